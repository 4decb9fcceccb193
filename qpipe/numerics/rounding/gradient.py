"""AdaRound by gradient: which way to round each weight, learned on a layer's or a block's outputs.

    w^ = s (clip(floor(W / s) + h(V) + z, qmin, qmax) - z)      h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)
    loss = mean over positions of |y^ - y|^2  +  reg_param * sum(1 - |2 h(V) - 1|^beta)

V starts where h(V) is the fraction of W / s, so that w^ = W; y are float outputs after the activation that
follows. For the first `warm_start` of the iterations the second term is off; then beta falls along a cosine,
from `beta_range[0]`, which leaves h alone between 0 and 1, to `beta_range[1]`, which drives it to either end.

Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", arXiv 2004.10568.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qpipe.numerics.grid import Encoding, broadcast

STRETCH = (-0.1, 1.1)
"""Where the sigmoid is stretched to before it is clipped, so that 0 and 1 are reached."""

Forward = Callable[[dict[str, Tensor], Tensor], Tensor]
"""(weights by name, a batch of inputs) -> outputs after the activation."""

Batches = Callable[[Tensor], tuple[Tensor, Tensor]]
"""(indices of samples, int64 on the CPU) -> (their inputs x^, their float targets)."""


@dataclass(frozen=True)
class GradientOptions:
    """The defaults are the paper's and AIMET's. `iterations` None: 10000, or 15000 below 8 bits.

    `early_stop` counts the checks without a gain of the reconstruction error after which to stop and to
    restore the best; 0 never stops. A check follows every `check_every` iterations once the warm start is
    over, rounds for good and looks at the same samples each time, at most `check_samples`.
    """

    iterations: int | None = None
    batch_size: int = 32
    learning_rate: float = 1e-3
    reg_param: float = 0.01
    beta_range: tuple[float, float] = (20.0, 2.0)
    warm_start: float = 0.2
    early_stop: int = 0
    check_every: int = 250
    check_samples: int = 256

    def __post_init__(self) -> None:
        if self.iterations is not None and self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}.")
        if not 0.0 <= self.warm_start < 1.0:
            raise ValueError(f"warm_start must be at least 0 and below 1, got {self.warm_start}.")
        if self.batch_size < 1 or self.check_every < 1 or self.check_samples < 1:
            raise ValueError("batch_size, check_every and check_samples must be at least 1.")

    def iterations_for(self, bitwidth: int) -> int:
        """The iterations to run for weights of `bitwidth`."""
        return self.iterations if self.iterations is not None else (10000 if bitwidth >= 8 else 15000)


@dataclass(frozen=True, eq=False)
class GradientResult:
    """`weights` on their grids, by name, and a JSON `report`.

    error_before and error_after are the squared error of the outputs over their mean square, with nearest
    rounding and with the result, over all samples; `iterations` that were run; `changed`, the share of
    weights that differ from nearest; kept: "gradient", or "nearest" where the result was worse than that.
    """

    weights: dict[str, Tensor]
    report: dict[str, Any]


class Rounding:
    """The rounding of one weight: its floor, and V, which decides between it and the next step."""

    def __init__(self, weight: Tensor, e: Encoding) -> None:
        scale, zero_point = broadcast(e, tuple(weight.shape))
        self.scale = torch.tensor(scale, device=weight.device)
        self.bitwidth = e.bitwidth
        z = torch.tensor(zero_point, device=weight.device, dtype=torch.float32)
        self._bounds = e.qmin - z, e.qmax - z
        steps = weight.detach().float() / self.scale
        self.floor = steps.floor()
        self._nearest = steps.round().clamp(*self._bounds)
        self.v = start_of(steps - self.floor).requires_grad_()

    def soft(self) -> Tensor:
        """w^, differentiable in V."""
        return (self.floor + rectified_sigmoid(self.v)).clamp(*self._bounds) * self.scale

    def hard(self, v: Tensor | None = None) -> Tensor:
        """w^ with every h(V) rounded for good: a point of the grid."""
        up = (self.v if v is None else v).detach() >= 0.0
        return (self.floor + up).clamp(*self._bounds) * self.scale

    def nearest(self) -> Tensor:
        """Nearest rounding on the same grid."""
        return self._nearest * self.scale


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)."""
    low, high = STRETCH
    return (torch.sigmoid(v) * (high - low) + low).clamp(0.0, 1.0)


def start_of(fraction: Tensor) -> Tensor:
    """The V for which h(V) is `fraction`, in 0..1."""
    low, high = STRETCH
    return -torch.log((high - low) / (fraction - low) - 1.0)


def beta_at(iteration: int, iterations: int, beta_range: tuple[float, float], warm_start: float) -> float:
    """The exponent beta: `beta_range[0]` until the warm start ends, then a half cosine down to `beta_range[1]`."""
    start, end = beta_range
    warm = warm_start * iterations
    share = min(max((iteration - warm) / (iterations - warm), 0.0), 1.0)
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * share))


