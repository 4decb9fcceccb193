"""Rewrite rules for bounds: one way to write that a value is cut off.

    Max(x, 0)               Relu(x)                torch.clamp, as the exporter writes it, and relu as max
    Max(x, a), Min(x, b)    Clip(x, a), Clip(x, , b)
    two bounds in a row     one Clip               ReLU6 written as Relu and Min, or as clamp

Kernels, placement and equalization know Relu and Clip. Bounds that are parameters, or vectors, stay.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from qpipe.model.network.invariants import constant
from qpipe.model.network.rewriting import add_constant, replace

_Bounds = tuple[float, float]


def bound_as_clip(parameters: Collection[str], graph: ir.Graph, node: ir.Node) -> bool:
    """Max and Min of a float value and a number, and Clip from 0, in their usual form; what bounded the value
    before, and is read by nobody else, is taken in."""
    found = _bounds(node, parameters)
    if found is None or node.outputs[0].dtype != ir.DataType.FLOAT:
        return False
    source, (low, high) = found
    before = source.producer()
    inner = None if before is None or len(source.uses()) != 1 or source.is_graph_output() else before
    earlier = None if inner is None else _bounds(inner, parameters)
    if earlier is not None:
        source, (first, last) = earlier
        if max(first, low) <= min(last, high):  # else the order of the bounds decides
            low, high = max(first, low), min(last, high)
        else:
            earlier, source = None, found[0]
    if earlier is None and _usual(node, low, high):
        return False
    return replace(graph, node, _clip(graph, node, source, low, high))


def _bounds(node: ir.Node, parameters: Collection[str]) -> tuple[ir.Value, _Bounds] | None:
    """What `node` bounds, and between which numbers; None for another node and for bounds that are no numbers."""
    if node.domain or not node.inputs or node.inputs[0] is None:
        return None
    if node.op_type == "Relu":
        return node.inputs[0], (0.0, math.inf)
    if node.op_type == "Clip":
        low, high = _number(node, 1, parameters, -math.inf), _number(node, 2, parameters, math.inf)
        return None if low is None or high is None else (node.inputs[0], (low, high))
    if node.op_type not in ("Max", "Min") or len(node.inputs) != 2:
        return None
    for index, other in ((1, 0), (0, 1)):
        source, number = node.inputs[other], _number(node, index, parameters)
        if (
            number is not None
            and source is not None
            and not source.is_initializer()
            and _keeps_rank(node, source)
        ):
            return source, (number, math.inf) if node.op_type == "Max" else (-math.inf, number)
    return None


def _number(
    node: ir.Node, index: int, parameters: Collection[str], absent: float | None = None
) -> float | None:
    """The one number at input `index`, `absent` where nothing is there; None for anything else."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return absent
    array = constant(node, index)
    known = array is not None and array.size == 1 and value.name not in parameters
    number = float(array.reshape(())) if known and array is not None else None
    return None if number is None or math.isnan(number) else number


def _keeps_rank(node: ir.Node, source: ir.Value) -> bool:
    """Whether the number does not add dimensions of size 1 to what it bounds."""
    before, after = source.shape, node.outputs[0].shape
    return before is not None and after is not None and len(before) == len(after)


def _usual(node: ir.Node, low: float, high: float) -> bool:
    """Whether the node is written as `_clip` writes it already."""
    return node.op_type == ("Relu" if (low, high) == (0.0, math.inf) else "Clip")


def _clip(graph: ir.Graph, node: ir.Node, source: ir.Value, low: float, high: float) -> ir.Node:
    if (low, high) == (0.0, math.inf):
        return ir.node("Relu", [source], name=node.name)
    inputs: list[ir.Value | None] = [source]
    for side, bound in (("min", low), ("max", high)):
        name = f"{node.outputs[0].name}_{side}"
        inputs.append(None if math.isinf(bound) else add_constant(graph, name, np.array(bound, np.float32)))
    while inputs[-1] is None:
        inputs.pop()
    return ir.node("Clip", inputs, name=node.name)
