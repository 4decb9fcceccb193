"""Operators that make, take or compute on integer codes, exactly: the sums are integers, rounding is half to even.

    QuantizeLinear          q = clip(round(x / scale) + zero_point, qmin, qmax)
    DequantizeLinear        x = (q - zero_point) * scale
    ConvInteger, …          sum (x - x_zero_point) (w - w_zero_point) in 32 bits
    QLinearConv, …          clip(round(sum * (x_scale * w_scale / y_scale)) + y_zero_point, qmin, qmax)

The sums run in float64, which holds every integer below 2^53, on any device; torch has no integer convolution
on a GPU. No gradient passes a code.

Source: ONNX operators of these names, opset 21; where ONNX's reference and onnxruntime differ (rounding with or
before the zero point, the scale of nothing but zeros), as onnxruntime does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qpipe.model.operators.conv import conv
from qpipe.model.operators.registry import FLOAT8, TORCH_DTYPES, converted, operator

_UINT8 = 2


@operator("QuantizeLinear")
def quantize_linear(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    saturate: int = 1,
) -> Tensor:
    """The codes of x, in the type of the zero point; in an 8-bit float, x / scale as `converted` has it."""
    dtype = TORCH_DTYPES[output_dtype or _UINT8] if zero_point is None else zero_point.dtype
    ratio = x / _spread(scale, x, axis, block_size)
    if dtype in FLOAT8:
        return converted(ratio, dtype, saturate)
    zero = None if zero_point is None else _spread(zero_point.to(torch.int32), x, axis, block_size)
    return _codes(torch.round(ratio), zero, dtype)


@operator("DequantizeLinear")
def dequantize_linear(
    x: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, axis: int = 1, block_size: int = 0
) -> Tensor:
    """What the codes x stand for."""
    codes = x.to(scale.dtype if x.dtype in FLOAT8 else torch.int32)
    if zero_point is not None and x.dtype not in FLOAT8:
        codes = codes - _spread(zero_point.to(torch.int32), x, axis, block_size)
    return codes.to(scale.dtype) * _spread(scale, x, axis, block_size)


@operator("DynamicQuantizeLinear", many=True)
def dynamic_quantize_linear(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The uint8 codes of x on the grid of its own range, 0 included; the scale; the zero point."""
    low, high = torch.aminmax(x)
    low, high = low.clamp(max=0), high.clamp(min=0)
    width = high - low
    scale = torch.where(width == 0, 1.0, width / 255)
    zero_point = torch.round(-low / scale).clamp(0, 255).to(torch.uint8)
    return quantize_linear(x, scale, zero_point), scale, zero_point


@operator("ConvInteger")
def conv_integer(
    x: Tensor,
    w: Tensor,
    x_zero_point: Tensor | None = None,
    w_zero_point: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: tuple[int, ...] | None = None,
    group: int = 1,
    kernel_shape: tuple[int, ...] | None = None,
    pads: tuple[int, ...] | None = None,
    strides: tuple[int, ...] | None = None,
) -> Tensor:
    """The convolution of the codes without their zero points, int32."""
    weights = _centred(w, _per_channel(w_zero_point, w.ndim))
    sums = conv(
        _centred(x, x_zero_point), weights,
        auto_pad=auto_pad, dilations=dilations, group=group, pads=pads, strides=strides,
    )  # fmt: skip
    return _in_32_bits(sums)


@operator("MatMulInteger")
def matmul_integer(
    a: Tensor, b: Tensor, a_zero_point: Tensor | None = None, b_zero_point: Tensor | None = None
) -> Tensor:
    """The product of the codes without their zero points, int32; a's may be per row, b's per column."""
    return _in_32_bits(torch.matmul(_centred(a, _per_row(a_zero_point)), _centred(b, b_zero_point)))


@operator("QLinearConv")
def qlinear_conv(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: tuple[int, ...] | None = None,
    group: int = 1,
    kernel_shape: tuple[int, ...] | None = None,
    pads: tuple[int, ...] | None = None,
    strides: tuple[int, ...] | None = None,
) -> Tensor:
    """The convolution of codes, in the codes of the output; the int32 bias has scale x_scale * w_scale."""
    sums = conv_integer(
        x, w, x_zero_point, w_zero_point,
        auto_pad=auto_pad, dilations=dilations, group=group, pads=pads, strides=strides,
    )  # fmt: skip
    rank = x.ndim - 2
    if bias is not None:
        sums = sums + bias.reshape((-1,) + (1,) * rank)
    scale = x_scale * w_scale / y_scale
    scale = scale.reshape((-1,) + (1,) * rank) if scale.numel() > 1 else scale
    return _codes(torch.round(sums.to(scale.dtype) * scale), y_zero_point, y_zero_point.dtype)


@operator("QLinearMatMul")
def qlinear_matmul(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
) -> Tensor:
    """The product of codes, in the codes of the output."""
    sums = matmul_integer(a, b, a_zero_point, b_zero_point)
    rows = _per_row(a_scale)
    assert rows is not None
    scale = rows * b_scale / y_scale
    return _codes(torch.round(sums.to(scale.dtype) * scale), y_zero_point, y_zero_point.dtype)


def _codes(steps: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Whole numbers of steps as codes: clipped before the zero point is added, so that nothing overflows."""
    info = torch.iinfo(dtype)
    if zero_point is None:
        return steps.clamp(info.min, info.max).to(torch.int32).to(dtype)
    zero = zero_point.to(torch.int32)
    return (steps.clamp(info.min - zero, info.max - zero).to(torch.int32) + zero).to(dtype)


def _spread(parameter: Tensor, x: Tensor, axis: int, block_size: int) -> Tensor:
    """A scale or zero point (one, per channel along `axis`, or per block) in a shape that broadcasts against x."""
    if parameter.numel() == 1 and not block_size:
        return parameter.reshape(())
    axis = axis + x.ndim if axis < 0 else axis
    if not block_size:
        return parameter.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    block = torch.arange(x.shape[axis], device=x.device) // block_size
    return parameter.index_select(axis, block)


def _centred(codes: Tensor, zero_point: Tensor | None) -> Tensor:
    exact = codes.to(torch.float64)
    return exact if zero_point is None else exact - zero_point.to(torch.float64)


def _in_32_bits(sums: Tensor) -> Tensor:
    """Exact sums as int32; what does not fit wraps around, as 32-bit accumulators do."""
    return sums.to(torch.int64).to(torch.int32)


def _per_channel(zero_point: Tensor | None, rank: int) -> Tensor | None:
    if zero_point is None or zero_point.numel() == 1:
        return zero_point
    return zero_point.reshape((-1,) + (1,) * (rank - 1))


def _per_row(parameter: Tensor | None) -> Tensor | None:
    """What belongs to the rows of a matrix as a column; more dimensions say themselves where they belong."""
    if parameter is None or parameter.numel() == 1 or parameter.ndim != 1:
        return parameter
    return parameter.reshape(-1, 1)
