"""What one QuantizeLinear or DequantizeLinear says: its grid, and where its codes come from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qpipe.errors import InputError
from qpipe.model.network.invariants import constant
from qpipe.model.network.naming import Names
from qpipe.numerics.grid import SMALLEST_SCALE, Encoding, broadcast, dequantize, spread
from qpipe.numerics.scheme import code_bounds

Array = npt.NDArray[Any]
BITWIDTH = "qpipe.bitwidth"
"""Key in the metadata of a QDQ node: the bitwidth of its codes where their type is wider."""
_INTEGERS = {
    ir.DataType.INT2: (2, True), ir.DataType.UINT2: (2, False),
    ir.DataType.INT4: (4, True), ir.DataType.UINT4: (4, False),
    ir.DataType.INT8: (8, True), ir.DataType.UINT8: (8, False),
    ir.DataType.INT16: (16, True), ir.DataType.UINT16: (16, False),
    ir.DataType.INT32: (32, True),
}  # fmt: skip
_ON_CODES = re.compile(
    r"QLinear\w+|QGemm|QAttention|\w+Integer|MatMulIntegerToFloat|Dynamic\w*Quantize\w+|QEmbed\w+"
    r"|MatMulNBits|GatherBlockQuantized|MatMulBnb4|QMoE|QOrdered\w+"
)


def quantizes(node: ir.Node) -> bool:
    """Whether `node` is a QuantizeLinear."""
    return node.op_type == "QuantizeLinear" and node.domain in ("", "ai.onnx", "com.microsoft")


def dequantizes(node: ir.Node) -> bool:
    """Whether `node` is a DequantizeLinear."""
    return node.op_type == "DequantizeLinear" and node.domain in ("", "ai.onnx", "com.microsoft")


def on_codes(node: ir.Node) -> bool:
    """Whether `node` computes on integer codes (QLinearConv, MatMulInteger, …)."""
    return node.domain in ("", "ai.onnx", "com.microsoft") and bool(_ON_CODES.fullmatch(node.op_type))


def computes_codes(node: ir.Node) -> bool:
    """Whether `node` makes, takes or computes on integer codes."""
    return quantizes(node) or dequantizes(node) or on_codes(node)


def standard_nodes(model: ir.Model) -> None:
    """QuantizeLinear and DequantizeLinear of com.microsoft become ONNX's, in place."""
    for graph in model.graphs():
        for node in graph:
            if quantizes(node) or dequantizes(node):
                node.domain = ""
                node.attributes.pop("precision", None)  # of opset 23; all is float32 here
    used = {node.domain for graph in model.graphs() for node in graph}
    for domain in [domain for domain in model.opset_imports if domain and domain not in used]:
        del model.opset_imports[domain]


def scale_sources(graph: ir.Graph) -> set[str]:
    """The initializers from which scales and zero points follow: constants, whoever calls them parameters."""
    stack = [value for node in graph if quantizes(node) or dequantizes(node) for value in node.inputs[1:]]
    seen: set[ir.Value | None] = {None}
    while stack:
        value = stack.pop()
        if value in seen or value is None:
            continue
        seen.add(value)
        producer = value.producer()
        stack += producer.inputs if producer is not None else ()
    return {str(value.name) for value in seen if value is not None and value.is_initializer()}


def has_constant_grid(node: ir.Node) -> bool:
    """Whether scale and zero point of `node` are constants, and its codes integers."""
    given = len(node.inputs) > 2 and node.inputs[2] is not None
    known = constant(node, 1) is not None and not (given and constant(node, 2) is None)
    return known and _code_type(node) in _INTEGERS


def has_grid(node: ir.Node) -> bool:
    """Whether the grid is also one for the whole tensor, as an activation's has to be."""
    scale = constant(node, 1)
    return scale is not None and scale.size == 1 and has_constant_grid(node)


def grid(node: ir.Node, rank: int | None = None) -> Encoding:
    """The constant grid of `node`; `rank` is that of its tensor, None for an activation, which has one scale.

    A negative scale, as onnxruntime's int4 weights have it, is that of the mirrored codes: its size, and the zero
    point counted from the other end. A scale of 0 of a constant, all of which it makes 0, is the smallest that there
    is. Raises InputError for a grid that cannot be."""
    scale, zero_point = constant(node, 1), constant(node, 2)
    assert scale is not None
    dtype = _code_type(node)
    bitwidth, signed = _INTEGERS[dtype]
    bitwidth = int(node.metadata_props.get(BITWIDTH, bitwidth))
    if rank is None and scale.size != 1:
        raise InputError(
            f"Node {node.name!r} ({node.op_type}) has {scale.size} scales for an activation; qpipe takes one."
        )
    zeros = np.zeros(scale.shape, np.int32) if zero_point is None else zero_point.astype(np.int32)
    single = scale.size == 1
    block = 0 if single or scale.ndim < 2 else node.attributes.get_int("block_size", 0)
    axis = node.attributes.get_int("axis", 1)
    assert axis is not None
    if rank is not None:
        axis = min(axis + rank if axis < 0 else axis, rank - 1)
    try:
        shape = () if single else scale.shape
        zeros = np.broadcast_to(zeros.reshape(-1)[0] if zeros.size == 1 else zeros, shape)
        scale = scale.astype(np.float32).reshape(shape)
        zeros = np.where(scale < 0, sum(code_bounds(bitwidth, signed)) - zeros, zeros)
        size = (
            np.abs(scale) if rank is None else np.where(scale == 0, np.float32(SMALLEST_SCALE), np.abs(scale))
        )
        free = signed and bool(np.any(scale < 0) and np.all((zeros == 0) | (zeros == -1)))
        symmetric = free or bool(np.all(zeros == (0 if signed else 1 << (bitwidth - 1))))
        along = None if single else axis
        return Encoding(bitwidth, signed, symmetric, size, zeros, along, block or None, free_sign=free)
    except ValueError as error:
        raise InputError(
            f"The grid of node {node.name!r} ({node.op_type}) cannot be read: {error}"
        ) from error


