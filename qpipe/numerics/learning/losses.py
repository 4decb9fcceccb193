"""How far the outputs are from what they should be: what is minimized, and by what it is judged.

    mse           mean over positions of sum over channels of (y^ - y)^2
    fisher        the same of (y^ - y)^2 g^2, g the gradient of the task's loss in y of the float model
    divergence    T^2 KL(softmax(y / T) || softmax(y^ / T)), mean over positions; y are logits
    features      mean of (y^ - y)^2 / variance, one variance a tensor, so that each counts alike

Outputs and targets are one tensor, or as many of each; the loss is the sum over the pairs. Of what is judged by several
outputs none may lose: a sum alone gives one of them away where another gains more.

Source: Li et al., "BRECQ", arXiv 2102.05426 (fisher); Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural
Network", arXiv 1503.02531 (divergence).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Loss = Callable[[Any, Any], Tensor]
"""(outputs, targets) -> a number to be minimized, the mean over the batch."""

Judge = Callable[[Any, Any], tuple[Tensor, Tensor]]
"""(outputs, targets) -> an error and what it is a share of, sums over the batch, float64; or, of several outputs none
of which may lose, the errors by sample and output, (n, K), and what their sum is a share of."""


def mse(channel_axis: int = 1) -> Loss:
    """The squared error, summed over `channel_axis` (an output without that axis: over none), mean over the rest."""

    def loss(outputs: Any, targets: Any) -> Tensor:
        return total(_squared(y, target) / _positions(y, channel_axis) for y, target in pairs(outputs, targets))

    return loss


def fisher(channel_axis: int = 1) -> Loss:
    """The squared error weighted by squared gradients. Targets are pairs (y, g), each of the output's shape.

    g may have any scale: it is the same for all, and the caller's to choose.
    """

    def loss(outputs: Any, targets: Any) -> Tensor:
        listed = [outputs] if isinstance(outputs, Tensor) else outputs
        weighted = [targets] if isinstance(outputs, Tensor) else targets
        return total(
            _squared(y * gradient, target * gradient) / _positions(y, channel_axis)
            for y, (target, gradient) in zip(listed, weighted, strict=True)
        )

    return loss


def divergence(temperature: float = 1.0, class_axis: int = -1) -> Loss:
    """The divergence of the softmax from that of the targets, both logits, at `temperature`, times its square."""

    def loss(outputs: Any, targets: Any) -> Tensor:
        return total(_divergence(y, target, temperature, class_axis) for y, target in pairs(outputs, targets))

    return loss


def features(variances: Sequence[float]) -> Loss:
    """The mean squared error of each tensor over its variance, of which `variances` has one for each."""

    def loss(outputs: Any, targets: Any) -> Tensor:
        errors = [_squared(y, target) / max(1, y.numel()) for y, target in pairs(outputs, targets)]
        if len(errors) != len(variances):
            raise ValueError(f"{len(variances)} variances do not fit {len(errors)} outputs.")
        return total(error / variance for error, variance in zip(errors, variances, strict=True))

    return loss


def squared_error(outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """The judge by default: the squared error, and the squares of the targets."""
    both = list(pairs(outputs, targets))
    error = total((y - target).square().sum(dtype=torch.float64) for y, target in both)
    return error, total(target.square().sum(dtype=torch.float64) for _, target in both)


def by_sample(outputs: Any, targets: Any, variances: Sequence[float]) -> Tensor:
    """(n, K), float64: of each sample the mean squared error of each of K tensors over its variance."""
    rows = [_difference(y, target).square().reshape(len(y), -1).mean(1) for y, target in pairs(outputs, targets)]
    return torch.stack([row / variance for row, variance in zip(rows, variances, strict=True)], 1)


def loses(before: Tensor, after: Tensor) -> Tensor:
    """(K,), bool: which outputs err more than before by more than the noise, of errors (n, K) of the same n samples:
    their mean rises by more than its standard error."""
    rise = after - before
    noise = rise.std(0, correction=min(1, len(rise) - 1)) / math.sqrt(len(rise))
    return rise.mean(0) > noise


def judged_by(loss: Loss) -> Judge:
    """The judge whose error is the mean of `loss` over the samples."""

    def judge(outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        first = outputs if isinstance(outputs, Tensor) else outputs[0]
        count = torch.tensor(float(len(first)), dtype=torch.float64)
        return loss(outputs, targets).double().cpu() * count, count

    return judge


def pairs(outputs: Any, targets: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Each output with its target. Raises ValueError where there are not as many of each."""
    if isinstance(outputs, Tensor):
        outputs, targets = [outputs], [targets]
    return zip(outputs, targets, strict=True)


def total(terms: Iterable[Tensor]) -> Tensor:
    """The sum of some numbers, at least one."""
    first, *rest = terms
    for term in rest:
        first = first + term
    return first


def _squared(y: Tensor, target: Tensor) -> Tensor:
    """The squared error, in one pass each way. The shapes agree: a broadcast would be a mistake that nobody sees."""
    if y.shape != target.shape:
        raise ValueError(f"an output has shape {tuple(y.shape)}, its target {tuple(target.shape)}.")
    return torch.nn.functional.mse_loss(y, target, reduction="sum")


def _difference(y: Tensor, target: Tensor) -> Tensor:
    if y.shape != target.shape:
        raise ValueError(f"an output has shape {tuple(y.shape)}, its target {tuple(target.shape)}.")
    return y.double() - target.double()


def _positions(y: Tensor, channel_axis: int) -> int:
    """How many sums over channels there are."""
    channels = y.shape[channel_axis] if -y.ndim <= channel_axis < y.ndim else 1
    return max(1, y.numel() // max(1, channels))


def _divergence(y: Tensor, target: Tensor, temperature: float, axis: int) -> Tensor:
    reference = torch.log_softmax(target / temperature, axis)
    found = torch.log_softmax(y / temperature, axis)
    difference = (reference.exp() * (reference - found)).sum()
    return difference * (temperature * temperature / _positions(y, axis))
