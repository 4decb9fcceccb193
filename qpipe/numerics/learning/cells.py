"""A weight's grid in torch, for variables that learn on it: scales as the encoding has them, spread over the weight.

Codes are counted from the zero point here, so that a weight on the grid is code * scale: they lie in
qmin - z .. qmax - z, and mirrored or unsigned codes need no case of their own.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from qpipe.numerics.grid import SMALLEST_SCALE, Encoding

WIDEST = 16
"""The widest codes that float32 counts exactly with room for what is learned beside them."""


class Cells:
    """The grid of `encoding` on a weight of `shape`, in `dtype`: float32, or float64 where gradients are checked.

    scale: of the encoding's own shape. low, high: the bounds of the codes, in a shape that broadcasts against the
    weight. Raises ValueError for codes of more than 16 bits.
    """

    def __init__(self, encoding: Encoding, like: Tensor) -> None:
        if encoding.bitwidth > WIDEST:
            raise ValueError(f"codes of at most {WIDEST} bits can be learned, got {encoding.bitwidth}.")
        self.encoding, self.shape = encoding, tuple(like.shape)
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.scale = torch.tensor(encoding.scale, device=like.device).to(dtype)
        zero_point = self.spread(torch.tensor(encoding.zero_point, device=like.device).to(dtype))
        self.low, self.high = encoding.qmin - zero_point, encoding.qmax - zero_point
        self.step = self.spread(self.scale)

    def spread(self, value: Tensor) -> Tensor:
        """`value`, one for each scale, in a shape that broadcasts against the weight; differentiable."""
        axis, size = self.encoding.axis, self.encoding.block_size
        if axis is None:
            return value
        if size is None:
            return value.reshape([-1 if i == axis else 1 for i in range(len(self.shape))])
        inner = value.unsqueeze(axis + 1)
        repeated = inner.expand(*inner.shape[: axis + 1], size, *inner.shape[axis + 2 :])
        return repeated.flatten(axis, axis + 1).narrow(axis, 0, self.shape[axis])

    def steps(self, weight: Tensor) -> Tensor:
        """`weight` counted in steps of its grid."""
        return weight.detach().to(self.scale.dtype) / self.step

    def codes(self, weight: Tensor) -> Tensor:
        """The codes nearest to `weight`; of a weight on the grid, its own."""
        return torch.clamp(self.steps(weight).round_(), self.low, self.high)

    def final(self, codes: Tensor, scale: Tensor | None) -> tuple[Tensor, Encoding]:
        """float32 values that their encoding's quantizer leaves as they are, and the encoding, frozen.

        `scale` None keeps the scales bit for bit.
        """
        encoding = replace(self.encoding, frozen=True)
        if scale is not None:
            learned = scale.detach().float().clamp(min=SMALLEST_SCALE).cpu().numpy()
            encoding = replace(encoding, scale=learned)
        step = self.spread(torch.tensor(encoding.scale, device=codes.device))
        return (codes.detach().float() * step).add_(0.0), encoding  # no -0


def powers_of_two(encoding: Encoding) -> bool:
    """Whether every scale is a power of two, and must therefore stay as it is."""
    return bool(np.all(np.frexp(encoding.scale)[0] == 0.5))
