"""Pools over windows of 1, 2 or 3 dimensions, and over everything."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from qpipe.model.operators.registry import Ints, ints, operator
from qpipe.model.operators.window import Window, padded, window

_MAX: dict[int, Callable[..., Tensor]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_MAX_INDICES: dict[int, Callable[..., tuple[Tensor, Tensor]]] = {
    1: F.max_pool1d_with_indices,
    2: F.max_pool2d_with_indices,
    3: F.max_pool3d_with_indices,
}
_AVERAGE: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _extended(place: Window, spatial: tuple[int, ...], ceil_mode: int) -> Window:
    """`place` with the ends moved so that flooring gives as many windows as ONNX's rule.

    A window that would start behind the input and its padding does not count.
    """
    if not ceil_mode:
        return place
    ends = []
    for i, size in enumerate(spatial):
        reach = (place.kernel[i] - 1) * place.dilations[i] + 1
        total = size + place.begins[i] + place.ends[i]
        count = math.ceil((total - reach) / place.strides[i]) + 1
        if (count - 1) * place.strides[i] >= size + place.begins[i]:
            count -= 1
        ends.append(place.ends[i] + max(0, (count - 1) * place.strides[i] + reach - total))
    return replace(place, ends=tuple(ends))


@operator("MaxPool", more="indices")
def max_pool(
    x: Tensor,
    *,
    kernel_shape: tuple[int, ...],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: tuple[int, ...] | None = None,
    pads: tuple[int, ...] | None = None,
    storage_order: int = 0,
    strides: tuple[int, ...] | None = None,
    indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The largest of each window; with `indices` also where it stands in the flat x."""
    spatial = tuple(x.shape[2:])
    place = _extended(window(spatial, kernel_shape, strides, dilations, pads, auto_pad), spatial, ceil_mode)
    dtype = x.dtype
    x = x if x.is_floating_point() else x.double()
    if indices:
        values, where = _max_with_indices(x, place, storage_order)
        return values.to(dtype), where
    padding = place.begins
    if not place.symmetric or any(2 * p > k for p, k in zip(padding, place.kernel, strict=True)):
        x, padding = padded(x, place.begins, place.ends, -math.inf), (0,) * len(padding)
    pooled = _MAX[len(kernel_shape)](x, place.kernel, place.strides, padding, place.dilations)
    return pooled.to(dtype)


def _max_with_indices(x: Tensor, place: Window, storage_order: int) -> tuple[Tensor, Tensor]:
    """Values and flat positions, column major within the spatial dimensions with storage_order 1."""
    wide = padded(x, place.begins, place.ends, -math.inf)
    values, flat = _MAX_INDICES[len(place.kernel)](wide, place.kernel, place.strides, 0, place.dilations)
    coordinates = []
    for size, begin in zip(reversed(wide.shape[2:]), reversed(place.begins), strict=True):
        coordinates.append(flat % size - begin)
        flat = flat // size
    spatial = tuple(x.shape[2:])
    position = torch.zeros_like(flat)
    ordered = list(zip(reversed(coordinates), spatial, strict=True))
    for coordinate, size in reversed(ordered) if storage_order else ordered:
        position = position * size + coordinate
    images = torch.arange(x.shape[0] * x.shape[1], device=x.device).reshape(x.shape[:2] + (1,) * len(spatial))
    return values, position + images * math.prod(spatial)


@operator("AveragePool")
def average_pool(
    x: Tensor,
    *,
    kernel_shape: tuple[int, ...],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: tuple[int, ...] | None = None,
    pads: tuple[int, ...] | None = None,
    strides: tuple[int, ...] | None = None,
) -> Tensor:
    """The mean of each window, over the padding too with `count_include_pad`."""
    spatial = tuple(x.shape[2:])
    base = window(spatial, kernel_shape, strides, dilations, pads, auto_pad)
    place = _extended(base, spatial, ceil_mode)
    rank = len(kernel_shape)
    plain = place == base and place.symmetric and set(place.dilations) == {1}
    if plain and all(2 * p <= k for p, k in zip(place.begins, place.kernel, strict=True)):
        return _AVERAGE[rank](
            x, place.kernel, place.strides, place.begins, count_include_pad=bool(count_include_pad)
        )
    ones = torch.ones((1, 1, *spatial), dtype=x.dtype, device=x.device)
    inside = padded(ones, base.begins, base.ends, float(count_include_pad))
    beyond = tuple(e - b for e, b in zip(place.ends, base.ends, strict=True))
    counts = _window_sums(padded(inside, (0,) * rank, beyond), place)
    return _window_sums(padded(x, place.begins, place.ends), place) / counts


