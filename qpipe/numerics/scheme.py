"""What kind of grid a tensor gets, before any data is seen: bitwidth, sign, symmetry, granularity, observer.

Light on purpose: dataclasses, typing and re only, so that a stage's signature can name them without loading
numpy. A grid itself, with its scale and zero point, is `qpipe.numerics.grid.Encoding`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

Observer = Literal["auto", "minmax", "moving_average", "percentile", "sqnr", "mse", "entropy"]
"""How a range is found: `auto` is mse up to `LOW_BITWIDTH` bits and minmax above (docs/grids.md)."""
Grid = Literal["auto", "max", "full_range", "signed_max"]
"""Where a symmetric signed grid puts the largest magnitude of a weight: at qmax (max), at -qmin whatever its sign, so
that a positive one is cut off by a step (full_range), or at qmin with its own sign, the codes mirrored where it is
positive (signed_max). `auto` is signed_max up to `LOW_BITWIDTH` bits where the target takes that, else max."""
Granularity = Literal["auto", "per_tensor", "per_channel", "per_block"]
"""How many scales a weight has: `auto` is per channel where the target takes that, else per tensor."""

BITWIDTHS: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8, 16)
"""The bitwidths that weights and activations can have; a bias is always int32."""
LOW_BITWIDTH = 4
"""Up to here a code more, and what is cut off, decide: the defaults differ."""


@dataclass(frozen=True)
class TensorScheme:
    """The grid one class of tensors gets.

    `symmetric` puts zero in the middle of the codes; together with `signed=False` it means codes from 0 up
    for data that is never negative, and a zero point in the middle otherwise. `block_size` counts the
    elements along the blocked axis that share a scale and is 0 unless `granularity` is per_block.
    `percentile`, in percent, is read by the percentile observer alone. `power_of_two` restricts scales to
    powers of two. `grid` is that of symmetric signed weights; others have no choice, and `auto` or `max`. Raises
    ValueError, one sentence, for a combination that has no meaning.
    """

    bitwidth: int
    signed: bool
    symmetric: bool
    granularity: Granularity = "per_tensor"
    block_size: int = 0
    observer: Observer = "auto"
    percentile: float = 99.99
    power_of_two: bool = False
    grid: Grid = "auto"

    def __post_init__(self) -> None:
        if self.bitwidth not in BITWIDTHS:
            raise ValueError(_one_of("bitwidth", self.bitwidth, BITWIDTHS))
        if self.granularity not in get_args(Granularity):
            raise ValueError(_one_of("granularity", self.granularity, get_args(Granularity)))
        if self.observer not in get_args(Observer):
            raise ValueError(_one_of("observer", self.observer, get_args(Observer)))
        if self.granularity == "per_block" and self.block_size < 1:
            raise ValueError(f"per_block needs a block_size of at least 1, got {self.block_size}.")
        if self.granularity != "per_block" and self.block_size != 0:
            raise ValueError(f"block_size is for per_block, got {self.block_size} with {self.granularity}.")
        if not 50.0 < self.percentile <= 100.0:
            raise ValueError(f"percentile must lie above 50 and be at most 100, got {self.percentile}.")
        if self.grid not in get_args(Grid):
            raise ValueError(_one_of("grid", self.grid, get_args(Grid)))
        if self.grid in ("full_range", "signed_max") and not (self.signed and self.symmetric):
            raise ValueError(f"grid {self.grid} is for signed symmetric codes; set grid to auto or max.")

    def settled(self) -> TensorScheme:
        """The scheme of a weight with the observer and the grid that `auto` stands for, where no target objects."""
        low = self.bitwidth <= LOW_BITWIDTH
        mirrored = low and self.signed and self.symmetric
        observer = ("mse" if low else "minmax") if self.observer == "auto" else self.observer
        grid = ("signed_max" if mirrored else "max") if self.grid == "auto" else self.grid
        return replace(self, observer=observer, grid=grid)


@dataclass(frozen=True)
class TensorChange:
    """What is different about some tensors of a class; a field that is left out stays as the scheme has it."""

    bitwidth: int | None = None
    signed: bool | None = None
    symmetric: bool | None = None
    granularity: Granularity | None = None
    block_size: int | None = None
    observer: Observer | None = None
    percentile: float | None = None
    power_of_two: bool | None = None
    grid: Grid | None = None

    def applied(self, scheme: TensorScheme) -> TensorScheme:
        """`scheme` with the changes. Raises ValueError for a combination that has no meaning."""
        changes = {each.name: getattr(self, each.name) for each in fields(self)}
        if changes["granularity"] not in (None, "per_block", scheme.granularity):
            changes["block_size"] = changes["block_size"] or 0
        return replace(scheme, **{name: value for name, value in changes.items() if value is not None})


@dataclass(frozen=True)
class Override:
    """Other grids for a part of the model.

    `nodes` are filters as in `target.nodes`: their weights get the changes of `weight`, the values that they
    read those of `activation`. A name that matches a weight or an activation means that one alone.
    """

    nodes: tuple[str, ...]
    weight: TensorChange | None = None
    activation: TensorChange | None = None

    def __post_init__(self) -> None:
        if not self.nodes:
            raise ValueError("an override names no nodes.")
        if self.weight is None and self.activation is None:
            raise ValueError(f"the override of {', '.join(self.nodes)} changes neither weight nor activation.")


@dataclass(frozen=True)
class Scheme:
    """The grids of a whole model, weights and activations; `activation` None quantizes weights only.

    `overrides` change them for parts of the model, one after the other: the last one that matches wins. A bias
    is always int32 with scale s_x * s_w, or stays float where the activation in front has no grid.
    """

    weight: TensorScheme
    activation: TensorScheme | None
    name: str = ""
    overrides: tuple[Override, ...] = ()

    def __post_init__(self) -> None:
        if self.activation is not None and self.activation.granularity != "per_tensor":
            raise ValueError(f"activations are quantized per_tensor, got {self.activation.granularity}.")
        if self.weight.observer == "moving_average":
            raise ValueError("observer moving_average follows batches of activations, got it for weights.")
        if self.activation is not None and self.activation.grid not in ("auto", "max"):
            raise ValueError(f"grid {self.activation.grid} is for weights, got it for activations.")
        for override in self.overrides:
            self.overridden(override)

    def overridden(self, override: Override) -> Scheme:
        """The scheme of the tensors that `override` matches. Raises ValueError for one that has no meaning."""
        weight, activation = self.weight, self.activation
        if override.weight is not None:
            weight = override.weight.applied(weight)
        if override.activation is not None:
            if activation is None:
                raise ValueError("an override changes activations, which the scheme leaves in float.")
            activation = override.activation.applied(activation)
        return Scheme(weight, activation, self.name)


def with_granularity(scheme: Scheme, granularity: Granularity | None) -> Scheme:
    """`scheme` with the granularity of weights, where it is given; ValueError where its weights cannot have it."""
    return replace(scheme, weight=TensorChange(granularity=granularity).applied(scheme.weight))


def with_observers(scheme: Scheme, choice: Mapping[str, Any]) -> Scheme:
    """`scheme` with the observers that `choice` names: `weight_observer`, `weight_percentile`, and so for
    activations; `weights` has changes of single weights, by name. What it does not name stays."""
    weight = _with_observer(scheme.weight, choice, "weight")
    activation = scheme.activation and _with_observer(scheme.activation, choice, "activation")
    own = (
        Override((f"value:{re.escape(name)}",), TensorChange(**changes))
        for name, changes in sorted(choice.get("weights", {}).items())
    )
    return replace(scheme, weight=weight, activation=activation, overrides=(*scheme.overrides, *own))


def _with_observer(scheme: TensorScheme, choice: Mapping[str, Any], side: str) -> TensorScheme:
    observer = choice.get(f"{side}_observer")
    if observer is None:
        return scheme
    percentile = choice.get(f"{side}_percentile") or scheme.percentile
    return replace(scheme, observer=observer, percentile=percentile)


def code_bounds(bitwidth: int, signed: bool) -> tuple[int, int]:
    """The smallest and the largest integer code: (-128, 127) for 8 bits signed, (0, 255) unsigned."""
    if signed:
        return -(1 << (bitwidth - 1)), (1 << (bitwidth - 1)) - 1
    return 0, (1 << bitwidth) - 1


def _one_of(what: str, value: object, allowed: tuple[object, ...]) -> str:
    return f"{what} must be one of {', '.join(map(str, allowed))}, got {value}."
