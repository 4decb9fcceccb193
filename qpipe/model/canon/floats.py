"""One type of floating-point number: float32.

Models in float16, bfloat16 or double are converted on import, and say so in their notes: grids are found
and errors measured against a float32 model, and the quantized one has none of the original's numbers anyway.
Whoever feeds the model goes on as before: inputs and outputs keep their type, by a Cast at the border.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qpipe.model.network.naming import names_of

OTHERS = {ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16", ir.DataType.DOUBLE: "double"}
_KEPT = "qpipe.kept"
_TYPE_ATTRIBUTES = ("to", "dtype")


def to_float32(model: ir.Model, keep_outside: bool = True) -> list[str]:
    """Convert all tensors, types, casts and constants of `model` to float32, in place; returns the notes. Inputs and
    outputs stay what they are, with a Cast behind or before them, unless `keep_outside` is false."""
    found: set[ir.DataType] = set()
    if keep_outside:
        _keep_outside(model.graph, found)
    for graph in model.graphs():
        kept = {value for value in graph.inputs if value.metadata_props.pop(_KEPT, None)}
        for value in [*graph.initializers.values(), *graph.inputs]:
            if value not in kept:
                _convert_value(value, found)
        for node in graph:
            if node.metadata_props.pop(_KEPT, None):
                continue
            _convert_attributes(node, found)
            for value in node.outputs:
                _convert_value(value, found)
    if not found:
        return []
    kinds = " and ".join(sorted(OTHERS[dtype] for dtype in found))
    return [f"The model computed in {kinds}; it was converted to float32."]


def _keep_outside(graph: ir.Graph, found: set[ir.DataType]) -> None:
    """Put a Cast behind each input and before each output of another type, and mark what is to stay as it is."""
    names = names_of(graph)
    first = next(iter(graph), None)
    for value in graph.inputs:
        if value.dtype not in OTHERS or value.is_initializer():
            continue
        found.add(value.dtype)
        cast = _cast(None, ir.DataType.FLOAT, names.fresh(f"{value.name}_float32"), value.shape)
        value.replace_all_uses_with(cast.outputs[0], replace_graph_outputs=True)
        cast.replace_input_with(0, value)
        value.metadata_props[_KEPT] = "1"
        graph.insert_before(first, cast) if first is not None else graph.append(cast)
    for index, value in enumerate(graph.outputs):
        if value.dtype not in OTHERS:
            continue
        found.add(value.dtype)
        name, value.name = str(value.name), names.fresh(f"{value.name}_float32")
        cast = _cast(value, value.dtype, name, value.shape)
        cast.metadata_props[_KEPT] = "1"
        graph.append(cast)
        graph.outputs[index] = cast.outputs[0]


def _cast(value: ir.Value | None, dtype: ir.DataType, name: str, shape: ir.Shape | None) -> ir.Node:
    cast = ir.node("Cast", [value], {"to": int(dtype)}, name=name)
    cast.outputs[0].name, cast.outputs[0].type, cast.outputs[0].shape = name, ir.TensorType(dtype), shape
    return cast


def _convert_value(value: ir.Value, found: set[ir.DataType]) -> None:
    tensor = value.const_value
    if tensor is not None and tensor.dtype in OTHERS:
        found.add(tensor.dtype)
        value.const_value = _converted(tensor, value.name)
    if value.dtype in OTHERS:
        found.add(value.dtype)
        if isinstance(value.type, ir.TensorType):
            value.type = ir.TensorType(ir.DataType.FLOAT)  # not in place: clones of a graph share it
        else:
            value.dtype = ir.DataType.FLOAT


def _converted(tensor: ir.TensorProtocol, name: str | None) -> ir.TensorProtocol:
    largest = np.finfo(np.float32).max
    array = tensor.numpy()
    if tensor.dtype == ir.DataType.DOUBLE:  # -1.8e308 in a mask stays a large finite number
        array = np.where(np.isfinite(array), np.clip(array, -largest, largest), array)
    return ir.Tensor(array.astype(np.float32), name=name)


def _convert_attributes(node: ir.Node, found: set[ir.DataType]) -> None:
    for key, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in OTHERS:
            tensor = attribute.as_tensor()
            found.add(tensor.dtype)
            node.attributes[key] = ir.AttrTensor(key, _converted(tensor, tensor.name))
        elif key in _TYPE_ATTRIBUTES and attribute.type == ir.AttributeType.INT and attribute.value in OTHERS:
            node.attributes[key] = ir.AttrInt64(key, int(ir.DataType.FLOAT))
