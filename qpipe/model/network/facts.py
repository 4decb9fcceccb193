"""What later stages have to know of a network, beside its graph and its grids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Spread:
    """How the outputs of a layer are distributed by the normalization that was folded into it: per channel (C,), the
    mean `beta` and, but for the sign, the standard deviation `gamma`."""

    gamma: Vector
    beta: Vector


@dataclass(frozen=True)
class Library:
    """A library of custom operators: the SHA-256 of its bytes, and where it lies, if that is known. A packed model says
    the first alone: neither does its content depend on a place, nor does code come with it."""

    sha256: str
    path: Path | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Facts:
    """`biases`: whether quantized layers have int32 biases or keep float ones. `came_quantized`: whether the grids came
    with the model, so that its weights stay where they are. `statistics`: the Spread of a layer's output, by its name.
    `tied`: names under which torch knows a parameter besides its own: that name -> the initializer's. `custom_ops`: the
    libraries without which onnxruntime does not know all operators. `on_codes`: the operators (bounds, moves) that a
    file has on codes where both roundings around them are on one grid.
    """

    biases: Literal["int32", "float"] = "int32"
    came_quantized: bool = False
    statistics: Mapping[str, Spread] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    custom_ops: tuple[Library, ...] = ()
    on_codes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.biases not in ("int32", "float"):
            raise ValueError(f"biases are int32 or float, got {self.biases!r}.")

    def to_json(self) -> dict[str, Any]:
        """What differs from the defaults, under the names that a packed model has it."""
        spreads = {
            name: {"gamma": spread.gamma.tolist(), "beta": spread.beta.tolist()}
            for name, spread in self.statistics.items()
        }
        found: dict[str, Any] = {
            _BIASES: self.biases, _CAME: self.came_quantized, _STATISTICS: spreads, _TIED: dict(self.tied),
            _CUSTOM_OPS: [library.sha256 for library in self.custom_ops], _ON_CODES: list(self.on_codes),
        }  # fmt: skip
        return {name: value for name, value in found.items() if value and value != "int32"}


NAMES = ("biases", "quantized_source", "folded_statistics", "tied", "custom_ops", "on_codes")
_BIASES, _CAME, _STATISTICS, _TIED, _CUSTOM_OPS, _ON_CODES = NAMES


def facts_from(packed: Mapping[str, Any]) -> Facts:
    """The facts that stand among the entries of a packed model's metadata."""
    statistics = {
        name: Spread(np.array(spread["gamma"], np.float64), np.array(spread["beta"], np.float64))
        for name, spread in packed.get(_STATISTICS, {}).items()
    }
    return Facts(
        packed.get(_BIASES, "int32"),
        bool(packed.get(_CAME, False)),
        statistics,
        dict(packed.get(_TIED, {})),
        tuple(Library(str(sha256)) for sha256 in packed.get(_CUSTOM_OPS, ())),
        tuple(packed.get(_ON_CODES, ())),
    )