def floats_of(codes: Array, node: ir.Node, encoding: Encoding) -> npt.NDArray[np.float32]:
    """What the constant `codes` stand for that `node` dequantizes, whose grid is `encoding`.

    Raises ValueError where they do not fit."""
    scale = constant(node, 1)
    assert scale is not None
    sign = spread(np.sign(scale).reshape(encoding.scale.shape), encoding, codes.shape)
    codes = np.where(sign < 0, encoding.qmin + encoding.qmax - codes, codes)
    return dequantize(np.where(sign == 0, broadcast(encoding, codes.shape)[1], codes), encoding)


def mirrored_codes(e: Encoding) -> Array:
    """Where a weight's grid is written with a negative scale, zero point 0 and the codes -1 - q, of its scale's
    shape: at the zero points of -1 of one whose sign is free."""
    return np.asarray((e.zero_point == -1) & e.free_sign)


def initializer(name: str, array: Array) -> ir.Value:
    """An initializer of no graph yet."""
    return ir.val(name, const_value=ir.Tensor(np.asarray(array, order="C"), name=name))


def dequantized(
    graph: ir.Graph,
    node: ir.Node,
    triple: Sequence[ir.Value | None],
    axis: int,
    names: Names,
    block_size: int = 0,
) -> ir.Value:
    """The floats that codes, scale and zero point stand for, by a DequantizeLinear in front of `node`."""
    codes = triple[0]
    assert codes is not None
    name = names.fresh(f"{codes.name}__dequantized")
    floats = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=codes.shape)
    attributes = {"axis": axis, **({"block_size": block_size} if block_size else {})}
    given = [value for value in triple if value is not None]
    made = ir.node("DequantizeLinear", given, attributes, outputs=[floats], name=f"{name}_node")
    graph.insert_before(node, made)
    return floats


def _code_type(node: ir.Node) -> ir.DataType:
    """The type of the codes: that of the zero point, of the codes, or uint8, in this order."""
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    if zero_point is not None and zero_point.const_value is not None:
        return zero_point.const_value.dtype
    if dequantizes(node):
        codes = node.inputs[0]
        assert codes is not None
        tensor = codes.const_value
        return tensor.dtype if tensor is not None else codes.dtype or ir.DataType.UINT8
    given = node.attributes.get_int("output_dtype", 0)
    return ir.DataType(given) if given else ir.DataType.UINT8


def clip_of_codes(node: ir.Node) -> tuple[int, int] | None:
    """The bounds of a Clip of integers; None for any other node."""
    if node.op_type != "Clip" or node.domain:
        return None
    low, high = constant(node, 1), constant(node, 2)
    if low is None or high is None or low.dtype.kind not in "iu":
        return None
    return int(low), int(high)


def bound_of_codes(node: ir.Node) -> Array | None:
    """The codes with which a Min or Max compares its first input; None for any other node."""
    if node.op_type not in ("Min", "Max") or node.domain or len(node.inputs) != 2:
        return None
    codes = constant(node, 1)
    return None if codes is None or codes.dtype.kind not in "iu" else codes


def clips_to_grid(clip: ir.Node, quantizer: ir.Node) -> bool:
    """Whether a Clip in front of a QuantizeLinear of narrow codes has the ends of its grid for bounds."""
    encoding, low, high = grid(quantizer), constant(clip, 1), constant(clip, 2)
    codes = np.array([encoding.qmin, encoding.qmax], np.float64) - encoding.zero_point
    bounds = (codes * encoding.scale).astype(np.float32)
    return low is not None and high is not None and np.array_equal(bounds, [low, high])


def narrowed(encoding: Encoding, bounds: tuple[int, int]) -> int | None:
    """The bitwidth whose codes are exactly within `bounds`; None where there is none."""
    for bitwidth in range(2, encoding.bitwidth + 1):
        if code_bounds(bitwidth, encoding.signed) == bounds:
            return bitwidth
    return None
