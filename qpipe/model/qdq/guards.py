"""What onnxruntime makes of a QDQ graph: nodes that it must not run on integers, and bounds that it can take on codes.

**Kept in float.** Given DQ -> Conv, ConvTranspose or Gemm with a float weight -> Q (Relu or Clip may stand in front of
the Q), onnxruntime rounds the weight to 8 bits per tensor by itself (WeightBiasQuantization, at every level of
optimization from basic on): a layer that a target's filters leave in float, or one whose bias is computed, would run on
integers and nobody would have said so. Scales of a Conv's or a Gemm's weight along another axis than that of the output
channels it takes for scales of these. Its integer Softmax wraps where 1 is beyond its grid, and over a single element,
a graph with a quantized AveragePool that has dilations does not load, and a GlobalAveragePool whose output has a far
finer grid than its input, since nothing of it passes a Relu, say, does not run. It sees DQ -> node -> Q there also once
it has taken out what changes nothing between them, a mask of zeros, say. Of all this codes of 16 bits have the rounded
weights alone. And an Add with the LayerNormalization behind it becomes one kernel, which is slower than the two. A Clip
without bounds in front of the node changes no value either, and stays.

**Taken on codes.** A bound between two roundings on one grid:

    v -> Q -> DQ -> Min(b) -> Q -> DQ        v -> Q -> Min(codes of b) -> DQ

Rounding keeps the order, so that both give the same bits. The left form is what a bounded activation becomes once its
channels were equalized, a bound for each: onnxruntime runs it in float between two conversions, and the operators
around it lose their integer kernels. Its Min and Max of codes exist for 8 bits. A bound that no code exceeds goes.

They are fastest where the constant need not be spread over the inner dimensions: where these are known, an Expand
writes it out. onnxruntime computes that when it loads the file, which stays small.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qpipe.model.network.invariants import constant_tensor
from qpipe.model.network.naming import Names, fresh_name
from qpipe.model.qdq.nodes import clips_to_grid, dequantizes, grid, has_grid, initializer, quantizes
from qpipe.numerics.grid import quantize, same_grid

Array = npt.NDArray[Any]
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


SPREAD = 1 << 16
"""Elements up to which a bound is written out whole; beyond, along the last dimension alone."""


def bound_codes(graph: ir.Graph, op_types: Collection[str], keep: Collection[str] = ()) -> None:
    """Take the bounds of `op_types` (Min, Max) on codes where both roundings are on one grid of 8-bit codes, in place.
    The dequantized values named in `keep` stay in the graph."""
    for node in list(graph):
        found = _between(node) if node.op_type in op_types and not node.domain else None
        if found is None:
            continue
        first, bound, last = found
        codes, result = first.inputs[0], last.outputs[0]
        assert codes is not None
        source = _rounded(codes)
        cut = _codes(bound, last)
        name, result.name = str(result.name), None
        if not np.all(cut == (grid(last).qmax if node.op_type == "Min" else grid(last).qmin)):
            output = ir.Value(name=name, type=result.type, shape=result.shape)
            inputs = [codes, _spread(graph, node, cut, f"{bound.name}__quantized", result.shape)]
            made = ir.node(node.op_type, inputs, outputs=[output], name=node.name)
            made.metadata_props.update(node.metadata_props)
            graph.insert_before(last, made)
            codes = output
        clips = [reader for reader in node.outputs[0].consumers() if reader is not last]  # to the grid
        for use in tuple(result.uses()):
            use.node.replace_input_with(use.idx, codes)
        graph.remove([last, *clips, node], safe=True)
        floats = first.outputs[0]
        if not (floats.uses() or floats.is_graph_output() or floats.name in keep):
            graph.remove(first, safe=True)
            if source is not None and str(source.name).startswith(f"{floats.name}__float"):
                source.name, floats.name = floats.name, None  # nobody else has it any more


def _between(node: ir.Node) -> tuple[ir.Node, ir.Value, ir.Node] | None:
    """The DequantizeLinear in front of a bound, the bound and the QuantizeLinear behind, where both say one grid of
    codes of 8 bits and nothing else reads what is between."""
    last = clip = _alone(node)
    if clip is not None and clip.op_type == "Clip":
        last = _alone(clip)
    if len(node.inputs) != 2 or last is None or not quantizes(last) or not has_grid(last) or _bits(last) != 8:
        return None
    if clip is None or (clip is not last and not clips_to_grid(clip, last)):
        return None
    for position, value in enumerate(node.inputs):
        first, bound = None if value is None else value.producer(), node.inputs[1 - position]
        if first is None or bound is None or bound.const_value is None:
            continue
        same = dequantizes(first) and has_grid(first) and same_grid(grid(first), grid(last))
        if same and len(bound.const_value.shape) <= len(value.shape or ()):  # type: ignore[union-attr]
            return first, bound, last
    return None


def _rounded(codes: ir.Value) -> ir.Value | None:
    """What `codes` are made of by a QuantizeLinear, behind a Clip to its grid."""
    node = codes.producer()
    value = node.inputs[0] if node is not None and quantizes(node) else None
    clip = None if value is None else value.producer()
    if node is not None and clip is not None and clip.op_type == "Clip" and clips_to_grid(clip, node):
        return clip.inputs[0]
    return value


def _alone(node: ir.Node) -> ir.Node | None:
    """The only one that reads what `node` gives."""
    uses = tuple(node.outputs[0].uses())
    return uses[0].node if len(uses) == 1 and uses[0].idx == 0 and not node.outputs[0].is_graph_output() else None


def _bits(quantizer: ir.Node) -> int:
    tensor = constant_tensor(quantizer.inputs[2])
    return 0 if tensor is None else tensor.dtype.bitwidth


def _codes(bound: ir.Value, quantizer: ir.Node) -> Array:
    """The codes of a constant, in their type; a Clip to the grid, behind the bound, is in them."""
    array, point = constant_tensor(bound), constant_tensor(quantizer.inputs[2])
    assert array is not None
    assert point is not None
    return quantize(array.numpy(), grid(quantizer), str(bound.name)).astype(point.dtype.numpy())


def _spread(graph: ir.Graph, node: ir.Node, codes: Array, name: str, shape: ir.Shape | None) -> ir.Value:
    """`codes` as a constant, written out over the dimensions behind the channels as far as they are known."""
    value = _constant(graph, codes, name)
    known = [dim if isinstance(dim, int) else 1 for dim in shape or ()]
    rank = len(known)
    full = [1, *known[1:]]
    if np.prod(full) > SPREAD:
        full = [1] * (rank - 1) + known[-1:]
    aligned = [1] * (rank - codes.ndim) + list(codes.shape)
    wanted = [max(pair) for pair in zip(aligned, full, strict=True)]
    if codes.size == 1 or wanted == aligned:
        return value
    name = fresh_name(graph, f"{name}_spread")
    output = ir.Value(name=name, type=value.type, shape=ir.Shape(wanted))
    sizes = _constant(graph, np.array(wanted, np.int64), f"{name}_shape")
    made = ir.node("Expand", [value, sizes], outputs=[output], name=name)
    graph.insert_before(node, made)
    return output


def _constant(graph: ir.Graph, array: Array, name: str) -> ir.Value:
    value = initializer(fresh_name(graph, name), array)
    graph.register_initializer(value)
    return value
