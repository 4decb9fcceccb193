"""Nodes between quantized values that onnxruntime must not run on integers, kept in float.

Given DQ -> Conv, ConvTranspose or Gemm with a float weight -> Q (Relu or Clip may stand in front of the Q),
onnxruntime rounds the weight to 8 bits per tensor by itself (WeightBiasQuantization, at every level of optimization
from basic on): a layer that a target's filters leave in float, or one whose bias is computed, would run on integers
and nobody would have said so. Its integer Softmax over a single element is 0 (1 is code 256, which wraps), and a
graph with a quantized AveragePool that has dilations does not load. It sees DQ -> node -> Q there also once it has
taken out what changes nothing between them, a mask of zeros, say. A Clip without bounds in front of the node changes
no value either, and stays.
"""

from __future__ import annotations

import onnx_ir as ir

from qpipe.model.naming import Names

_ROUNDED = frozenset({"Conv", "ConvTranspose", "Gemm"})
_TAKEN_OUT = frozenset({"Identity", "Dropout", "Add", "Sub", "Mul", "Div"})
"""What onnxruntime takes out of a graph where it changes nothing."""
_PASSED = frozenset({"Relu", "Clip"}) | _TAKEN_OUT


def guard_float_layers(graph: ir.Graph, names: Names) -> None:
    """Put a Clip without bounds in front of each such node of a QDQ graph, in place."""
    for node in list(graph):
        if node.domain or not (_has_float_weight(node) or _wrong_on_integers(node)):
            continue
        value = node.inputs[0]
        if value is None or not _dequantized(value) or not _rounded_after(node):
            continue
        result = ir.Value(name=names.fresh(f"{node.name}__input"), type=value.type, shape=value.shape)
        guard = ir.node("Clip", [value], outputs=[result], name=names.fresh(f"{node.name}__guard"))
        graph.insert_before(node, guard)
        node.replace_input_with(0, result)


def _has_float_weight(node: ir.Node) -> bool:
    weight = node.inputs[1] if node.op_type in _ROUNDED else None
    return weight is not None and weight.is_initializer() and weight.dtype == ir.DataType.FLOAT


def _wrong_on_integers(node: ir.Node) -> bool:
    if node.op_type == "AveragePool":
        return "dilations" in node.attributes
    shape = node.outputs[0].shape
    axis: int = node.attributes.get_int("axis", -1)
    return node.op_type == "Softmax" and shape is not None and shape[axis] == 1


def _dequantized(value: ir.Value) -> bool:
    """Whether `value` comes from a DequantizeLinear, at once or through what may be taken out."""
    node = value.producer()
    while node is not None and node.op_type in _TAKEN_OUT:
        node = next((v.producer() for v in node.inputs if v is not None and not _constant(v)), None)
    return node is not None and node.op_type == "DequantizeLinear"


def _constant(value: ir.Value) -> bool:
    """Whether `value` is a parameter, quantized or not."""
    node = value.producer()
    first = value if node is None or node.op_type != "DequantizeLinear" else node.inputs[0]
    return first is not None and first.is_initializer()


def _rounded_after(node: ir.Node) -> bool:
    """Whether a QuantizeLinear alone reads what `node` gives, at once or behind an activation."""
    while True:
        readers = node.outputs[0].consumers()
        if len(readers) != 1 or node.outputs[0].is_graph_output():
            return False
        node = readers[0]
        if node.op_type not in _PASSED:
            return node.op_type == "QuantizeLinear"
