"""Resize: interpolation along one dimension after another, each output a weighted sum of a few inputs."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from qpipe.model.operators.registry import Ints, ints, operator

Floats = Tensor | tuple[float, ...] | None


@operator("Resize", numbers=(1, 2, 3))
def resize(
    x: Tensor,
    roi: Floats = None,
    scales: Floats = None,
    sizes: Ints = None,
    *,
    antialias: int = 0,
    axes: tuple[int, ...] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    """x with the dimensions `axes` scaled by `scales` or brought to `sizes`.

    Interpolated integers are cut off towards zero, as in onnxruntime; ONNX's reference rounds them."""
    dims = tuple(range(x.ndim)) if axes is None else tuple(a % x.ndim for a in axes)
    factors, lengths = _extent([x.shape[d] for d in dims], _floats(scales), sizes, keep_aspect_ratio_policy)
    region = _floats(roi) or (0.0,) * len(dims) + (1.0,) * len(dims)
    kind = (mode, nearest_mode, coordinate_transformation_mode, cubic_coeff_a, exclude_outside, antialias)
    crop = coordinate_transformation_mode == "tf_crop_and_resize"
    y = x if x.is_floating_point() or mode == "nearest" else x.to(torch.float32)
    for i, dim in enumerate(dims):
        if x.shape[dim] == lengths[i] and factors[i] == 1.0 and not crop:
            continue
        span = (region[i], region[i + len(dims)]) if crop else (0.0, 1.0)
        index, weight, outside = _taps(x.shape[dim], lengths[i], factors[i], span, *kind)
        y = _combined(y, dim, index, weight)
        if crop and bool(outside.any()):
            view = outside.to(y.device).reshape([-1 if d == dim else 1 for d in range(y.ndim)])
            y = torch.where(view, torch.full_like(y, extrapolation_value), y)
    return y.to(x.dtype)


def _floats(value: Floats) -> tuple[float, ...] | None:
    """`value` as Python numbers; None where it is absent or empty, which ONNX treats alike."""
    if value is None:
        return None
    return tuple(value.tolist() if isinstance(value, Tensor) else value) or None


def _extent(
    lengths: list[int], scales: tuple[float, ...] | None, sizes: Ints, policy: str
) -> tuple[list[float], list[int]]:
    """The factor and the resulting length of each dimension."""
    if scales is not None:
        return list(scales), [math.floor(n * s) for n, s in zip(lengths, scales, strict=True)]
    wanted = ints(sizes)
    factors = [w / n for w, n in zip(wanted, lengths, strict=True)]
    if policy != "stretch":
        common = min(factors) if policy == "not_larger" else max(factors)
        return [common] * len(lengths), [math.floor(common * n + 0.5) for n in lengths]
    return factors, list(wanted)


def _combined(x: Tensor, dim: int, index: Tensor, weight: Tensor | None) -> Tensor:
    """Sum over taps t of weight[:, t] * x[index[:, t]] along `dim`; without weights the one tap as it is."""
    index = index.to(x.device)
    if weight is None:
        return x.index_select(dim, index[:, 0])
    view = [-1 if d == dim else 1 for d in range(x.ndim)]
    parts = [
        x.index_select(dim, index[:, t]) * weight[:, t].to(x.device, x.dtype).reshape(view)
        for t in range(index.shape[1])
    ]
    return sum(parts[1:], parts[0])


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # whoever asks first, they may be kept for a gradient later
def _taps(
    length: int,
    out: int,
    factor: float,
    span: tuple[float, float],
    mode: str,
    nearest_mode: str,
    transformation: str,
    a: float,
    exclude_outside: int,
    antialias: int,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Input positions (out, taps), their weights, and which outputs look outside the input."""
    position = _positions(length, out, factor, span, transformation)
    outside = (position < 0) | (position > length - 1)
    if mode == "nearest":
        return _nearest(position, nearest_mode).clamp(0, length - 1).unsqueeze(1), None, outside
    shrink = min(1.0, factor) if antialias else 1.0
    radius = 1 if mode == "linear" else 2
    first = math.floor(-radius / shrink) + 1
    offsets = torch.arange(first, 2 - first)
    base = position.floor()
    distance = ((offsets - (position - base).unsqueeze(1)) * shrink).abs()
    weight = (1 - distance).clamp(0, 1) if mode == "linear" else _cubic(distance, a)
    index = base.long().unsqueeze(1) + offsets
    if exclude_outside:
        weight = torch.where((index < 0) | (index >= length), 0.0, weight)
    return index.clamp(0, length - 1), weight / weight.sum(1, keepdim=True), outside


def _positions(
    length: int, out: int, factor: float, span: tuple[float, float], transformation: str
) -> Tensor:
    """The place in the input of each output element, float64."""
    i = torch.arange(out, dtype=torch.float64)
    match transformation:
        case "asymmetric":
            return i / factor
        case "align_corners":
            return i * (length - 1) / (out - 1) if out > 1 else i
        case "pytorch_half_pixel":
            return (i + 0.5) / factor - 0.5 if out > 1 else i
        case "tf_crop_and_resize":
            start, end = span
            if out > 1:
                return start * (length - 1) + i * (end - start) * (length - 1) / (out - 1)
            return 0.5 * (start + end) * (length - 1) + i
        case "half_pixel_symmetric":
            shift = length / 2 * (1 - out / (factor * length))
            return shift + (i + 0.5) / factor - 0.5
        case _:
            return (i + 0.5) / factor - 0.5


def _nearest(position: Tensor, nearest_mode: str) -> Tensor:
    match nearest_mode:
        case "round_prefer_floor":
            return (position - 0.5).ceil().long()
        case "round_prefer_ceil":
            return (position + 0.5).floor().long()
        case "floor":
            return position.floor().long()
        case _:
            return position.ceil().long()


def _cubic(d: Tensor, a: float) -> Tensor:
    """Keys' cubic convolution kernel at distance d."""
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return torch.where(d <= 1, near, torch.where(d < 2, far, torch.zeros_like(d)))


@operator("GridSample")
def grid_sample(
    x: Tensor, grid: Tensor, *, align_corners: int = 0, mode: str = "linear", padding_mode: str = "zeros"
) -> Tensor:
    """x sampled at the places in `grid`, which run from -1 to 1."""
    names = {"linear": "bilinear", "cubic": "bicubic"}
    return torch.nn.functional.grid_sample(
        x, grid, names.get(mode, mode), padding_mode, align_corners=bool(align_corners)
    )


@operator("AffineGrid", numbers=(1,))
def affine_grid(theta: Tensor, size: Ints, *, align_corners: int = 0) -> Tensor:
    """The sampling grid of an affine transformation."""
    return torch.nn.functional.affine_grid(theta, list(ints(size)), align_corners=bool(align_corners))


@operator("CenterCropPad", numbers=(1,))
def center_crop_pad(x: Tensor, shape: Ints, *, axes: tuple[int, ...] | None = None) -> Tensor:
    """x cropped or padded with zeros around its centre to `shape` along `axes`."""
    wanted = ints(shape)
    for axis, size in zip(range(x.ndim) if axes is None else axes, wanted, strict=True):
        dim = axis % x.ndim
        extra = size - x.shape[dim]
        if extra < 0:
            x = x.narrow(dim, -extra // 2, size)
        elif extra:
            pads = [0] * (2 * x.ndim)
            pads[2 * (x.ndim - 1 - dim)] = extra // 2
            pads[2 * (x.ndim - 1 - dim) + 1] = extra - extra // 2
            x = torch.nn.functional.pad(x, pads)
    return x
