"""What of a value counts where all that reads it picks or cuts off: the largest of a window, a Relu, a Softmax.

Masks write a finite number for minus infinity, -1e4, -1e9 or the lowest of the type, by a Pad, a Where or an Add. Such
a stand-in must not take the range of the value that it stands in: it is there to lose.

    v -> ReduceMax -> r                  what lies outside the range of r, r never is
    v -> Mul(v, 0.5) -> t -> MaxPool     the range that counts of t, halved back
    v -> Sigmoid                         beyond +-12 nothing changes any more in 16 bits
    v -> Add(v, mask) -> … -> Softmax    a decision: the sum and all on the way stay in float, `float_parts.decided`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from qpipe.model.network.invariants import constant_tensor
from qpipe.model.structure.families import MOVING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Link:
    """What one reader says of a value v: that it counts from `low` to `high`, and down to `depth` below its largest;
    or, with `other`, where `factor` * v + `shift` is in the range that counts of that value. There `slope` is a second
    factor, for what comes out negative (LeakyRelu, PRelu)."""

    other: str = ""
    factor: float = 1.0
    shift: float = 0.0
    slope: float = 1.0
    low: float = -math.inf
    high: float = math.inf
    depth: float = math.inf

    @property
    def same(self) -> bool:
        """Whether the numbers of `other` are those of v."""
        return bool(self.other) and (self.factor, self.shift, self.slope) == (1.0, 0.0, 1.0)

    def ends(self, largest: float) -> tuple[float, float]:
        """The range of v, whose largest element that is, without `other`."""
        return (max(self.low, largest - self.depth) if largest < math.inf else self.low), self.high

    def back(self, low: float, high: float) -> tuple[float, float]:
        """The range of v, for that of `other`."""
        ends = [((end / self.slope if end < 0 else end) - self.shift) / self.factor for end in (low, high)]
        return min(ends), max(ends)


Links = tuple[Link, ...]

ONE_OF_MANY = frozenset({"MaxPool", "GlobalMaxPool", "ReduceMax", "ReduceMin"})
MOVES = MOVING | {"Pad", "Concat", "Dropout"}
_SATURATED = {
    "Relu": Link(low=0.0),
    "Sigmoid": Link(low=-12.0, high=12.0),
    "Tanh": Link(low=-6.0, high=6.0),
    "Erf": Link(low=-3.5, high=3.5),
    "Softplus": Link(low=-12.0),
    "Exp": Link(depth=12.0),
}
"""Beyond these inputs the output changes by less than a step of 16 bits: 2^-17 of its range."""


def survivals(graph: ir.Graph, data: set[ir.Value]) -> dict[str, Links]:
    """The activations of which not everything counts, by name, with what their readers say; `data` are all."""
    found: dict[str, Links] = {}
    for value in reversed([*graph.inputs, *(output for node in graph for output in node.outputs)]):
        if value not in data or value.is_graph_output():
            continue
        links = [_links(node, value, data, found) for node in dict.fromkeys(value.consumers())]
        if links and all(links):
            found[str(value.name)] = tuple(link for several in links for link in several)
    return found


def _links(node: ir.Node, value: ir.Value, data: set[ir.Value], known: Container[str]) -> list[Link]:
    """What `node` says of `value`, which it reads; nothing where all of it counts."""
    op, out = node.op_type, str(node.outputs[0].name)
    others = [v for v in node.inputs if v is not None and v is not value]
    if op in ONE_OF_MANY or (op in ("Max", "Min") and any(v in data for v in others)):
        return [Link(out)]
    if op in MOVES:
        read = [str(v.name) for v in node.outputs if v.consumers() or v.is_graph_output()]
        return [Link(name) for name in read] if all(name in known for name in read) else []
    if op in _SATURATED:
        return [_SATURATED[op]]
    if op in ("Max", "Min", "Clip"):
        return _bounded(node, value)
    line = _line(node, value) if out in known and list(node.inputs).count(value) == 1 else None
    return [line] if line is not None else []


def _bounded(node: ir.Node, value: ir.Value) -> list[Link]:
    """A Clip, or a Max or Min with one number."""
    if node.op_type == "Clip":
        ends = [_number(v) for v in (*node.inputs[1:], None, None)[:2]]
        low, high = (None if node.inputs[0] is not value else end for end in ends)
    else:
        others = [_number(v) for v in node.inputs if v is not value]
        number = others[0] if len(others) == 1 else None
        low, high = (number, None) if node.op_type == "Max" else (None, number)
    if low is None and high is None:
        return []
    return [Link(low=-math.inf if low is None else low, high=math.inf if high is None else high)]


def _line(node: ir.Node, value: ir.Value) -> Link | None:
    """A node whose output is a straight line of `value`, or two of them that meet at 0."""
    op, out = node.op_type, str(node.outputs[0].name)
    if op == "Neg":
        return Link(out, factor=-1.0)
    if op in ("LeakyRelu", "PRelu"):
        slope = _slope(node)
        return Link(out, slope=slope) if slope > 0 else None
    first = bool(node.inputs) and node.inputs[0] is value
    number = _number(next((v for v in node.inputs if v is not value), None))
    if number is None or op not in ("Mul", "Div", "Add", "Sub"):
        return None
    if op == "Add":
        return Link(out, shift=number)
    if op == "Sub":
        return Link(out, shift=-number) if first else Link(out, factor=-1.0, shift=number)
    if number == 0 or (op == "Div" and not first):
        return None
    return Link(out, factor=number if op == "Mul" else 1.0 / number)


def _slope(node: ir.Node) -> float:
    """The factor of what is negative, the least of all channels'; 0 where it is computed."""
    if node.op_type == "LeakyRelu":
        return float(node.attributes.get_float("alpha", 0.01))
    slopes = constant_tensor(node.inputs[1])
    return 0.0 if slopes is None else float(slopes.numpy().min())


