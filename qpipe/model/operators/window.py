"""Sliding windows: where they lie, for convolutions and pools of any rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """A kernel's sizes, strides, dilations and padding, one number per spatial dimension."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def symmetric(self) -> bool:
        """Whether torch's own padding can express it."""
        return self.begins == self.ends


def window(
    spatial: tuple[int, ...],
    kernel: tuple[int, ...],
    strides: tuple[int, ...] | None,
    dilations: tuple[int, ...] | None,
    pads: tuple[int, ...] | None,
    auto_pad: str,
) -> Window:
    """The window over an input of size `spatial`, with ONNX's defaults filled in and auto_pad resolved."""
    rank = len(kernel)
    steps = strides or (1,) * rank
    gaps = dilations or (1,) * rank
    if auto_pad in ("NOTSET", ""):
        given = pads or (0,) * (2 * rank)
        return Window(kernel, steps, gaps, tuple(given[:rank]), tuple(given[rank:]))
    if auto_pad == "VALID":
        return Window(kernel, steps, gaps, (0,) * rank, (0,) * rank)
    begins, ends = [], []
    for size, k, step, gap in zip(spatial, kernel, steps, gaps, strict=True):
        total = max(0, (-(-size // step) - 1) * step + (k - 1) * gap + 1 - size)
        small = total // 2
        begins.append(small if auto_pad == "SAME_UPPER" else total - small)
        ends.append(total - begins[-1])
    return Window(kernel, steps, gaps, tuple(begins), tuple(ends))


def padded(x: Tensor, begins: tuple[int, ...], ends: tuple[int, ...], value: float = 0.0) -> Tensor:
    """x with its last len(begins) dimensions widened by `value`; negative amounts crop."""
    if not any(begins) and not any(ends):
        return x
    return F.pad(
        x, [n for pair in zip(reversed(begins), reversed(ends), strict=True) for n in pair], value=value
    )
