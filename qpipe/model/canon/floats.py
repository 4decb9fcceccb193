"""One type of floating-point number: float32.

Models in float16, bfloat16 or double are converted on import, and say so in their notes: grids are found
and errors measured against a float32 model, and the quantized one has none of the original's numbers anyway.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

OTHERS = {ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16", ir.DataType.DOUBLE: "double"}
_TYPE_ATTRIBUTES = ("to", "dtype")


def to_float32(model: ir.Model) -> list[str]:
    """Convert all tensors, types, casts and constants of `model` to float32, in place; returns the notes."""
    found: set[ir.DataType] = set()
    for graph in model.graphs():
        for value in [*graph.initializers.values(), *graph.inputs]:
            _convert_value(value, found)
        for node in graph:
            _convert_attributes(node, found)
            for value in node.outputs:
                _convert_value(value, found)
    if not found:
        return []
    kinds = " and ".join(sorted(OTHERS[dtype] for dtype in found))
    return [f"The model computed in {kinds}; it was converted to float32."]


def _convert_value(value: ir.Value, found: set[ir.DataType]) -> None:
    tensor = value.const_value
    if tensor is not None and tensor.dtype in OTHERS:
        found.add(tensor.dtype)
        value.const_value = _converted(tensor, value.name)
    if value.dtype in OTHERS:
        found.add(value.dtype)
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
