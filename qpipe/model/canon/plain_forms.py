"""Rewrite rules of the canonical form that are no layer's: nodes that compute nothing, shapes that are known.

Each rule gets one node and says whether it changed the graph around it. None of them touches the value of a
parameter, merges initializers or fuses a BatchNormalization; none changes what the graph computes.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import onnx_ir as ir

from qpipe.model.network.invariants import constant, permutation
from qpipe.model.network.rewriting import add_constant, bypass, replace


def skip_nothing(graph: ir.Graph, node: ir.Node) -> bool:
    """A node that gives back its input goes; a model's output keeps its name."""
    value = node.inputs[0] if node.inputs else None
    return value is not None and not node.domain and _gives_back(node) and bypass(graph, node, value)


def _gives_back(node: ir.Node) -> bool:
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    op = node.op_type
    if op in ("Identity", "Dropout"):
        return op == "Identity" or _inference_dropout(node)
    if op in ("Concat", "Sum", "Mean", "Max", "Min"):
        return len(node.inputs) == 1
    if op == "Clip":
        return all(bound is None for bound in node.inputs[1:])
    if op == "Cast":
        return source.dtype is not None and source.dtype == node.attributes["to"].as_int()
    if op == "Transpose":
        perm = permutation(node)
        return perm is not None and perm == tuple(range(len(perm)))
    if op in ("Reshape", "Expand", "Flatten"):
        return _same_shape(source, output)
    if op == "Slice":
        steps = constant(node, 4)
        return _same_shape(source, output) and (
            len(node.inputs) < 5 or (steps is not None and bool(np.all(steps == 1)))
        )
    if op == "Pad":
        pads = constant(node, 1)
        return pads is not None and not pads.any()
    return False


def skip_neutral(parameters: Collection[str], graph: ir.Graph, node: ir.Node) -> bool:
    """Adding zeros or multiplying by ones goes, unless those are a parameter that may change."""
    if node.op_type not in ("Add", "Sub", "Mul", "Div") or node.domain:
        return False
    neutral = 0 if node.op_type in ("Add", "Sub") else 1
    for index in (1, 0) if node.op_type in ("Add", "Mul") else (1,):
        source, value, array = node.inputs[1 - index], node.inputs[index], constant(node, index)
        if source is None or value is None or array is None or value.name in parameters:
            continue
        if bool(np.all(array == neutral)) and _same_shape(source, node.outputs[0]):
            return bypass(graph, node, source)
    return False


def _inference_dropout(node: ir.Node) -> bool:
    training = constant(node, 2)
    off = len(node.inputs) < 3 or node.inputs[2] is None or (training is not None and not training.any())
    return off and not any(output.uses() or output.is_graph_output() for output in node.outputs[1:])


def cast_like_to_cast(graph: ir.Graph, node: ir.Node) -> bool:
    """CastLike whose pattern has a known type is a Cast."""
    if node.op_type != "CastLike" or node.inputs[1] is None or node.inputs[1].dtype is None:
        return False
    dtype = node.inputs[1].dtype
    attributes: dict[str, Any] = {"to": int(dtype)}
    if "saturate" in node.attributes:
        attributes["saturate"] = node.attributes["saturate"].as_int()
    cast = ir.node("Cast", [node.inputs[0]], attributes, name=node.name)
    return replace(graph, node, cast)


def known_shape(graph: ir.Graph, node: ir.Node) -> bool:
    """Shape of a value whose dimensions are numbers is a constant."""
    source = node.inputs[0] if node.inputs else None
    if node.op_type != "Shape" or source is None or source.shape is None:
        return False
    start = node.attributes.get_int("start", 0)
    end = node.attributes.get_int("end", len(source.shape))
    dims = list(source.shape)[start:end]
    if not all(isinstance(dim, int) for dim in dims) or node.outputs[0].is_graph_output():
        return False
    value = add_constant(graph, str(node.outputs[0].name), np.array(dims, dtype=np.int64))
    node.outputs[0].replace_all_uses_with(value)
    graph.remove(node, safe=True)
    return True


def known_dimension(graph: ir.Graph, node: ir.Node) -> bool:
    """Dimensions picked from the shape of a value that are numbers are a constant, whatever the others are."""
    source = node.inputs[0] if node.inputs and not node.domain else None
    shape = source.producer() if source is not None else None
    if shape is None or shape.op_type != "Shape" or shape.domain or node.outputs[0].is_graph_output():
        return False
    value = shape.inputs[0]
    if value is None or value.shape is None:
        return False
    begin, end = shape.attributes.get_int("start", 0), shape.attributes.get_int("end", len(value.shape))
    dims = list(value.shape)[begin:end]
    places = _picked(node, len(dims))
    if places is None or not all(isinstance(dims[place], int) for place in places.ravel()):
        return False
    sizes = np.array([dims[place] for place in places.ravel()], dtype=np.int64).reshape(places.shape)
    node.outputs[0].replace_all_uses_with(add_constant(graph, str(node.outputs[0].name), sizes))
    graph.remove(node, safe=True)
    return True


