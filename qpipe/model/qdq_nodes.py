"""What one QuantizeLinear or DequantizeLinear says: its grid, and where its codes come from."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qpipe.errors import InputError
from qpipe.model.rewrites import constant
from qpipe.numerics.grid import Encoding
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
    r"|MatMulNBits|MatMulBnb4|QMoE|QOrdered\w+"
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


def grid(node: ir.Node, rank: int | None = None) -> Encoding:
    """The grid of `node`; `rank` is that of its tensor, None for an activation, which has one scale.

    Raises InputError for a scale that is computed, a type that is no integer, or a grid that cannot be."""
    scale, zero_point = constant(node, 1), constant(node, 2)
    if scale is None or (len(node.inputs) > 2 and node.inputs[2] is not None and zero_point is None):
        raise InputError(
            f"The scale of node {node.name!r} ({node.op_type}) is computed while the model runs; qpipe reads "
            "static quantization, in which scales are constants."
        )
    dtype = _code_type(node)
    if dtype not in _INTEGERS:
        raise InputError(f"Node {node.name!r} ({node.op_type}) has codes of type {dtype.name}, no integers.")
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
        middle = 0 if signed else 1 << (bitwidth - 1)
        return Encoding(
            bitwidth, signed, bool(np.all(zeros == middle)), scale.astype(np.float32).reshape(shape), zeros,
            None if single else axis, block or None,
        )  # fmt: skip
    except ValueError as error:
        raise InputError(
            f"The grid of node {node.name!r} ({node.op_type}) cannot be read: {error}"
        ) from error


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


def narrowed(encoding: Encoding, bounds: tuple[int, int]) -> int | None:
    """The bitwidth whose codes are exactly within `bounds`; None where there is none."""
    for bitwidth in range(2, encoding.bitwidth + 1):
        if code_bounds(bitwidth, encoding.signed) == bounds:
            return bitwidth
    return None
