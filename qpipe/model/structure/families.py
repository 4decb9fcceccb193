"""Families of operators and of types that several rooms ask about, and of whatever else must go together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

import onnx_ir as ir

T = TypeVar("T")

MOVING = frozenset(
    {"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "Expand", "Tile"}
    | {"DepthToSpace", "SpaceToDepth", "Identity", "MaxPool", "GlobalMaxPool"}
)
"""Their outputs hold values of their first input: on the same grid a second quantizer is redundant."""

ON_CODES = (MOVING - {"Identity", "MaxPool", "GlobalMaxPool"}) | {"Pad"}
"""Of what moves values: what onnxruntime's CPU has for codes of 8 bits, unsigned ones."""

RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
"""Their outputs are drawn anew in each run."""

WIDE_UNSIGNED = frozenset({ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64})


class Joined(Generic[T]):
    """Things that must go together: whatever is joined, directly or by way of others, has one leader. A thing that was
    joined to no other leads itself.

    Not networkx's UnionFind: the stages that place quantizers would load networkx for it alone (0.2 s), and its version
    would be in their keys.
    """

    def __init__(self) -> None:
        self._above: dict[T, T] = {}

    def leader(self, thing: T) -> T:
        """The one that is the same for all that were joined with `thing`."""
        while (above := self._above.get(thing, thing)) != thing:
            self._above[thing] = self._above.get(above, above)  # the way gets shorter each time
            thing = above
        return thing

    def join(self, first: T, others: Iterable[T]) -> None:
        """Put `others` under the leader of `first`."""
        for other in others:
            self._above[self.leader(other)] = self.leader(first)
