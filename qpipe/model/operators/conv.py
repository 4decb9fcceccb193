"""Convolutions and transposed convolutions over 1, 2 or 3 dimensions."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from qpipe.errors import InputError
from qpipe.model.operators.registry import operator
from qpipe.model.operators.window import padded, window

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


@operator("Conv")
def conv(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: tuple[int, ...] | None = None,
    group: int = 1,
    kernel_shape: tuple[int, ...] | None = None,
    pads: tuple[int, ...] | None = None,
    strides: tuple[int, ...] | None = None,
) -> Tensor:
    """x (N, C, …) convolved with w (O, C/group, …): (N, O, …)."""
    place = window(tuple(x.shape[2:]), tuple(w.shape[2:]), strides, dilations, pads, auto_pad)
    padding = place.begins
    if not place.symmetric:
        x, padding = padded(x, place.begins, place.ends), (0,) * len(place.begins)
    return _of_rank(_CONV, w)(x, w, b, place.strides, padding, place.dilations, group)


@operator("ConvTranspose")
def conv_transpose(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: tuple[int, ...] | None = None,
    group: int = 1,
    kernel_shape: tuple[int, ...] | None = None,
    output_padding: tuple[int, ...] | None = None,
    output_shape: tuple[int, ...] | None = None,
    pads: tuple[int, ...] | None = None,
    strides: tuple[int, ...] | None = None,
) -> Tensor:
    """x (N, C, …) with w (C, O/group, …), the gradient of a convolution: (N, O, …)."""
    rank = w.ndim - 2
    steps, gaps = strides or (1,) * rank, dilations or (1,) * rank
    extra = output_padding or (0,) * rank
    begins, ends = _transposed_pads(x, w, steps, gaps, extra, output_shape, pads, auto_pad)
    function = _of_rank(_TRANSPOSED, w)
    small = all(e < max(s, g) for e, s, g in zip(extra, steps, gaps, strict=True))
    if begins == ends and min(begins) >= 0 and small:
        return function(x, w, b, steps, begins, extra, group, gaps)
    # Whole, then cropped; an output padding lies behind the end, where only the bias reaches.
    whole = function(x, w, None, steps, 0, 0, group, gaps)
    cropped = padded(whole, tuple(-n for n in begins), tuple(o - n for o, n in zip(extra, ends, strict=True)))
    return cropped if b is None else cropped + b.reshape((-1,) + (1,) * rank)


def _transposed_pads(
    x: Tensor,
    w: Tensor,
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
    extra: tuple[int, ...],
    output_shape: tuple[int, ...] | None,
    pads: tuple[int, ...] | None,
    auto_pad: str,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How much of the whole result is cut off before and after, per spatial dimension."""
    rank = w.ndim - 2
    if output_shape is None and auto_pad in ("NOTSET", "", "VALID"):
        given = (0,) * (2 * rank) if pads is None or auto_pad == "VALID" else pads
        return tuple(given[:rank]), tuple(given[rank:])
    wanted = (
        output_shape[-rank:]
        if output_shape
        else tuple(n * s for n, s in zip(x.shape[2:], strides, strict=True))
    )
    begins, ends = [], []
    for i in range(rank):
        full = strides[i] * (x.shape[2 + i] - 1) + extra[i] + (w.shape[2 + i] - 1) * dilations[i] + 1
        total = full - wanted[i]
        begins.append(total // 2 if auto_pad == "SAME_UPPER" else total - total // 2)
        ends.append(total - begins[-1])
    return tuple(begins), tuple(ends)


def _of_rank(functions: dict[int, Callable[..., Tensor]], w: Tensor) -> Callable[..., Tensor]:
    rank = w.ndim - 2
    if rank not in functions:
        raise InputError(f"A convolution has 1 to 3 spatial dimensions, got {rank}.")
    return functions[rank]
