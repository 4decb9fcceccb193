"""What a whole network is trained for: losses against numpy, and losses of a user's that are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qpipe.errors import InputError, StageError
from qpipe.methods.learning.objective import Objective, Targets, checked, cross_entropy, variances_of

RNG = np.random.default_rng(0)


def logarithms(y: Any, axis: int) -> Any:
    shifted = y - y.max(axis, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis, keepdims=True))


@pytest.mark.parametrize(("shape", "axis"), [((6, 5), -1), ((6, 3, 5), -1), ((6, 5, 2, 2), 1)])
def test_distillation_is_what_the_formulas_say(shape: tuple[int, ...], axis: int) -> None:
    y, target = RNG.normal(size=(2, *shape))
    given, wanted = torch.tensor(y), Targets([torch.tensor(target)])
    names, variances = ("y",), variances_of({"y": target})
    squared = float(Objective(names, variances).loss([given], wanted))
    assert squared == pytest.approx(np.square(y - target).mean() / np.square(target - target.mean(0)).mean())
    p, q = logarithms(target / 2.0, axis), logarithms(y / 2.0, axis)
    kl = float(Objective(names, variances, "kl", 2.0).loss([given], wanted))
    assert kl == pytest.approx(4.0 * (np.exp(p) * (p - q)).sum(axis).mean())


@pytest.mark.parametrize(("shape", "axis"), [((6, 5), -1), ((6, 3, 5), -1), ((6, 5, 2, 2), 1)])
def test_cross_entropy_leaves_out_labels_below_zero(shape: tuple[int, ...], axis: int) -> None:
    y = RNG.normal(size=shape)
    rows = np.moveaxis(logarithms(y, axis), axis, -1)
    labels = RNG.integers(-1, 5, rows.shape[:-1])
    chosen = labels.reshape(-1) >= 0
    wanted = -rows.reshape(-1, 5)[chosen, labels.reshape(-1)[chosen]].mean()
    assert float(cross_entropy(torch.tensor(y), torch.tensor(labels))) == pytest.approx(wanted)


def test_a_share_mixes_and_the_judge_weighs_by_samples() -> None:
    y, target, labels = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    parts = [Objective(("y",), (2.0,), share=s, task=cross_entropy) for s in (0.0, 1.0, 0.25)]
    task, distilled, mixed = (float(each.loss([y], Targets([target], labels))) for each in parts)
    assert mixed == pytest.approx(0.25 * distilled + 0.75 * task)
    error, count = parts[2].judge([y], Targets([target], labels))
    assert (float(error), float(count)) == (pytest.approx(4 * mixed), 4.0)


def test_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"Labels of shape \[4, 2\] do not fit outputs of shape \[4, 3\]"):
        cross_entropy(torch.zeros(4, 3), torch.zeros(4, 2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda y, labels: 0.5, "returned float"),
        (lambda y, labels: y, "one number"),
        (lambda y, labels: y.detach().sum(), "without a gradient"),
        (lambda y, labels: y[:, 9].sum(), "failed: IndexError"),
    ],
)
def test_what_is_no_loss_is_said(function: Callable[[Any, Tensor], Any], said: str) -> None:
    y = torch.zeros(4, 3, requires_grad=True)
    with pytest.raises(StageError, match=f"my:loss .*{said}"):
        checked(function, "my:loss")(y, torch.zeros(4))
    assert checked(lambda y, labels: (y + 1).sum(), "my:loss")(y, torch.zeros(4)).item() == 12.0
