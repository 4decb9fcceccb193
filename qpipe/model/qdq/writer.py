"""A quantized model as standard ONNX: QuantizeLinear and DequantizeLinear (QDQ) at the encodings.

    activation v    v__float -> QuantizeLinear -> v__quantized -> DequantizeLinear -> v
    weight w        w__quantized (int4, int8 or int16 codes) -> DequantizeLinear -> w
    bias b          b__quantized (int32 codes, scale s_x * s_w) -> DequantizeLinear -> b

Where a weight's codes are mirrored (zero point -1, all others 0), its scale is negative and the zero point 0, and so is
the bias's scale: kernels take one zero point for all channels, 0 costs them nothing, and onnxruntime's own int4 weights
are written so.

The dequantized value has the name, so every reader of `v`, and whoever asks a session for it, gets the
rounded one; a graph input alone keeps its own name, and its readers get `v__dequantized`. Inputs and outputs
of the graph stay float. Codes narrower than the types that ONNX has (3 bits, 6 bits) are stored in the next
wider type; an activation is clipped to its codes' range first. Activations of 4 bits and less are stored in 8:
onnxruntime (1.31) fuses 4-bit ones into integer kernels that do not take them, and then refuses the graph.

On a CPU without VNNI, onnxruntime's products of uint8 activations and int8 weights can saturate in 16 bits. Weights
of 7 bits, stored in int8, cannot (this is what `reduce_range` means elsewhere).

Source: ONNX operators QuantizeLinear and DequantizeLinear, opset 21.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from qpipe.errors import InputError
from qpipe.model.network.naming import IN_USE, fresh_name, names_of
from qpipe.model.network.packing import graph_proto
from qpipe.model.qdq.bias import QuantizedBias, bias_codes, bias_scale, effective_encodings, quantized_biases
from qpipe.model.qdq.codes import take_on_codes
from qpipe.model.qdq.guards import guard_float_layers
from qpipe.model.qdq.kernel_forms import take_kernels
from qpipe.model.qdq.nodes import BITWIDTH, mirrored_codes
from qpipe.model.structure.families import MOVING
from qpipe.numerics.grid import Array, Encoding, quantize, same_grid, spread

if TYPE_CHECKING:
    import onnx

    from qpipe.model.network.network import Network


Uses = tuple[tuple[ir.Node, int], ...]
"""Who reads a value: (node, input position)."""


def to_qdq(model: Network) -> onnx.ModelProto:
    """`model` with a QDQ pair at every encoding, opset 21, self-contained.

    Raises InputError for an encoding that ONNX has no integer type for (more than 16 bits).
    """
    # Not ir.to_proto: tensors of a model just loaded may lie in the file beside it, and would stay there.
    return graph_proto(qdq_model(model), inline_bytes=None)[0]


def qdq_model(model: Network, keep: Collection[str] = ()) -> ir.Model:
    """What `to_qdq` writes, as an onnx_ir model of its own; big tensors that stay float are shared. Values that
    are named in `keep` are in it, even where nothing reads them.

    The codes of weights are computed when they are asked for, each time, so that a model that is written tensor by
    tensor takes memory for one. A nan among the weights is found, and refused, then."""
    encodings = effective_encodings(model)
    clone = model.ir.clone()
    graph = clone.graph
    nodes = {str(node.name): node for node in graph}
    graph.meta[IN_USE] = names = names_of(graph)
    for name in nodes:
        names.take(name)
    activations = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    # Biases first: a weight that also serves as a bias must not be replaced there by its own codes.
    for bias in quantized_biases(model).values():
        _insert_bias(graph, nodes[bias.node], bias, encodings)
    for name in [name for name in graph.initializers if name in encodings]:
        _insert_weight(graph, graph.initializers[name], encodings[name])
    for value in activations:
        encoding = encodings.get(str(value.name))
        if encoding is not None:
            redundant = _redundant(value, encoding, encodings)
            if activation_storage(encoding).bitwidth == 8 or not redundant:
                _insert_activation(graph, value, encoding, clipped=not redundant)
    take_on_codes(graph, model.facts.on_codes, keep)
    take_kernels(graph, model.facts.on_codes, keep)
    guard_float_layers(graph, names)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        if not graph.initializers[name].is_graph_output():
            del graph.initializers[name]
    graph.meta.pop(_KNOWN, None)
    return clone


def _redundant(value: ir.Value, encoding: Encoding, encodings: dict[str, Encoding]) -> bool:
    """Whether `value` is on its grid already, being values of an input on the same one.

    In 8 bits its pair is still written, since that lets the node run on integers.
    """
    node = value.producer()
    if node is None or node.op_type not in MOVING or node.inputs[0] is None:
        return False
    # The input may have been rounded already, under its own name.
    name = str(node.inputs[0].name)
    source = encodings.get(name) or encodings.get(name.removesuffix("__dequantized"))
    return source is not None and same_grid(source, encoding)


def storage(encoding: Encoding) -> ir.DataType:
    """The narrowest ONNX integer type that holds the codes of `encoding`."""
    for bits, signed, unsigned in (
        (4, ir.DataType.INT4, ir.DataType.UINT4),
        (8, ir.DataType.INT8, ir.DataType.UINT8),
        (16, ir.DataType.INT16, ir.DataType.UINT16),
    ):
        if encoding.bitwidth <= bits:
            return signed if encoding.signed else unsigned
    raise InputError(f"ONNX has no type for codes of {encoding.bitwidth} bits. Use at most 16.")


def activation_storage(encoding: Encoding) -> ir.DataType:
    """The integer type of an activation's codes, of at least 8 bits."""
    return storage(replace(encoding, bitwidth=8) if encoding.bitwidth < 8 else encoding)


