"""How far the outputs are from what they should be: what is minimized, and by what it is judged.

Outputs and targets are one tensor, or as many of each. Each loss is the sum over the pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Loss = Callable[[Any, Any], Tensor]
"""(outputs, targets) -> a number to be minimized, the mean over the batch."""

Judge = Callable[[Any, Any], tuple[Tensor, Tensor]]
"""(outputs, targets) -> an error and what it is a share of, sums over the batch, float64."""


def mse(channel_axis: int = 1) -> Loss:
    """The squared error, summed over `channel_axis`, mean over the rest."""

    def loss(outputs: Any, targets: Any) -> Tensor:
        return total((y - target).square().sum(channel_axis).mean() for y, target in pairs(outputs, targets))

    return loss


def squared_error(outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """The judge by default: the squared error, and the squares of the targets."""
    both = list(pairs(outputs, targets))
    error = total((y - target).square().sum(dtype=torch.float64) for y, target in both)
    return error, total(target.square().sum(dtype=torch.float64) for _, target in both)


def pairs(outputs: Any, targets: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Each output with its target."""
    if isinstance(outputs, Tensor):
        outputs, targets = [outputs], [targets]
    return zip(outputs, targets, strict=True)


def total(terms: Iterator[Tensor] | Sequence[Tensor]) -> Tensor:
    """The sum of some numbers, at least one."""
    first, *rest = terms
    for term in rest:
        first = first + term
    return first
