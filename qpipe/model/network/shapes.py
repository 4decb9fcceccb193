"""Shapes and types of all values, inferred by onnx and merged into what the graph already says."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from qpipe.model.network.packing import graph_proto


def infer_shapes(model: ir.Model) -> None:
    """Fill in the types and shapes of `model`'s values, in place.

    A number beats a name and a name that the graph has already beats a name that inference makes up, so
    the exporter's `batch` survives. Where inference fails, what was known stays."""
    proto, _ = graph_proto(model)
    for node in proto.graph.node:
        if node.op_type == "GroupNormalization":  # onnx infers nothing for it, nor for anything behind it
            node.op_type = "InstanceNormalization"
            del node.attribute[:]
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except Exception:  # onnx raises RuntimeError, ValueError or its own InferenceError
        return
    known = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)
    graph = inferred.graph
    for info in [*graph.value_info, *graph.output]:
        if info.name in known:
            _merge(known[info.name], info.type)


def _merge(value: ir.Value, found: onnx.TypeProto) -> None:
    if value.type is None:
        value.type = ir.serde.deserialize_type_proto_for_type(found)
    if found.WhichOneof("value") != "tensor_type" or not found.tensor_type.HasField("shape"):
        return
    dims = [_size_or_name(dim) for dim in found.tensor_type.shape.dim]
    if value.shape is not None and len(value.shape) == len(dims):
        dims = [_better(mine, theirs) for mine, theirs in zip(value.shape, dims, strict=True)]
    value.shape = ir.Shape(dims)


def _size_or_name(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    """None for a name that inference made up: it numbers them anew each time."""
    if dim.HasField("dim_value"):
        return int(dim.dim_value)
    return None if not dim.dim_param or dim.dim_param.startswith("unk__") else str(dim.dim_param)


def _better(mine: int | ir.SymbolicDim, theirs: int | str | None) -> int | str | None:
    if isinstance(mine, int) or isinstance(theirs, int):
        return mine if isinstance(mine, int) else theirs
    return mine.value if mine.value is not None else theirs


def complete(model: ir.Model) -> bool:
    """Whether every value that a node of the graph produces has a type and a shape."""
    return all(
        output.type is not None and output.shape is not None
        for node in model.graph
        for output in node.outputs
        if output.name
    )
