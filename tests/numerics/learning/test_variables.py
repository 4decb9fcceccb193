"""An activation's step size and tensors that stay in float."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from qpipe.numerics.fake_quantize import fake_quantize
from qpipe.numerics.grid import Encoding, same_grid
from qpipe.numerics.learning.variables import Free, Step

GRID = Encoding(4, False, False, np.array(0.3), np.array(5))


def test_a_step_is_what_it_was_and_the_logarithm_is_learned_by_lsq() -> None:
    step = Step(GRID, features=50)
    assert torch.equal(step.value(), torch.tensor(GRID.scale))
    assert same_grid(step.final()[1], GRID)
    x = torch.linspace(-3, 5, 200, dtype=torch.float64)
    toward = torch.cos(7 * x)
    scale = step.value().double()
    (fake_quantize(x, scale, torch.tensor(5), 0, 15) * toward).sum().backward()  # type: ignore[no-untyped-call]  # torch's
    assert step.u.grad is not None
    u, low, high = x / 0.3, -5.0, 10.0
    slope = torch.where(u.round() < low, low, torch.where(u.round() > high, high, u.round() - u))
    by_hand = float((toward * slope).sum()) * 0.3 / (50 * 15) ** 0.5
    assert float(step.u.grad) == pytest.approx(by_hand, rel=1e-5)
    with torch.no_grad():
        step.u += 0.5
    value, encoding = step.final()
    assert float(value) == float(encoding.scale) == pytest.approx(0.3 * np.exp(0.5), rel=1e-6)
    assert step.changed() == (0, 0)


def test_a_step_that_is_a_power_of_two_is_not_learned() -> None:
    with pytest.raises(ValueError, match="powers of two"):
        Step(replace(GRID, scale=np.array(0.25)))


def test_a_free_tensor_moves_by_its_unit() -> None:
    b = torch.tensor([0.1, -2.0, 30.0])
    free = Free(b, "norm", unit=torch.tensor([1.0, 2.0, 0.5]))
    assert torch.equal(free.hard(), b)
    assert free.final()[1] is None
    (p,) = free.parameters()["norm"]
    with torch.no_grad():
        p += 1.0
    torch.testing.assert_close(free.final()[0], torch.tensor([1.1, 0.0, 30.5]))