def _insert_activation(graph: ir.Graph, value: ir.Value, encoding: Encoding, clipped: bool) -> None:
    """Q and DQ behind `value`, and all its readers, the graph's outputs among them, moved behind these.

    With `clipped` a Clip keeps the codes in range where their type is wider than they are.
    """
    name, is_input, readers = str(value.name), value.is_graph_input(), _uses(value)
    outputs = [i for i, output in enumerate(graph.outputs) if output is value]
    constants = _constants(graph, name, encoding, activation_storage(encoding))
    if not is_input:
        value.name = fresh_name(graph, f"{name}__float")
    made = _rounding(graph, value, name, encoding, constants, clipped)
    rounded = made[-1].outputs[0]
    rounded.name = fresh_name(graph, f"{name}__dequantized") if is_input else name
    for node, position in readers:
        node.replace_input_with(position, rounded)
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], made)
    else:
        graph.insert_after(producer, made)
    if not is_input:
        for i in outputs:
            graph.outputs[i] = rounded


def _rounding(
    graph: ir.Graph,
    value: ir.Value,
    name: str,
    encoding: Encoding,
    constants: tuple[ir.Value, ir.Value],
    clipped: bool,
) -> list[ir.Node]:
    """The nodes, of no graph yet, that round `value` to its grid; they are called after `name`. The output of the last
    one has no name."""
    dtype, made, source = activation_storage(encoding), list[ir.Node](), value
    if clipped and dtype.bitwidth != encoding.bitwidth:
        bounds = [
            _constant(graph, f"{name}__{side}", (np.float32(code) - encoding.zero_point) * encoding.scale)
            for side, code in (("low", encoding.qmin), ("high", encoding.qmax))
        ]
        made.append(_node(graph, "Clip", [value, *bounds], f"{name}__clip", f"{name}__clipped", value))
        source = made[-1].outputs[0]
    inputs, codes = [source, *constants], f"{name}__quantized"
    made.append(_node(graph, "QuantizeLinear", inputs, f"{name}__quantize", codes, value, dtype))
    inputs = [made[-1].outputs[0], *constants]
    made.append(_node(graph, "DequantizeLinear", inputs, f"{name}__dequantize", None, value))
    _say_bitwidth(made[-2:], encoding, dtype)
    return made


def _insert_weight(graph: ir.Graph, weight: ir.Value, encoding: Encoding) -> None:
    """The initializer's integer codes and a DQ that takes over its name and its readers."""
    name = str(weight.name)
    assert weight.const_value is not None
    dtype = storage(encoding)
    if encoding.block_size is not None and dtype.bitwidth == 8:
        # onnxruntime (1.31) fuses these into an integer MatMul that cannot run with scales per block.
        dtype = storage(replace(encoding, bitwidth=16))
    source, stored = weight.const_value, f"{name}__quantized"

    mirrored = mirrored_codes(encoding)

    def codes() -> ir.Tensor[Array]:
        found, shape = quantize(source.numpy(), encoding, name), tuple(source.shape.numpy())
        return _tensor(stored, np.where(spread(mirrored, encoding, shape), -1 - found, found), dtype)

    tensor = ir.LazyTensor(codes, dtype, ir.Shape(source.shape.numpy()), name=stored)
    _replace_constant(graph, weight, name, tensor, encoding, _uses(weight), mirrored)


def _insert_bias(graph: ir.Graph, node: ir.Node, bias: QuantizedBias, encodings: dict[str, Encoding]) -> None:
    """The int32 codes of one layer's bias. A bias that serves several layers gets codes for each of them."""
    value = graph.initializers[bias.name]
    assert value.const_value is not None
    array = value.const_value.numpy()
    scale = bias_scale(encodings[bias.input], encodings[bias.weight], bias.repeats)
    mirrored = np.tile(mirrored_codes(encodings[bias.weight]), bias.repeats if scale.ndim else 1).reshape(scale.shape)
    codes = np.where(mirrored, -1, 1) * bias_codes(array, scale)
    axis = array.ndim - 1 if scale.ndim else None
    grid = Encoding(32, True, True, scale, np.zeros(scale.shape, np.int32), axis)
    uses = ((node, bias.position),)
    name = bias.name if len(_uses(value)) == 1 else fresh_name(graph, f"{bias.name}__{node.name}")
    tensor = _tensor(f"{name}__quantized", codes, ir.DataType.INT32)
    _replace_constant(graph, value, name, tensor, grid, uses, mirrored)


