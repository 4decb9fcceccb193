"""Grids in numpy: what an encoding is, how it follows from a range, and the arithmetic of rounding onto it.

    q  = clip(round_half_even(x / scale) + zero_point, qmin, qmax)        quantize
    x' = (q - zero_point) * scale                                        dequantize

in float32, operation by operation as ONNX's QuantizeLinear and DequantizeLinear prescribe and onnxruntime
computes. A division by the scale, never a multiplication by its reciprocal: the two differ in the last bit,
and so flip codes.

Source: ONNX operators QuantizeLinear and DequantizeLinear, opset 21.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qpipe.errors import InputError
from qpipe.numerics.scheme import Granularity, TensorScheme, code_bounds

Array = npt.NDArray[Any]
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
_LARGEST_SCALE = float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class Encoding:
    """The grid of one tensor; arrays are read-only.

    `scale` is float32 and `zero_point` int32, both of shape () per tensor, (C,) per channel along `axis`, or
    the tensor's own shape with the size along `axis` divided by `block_size` (rounded up) per block. `frozen`
    says that the weights on this grid have been tuned, so nobody may choose the grid again. `free_sign`: signed codes
    that may be mirrored under each scale (`grid: signed_max`). Mirrored ones, which a file has with a negative scale
    and the zero point 0, are here those with the positive scale and the zero point -1: the same values.
    Compare with `same_grid`, not with ==. Raises ValueError where the parts do not fit together.
    """

    bitwidth: int
    signed: bool
    symmetric: bool
    scale: Array
    zero_point: Array
    axis: int | None = None
    block_size: int | None = None
    frozen: bool = False
    free_sign: bool = False

    def __post_init__(self) -> None:
        scale = _read_only(self.scale, np.float32)
        zero_point = _read_only(self.zero_point, np.int32)
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "zero_point", zero_point)
        if self.bitwidth not in range(2, 33):
            raise ValueError(f"an encoding's bitwidth must lie in 2..32, got {self.bitwidth}.")
        if scale.shape != zero_point.shape:
            raise ValueError(f"scale has shape {scale.shape}, but zero_point has {zero_point.shape}.")
        if not bool(np.all(np.isfinite(scale) & (scale > 0))):
            raise ValueError("every scale must be finite and above 0.")
        if zero_point.size and not self.qmin <= zero_point.min() <= zero_point.max() <= self.qmax:
            raise ValueError(f"every zero_point must lie in {self.qmin}..{self.qmax}.")
        if self.free_sign and not (self.signed and bool(np.all((zero_point == 0) | (zero_point == -1)))):
            raise ValueError("codes of free sign are signed, with zero points 0 or -1.")
        self._check_shape()

    def _check_shape(self) -> None:
        if self.axis is None:
            if self.block_size is not None or self.scale.ndim != 0:
                raise ValueError(f"without axis the scale is one number, got shape {self.scale.shape}.")
        elif self.axis < 0:
            raise ValueError(f"an encoding's axis counts from the front, got {self.axis}.")
        elif self.block_size is None:
            if self.scale.ndim != 1:
                raise ValueError(f"per channel the scales have shape (C,), got {self.scale.shape}.")
        elif self.block_size < 1 or self.scale.ndim <= self.axis:
            raise ValueError(
                f"a per-block encoding needs block_size >= 1 and the tensor's own rank, "
                f"got block_size {self.block_size}, axis {self.axis}, scales of shape {self.scale.shape}."
            )

    @property
    def qmin(self) -> int:
        """The smallest integer code of the type, -2^(bitwidth-1) or 0."""
        return code_bounds(self.bitwidth, self.signed)[0]

    @property
    def qmax(self) -> int:
        """The largest integer code of the type, 2^(bitwidth-1) - 1 or 2^bitwidth - 1."""
        return code_bounds(self.bitwidth, self.signed)[1]

    @property
    def granularity(self) -> Granularity:
        """per_tensor, per_channel or per_block."""
        if self.axis is None:
            return "per_tensor"
        return "per_channel" if self.block_size is None else "per_block"

    def to_json(self) -> dict[str, Any]:
        """A plain JSON value that holds the grid bit for bit: `Encoding(**value)` is one like it."""
        return {
            "bitwidth": self.bitwidth,
            "signed": self.signed,
            "symmetric": self.symmetric,
            "scale": self.scale.tolist(),
            "zero_point": self.zero_point.tolist(),
            "axis": self.axis,
            "block_size": self.block_size,
            "frozen": self.frozen,
            "free_sign": self.free_sign,
        }


def same_grid(a: Encoding, b: Encoding) -> bool:
    """Whether both put every tensor onto the same values with the same codes; `frozen` does not count."""
    return (
        (a.bitwidth, a.signed, a.axis, a.block_size) == (b.bitwidth, b.signed, b.axis, b.block_size)
        and np.array_equal(a.scale, b.scale)
        and np.array_equal(a.zero_point, b.zero_point)
    )


def encoding_from_range(
    lo: npt.ArrayLike, hi: npt.ArrayLike, scheme: TensorScheme, axis: int | None = None, name: str = ""
) -> Encoding:
    """The grid of `scheme` that covers [lo, hi], widened so that zero is exactly representable.

    `lo` and `hi` have the shape of the scale to be: () per tensor, (C,) per channel, the tensor's shape with
    the blocked axis counted in blocks per block.

        symmetric, grid max             scale = max(|lo|, |hi|) / qmax; unsigned from 0 up when lo >= 0
        symmetric, grid full_range      scale = max(|lo|, |hi|) / -qmin; hi may saturate, a step too early
        symmetric, grid signed_max      the same; zero point -1 where hi > |lo|, and then lo may: these are the
                                        codes -1 - q of zero point 0, mirrored
        asymmetric                      scale = (hi - lo) / (qmax - qmin)

    A scale of 0 becomes the smallest normal; at the other end of float32 it is so small that every code stands for
    a finite number. `auto` is max here.
    Raises InputError, with the tensor's `name`, for a bound that is not finite.
    """
    if not bool(np.all(np.isfinite(lo) & np.isfinite(hi))):
        raise InputError(f"The range of {_tensor(name)} is nan or infinite, so it cannot be quantized.")
    scale, zero_point = grid_from_range(np.asarray(lo), np.asarray(hi), scheme)
    return Encoding(
        bitwidth=scheme.bitwidth,
        signed=scheme.signed,
        symmetric=scheme.symmetric,
        scale=scale,
        zero_point=zero_point,
        axis=None if scheme.granularity == "per_tensor" else axis,
        block_size=scheme.block_size if scheme.granularity == "per_block" else None,
        free_sign=scheme.grid == "signed_max",
    )


def grid_from_range(lo: Array, hi: Array, scheme: TensorScheme) -> tuple[Array, Array]:
    """The scales (float32) and zero points of `encoding_from_range`, in the shape of the finite `lo` and `hi`."""
    low, high = np.minimum(lo, 0.0, dtype=np.float64), np.maximum(hi, 0.0, dtype=np.float64)
    qmin, qmax = code_bounds(scheme.bitwidth, scheme.signed)
    if scheme.symmetric:
        middle = np.where(scheme.signed | (low >= 0.0), 0, 1 << (scheme.bitwidth - 1))
        if scheme.grid == "signed_max":
            middle = np.where(high > -low, -1, 0)
        steps = -qmin if scheme.grid in ("full_range", "signed_max") else qmax - middle
        scale = usable_scale(np.maximum(-low, high) / steps, scheme.power_of_two)
        zero_point = middle
    else:
        scale = usable_scale((high - low) / (qmax - qmin), scheme.power_of_two)
        zero_point = np.clip(np.rint(qmin - low / scale), qmin, qmax)
    scale = _finite(scale, np.maximum(zero_point - qmin, qmax - zero_point), scheme.power_of_two)
    return scale, np.broadcast_to(zero_point, scale.shape)


def usable_scale(scale: Array, power_of_two: bool = False) -> npt.NDArray[np.float32]:
    """`scale` as float32, kept within the normal numbers; with `power_of_two` rounded up to the next one."""
    bounded = np.clip(np.asarray(scale, np.float64), SMALLEST_SCALE, _LARGEST_SCALE)
    if power_of_two:
        mantissa, exponent = np.frexp(bounded.astype(np.float32))
        bounded = np.ldexp(1.0, np.minimum(np.where(mantissa == 0.5, exponent - 1, exponent), 127))
    return bounded.astype(np.float32)


def _finite(scale: Array, steps: Array, power_of_two: bool) -> npt.NDArray[np.float32]:
    """`scale`, or the largest one of which `steps` are no infinity."""
    if np.max(scale, initial=0.0) * np.max(steps, initial=1.0) < 0.5 * _LARGEST_SCALE:
        return scale
    # One place down: the product must not round up to it.
    largest = np.nextafter((_LARGEST_SCALE / steps).astype(np.float32), np.float32(0))
    if power_of_two:
        largest = np.ldexp(np.float32(0.5), np.frexp(largest)[1])
    return np.asarray(np.minimum(scale, largest), np.float32)


def broadcast(e: Encoding, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Scale and zero point of `e` in a shape that broadcasts against a tensor of `shape`.

    Raises ValueError when the tensor has other channels or blocks than the encoding.
    """
    return spread(e.scale, e, shape), spread(e.zero_point, e, shape)


