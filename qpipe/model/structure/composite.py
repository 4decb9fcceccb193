"""Functions written out as several nodes: Gelu, HardSwish, Swish, RMS norm, layer norm and their like.

Inside one the values have ranges that 8 bits cannot hold (x^2, a variance plus 1e-6), so no quantizer belongs
there. Such a function is found from an operator that marks it (Erf, Sigmoid, Sqrt, …): downstream of that the
first product or quotient of two data values closes the function; from there, back to the one value that every
path starts at, lies its inside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from qpipe.model.network.invariants import constant_tensor

_INSIDE = frozenset(
    {"Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Reciprocal", "Exp", "Log", "Neg", "Abs", "Erf", "Tanh"}
    | {"Sigmoid", "HardSigmoid", "Softplus", "Clip", "Relu", "Min", "Max", "ReduceMean", "ReduceSum", "Cast"}
)
_NORMS = frozenset({"Sqrt", "Reciprocal"})
_LONGEST = 16


@dataclass(frozen=True)
class Composite:
    """The nodes of one function; `root` goes in, `result` comes out."""

    nodes: frozenset[ir.Node]
    root: ir.Value
    result: ir.Value


def find_composites(graph: ir.Graph, data: set[ir.Value], marks: tuple[str, ...]) -> list[Composite]:
    """The functions of `graph` that the operators `marks` belong to; `data` are its activations."""
    place = {node: i for i, node in enumerate(graph)}
    found: dict[ir.Value, Composite] = {}
    for node in graph:
        if node.op_type not in marks or node.outputs[0] not in data:
            continue
        join = _join(node, data)
        made = None if join is None else _composite(join, data, place, node.op_type in _NORMS)
        if made is not None and node in made.nodes:
            known = found.get(made.result)
            if known is None or len(known.nodes) < len(made.nodes):
                found[made.result] = made
    return list(found.values())


def only_consumer(value: ir.Value) -> ir.Node | None:
    """The one node that reads `value`, once or more often; None where several do, or the caller."""
    consumers = set(value.consumers())
    return None if value.is_graph_output() or len(consumers) != 1 else next(iter(consumers))


def data_inputs(node: ir.Node, data: set[ir.Value]) -> list[ir.Value]:
    """The activations that `node` reads, each once, in order."""
    return list(dict.fromkeys(value for value in node.inputs if value is not None and value in data))


def _join(node: ir.Node, data: set[ir.Value]) -> ir.Node | None:
    """The first product or quotient of two activations downstream of `node`, with nothing else on the way."""
    for _ in range(_LONGEST):
        following = only_consumer(node.outputs[0])
        if following is None or following.op_type not in _INSIDE:
            return None
        if len(data_inputs(following, data)) > 1:
            return following if following.op_type in ("Mul", "Div") else None
        node = following
    return None


def _composite(
    join: ir.Node, data: set[ir.Value], place: Mapping[ir.Node, int], norm: bool
) -> Composite | None:
    """Grows back from `join`, always at the latest open value, until one is left."""
    nodes, frontier = {join}, set(data_inputs(join, data))
    while len(frontier) > 1:
        latest = max(frontier, key=lambda value: _place(value, place))
        producer = latest.producer()
        if producer is None or producer.op_type not in _INSIDE or len(nodes) > _LONGEST:
            return None
        nodes.add(producer)
        frontier.remove(latest)
        frontier.update(data_inputs(producer, data))
    if not frontier:
        return None
    root = frontier.pop()
    if norm:
        root = _centred(root, nodes, data)
    result = _trailing(join, nodes, data, norm)
    inside = {node.outputs[0] for node in nodes} - {result}
    leaks = any(value.is_graph_output() or set(value.consumers()) - nodes for value in inside)
    return None if leaks else Composite(frozenset(nodes), root, result)


def _place(value: ir.Value, place: Mapping[ir.Node, int]) -> int:
    producer = value.producer()
    return -1 if producer is None else place[producer]


def _centred(root: ir.Value, nodes: set[ir.Node], data: set[ir.Value]) -> ir.Value:
    """A layer norm subtracts the mean first: x, where the root is x - mean(x)."""
    sub = root.producer()
    if sub is None or sub.op_type != "Sub" or len(data_inputs(sub, data)) != 2:
        return root
    x, mean = data_inputs(sub, data)
    reduce = mean.producer()
    if reduce is None or reduce.op_type != "ReduceMean" or reduce.inputs[0] is not x:
        return root
    nodes.update({sub, reduce})
    return x


def _trailing(join: ir.Node, nodes: set[ir.Node], data: set[ir.Value], norm: bool) -> ir.Value:
    """What the constants after `join` make of it: 0.5 * for a Gelu, weight and bias for a norm."""
    result = join.outputs[0]
    allowed = ("Mul", "Add") if norm else ("Mul", "Div")
    for _ in range(2 if norm else 1):
        after = only_consumer(result)
        if after is None or after.op_type not in allowed or len(data_inputs(after, data)) != 1:
            break
        other = next((value for value in after.inputs if value is not None and value is not result), None)
        factor = constant_tensor(other)
        if factor is None or (not norm and factor.size != 1):
            break
        nodes.add(after)
        result = after.outputs[0]
    return result