def _replace_constant(
    graph: ir.Graph,
    value: ir.Value,
    name: str,
    codes: ir.TensorProtocol,
    encoding: Encoding,
    uses: Uses,
    mirrored: Array,
) -> None:
    """A DQ of `codes`, called `name`, for the given readers of the initializer `value`; where they are `mirrored`, the
    scale is negative and the zero point 0."""
    dtype = codes.dtype
    inputs = [_initializer(graph, codes), *_constants(graph, name, encoding, dtype, mirrored)]
    if value.name == name and value.is_graph_output():
        name = fresh_name(graph, f"{name}__dequantized")  # the output of the model stays what it was
    elif value.name == name and len(uses) == len(_uses(value)):
        # The name goes over to the DQ's output; the float tensor is read by nobody any more.
        del graph.initializers[name]
    made = _node(graph, "DequantizeLinear", inputs, f"{name}__dequantize", None, value, axis=encoding)
    made.outputs[0].name = name
    _say_bitwidth([made], encoding, dtype)
    for node, position in uses:
        node.replace_input_with(position, made.outputs[0])
    graph.insert_before(graph[0], made)


def _say_bitwidth(nodes: list[ir.Node], encoding: Encoding, dtype: ir.DataType) -> None:
    """Where the type is wider than the codes, the nodes' metadata keep their bitwidth for who reads the file."""
    for node in nodes if dtype.bitwidth != encoding.bitwidth else ():
        node.metadata_props[BITWIDTH] = str(encoding.bitwidth)


def _constants(
    graph: ir.Graph, name: str, encoding: Encoding, dtype: ir.DataType, mirrored: Array | None = None
) -> tuple[ir.Value, ir.Value]:
    """Scale and zero point as initializers, for codes that are `mirrored` in places: those of the first with the same
    numbers, zero points called after them."""
    scale, points, codes = encoding.scale, np.asarray(encoding.zero_point), str(dtype.name).lower()
    if mirrored is not None:
        scale, points = np.where(mirrored, -scale, scale), np.where(mirrored, 0, points)
    title = f"zero_point_{codes}_{points.reshape(-1)[0] if points.size else 0}" + ("" if points.ndim == 0 else "s")
    return _shared(graph, f"{name}__scale", scale, None), _shared(graph, title, points, dtype)


def _shared(graph: ir.Graph, name: str, array: Array, dtype: ir.DataType | None) -> ir.Value:
    """`array` as an initializer, one for all that have the same."""
    known: dict[tuple[object, ...], ir.Value] = graph.meta.setdefault(_KNOWN, {})
    key = (dtype, array.shape, array.tobytes())
    if key not in known:
        known[key] = _constant(graph, name, array, dtype)
    return known[key]


_KNOWN = "qpipe.grids"


_NUMPY: dict[ir.DataType, Any] = {
    ir.DataType.INT4: ml_dtypes.int4,
    ir.DataType.UINT4: ml_dtypes.uint4,
    ir.DataType.INT8: np.int8,
    ir.DataType.UINT8: np.uint8,
    ir.DataType.INT16: np.int16,
    ir.DataType.UINT16: np.uint16,
    ir.DataType.INT32: np.int32,
}


def _constant(graph: ir.Graph, name: str, array: Array, dtype: ir.DataType | None = None) -> ir.Value:
    return _initializer(graph, _tensor(name, array, dtype))


def _tensor(name: str, array: Array, dtype: ir.DataType | None = None) -> ir.Tensor[Array]:
    array = np.asarray(array, np.float32) if dtype is None else np.asarray(array).astype(_NUMPY[dtype])
    return ir.Tensor(array, dtype=dtype, name=name)


def _initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """`tensor` as an initializer, under its name or one like it that is free."""
    tensor.name = fresh_name(graph, str(tensor.name))
    value = ir.val(tensor.name, const_value=tensor)
    graph.register_initializer(value)
    return value


def _node(
    graph: ir.Graph,
    op_type: str,
    inputs: list[ir.Value],
    name: str,
    output: str | None,
    like: ir.Value,
    dtype: ir.DataType | None = None,
    axis: Encoding | None = None,
) -> ir.Node:
    """A node of one output, of the shape and, without `dtype`, of the type of `like`; it and `output` get names
    that nothing else has."""
    attributes: dict[str, int] = {}
    if axis is not None and axis.axis is not None:
        attributes["axis"] = axis.axis
        if axis.block_size is not None:
            attributes["block_size"] = axis.block_size
    kind = ir.TensorType(dtype) if dtype is not None else like.type
    result = ir.Value(name=output and fresh_name(graph, output), type=kind, shape=like.shape)
    return ir.node(op_type, inputs, attributes, outputs=[result], name=fresh_name(graph, name))


def _uses(value: ir.Value) -> Uses:
    return tuple((use.node, use.idx) for use in value.uses())
