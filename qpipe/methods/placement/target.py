"""What an inference engine quantizes: which operators, which of their values, which values share a grid, and
what it forbids.

Light on purpose: dataclasses of plain JSON types, so that a YAML mapping (`conf/target/*.yaml`) builds one.
`qpipe.methods.placement.placement` reads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from qpipe.errors import InputError
from qpipe.numerics.scheme import Granularity, Grid, Scheme, TensorScheme

KINDS = ("name", "value", "type", "scope", "between")
"""What a node filter can go by: `kind:text`; without a kind the text is a regular expression of names."""


@dataclass(frozen=True)
class OpRule:
    """Which values of an operator have a grid.

    `inputs` are the positions of the data inputs that are quantized, all of them where None; initializers are
    weights or constants and never count. `outputs` says whether the outputs are quantized.
    """

    inputs: tuple[int, ...] | None = None
    outputs: bool = True


@dataclass(frozen=True)
class Nodes:
    """Which part of a model is quantized: `exclude` stays in float; with `only`, all else does.

    - `name:conv[12]` or `conv[12]`: a regular expression for whole names of nodes and values;
    - `value:conv1_w`: the same for values alone, which are activations and weights;
    - `type:Softmax`: an operator;
    - `scope:encoder.layer.0`: the nodes of a torch module and those below it;
    - `between:a..b`: the nodes that follow from value `a` and that value `b` needs; one side may be empty.

    Raises ValueError for an expression that is none.
    """

    exclude: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for side in ("exclude", "only"):
            check_filters(getattr(self, side), f"nodes.{side}")


def split(text: str) -> tuple[str, str]:
    """The kind of a node filter, and the rest of it; `name` where none is said."""
    kind, colon, rest = text.partition(":")
    return (kind, rest) if colon and kind in KINDS else ("name", text)


def check_filters(filters: Iterable[str], address: str) -> None:
    """Raises ValueError, with the `address`, for a node filter that cannot be read."""
    for text in filters:
        kind, pattern = split(text)
        if kind == "between" and pattern.count("..") != 1:
            raise ValueError(f"{address}: {text!r} must be between:first..last, with names of values.")
        try:
            re.compile(pattern if kind in ("name", "value") else "")
        except re.error as error:
            raise ValueError(f"{address}: {text!r} is no regular expression: {error}.") from error


@dataclass(frozen=True)
class Limits:
    """What an engine takes for one class of tensors; a field that is left out admits everything."""

    bitwidths: tuple[int, ...] = ()
    signed: bool | None = None
    symmetric: bool | None = None
    power_of_two: bool | None = None
    granularities: tuple[Granularity, ...] = ()
    grids: tuple[Grid, ...] = ()

    def broken(self, scheme: TensorScheme) -> str | None:
        """What of `scheme` is not admitted, and what would be, in a clause; None where all is."""
        if self.bitwidths and scheme.bitwidth not in self.bitwidths:
            return f"{' or '.join(map(str, self.bitwidths))} bits, not {scheme.bitwidth}"
        if self.signed not in (None, scheme.signed):
            return "signed codes, not unsigned ones" if self.signed else "unsigned codes, not signed ones"
        if self.symmetric not in (None, scheme.symmetric):
            return (
                "symmetric grids, not asymmetric ones"
                if self.symmetric
                else "asymmetric grids, not symmetric ones"
            )
        if self.power_of_two not in (None, scheme.power_of_two):
            return "scales that are powers of two, not free ones" if self.power_of_two else "free scales"
        if self.granularities and self.settled(scheme).granularity not in self.granularities:
            return f"{' or '.join(self.granularities)} scales, not {scheme.granularity}"
        if self.grids and self.settled(scheme).grid not in self.grids:
            return f"grid {' or '.join(self.grids)}, not {scheme.grid}"
        return None

    def settled(self, scheme: TensorScheme) -> TensorScheme:
        """`scheme` with what `auto` stands for: per channel, and mirrored codes at few bits, where that is admitted."""
        if scheme.granularity == "auto":
            per_channel = not self.granularities or "per_channel" in self.granularities
            scheme = replace(scheme, granularity="per_channel" if per_channel else "per_tensor")
        if scheme.grid == "auto" and self.grids and "signed_max" not in self.grids:
            scheme = replace(scheme, grid="max")
        return scheme.settled()


@dataclass(frozen=True)
class Target:
    """The table of one inference engine. Operators that it does not name run in float.

    - `quantize`: operator -> rule;
    - `weights`: operators whose weight (an initializer, input 1) has a grid;
    - `bias`: their biases are int32 on the grid s_x * s_w, or stay float;
    - `one_channel`: operators whose layers of one input and one output channel stay in float: their integer kernels are
      slower;
    - `float_outputs`: layers whose kernels give floats: their outputs have a grid where a reader wants one, and what
      follows them has none where it meets no value that is on a grid;
    - `float_ends`: operators that join values, which stay in float where their result leaves the model: a place in a
      picture and a probability have no grid in common;
    - `float_sums`: normalizations; the sums that they alone read stay in float, where layers give floats;
    - `float_spectra`: operators up to which what is made of the model's input by fixed sums and powers stays in float;
    - `fused`: operator -> activations computed in the same kernel, so no quantizer stands between;
    - `share`: operators whose outputs are on the grid of their inputs, since they only move values;
    - `bound`: operators that cut values off, and Concat; one that alone reads its input puts it on the grid of its
      output, where what would be cut off saturates, and what is joined is rounded once;
    - `on_codes`: operators that a file has on codes between roundings on one grid of 8 bits: Min and Max, and those of
      `share` that move values; Sub, as the sum of codes under a negative scale; PRelu, as the sum of its two parts;
    - `constants`: operators (of two inputs) whose constant operand has a grid of its own, like that of an activation of
      8 bits;
    - `tables`: operators that look up values in a constant, whose table has such a grid, and they the same; with any,
      a table that is added in float (`float_sums`) is stored in 16 bits;
    - `softmax`: the grid of a Softmax's output: `fixed` at scale 2^-bitwidth with zero point qmin; `covering`, finer by
      powers of two as far as it holds what was seen; or `free`;
    - `composite`: operators that mark the inside of a function written out (Gelu, RMS norm, …), which runs in
      float between its input and its output;
    - `weight`, `activation`: what it takes of the scheme's weights and activations;
    - `activations`: whether the scheme must have activations (required), must not (none), or may;
    - `schemes`: names of shipped schemes that it takes, for the way out in messages;
    - `nodes`: which part of the model is quantized.
    """

    name: str
    quantize: dict[str, OpRule] = field(default_factory=dict)
    weights: tuple[str, ...] = ("Conv", "ConvTranspose", "Gemm", "MatMul")
    bias: Literal["int32", "float"] = "int32"
    one_channel: tuple[str, ...] = ()
    float_outputs: tuple[str, ...] = ()
    float_ends: tuple[str, ...] = ()
    float_sums: tuple[str, ...] = ()
    float_spectra: tuple[str, ...] = ()
    fused: dict[str, tuple[str, ...]] = field(default_factory=dict)
    share: tuple[str, ...] = ()
    bound: tuple[str, ...] = ()
    on_codes: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    softmax: Literal["fixed", "covering", "free"] = "fixed"
    composite: tuple[str, ...] = ()
    weight: Limits = Limits()
    activation: Limits = Limits()
    activations: Literal["required", "none", "optional"] = "optional"
    schemes: tuple[str, ...] = ()
    nodes: Nodes = Nodes()

    def __post_init__(self) -> None:
        if strange := sorted(set(self.on_codes) - {"Min", "Max", "Sub", "PRelu", *self.share}):
            raise ValueError(f"on_codes takes Min, Max, Sub, PRelu and what stands in share, got {', '.join(strange)}.")
        both = sorted(set(self.share) & set(self.quantize))
        if both:
            raise ValueError(f"{', '.join(both)} cannot stand in both quantize and share.")

    def check(self, scheme: Scheme) -> None:
        """Raises InputError, with the way out, for a scheme that this engine does not take, and ValueError for an
        override whose filters cannot be read."""
        for index, override in enumerate(scheme.overrides):
            check_filters(override.nodes, f"scheme.overrides[{index}].nodes")
            self.check(scheme.overridden(override))
        clause = None
        if scheme.activation is None and self.activations == "required":
            clause = "takes quantized activations, and the scheme{} has none"
        elif scheme.activation is not None and self.activations == "none":
            clause = "leaves activations in float, and the scheme{} quantizes them"
        else:
            for side, limits in (("weight", self.weight), ("activation", self.activation)):
                tensors = getattr(scheme, side)
                broken = limits.broken(tensors) if tensors is not None else None
                if broken is not None:
                    clause = f"takes {side}s with {broken}, as the scheme{{}} has"
                    break
        if clause is not None:
            named = f" '{scheme.name}'" if scheme.name else ""
            out = f" Use {' or '.join(f'scheme={name}' for name in self.schemes)}." if self.schemes else ""
            raise InputError(f"The target '{self.name}' {clause.format(named)}.{out}")
