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
    for place, node in reversed(list(enumerate(proto.graph.node))):
        if node.op_type == "GroupNormalization":  # onnx infers nothing for it, nor for anything behind it
            node.op_type = "InstanceNormalization"
            del node.attribute[:]
        elif node.op_type == "ConvTranspose":
            _as_it_is_sized(proto.graph, place, node)
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except Exception:  # onnx raises RuntimeError, ValueError or its own InferenceError
        return
    known = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)
    graph = inferred.graph
    for info in [*graph.value_info, *graph.output]:
        if info.name in known:
            _merge(known[info.name], info.type)


def _as_it_is_sized(graph: onnx.GraphProto, place: int, node: onnx.NodeProto) -> None:
    """A ConvTranspose whose `output_shape` is smaller than its input has a shape without spatial dimensions for onnx:
    here it is one of a single pixel, with a kernel of that size."""
    given = {attribute.name: attribute for attribute in node.attribute}
    if "output_shape" not in given:
        return
    group = [given["group"]] if "group" in given else []
    kernel = onnx.helper.make_attribute("kernel_shape", given["output_shape"].ints)
    del node.attribute[:]
    node.attribute.extend([kernel, *group])
    pixel = f"{node.output[0]}__pixel"
    graph.node.insert(place, onnx.helper.make_node("GlobalAveragePool", [node.input[0]], [pixel]))
    node.input[0] = pixel


def believe_graph(model: ir.Model) -> dict[str, ir.Shape]:
    """Let what the graph computes decide over the shapes that the file declares, in place. A declared size inside stays
    where inference finds none. Those of outputs, which people write by hand, go: they are returned, by name, for what
    nobody finds. A negative size, which some exporters write for an open dimension, is none."""
    model.graph.sort()
    for value in model.graph.inputs:
        value.shape = _opened(value.shape)
    outputs = {str(value.name): _opened(value.shape) for value in model.graph.outputs if value.producer()}
    declared: dict[ir.Value, ir.Shape] = {}
    for value in (value for node in model.graph for value in node.outputs):
        shape = value.shape = None if value.is_graph_output() else _opened(value.shape)
        if shape is not None and any(isinstance(dim, int) for dim in shape):
            declared[value] = shape
            value.shape = ir.Shape([None if isinstance(dim, int) else dim.value for dim in shape])
    infer_shapes(model)
    for value, shape in declared.items():
        found = value.shape
        if found is None or len(found) == len(shape):
            dims = zip(found or [ir.SymbolicDim(None)] * len(shape), shape, strict=True)
            value.shape = ir.Shape([_better(dim, _declared(said)) for dim, said in dims])
    for value in model.graph.outputs:  # the names of dimensions are the file's where the sizes are
        said = outputs.get(str(value.name))
        if said is not None and value.shape is not None and len(said) == len(value.shape):
            value.shape = ir.Shape([_named(dim, name) for dim, name in zip(value.shape, said, strict=True)])
    return {name: shape for name, shape in outputs.items() if shape is not None}


def _named(dim: int | ir.SymbolicDim, said: int | ir.SymbolicDim) -> int | str | None:
    return dim if isinstance(dim, int) else (said.value if isinstance(said, ir.SymbolicDim) else dim.value)


def _opened(shape: ir.Shape | None) -> ir.Shape | None:
    if shape is None or not any(isinstance(dim, int) and dim < 0 for dim in shape):
        return shape
    dims = (dim if isinstance(dim, int) else dim.value for dim in shape)
    return ir.Shape([None if isinstance(dim, int) and dim < 0 else dim for dim in dims])


def _declared(dim: int | ir.SymbolicDim) -> int | str | None:
    return dim if isinstance(dim, int) else dim.value


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
