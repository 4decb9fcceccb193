"""Values that live on the CPU because they come from shapes, and their way to the device."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


@lru_cache(maxsize=4096)
def host_constant(data: Any, dtype: torch.dtype) -> Tensor:
    """A small constant of shape arithmetic, on the CPU; the same tensor each time, never written to."""
    return torch.tensor(data, dtype=dtype)


def to_device(x: Tensor, like: Tensor) -> Tensor:
    """x where `like` lives."""
    return x.to(like.device)
