"""What of a value survives where all that reads it picks: the largest of a window or of two, the likeliest of a row.

Masks write a finite number for minus infinity, -1e4, -1e9 or the lowest of the type, by a Pad, a Where or an Add. Such
a stand-in must not take the range of the value that it stands in: it is there to lose.

    v -> ReduceMax -> r                  what lies outside the range of r, r never is: v is clamped to it
    v -> Mul(v, 0.5) -> t -> MaxPool     v where t survives: an operator that keeps the order keeps who wins
    v -> Add(v, mask) -> … -> Softmax    a decision: the sum and all on the way stay in float, `decided`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from typing import TYPE_CHECKING

import onnx_ir as ir

from qpipe.model.network.invariants import constant_tensor
from qpipe.model.structure.families import MOVING

if TYPE_CHECKING:
    from torch import Tensor

Links = tuple[tuple[str, bool], ...]
"""The values that say what survives of another one: each by its range, or, if True, place by place."""

_ONE_OF_MANY = frozenset({"MaxPool", "GlobalMaxPool", "ReduceMax", "ReduceMin"})
_MOVES = MOVING | {"Pad", "Concat"}
_IN_ORDER = frozenset(
    {"Mul", "Div", "Add", "Sub", "Max", "Min", "Clip", "Relu", "LeakyRelu", "Elu", "Selu", "Celu", "Sigmoid"}
    | {"HardSigmoid", "Tanh", "Softplus", "Softsign", "Exp", "Log", "Sqrt", "Erf", "Identity", "Dropout"}
)
"""Operators whose output is in the order of their input, or in the opposite one, the other operand being one number."""
_STARTS = frozenset({"Add", "Sub", "Where"})
_ON_THE_WAY = _STARTS | _ONE_OF_MANY | _MOVES | {"Mul", "Div", "Max", "Min", "Clip", "Cast"}
_DECISIONS = frozenset(
    {"Softmax", "LogSoftmax", "Hardmax", "ReduceLogSumExp", "ArgMax", "ArgMin", "TopK"}
    | {"Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal"}
)


def decided(graph: ir.Graph, share: Container[str]) -> set[ir.Node]:
    """The nodes that stay in float because all that they give ends in a decision: sums and masks, what is made of
    them on the way, and what only moves values (`share`) to them."""
    nodes, leading = list(graph), set[ir.Node]()
    for node in reversed(nodes):
        readers = _readers(node)
        if node.op_type in _ON_THE_WAY and readers and all(r.op_type in _DECISIONS or r in leading for r in readers):
            leading.add(node)
    found: set[ir.Node] = set()
    for node in nodes:
        before = {value.producer() for value in node.inputs if value is not None}
        if node in leading and (node.op_type in _STARTS or before & found):
            found.add(node)
    for node in reversed(nodes):
        if node in leading and node.op_type in share and _readers(node) & found:
            found.add(node)
    return found


def survivals(graph: ir.Graph, data: set[ir.Value]) -> dict[str, Links]:
    """The activations of which not everything survives, by name, with those that say what does; `data` are all."""
    found: dict[str, Links] = {}
    for value in reversed([*graph.inputs, *(output for node in graph for output in node.outputs)]):
        if value not in data or value.is_graph_output():
            continue
        links = [_links(node, value, data, found) for node in dict.fromkeys(value.consumers())]
        if links and all(links):
            found[str(value.name)] = tuple(link for several in links for link in several)
    return found


def _readers(node: ir.Node) -> set[ir.Node]:
    return {reader for output in node.outputs for reader in output.consumers()}


def _links(node: ir.Node, value: ir.Value, data: set[ir.Value], known: Container[str]) -> list[tuple[str, bool]]:
    """What `node` says of `value`, which it reads; nothing where all of it counts."""
    op, out = node.op_type, str(node.outputs[0].name)
    others = [v for v in node.inputs if v is not None and v is not value]
    several = any(v in data for v in others)
    if op in _ONE_OF_MANY or (op in ("Max", "Min") and several):
        return [(out, False)]
    if op in _MOVES:
        read = [str(v.name) for v in node.outputs if v.consumers() or v.is_graph_output()]
        return [(name, False) for name in read] if all(name in known for name in read) else []
    if op not in _IN_ORDER or out not in known or list(node.inputs).count(value) > 1:
        return []
    numbers = all((tensor := constant_tensor(v)) is not None and tensor.size == 1 for v in others)
    return [(out, True)] if numbers and not (op == "Div" and node.inputs[0] is not value) else []


class Survivors:
    """Takes the values of one batch as they come, and calls `count(name, elements)` with what survives of each.

    A value of which not everything survives is held until those that say what does are there."""

    def __init__(self, survives: Mapping[str, Links], count: Callable[[str, Tensor], object]) -> None:
        self._survives, self._count = survives, count
        self._asked = {other for links in survives.values() for other, _ in links}
        self._waiting: dict[str, Tensor] = {}
        self._kept: dict[str, tuple[float, float, Tensor | None]] = {}
        """Of those that are asked: the ends of what survives, and its places, None for all."""

    def see(self, name: str, value: Tensor) -> None:
        """Takes the value `name`."""
        if name in self._survives:
            self._waiting[name] = value
            return
        self._count(name, value)
        self._say(name, value, None)
        while ready := [n for n in self._waiting if all(o in self._kept for o, _ in self._survives[n])]:
            for name in ready:
                value = self._waiting.pop(name)
                places = self._places(name, value)
                self._count(name, value[places])
                self._say(name, value[places], places)

    def _say(self, name: str, elements: Tensor, places: Tensor | None) -> None:
        if name in self._asked:
            ends = (elements.min().item(), elements.max().item()) if elements.numel() else (math.inf, -math.inf)
            self._kept[name] = *ends, places

    def _places(self, name: str, value: Tensor) -> Tensor:
        """Where `value` survives: where one of its readers needs it."""
        found = value != value  # a nan counts, and is refused
        for other, by_place in self._survives[name]:
            low, high, places = self._kept[other]
            if not by_place:
                found = found | ((value >= low) & (value <= high))
            elif places is not None and places.shape == value.shape:
                found = found | places
            else:
                return found | ~found
        return found
