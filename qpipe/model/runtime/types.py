"""The types of values that onnx's inference knows nothing of: onnxruntime, which runs their nodes, does."""

from __future__ import annotations

import re
from collections.abc import Iterable

import onnx_ir as ir

from qpipe.model.network.facts import Library
from qpipe.model.network.invariants import IR_VERSION
from qpipe.model.network.packing import graph_proto
from qpipe.model.network.shapes import infer_shapes
from qpipe.model.runtime.options import open_session, session_options

_TYPES = {
    "float": ir.DataType.FLOAT,
    "double": ir.DataType.DOUBLE,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "bool": ir.DataType.BOOL,
    "string": ir.DataType.STRING,
    **{f"{sign}int{bits}": ir.DataType[f"{sign}int{bits}".upper()] for sign in ("", "u") for bits in (8, 16, 32, 64)},
}


def learn_types(model: ir.Model, custom_ops: Iterable[Library] = ()) -> str | None:
    """Fill in the types and ranks that are missing behind operators of other domains, in place. What onnxruntime says
    against the model, which it does not open then; None where it does."""
    unknown = [output for node in model.graph for output in node.outputs if output.name and output.type is None]
    clone = ir.Model(model.graph.clone(), ir_version=IR_VERSION)
    named = ir.convenience.create_value_mapping(clone.graph, include_subgraphs=False)
    clone.graph.outputs[:] = [named[str(value.name)] for value in unknown] or list(clone.graph.outputs)
    proto, tensors = graph_proto(clone)
    options = session_options("plain", custom_ops=custom_ops)
    try:
        session = open_session(proto, {name: t.numpy() for name, t in tensors.items()}, options)
    except Exception as error:  # onnxruntime's errors have no common type
        return str(error).strip().splitlines()[0]
    for value, output in zip(unknown, session.get_outputs(), strict=False):
        value.type = _type(output.type)
        # It says [] of a single number, and of what it does not know.
        value.shape = ir.Shape(output.shape) if output.shape else None
    if unknown:
        infer_shapes(model)
    return None


def _type(said: str) -> ir.TypeProtocol | None:
    """`tensor(float)`, `seq(tensor(int64))`, `optional(tensor(float))` as onnx_ir has them."""
    found = re.fullmatch(r"(tensor|seq|optional)\((.*)\)", said)
    if found is None:
        return None
    kind, inside = found.groups()
    if kind == "tensor":
        return ir.TensorType(_TYPES[inside]) if inside in _TYPES else None
    element = _type(inside)
    if element is None:
        return None
    return ir.SequenceType(element) if kind == "seq" else ir.OptionalType(element)