def _number(value: ir.Value | None) -> float | None:
    """The one number that `value` always is."""
    tensor = constant_tensor(value)
    return None if tensor is None or tensor.size != 1 else float(tensor.numpy().reshape(-1)[0])


class Survivors:
    """Takes the values of one batch as they come, and calls `count(name, elements)` with what counts of each.

    A value of which not everything counts is held until those that say what does are there. What a reader cuts off is
    counted at the bound; what it passes over is not, but for one element at each end that has any beyond."""

    def __init__(self, survives: Mapping[str, Links], count: Callable[[str, Tensor], object]) -> None:
        self._survives, self._count = survives, count
        self._asked = {link.other for links in survives.values() for link in links if link.other}
        self._waiting: dict[str, Tensor] = {}
        self._ranges: dict[str, tuple[float, float]] = {}
        """Of those that are asked: what counts of them."""

    def see(self, name: str, value: Tensor) -> None:
        """Takes the value `name`."""
        if name not in self._survives or not value.numel():
            self._take(name, value)
        else:
            self._waiting[name] = value
        while ready := [n for n in self._waiting if all(o in self._ranges for o in self._others(n))]:
            for each in ready:
                self._take(each, self._reduced(each, self._waiting.pop(each)))

    def _others(self, name: str) -> list[str]:
        return [link.other for link in self._survives[name] if link.other]

    def _take(self, name: str, elements: Tensor) -> None:
        self._count(name, elements)
        if name in self._asked:
            some = elements.numel() > 0
            ends = (elements.min().item(), elements.max().item()) if some else (math.inf, -math.inf)
            self._ranges[name] = ends

    def _reduced(self, name: str, value: Tensor) -> Tensor:
        """What counts of `value`: what any of its readers needs."""
        import torch

        links, largest = self._survives[name], value.max().item()
        ends = [
            link.back(*self._ranges[link.other]) if link.other else link.ends(largest) for link in links
        ]
        low, high = min(low for low, _ in ends), max(high for _, high in ends)
        if not all(link.other for link in links):
            return value.clamp(low, high)
        below, above = value < low, value > high  # a nan is neither: it counts, and is refused
        beyond = [end for end, some in ((low, below), (high, above)) if some.any()]
        return torch.cat([value[~(below | above)], value.new_tensor(beyond)])
