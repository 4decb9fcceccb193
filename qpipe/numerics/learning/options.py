"""How to learn: iterations, rates by kind, schedule, when to look, when to stop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Optimizer = Literal["adam", "signsgd"]
Schedule = Literal["cosine", "linear", "constant"]
RATES: Mapping[str, float] = {"weight": 5e-3, "scale": 1e-3, "bias": 1e-3, "act_scale": 1e-3, "norm": 1e-3}
"""Weights in steps of their grids; the logarithms of scales; biases and normalizations in their own units."""


@dataclass(frozen=True)
class LearningOptions:
    """A kind of parameter that `rates` leaves out, or whose rate is 0, stays as it is.

    `schedule` takes every rate from its value to 0, or leaves it. `sampling` random draws each batch anew; in_order
    goes through the samples again and again. `early_stop` counts the looks without a gain after which to stop, 0 never
    stops; a look follows every `check_every` iterations (None: a tenth), sees the hard result on the held-out samples,
    at most `check_samples`. `at_once` samples of a batch run through together (None: all), and their gradients add up:
    the same step, in less memory. `hold_out` is the share of samples only looked at; 0 looks at those learned on.
    `lr_adjust` (threshold, rate) takes another rate for weights where the loss before the first step lies above the
    threshold. `reg_param`, `beta_range`, `warm_start` belong to the rectified sigmoid: the weight of its penalty, the
    exponent's way, and the share of iterations without it.
    """

    iterations: int = 300
    batch_size: int = 32
    rates: Mapping[str, float] = field(default_factory=lambda: dict(RATES))
    optimizer: Optimizer = "adam"
    schedule: Schedule = "cosine"
    sampling: Literal["random", "in_order"] = "random"
    hold_out: float = 0.15
    check_every: int | None = None
    check_samples: int = 256
    early_stop: int = 0
    at_once: int | None = None
    lr_adjust: tuple[float, float] | None = None
    reg_param: float = 0.01
    beta_range: tuple[float, float] = (20.0, 2.0)
    warm_start: float = 0.2

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise ValueError(f"iterations must be at least 0, got {self.iterations}.")
        if not 0.0 <= self.warm_start < 1.0:
            raise ValueError(f"warm_start must be at least 0 and below 1, got {self.warm_start}.")
        if not 0.0 <= self.hold_out < 1.0:
            raise ValueError(f"hold_out must be at least 0 and below 1, got {self.hold_out}.")
        if min(self.batch_size, self.check_samples, self.check_every or 1, self.at_once or 1) < 1:
            raise ValueError("batch_size, check_every, check_samples and at_once must be at least 1.")
        if any(not rate >= 0.0 for rate in self.rates.values()):
            raise ValueError(f"a learning rate must be at least 0, got {dict(self.rates)}.")

    @property
    def every(self) -> int:
        """The iterations between two looks."""
        return self.check_every or max(1, self.iterations // 10)

    def share_of_rate(self, iteration: int) -> float:
        """What the schedule leaves of every rate at `iteration`, counted from 0."""
        done = iteration / max(1, self.iterations)
        if self.schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done))
        return 1.0 - done if self.schedule == "linear" else 1.0

    def beta_at(self, iteration: int) -> float | None:
        """The exponent of the penalty at `iteration`; None during the warm start."""
        if iteration < self.warm_start * self.iterations:
            return None
        return beta_at(iteration, self.iterations, self.beta_range, self.warm_start)


def beta_at(iteration: int, iterations: int, beta_range: tuple[float, float], warm_start: float) -> float:
    """The exponent beta: `beta_range[0]` until the warm start ends, then a half cosine down to `beta_range[1]`."""
    start, end = beta_range
    warm = warm_start * iterations
    share = min(max((iteration - warm) / (iterations - warm), 0.0), 1.0)
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * share))