def _picked(node: ir.Node, count: int) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    """The places that a Gather or a Slice takes out of a row of `count` numbers."""
    places = np.arange(count)
    if node.op_type == "Gather":
        indices = constant(node, 1)
        outside = indices is None or ((indices >= count) | (indices < -count)).any()
        return None if outside else np.asarray(places[indices])
    if node.op_type != "Slice":
        return None
    starts, ends, steps = constant(node, 1), constant(node, 2), constant(node, 4)
    if starts is None or ends is None or (len(node.inputs) > 4 and node.inputs[4] is not None and steps is None):
        return None
    step = 1 if steps is None else int(steps.ravel()[0])
    start, end = int(starts.ravel()[0]), int(ends.ravel()[0])
    return places[start : None if step < 0 and end < -count else end : step]


def known_size(graph: ir.Graph, node: ir.Node) -> bool:
    """Size of a value whose dimensions are numbers is a constant."""
    source = node.inputs[0] if node.inputs else None
    if node.op_type != "Size" or source is None or source.shape is None or not source.shape.is_static():
        return False
    if node.outputs[0].is_graph_output():
        return False
    size = np.array(np.prod(source.shape.numpy(), dtype=np.int64), dtype=np.int64)
    node.outputs[0].replace_all_uses_with(add_constant(graph, str(node.outputs[0].name), size))
    graph.remove(node, safe=True)
    return True


def known_reshape(graph: ir.Graph, node: ir.Node) -> bool:
    """A computed target shape that leaves at most one dimension open is a constant with -1 there."""
    if node.op_type not in ("Reshape", "Expand") or node.inputs[1] is None or node.inputs[1].is_initializer():
        return False
    shape = node.outputs[0].shape
    if shape is None:
        return False
    target = [dim if isinstance(dim, int) else -1 for dim in shape]
    open_dims = target.count(-1)
    if 0 in target or open_dims > (1 if node.op_type == "Reshape" else 0):
        return False
    value = add_constant(graph, f"{node.outputs[0].name}_shape", np.array(target, dtype=np.int64))
    node.replace_input_with(1, value)
    node.attributes.pop("allowzero", None)
    return True


def merge_transposes(graph: ir.Graph, node: ir.Node) -> bool:
    """Transpose of a transpose is one transpose of the first one's input."""
    before = _producer(node, "Transpose") if node.op_type == "Transpose" else None
    if before is None or before.inputs[0] is None:
        return False
    first, second = permutation(before), permutation(node)
    if first is None or second is None:
        return False
    node.replace_input_with(0, before.inputs[0])
    node.attributes["perm"] = ir.AttrInt64s("perm", [first[axis] for axis in second])
    return True


def merge_reshapes(graph: ir.Graph, node: ir.Node) -> bool:
    """Reshape of a reshape to a constant shape without zeros needs the last only."""
    before = (
        _producer(node, "Reshape", "Flatten", "Squeeze", "Unsqueeze") if node.op_type == "Reshape" else None
    )
    shape = constant(node, 1)
    if before is None or shape is None or 0 in shape or before.inputs[0] is None:
        return False
    node.replace_input_with(0, before.inputs[0])
    return True


def trim_inputs(graph: ir.Graph, node: ir.Node) -> bool:
    """Optional inputs left out at the end are not written."""
    kept = len(node.inputs)
    while kept and node.inputs[kept - 1] is None:
        kept -= 1
    if kept == len(node.inputs):
        return False
    node.resize_inputs(kept)
    return True


def _producer(node: ir.Node, *op_types: str) -> ir.Node | None:
    value = node.inputs[0]
    before = None if value is None else value.producer()
    if before is None or before.domain or before.op_type not in op_types:
        return None
    return before


def _same_shape(left: ir.Value, right: ir.Value) -> bool:
    """Whether both shapes are known and equal, a dynamic dimension by its name."""
    if left.shape is None or right.shape is None or len(left.shape) != len(right.shape):
        return False
    return all(
        (a == b)
        if isinstance(a, int)
        else (not isinstance(b, int) and a.value is not None and a.value == b.value)
        for a, b in zip(left.shape, right.shape, strict=True)
    )
