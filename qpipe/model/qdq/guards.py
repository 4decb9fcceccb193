"""Nodes of a QDQ graph that onnxruntime must not run on integers.

Given DQ -> Conv, ConvTranspose or Gemm with a float weight -> Q (Relu or Clip may stand in front of
the Q), onnxruntime rounds the weight to 8 bits per tensor by itself (WeightBiasQuantization, at every level of
optimization from basic on): a layer that a target's filters leave in float, or one whose bias is computed, would run on
integers and nobody would have said so. Scales of a Conv's or a Gemm's weight along another axis than that of the output
channels it takes for scales of these. Its integer Softmax wraps where 1 is beyond its grid, and over a single element,
a graph with a quantized AveragePool that has dilations does not load, and a GlobalAveragePool whose output has a far
finer grid than its input, since nothing of it passes a Relu, say, does not run. It sees DQ -> node -> Q there also once
it has taken out what changes nothing between them, a mask of zeros, say. Of all this codes of 16 bits have the rounded
weights alone. And an Add with the LayerNormalization behind it becomes one kernel, which is slower than the two. A Clip
without bounds in front of the node changes no value either, and stays.
"""

from __future__ import annotations

import onnx_ir as ir

from qpipe.model.network.invariants import constant_tensor
from qpipe.model.network.naming import Names

_ROUNDED = frozenset({"Conv", "ConvTranspose", "Gemm"})
_AT_RISK = _ROUNDED | {"Softmax", "AveragePool", "GlobalAveragePool"}
_TAKEN_OUT = frozenset({"Identity", "Dropout", "Add", "Sub", "Mul", "Div"})
"""What onnxruntime takes out of a graph where it changes nothing."""
_PASSED = frozenset({"Relu", "Clip"}) | _TAKEN_OUT
_POOLED = (2.0**-16, 256.0)
"""Bounds of input scale / output scale. Its GlobalAveragePool takes that, over the number of elements, from 2^-32 on,
below 256: these bounds keep to it for up to 2^16 elements."""


def guard_float_layers(graph: ir.Graph, names: Names) -> None:
    """Put a Clip without bounds in front of each such node of a QDQ graph, in place."""
    for node in list(graph):
        value = node.inputs[0] if not node.domain else None
        if value is None or not (_made_integer(node, value) or _made_slow(node, value)):
            continue
        result = ir.Value(name=names.fresh(f"{node.name}__input"), type=value.type, shape=value.shape)
        guard = ir.node("Clip", [value], outputs=[result], name=names.fresh(f"{node.name}__guard"))
        graph.insert_before(node, guard)
        node.replace_input_with(0, result)


def _made_integer(node: ir.Node, value: ir.Value) -> bool:
    """Whether onnxruntime would run `node`, which reads `value`, on integers although it must not."""
    before, after = (_dequantizer(value), _quantizer(node)) if node.op_type in _AT_RISK else (None, None)
    if before is None or after is None:
        return False
    on_integers = _is_8_bit(before) and _is_8_bit(after) and (_has_other_axis(node) or _wrong(before, node, after))
    return on_integers or _has_float_weight(node)


def _made_slow(node: ir.Node, value: ir.Value) -> bool:
    """Whether onnxruntime would put `node` and the Add in front into one kernel, SkipLayerNormalization, which takes
    more than twice the time of both (1.32). Where the Add's output is rounded it does not."""
    add = value.producer() if node.op_type == "LayerNormalization" else None
    rounded = any(reader.op_type == "QuantizeLinear" for reader in node.outputs[0].consumers())
    return rounded and add is not None and add.op_type == "Add"


def _is_8_bit(node: ir.Node) -> bool:
    """Whether a quantizer's codes have 8 bits: onnxruntime has no integer kernels for 16."""
    point = node.inputs[2] if len(node.inputs) > 2 else None
    return point is None or point.dtype is None or point.dtype.bitwidth == 8


def _has_float_weight(node: ir.Node) -> bool:
    weight = node.inputs[1] if node.op_type in _ROUNDED else None
    return weight is not None and weight.is_initializer() and weight.dtype == ir.DataType.FLOAT


def _has_other_axis(node: ir.Node) -> bool:
    """Whether the weight's codes have several scales along another axis than that of the output channels."""
    weight = node.inputs[1] if node.op_type in ("Conv", "Gemm") else None
    source = None if weight is None else weight.producer()
    if source is None or source.op_type != "DequantizeLinear":
        return False
    scale = constant_tensor(source.inputs[1])
    if scale is None or len(scale.shape) != 1 or scale.size == 1:
        return False
    channels = 0 if node.op_type == "Conv" or node.attributes.get_int("transB", 0) == 1 else 1
    return bool(source.attributes.get_int("axis", 1) != channels)


def _wrong(before: ir.Node, node: ir.Node, after: ir.Node) -> bool:
    """Whether `node` gives something else, or nothing, on integers."""
    if node.op_type == "AveragePool":
        return "dilations" in node.attributes
    if node.op_type == "GlobalAveragePool":
        return not _POOLED[0] <= _scale(before) / _scale(after) < _POOLED[1]
    shape = node.outputs[0].shape
    axis: int = node.attributes.get_int("axis", -1)
    return node.op_type == "Softmax" and (_ends_before_one(after) or (shape is not None and shape[axis] == 1))


def _ends_before_one(quantizer: ir.Node) -> bool:
    """Whether 1 is further than one step beyond the largest code."""
    tensor = constant_tensor(quantizer.inputs[2]) if len(quantizer.inputs) > 2 else None
    if tensor is None or tensor.dtype.bitwidth < 8:
        return False
    largest: int = 2 ** (tensor.dtype.bitwidth - tensor.dtype.is_signed()) - int(tensor.numpy().reshape(-1)[0])
    return largest * _scale(quantizer) < 1


def _scale(node: ir.Node) -> float:
    """The scale of a quantizer of activations."""
    tensor = constant_tensor(node.inputs[1])
    return 1.0 if tensor is None else float(tensor.numpy().reshape(-1)[0])


def _dequantizer(value: ir.Value) -> ir.Node | None:
    """The DequantizeLinear that `value` comes from, at once or through what may be taken out."""
    node = value.producer()
    while node is not None and node.op_type in _TAKEN_OUT:
        node = next((v.producer() for v in node.inputs if v is not None and not _is_parameter(v)), None)
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _is_parameter(value: ir.Value) -> bool:
    """Whether `value` is a parameter, quantized or not."""
    node = value.producer()
    first = value if node is None or node.op_type != "DequantizeLinear" else node.inputs[0]
    return first is not None and first.is_initializer()


def _quantizer(node: ir.Node) -> ir.Node | None:
    """The QuantizeLinear that alone reads what `node` gives, at once or behind an activation."""
    while True:
        readers = node.outputs[0].consumers()
        if len(readers) != 1 or node.outputs[0].is_graph_output():
            return None
        node = readers[0]
        if node.op_type not in _PASSED:
            return node if node.op_type == "QuantizeLinear" else None
