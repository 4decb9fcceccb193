"""An activation's step size and tensors that stay in float."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qpipe.numerics.fake_quantize import fake_quantize
from qpipe.numerics.grid import Encoding, same_grid
from qpipe.numerics.learning.variables import Ends, Free, Step

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


@pytest.mark.parametrize("which", ["step", "ends"])
@pytest.mark.parametrize("moved", [0.0, 0.11])
def test_gradients_are_those_of_differences_with_the_roundings_held(which: str, moved: float) -> None:
    """In float64. Held are what rounding adds to each code and, of ends, to the zero point."""
    step: Any = Step(GRID, features=50) if which == "step" else Ends(GRID)
    step.start = step.start.double()
    names = ("u",) if which == "step" else ("p", "q")
    for name in names:
        value = -moved / 2 if name == "p" else moved
        setattr(step, name, torch.full((), value, dtype=torch.float64, requires_grad=True))
    x = torch.linspace(-3, 6, 301, dtype=torch.float64)
    toward = torch.cos(7 * x)

    def grid() -> tuple[Tensor, Tensor]:
        return (step.value(), torch.tensor(5.0).double()) if which == "step" else tuple(step.value())

    s, z = grid()
    (fake_quantize(x, s, z, 0, 15) * toward).sum().backward()  # type: ignore[no-untyped-call]  # torch's
    with torch.no_grad():
        added = z.round() - z
        u = x / s
        codes = torch.clamp(u.round() + z.round(), 0, 15)
        inside, of_rounding = codes == u.round() + z.round(), u.round() - u
    assert 20 < int(inside.sum()) < 280

    def held() -> float:
        s, z = grid()
        return float((torch.where(inside, x + s * of_rounding, s * (codes - z - added)) * toward).sum())

    for name in names:
        parameter, ends = getattr(step, name), []
        for h in (1e-6, -1e-6):
            with torch.no_grad():
                parameter += h
                ends.append(held())
                parameter -= h
        scaled = step.gradient_scale if which == "step" else 1.0
        assert float(parameter.grad) == pytest.approx(scaled * (ends[0] - ends[1]) / 2e-6, rel=1e-6)


def test_ends_are_what_they_were_then_move_apart_and_keep_0_inside() -> None:
    ends = Ends(GRID)
    assert torch.equal(ends.value(), torch.tensor([0.3, 5.0]))
    assert same_grid(ends.final()[1], GRID)
    with torch.no_grad():
        ends.p -= 1 / 3  # -1.5 becomes -3.0, 3.0 becomes 4.5
        ends.q += 1 / 3
    _, encoding = ends.final()
    assert float(encoding.scale) == pytest.approx(7.5 / 15)
    assert int(encoding.zero_point) == 6
    for p, q, zero_point in ((9.0, 9.0, 0), (-9.0, -9.0, 15), (9.0, -9.0, None)):
        with torch.no_grad():
            ends.p.fill_(p)
            ends.q.fill_(q)
        ends.bound()
        _, encoding = ends.final()
        assert float(encoding.scale) > 0.0
        assert zero_point in (None, int(encoding.zero_point))
    with pytest.raises(ValueError, match="symmetric grid"):
        Ends(replace(GRID, signed=True, symmetric=True, zero_point=np.array(0)))


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
