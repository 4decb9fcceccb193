"""8-bit floats: what a number becomes in one of them, and what of one too large.

Source: ONNX operator Cast, opset 21, the table of float8 conversions.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT8 = frozenset({torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz})


def converted(x: Tensor, dtype: torch.dtype, saturate: int = 1) -> Tensor:
    """x in `dtype`. In an 8-bit float what is too large is the largest number, or without `saturate` infinite,
    or nan in a type without infinity."""
    if dtype not in FLOAT8 or x.dtype in FLOAT8:
        return x.to(dtype)
    wide = x.to(torch.float32)
    if saturate:
        largest = torch.finfo(dtype).max
        return wide.clamp(-largest, largest).to(dtype)
    if (
        dtype == torch.float8_e4m3fn
    ):  # where torch saturates; 464 lies between 448 and the number that would follow
        wide = torch.where(wide.abs() > 464, torch.nan, wide)
    return wide.to(dtype)