def rounding_loss(v: Tensor, iteration: int, iterations: int, options: GradientOptions) -> Tensor | None:
    """reg_param * sum(1 - |2 h(V) - 1|^beta); None during the warm start."""
    if iteration < options.warm_start * iterations:
        return None
    beta = beta_at(iteration, iterations, options.beta_range, options.warm_start)
    return options.reg_param * (1.0 - (2.0 * rectified_sigmoid(v) - 1.0).abs().pow(beta)).sum()


def regularized(
    error: Tensor, variables: Sequence[Tensor], iteration: int, iterations: int, options: GradientOptions
) -> Tensor:
    """`error` plus the rounding loss of every V, once the warm start is over."""
    loss = error
    for v in variables:
        term = rounding_loss(v, iteration, iterations, options)
        loss = loss if term is None else loss + term
    return loss


def samples_of(inputs: Tensor, targets: Tensor) -> Batches:
    """Batches out of two tensors, samples first."""
    return lambda index: (inputs[index.to(inputs.device)], targets[index.to(targets.device)])


def optimize(
    roundings: Mapping[str, Rounding],
    forward: Forward,
    batches: Batches,
    samples: int,
    *,
    options: GradientOptions | None = None,
    channel_axis: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> GradientResult:
    """Learns the roundings of one layer, or of several weights of a block, together.

    The reconstruction error sums over `channel_axis` of the outputs and takes the mean over the rest. Each
    iteration draws `batch_size` of the `samples` from a generator of its own with `seed`. `progress(done,
    total)` is called about a hundred times.
    """
    options = options or GradientOptions()
    total = options.iterations_for(min(r.bitwidth for r in roundings.values()))
    watch = _Watch(roundings, forward, batches, samples, options)
    draw = torch.Generator().manual_seed(seed)
    variables = [r.v for r in roundings.values()]
    adam = torch.optim.Adam(variables, lr=options.learning_rate)
    done = 0
    for iteration in range(total):
        index = torch.randperm(samples, generator=draw)[: options.batch_size]
        x, target = batches(index)
        y = forward({name: r.soft() for name, r in roundings.items()}, x)
        error = (y - target).square().sum(channel_axis).mean()
        loss = regularized(error, variables, iteration, total, options)
        adam.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        adam.step()
        done = iteration + 1
        if progress is not None and (done % max(1, total // 100) == 0 or done == total):
            progress(done, total)
        if watch.stops(done, total):
            break
    return watch.result(done)


class _Watch:
    """Judges hard roundings on fixed samples: when to stop, what to restore, whether nearest was better."""

    def __init__(
        self,
        roundings: Mapping[str, Rounding],
        forward: Forward,
        batches: Batches,
        samples: int,
        options: GradientOptions,
    ) -> None:
        self.roundings, self.forward, self.batches = roundings, forward, batches
        self.samples, self.options = samples, options
        self._best: dict[str, Tensor] | None = None
        self._least, self._idle = math.inf, 0

    def stops(self, done: int, total: int) -> bool:
        """Whether the reconstruction error has not fallen for `early_stop` checks."""
        o = self.options
        if not o.early_stop or done <= o.warm_start * total or done % o.check_every:
            return False
        error = self.error(self._hard(), min(self.samples, o.check_samples))
        if error < self._least:
            self._best = {name: r.v.detach().clone() for name, r in self.roundings.items()}
            self._least, self._idle = error, 0
        else:
            self._idle += 1
        return self._idle >= o.early_stop

    def result(self, done: int) -> GradientResult:
        """The weights to keep, and the report."""
        last = self._hard()
        if self._best is not None and self._least < self.error(
            last, min(self.samples, self.options.check_samples)
        ):
            last = {name: r.hard(self._best[name]) for name, r in self.roundings.items()}
        nearest = {name: r.nearest() for name, r in self.roundings.items()}
        before, after = self.error(nearest, self.samples), self.error(last, self.samples)
        kept = "gradient" if after <= before else "nearest"
        weights = last if after <= before else nearest
        changed = sum(int((weights[n] != nearest[n]).sum()) for n in weights)
        size = sum(w.numel() for w in weights.values())
        report = {
            "error_before": before,
            "error_after": min(before, after),
            "iterations": done,
            "changed": changed / size,
            "kept": kept,
        }
        return GradientResult(weights, report)

    def error(self, weights: dict[str, Tensor], samples: int) -> float:
        """The outputs' squared error over their mean square, on the first samples."""
        error = energy = 0.0
        with torch.no_grad():
            for start in range(0, samples, self.options.batch_size):
                x, target = self.batches(torch.arange(start, min(start + self.options.batch_size, samples)))
                y = self.forward(weights, x)
                error += float((y - target).square().sum(dtype=torch.float64))
                energy += float(target.square().sum(dtype=torch.float64))
        return error / energy if energy > 0 else error

    def _hard(self) -> dict[str, Tensor]:
        return {name: r.hard() for name, r in self.roundings.items()}
