"""Shapes and types of all values, inferred by onnx and merged into what the graph already says."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from qpipe.model.packing import graph_proto


def infer_shapes(model: ir.Model) -> None:
    """Fill in the types and shapes of `model`'s values, in place.

    A number beats a name and a name that the graph has already beats a name that inference makes up, so
    the exporter's `batch` survives. Where inference fails, what was known stays."""
    proto, _ = graph_proto(model)
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except Exception:  # onnx raises RuntimeError, ValueError or its own InferenceError
        return
    graphs = zip(model.graphs(), ir.from_proto(inferred).graphs(), strict=True)
    for graph, other in graphs:
        known = ir.convenience.create_value_mapping(other, include_subgraphs=False)
        for name, value in ir.convenience.create_value_mapping(graph, include_subgraphs=False).items():
            if name in known:
                _merge(value, known[name])


def _merge(value: ir.Value, found: ir.Value) -> None:
    if value.type is None and found.type is not None:
        value.type = found.type
    if found.shape is None:
        return
    if value.shape is None or len(value.shape) != len(found.shape):
        value.shape = _copied(found.shape)
        return
    pairs = zip(value.shape, found.shape, strict=True)
    value.shape = ir.Shape([_dimension(mine, theirs) for mine, theirs in pairs])


def _dimension(mine: int | ir.SymbolicDim, theirs: int | ir.SymbolicDim) -> int | str | None:
    if isinstance(mine, int):
        return mine
    if isinstance(theirs, int):
        return theirs
    return mine.value if mine.value is not None else _name(theirs)


def _name(dim: ir.SymbolicDim) -> str | None:
    """The name of a dimension; None where inference made it up, with a number that changes each time."""
    return None if dim.value is None or dim.value.startswith("unk__") else dim.value


def _copied(shape: ir.Shape) -> ir.Shape:
    return ir.Shape([dim if isinstance(dim, int) else _name(dim) for dim in shape])


def complete(model: ir.Model) -> bool:
    """Whether every value that a node of the graph produces has a type and a shape."""
    return all(
        output.type is not None and output.shape is not None
        for node in model.graph
        for output in node.outputs
        if output.name
    )
