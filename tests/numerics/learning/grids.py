"""Grids of every kind on one small weight, for tests of what is learned on them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from qpipe.numerics.grid import Encoding, dequantize, quantize, quantize_dequantize
from qpipe.numerics.observers import weight_encoding
from qpipe.numerics.scheme import TensorScheme

SHAPE = (6, 10, 3)


def weight(seed: int = 0) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32))


def _of(w: Tensor, axis: int = 0, **given: object) -> Encoding:
    plain = {"bitwidth": 4, "signed": True, "symmetric": True, "granularity": "per_channel", "observer": "mse"}
    return weight_encoding(w.numpy(), TensorScheme(**{**plain, **given}), axis)  # type: ignore[arg-type]


def grids(w: Tensor) -> dict[str, Encoding]:
    """Symmetric and not, per tensor, channel and block, mirrored, unsigned, 2 to 16 bits, too small a range."""
    channel = _of(w)
    return {
        "tensor": _of(w, granularity="per_tensor"),
        "channel": channel,
        "channel 1": _of(w, axis=1),
        "block": _of(w, axis=1, granularity="per_block", block_size=4),
        "asymmetric": _of(w, symmetric=False),
        "asymmetric block": _of(w, axis=1, symmetric=False, granularity="per_block", block_size=5),
        "unsigned": _of(w, signed=False, symmetric=False, granularity="per_tensor"),
        "mirrored": _of(w, grid="signed_max", bitwidth=3),
        "2 bits": _of(w, bitwidth=2),
        "8 bits": _of(w, bitwidth=8),
        "16 bits": _of(w, bitwidth=16, observer="minmax"),
        "saturating": replace(channel, scale=channel.scale * np.float32(0.3)),
    }


GRIDS = tuple(grids(weight()))


def far_codes(w: Tensor, e: Encoding, seed: int = 1) -> Tensor:
    """A weight on the grid whose codes lie up to three steps from the nearest ones."""
    moved = quantize(w.numpy(), e) + np.random.default_rng(seed).integers(-3, 4, size=SHAPE)
    codes = np.clip(moved, e.qmin, e.qmax)
    return torch.tensor(dequantize(codes, e))


def nearest(w: Tensor, e: Encoding) -> Tensor:
    return torch.tensor(quantize_dequantize(w.numpy(), e))
