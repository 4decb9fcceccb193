"""Spectra: Fourier transforms and mel filters. Complex numbers are a last dimension of 2, as ONNX has them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qpipe.model.operators.registry import TORCH_DTYPES, Ints, ints, number, operator

Number = Tensor | float | tuple[float, ...]


def _complex(x: Tensor) -> Tensor:
    """(…, 1) or (…, 2) as a complex tensor (…)."""
    return torch.view_as_complex(x.contiguous()) if x.shape[-1] == 2 else x.squeeze(-1)


@operator("DFT", numbers=(1, 2))
def dft(x: Tensor, length: Ints = None, axis: Ints = None, *, inverse: int = 0, onesided: int = 0) -> Tensor:
    """The discrete Fourier transform of x (…, 1 or 2) along `axis`, over `length` values.

    `onesided` keeps the first half of a spectrum, or takes one and gives back real numbers (…, 1)."""
    dim = (-2 if axis is None else ints(axis)[0]) % x.ndim
    count = None if length is None else ints(length)[0]
    values = _complex(x)
    if inverse and onesided:
        real: Tensor = torch.fft.irfft(values, count, dim)
        return real.unsqueeze(-1)
    if inverse:
        transform: Callable[..., Tensor]
        transform = _NumpyInverse.apply if x.device.type == "cpu" else torch.fft.ifft
        return torch.view_as_real(transform(values, count, dim))
    spectrum = torch.view_as_real(torch.fft.fft(values, count, dim))
    return spectrum.narrow(dim, 0, spectrum.shape[dim] // 2 + 1) if onesided else spectrum


class _NumpyInverse(torch.autograd.Function):
    """numpy's inverse transform: ONNX's cases are computed by it, and ask for its rounding where 0 belongs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, count: int | None, dim: int) -> Tensor:
        ctx.length, ctx.dim = values.shape[dim], dim
        return torch.from_numpy(np.fft.ifft(values.numpy(), count, dim))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The conjugate transpose: the forward transform / count, cut or filled up with zeros as x was."""
        (gradient,) = gradients
        count = gradient.shape[ctx.dim]
        spectrum = (torch.fft.fft(gradient, dim=ctx.dim) / count).narrow(ctx.dim, 0, min(count, ctx.length))
        missing = ctx.length - spectrum.shape[ctx.dim]
        if missing:
            shape = [missing if d == ctx.dim else n for d, n in enumerate(spectrum.shape)]
            spectrum = torch.cat([spectrum, spectrum.new_zeros(shape)], ctx.dim)
        return spectrum, None, None


@operator("STFT", numbers=(1, 3))
def stft(
    x: Tensor, step: Ints, window: Tensor | None = None, length: Ints = None, *, onesided: int = 1
) -> Tensor:
    """The spectra (N, frames, bins, 2) of windows of x (N, T, 1 or 2) that begin `step` apart."""
    count = x.shape[1] if window is None else window.shape[0]
    count = count if length is None else ints(length)[0]
    frames = _complex(x).unfold(1, count, ints(step)[0])
    frames = frames if window is None else frames * window
    spectrum = torch.view_as_real(torch.fft.fft(frames, dim=-1))
    return spectrum[:, :, : count // 2 + 1] if onesided else spectrum


@operator("MelWeightMatrix", numbers=(0, 1, 2, 3, 4))
def mel_weight_matrix(
    bins: Number, length: Number, rate: Number, low: Number, high: Number, *, output_datatype: int = 1
) -> Tensor:
    """The triangles (length // 2 + 1, bins) that turn a spectrum into mel bands, edges at whole frequencies."""
    count, size = int(number(bins)), int(number(length))
    first, last = (2595 * math.log10(1 + float(number(edge)) / 700) for edge in (low, high))
    mels = first + torch.arange(count + 2, dtype=torch.float64) * ((last - first) / (count + 2))
    edges = ((size + 1) * (700 * (10 ** (mels / 2595) - 1)) / number(rate)).floor()
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    place = torch.arange(size // 2 + 1, dtype=torch.float64).unsqueeze(1)
    rising = (place - left) / torch.where(centre > left, centre - left, 1.0)
    falling = (right - place) / torch.where(right > centre, right - centre, 1.0)
    up, down = (place >= left) & (place < centre), (place > centre) & (place < right)
    weights = torch.where(up, rising, 0.0) + torch.where(down, falling, 0.0) + (place == centre)
    return weights.to(TORCH_DTYPES[output_datatype])