def spread(parameter: Array, e: Encoding, shape: tuple[int, ...]) -> Array:
    """`parameter`, which has one element for each scale of `e`, in a shape that broadcasts against a tensor of `shape`.

    Raises ValueError when the tensor has other channels or blocks than the encoding.
    """
    if e.axis is None:
        return parameter
    if e.axis >= len(shape):
        raise ValueError(f"an encoding along axis {e.axis} does not fit a tensor of shape {shape}.")
    if e.block_size is None:
        if parameter.shape != (shape[e.axis],):
            raise ValueError(f"{parameter.size} scales along axis {e.axis} do not fit the shape {shape}.")
        target = [1] * len(shape)
        target[e.axis] = -1
        return parameter.reshape(target)
    blocks = list(shape)
    blocks[e.axis] = -(-shape[e.axis] // e.block_size)
    if parameter.shape != tuple(blocks):
        raise ValueError(
            f"scales {parameter.shape} in blocks of {e.block_size} do not fit the shape {shape}."
        )
    return parameter.take(np.arange(shape[e.axis]) // e.block_size, axis=e.axis)


def quantize(x: Array, e: Encoding, name: str = "") -> npt.NDArray[np.int32]:
    """The integer codes of `x`, int32, in qmin..qmax. Raises InputError, with the `name`, for a nan."""
    x = np.asarray(x, np.float32)
    refuse_nan(x, name)
    scale, zero_point = broadcast(e, x.shape)
    with np.errstate(over="ignore"):
        steps = np.rint(x / scale)
    # The bounds of 32 bits are no float32 numbers: clip those in float64.
    wide = steps.astype(np.float64) if e.bitwidth > 16 else steps
    clipped = np.clip(wide, e.qmin - zero_point, e.qmax - zero_point)
    return np.asarray(clipped.astype(np.int32) + zero_point, np.int32)


def dequantize(q: Array, e: Encoding) -> npt.NDArray[np.float32]:
    """The float32 values that the integer codes `q` stand for."""
    q = np.asarray(q)
    scale, zero_point = broadcast(e, q.shape)
    return np.asarray((q.astype(np.int32) - zero_point).astype(np.float32) * scale, np.float32)


def quantize_dequantize(x: Array, e: Encoding, name: str = "") -> npt.NDArray[np.float32]:
    """`x` rounded onto the grid, float32. Raises InputError, with the tensor's `name`, for a nan."""
    return dequantize(quantize(x, e, name), e)


def refuse_nan(x: Array, name: str = "") -> None:
    """Raises InputError, with the tensor's `name` and how many there are, when `x` holds a nan."""
    # One pass without a temporary of x's size: a nan anywhere makes the minimum nan.
    if x.size and np.isnan(np.min(x)):
        count = int(np.isnan(x).sum())
        raise InputError(
            f"There is nan in {count} of {x.size} elements of {_tensor(name)}: it cannot be quantized."
        )


def _tensor(name: str) -> str:
    return f"tensor '{name}'" if name else "the tensor"


def _read_only(value: npt.ArrayLike, dtype: type[np.generic]) -> Array:
    array: Array = np.array(value, dtype=dtype)
    array.setflags(write=False)
    return array
