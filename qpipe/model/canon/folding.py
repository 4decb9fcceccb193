"""Constant folding that never touches a named parameter.

What follows from constants alone is computed once, by onnxruntime, in one session for the whole graph. A
parameter is no constant here, with one exception: a weight that is *computed* from parameters (weight_norm,
spectral_norm) becomes one tensor, since that tensor is what gets quantized.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qpipe.model.network.invariants import IR_VERSION, OPSET
from qpipe.model.network.naming import SCOPE, names_of
from qpipe.model.network.packing import graph_proto
from qpipe.model.qdq.nodes import dequantizes, quantizes
from qpipe.model.structure.families import RANDOM

LARGEST_BYTES = 64 << 20
"""A constant that would be larger than this stays computed (a mask expanded to the batch, say)."""
_SLOTS = {"Conv": ("", "weight", "bias"), "ConvTranspose": ("", "weight", "bias"), "MatMul": ("", "weight")}
_SLOTS["Gemm"] = _SLOTS["Conv"]
_SLOTS |= dict.fromkeys(("RNN", "GRU", "LSTM"), ("", "weight", "recurrence", "bias"))
"""What the inputs of the operators with weights are called."""


def fold_constants(model: ir.Model, parameters: Collection[str]) -> bool:
    """Replace what follows from constants by initializers, in place; `parameters` stay. True if any did."""
    constants = {value for name, value in model.graph.initializers.items() if name not in parameters}
    folded: dict[ir.Node, None] = {}
    for node in model.graph:
        if _computable(node) and all(value is None or value in constants for value in node.inputs):
            folded[node] = None
            constants.update(node.outputs)
    frontier = [
        output
        for node in folded
        for output in node.outputs
        if any(reader not in folded for reader in output.consumers())
    ]
    computed = _evaluated(model.graph, frontier)
    for value, array in computed:
        _replace(model.graph, value, array, str(value.name))
    return bool(computed)


def fold_weights(model: ir.Model) -> list[str]:
    """Replace each weight or bias that is computed from parameters by one initializer, in place; the notes.

    A parameter that is only transposed is left to whoever shares it: its copy would be a second parameter."""
    constants = _from_parameters(model)
    slots: dict[ir.Value, str] = {}
    for node in model.graph:
        for value, slot in zip(node.inputs, _SLOTS.get(node.op_type, ()), strict=False):
            producer = None if value is None or not slot else value.producer()
            if value in constants and producer is not None and producer.op_type != "Transpose":
                slots.setdefault(value, _wanted_name(node, slot))
    notes, names = [], names_of(model.graph)
    for value, array in _evaluated(model.graph, list(slots)):
        name = names.fresh(slots[value])
        notes.append(f"The parameter {name!r} is what the model computes from {_sources(value)}.")
        _replace(model.graph, value, array, name)
    return notes


def fold_quantized(model: ir.Model) -> list[str]:
    """Replace what is computed from parameters and then quantized by one initializer of its name, in place; the notes.

    So its grid is that of a weight."""
    constants = _from_parameters(model)
    read = [node.inputs[0] for node in model.graph if quantizes(node)]
    values = dict.fromkeys(v for v in read if v in constants and v is not None and not v.is_initializer())
    notes = []
    for value, array in _evaluated(model.graph, list(values)):
        name = str(value.name)
        notes.append(f"The parameter {name!r} is what the model computes from {_sources(value)}.")
        _replace(model.graph, value, array, name)
    return notes


def _from_parameters(model: ir.Model) -> set[ir.Value]:
    """The initializers, and all that follows from them alone."""
    constants = set(model.graph.initializers.values())
    for node in model.graph:
        if _computable(node) and all(value is None or value in constants for value in node.inputs):
            constants.update(node.outputs)
    return constants


def _computable(node: ir.Node) -> bool:
    if node.domain or node.op_type in RANDOM or quantizes(node) or dequantizes(node):
        return False
    if any(output.is_graph_output() or output.dtype == ir.DataType.STRING for output in node.outputs):
        return False
    if any(
        attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attr in node.attributes.values()
    ):
        return False
    return all(_size_bytes(output) <= LARGEST_BYTES for output in node.outputs)


def _size_bytes(value: ir.Value) -> int:
    if value.shape is None or not value.shape.is_static() or value.dtype is None:
        return 0
    return int(np.prod(value.shape.numpy(), dtype=np.int64)) * max(value.dtype.bitwidth, 8) // 8


def _evaluated(graph: ir.Graph, values: Sequence[ir.Value]) -> list[tuple[ir.Value, np.ndarray[Any, Any]]]:
    """The values as onnxruntime computes them, without those that it cannot compute or that turn out too large."""
    if not values:
        return []
    try:
        arrays = _run(graph, values)
    except Exception:  # onnxruntime's errors have no common type
        if len(values) == 1:
            return []
        half = len(values) // 2
        return _evaluated(graph, values[:half]) + _evaluated(graph, values[half:])
    pairs = zip(values, arrays, strict=True)
    return [(value, array) for value, array in pairs if array.nbytes <= LARGEST_BYTES]


def _run(graph: ir.Graph, values: Sequence[ir.Value]) -> list[np.ndarray[Any, Any]]:
    from qpipe.model.runtime.options import open_session, session_options

    part = ir.convenience.extract(graph, [], list(values))
    part.opset_imports[""] = OPSET
    part.name = "constants"
    proto, tensors = graph_proto(ir.Model(part, ir_version=IR_VERSION))
    session = open_session(
        proto, {name: t.numpy() for name, t in tensors.items()}, session_options(threads=1)
    )
    arrays: list[np.ndarray[Any, Any]] = session.run(None, {})
    return arrays


def _replace(graph: ir.Graph, value: ir.Value, array: np.ndarray[Any, Any], name: str) -> None:
    value.name = None if value.name == name else value.name
    tensor = ir.Tensor(np.asarray(array, order="C"), name=name)
    constant = ir.val(name, const_value=tensor)
    value.replace_all_uses_with(constant)
    graph.register_initializer(constant)


def _wanted_name(node: ir.Node, slot: str) -> str:
    return f"{node.metadata_props.get(SCOPE) or node.name}.{slot}"


def _sources(value: ir.Value) -> str:
    """The names of the initializers of floats that `value` is computed from."""
    stack, seen, names = [value], {value}, set()
    while stack:
        current = stack.pop()
        producer = current.producer()
        if producer is None:
            if current.dtype == ir.DataType.FLOAT and current.shape is not None and len(current.shape):
                names.add(str(current.name))
            continue
        fresh = [other for other in producer.inputs if other is not None and other not in seen]
        seen.update(fresh)
        stack += fresh
    return " and ".join(map(repr, sorted(names)))