def _window_sums(x: Tensor, place: Window) -> Tensor:
    """The sum of each window of x, which is padded already."""
    flat = x.reshape(-1, 1, *x.shape[2:])
    kernel = torch.ones((1, 1, *place.kernel), dtype=x.dtype, device=x.device)
    sums = _CONV[len(place.kernel)](flat, kernel, None, place.strides, 0, place.dilations)
    return sums.reshape(x.shape[:2] + sums.shape[2:])


@operator("LpPool")
def lp_pool(
    x: Tensor,
    *,
    kernel_shape: tuple[int, ...],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: tuple[int, ...] | None = None,
    p: int = 2,
    pads: tuple[int, ...] | None = None,
    strides: tuple[int, ...] | None = None,
) -> Tensor:
    """The p-norm of each window."""
    spatial = tuple(x.shape[2:])
    place = _extended(window(spatial, kernel_shape, strides, dilations, pads, auto_pad), spatial, ceil_mode)
    return _window_sums(padded(x.abs() ** p, place.begins, place.ends), place) ** (1.0 / p)


@operator("GlobalAveragePool")
def global_average_pool(x: Tensor) -> Tensor:
    """The mean over all spatial dimensions, kept with size 1."""
    return x.mean(dim=tuple(range(2, x.ndim)), keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(x: Tensor) -> Tensor:
    """The maximum over all spatial dimensions, kept with size 1."""
    return x.amax(dim=tuple(range(2, x.ndim)), keepdim=True)


@operator("GlobalLpPool")
def global_lp_pool(x: Tensor, *, p: int = 2) -> Tensor:
    """The p-norm over all spatial dimensions, kept with size 1."""
    return (x.abs() ** p).sum(dim=tuple(range(2, x.ndim)), keepdim=True) ** (1.0 / p)


@operator("MaxUnpool", numbers=(2,))
def max_unpool(
    x: Tensor,
    indices: Tensor,
    output_shape: Ints = None,
    *,
    kernel_shape: tuple[int, ...],
    pads: tuple[int, ...] | None = None,
    strides: tuple[int, ...] | None = None,
) -> Tensor:
    """x put back to where `indices` say it came from, zeros elsewhere; the inverse of MaxPool's two outputs.

    A larger `output_shape` widens the result at its ends."""
    rank = len(kernel_shape)
    steps, given = strides or (1,) * rank, pads or (0,) * (2 * rank)
    spatial = tuple(
        (x.shape[2 + i] - 1) * steps[i] + kernel_shape[i] - given[i] - given[rank + i] for i in range(rank)
    )
    shape = (*x.shape[:2], *spatial)
    flat = x.new_zeros(math.prod(shape)).scatter(0, indices.reshape(-1), x.reshape(-1))
    result = flat.reshape(shape)
    if output_shape is None:
        return result
    ends = tuple(wanted - size for wanted, size in zip(ints(output_shape)[2:], spatial, strict=True))
    return padded(result, (0,) * rank, ends)


@operator("Col2Im", numbers=(1, 2))
def col2im(
    x: Tensor,
    image_shape: Ints,
    block_shape: Ints,
    *,
    dilations: tuple[int, ...] | None = None,
    pads: tuple[int, ...] | None = None,
    strides: tuple[int, ...] | None = None,
) -> Tensor:
    """Blocks x (N, C prod(block), L) added up where they lie in an image: (N, C, image)."""
    image, block = ints(image_shape), ints(block_shape)
    place = window(image, block, strides, dilations, pads, "NOTSET")
    wide = tuple(b + size + e for b, size, e in zip(place.begins, image, place.ends, strict=True))
    flat = torch.zeros((1, 1), dtype=torch.int64, device=x.device)
    for size, k, step, gap in zip(wide, block, place.strides, place.dilations, strict=True):
        count = (size - (k - 1) * gap - 1) // step + 1
        taps = torch.arange(k, device=x.device) * gap
        starts = torch.arange(count, device=x.device) * step
        along = taps[:, None] + starts
        flat = (flat[:, None, :, None] * size + along[None, :, None, :]).reshape(flat.shape[0] * k, -1)
    parts = x.reshape(x.shape[0], -1, flat.numel())
    summed = parts.new_zeros((*parts.shape[:2], math.prod(wide)))
    summed = summed.index_add(2, flat.reshape(-1), parts)
    return padded(
        summed.reshape(*parts.shape[:2], *wide),
        tuple(-n for n in place.begins),
        tuple(-n for n in place.ends),
    )
