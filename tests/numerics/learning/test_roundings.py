"""Weights learned on their grids: the start is what was there, what comes out is on the grid, gradients are true."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from qpipe.numerics.fake_quantize import FakeQuantize
from qpipe.numerics.grid import broadcast, quantize, same_grid
from qpipe.numerics.learning.roundings import (
    ROUNDINGS,
    RoundingName,
    rectified_sigmoid,
    rounding_penalty,
    start,
    start_of,
)
from qpipe.numerics.learning.variables import Variable, restore, snapshot
from tests.numerics.learning.grids import GRIDS, far_codes, grids, nearest, weight

W = weight()
E = grids(W)
every_rounding = pytest.mark.parametrize("rounding", ROUNDINGS)
every_grid = pytest.mark.parametrize("grid", GRIDS)


def shaken(variable: Variable, seed: int = 0, by: float = 0.8) -> Variable:
    """Each parameter pushed somewhere, then brought back between its bounds."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for kind, held in variable.parameters().items():
            for p in held:
                p += (by if kind == "weight" else 0.1) * torch.randn(p.shape, generator=draw, dtype=p.dtype)
    variable.bound()
    return variable


@every_rounding
@every_grid
@pytest.mark.parametrize("learn_scale", [False, True])
@pytest.mark.parametrize("relative", [False, True])
def test_before_the_first_step_a_weight_is_what_it_was(
    rounding: RoundingName, grid: str, learn_scale: bool, relative: bool
) -> None:
    for current in (nearest(W, E[grid]), far_codes(W, E[grid])):
        variable = start(rounding, W, current, E[grid], learn_scale=learn_scale, relative=relative)
        value, encoding = variable.final()
        assert torch.equal(variable.hard(), current)
        assert torch.equal(value, current)
        assert encoding is not None
        assert same_grid(encoding, E[grid])
        assert encoding.frozen
        assert variable.changed() == (0, W.numel())
    calibrated = start(rounding, W, W, E[grid], learn_scale=learn_scale, relative=relative)
    assert torch.equal(calibrated.hard(), nearest(W, E[grid]))


@every_rounding
@every_grid
def test_what_comes_out_is_left_as_it_is_by_its_quantizer(rounding: RoundingName, grid: str) -> None:
    for seed, learn_scale in ((0, False), (1, True)):
        variable = shaken(start(rounding, W, far_codes(W, E[grid]), E[grid], learn_scale=learn_scale), seed)
        value, encoding = variable.final()
        assert encoding is not None
        assert value.dtype == torch.float32
        assert torch.equal(FakeQuantize(encoding)(value), value)
        assert torch.equal(value, variable.hard())
        assert same_grid(encoding, E[grid]) is not learn_scale
        assert np.array_equal(encoding.zero_point, E[grid].zero_point)
        moved, codes = variable.changed()
        assert codes == W.numel()
        was, now = quantize(far_codes(W, E[grid]).numpy(), E[grid]), quantize(value.numpy(), encoding)
        assert moved == int((was != now).sum()) > 0


@every_rounding
def test_scales_that_are_powers_of_two_are_not_learned(rounding: RoundingName) -> None:
    e = E["channel"]
    stepped = replace(e, scale=2.0 ** np.round(np.log2(e.scale)))
    with pytest.raises(ValueError, match="powers of two"):
        start(rounding, W, W, stepped, learn_scale=True)
    assert torch.equal(start(rounding, W, W, stepped).hard(), nearest(W, stepped))


@every_rounding
def test_a_snapshot_brings_all_back(rounding: RoundingName) -> None:
    variable = start(rounding, W, far_codes(W, E["block"]), E["block"], learn_scale=True)
    before, taken = variable.hard(), snapshot(variable)
    assert not torch.equal(shaken(variable).hard(), before)
    restore(variable, taken)
    assert torch.equal(variable.hard(), before)


def test_an_unknown_rounding_another_shape_and_wide_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="there is no rounding 'ste'; there are"):
        start("ste", W, W, E["channel"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has shape"):
        start("ste_weight", W, W[:2], E["channel"])
    with pytest.raises(ValueError, match="at most 16 bits"):
        start("ste_weight", W, W, replace(E["16 bits"], bitwidth=32))


def _gradient(variable: Variable, toward: Tensor) -> dict[str, list[Tensor]]:
    """The gradient of sum(value * toward)."""
    for held in variable.parameters().values():
        for p in held:
            p.grad = None
    (variable.value() * toward).sum().backward()  # type: ignore[no-untyped-call]  # torch's
    found = {}
    for kind, held in variable.parameters().items():
        found[kind] = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in held]
    return found


@every_grid
@pytest.mark.parametrize("rounding", ["ste_weight", "signed_step"])
@pytest.mark.parametrize("relative", [True, False])
def test_a_straight_through_weight_moves_its_value_by_a_step_and_scales_by_their_codes(
    grid: str, rounding: RoundingName, relative: bool
) -> None:
    """By a step for each step that it moves, by as much as it moves where it is counted in the weight's own units."""
    current = far_codes(W, E[grid]).double()
    variable = start(rounding, W.double(), current, E[grid], learn_scale=True, relative=relative)
    toward = torch.randn(W.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = _gradient(variable, toward)
    step = torch.tensor(broadcast(E[grid], tuple(W.shape))[0]).double()
    torch.testing.assert_close(found["weight"][0], toward * step if relative else toward, rtol=1e-6, atol=0)
    _holds_by_differences(variable, toward, "scale")


def _holds_by_differences(
    variable: Variable, toward: Tensor, kind: str, value: Callable[[], Tensor] | None = None, rtol: float = 1e-6
) -> None:
    """The gradient of a kind of parameter beside central differences of what it is computed of, in float64."""
    found = _gradient(variable, toward)[kind]
    value = value or variable.value
    for p, gradient in zip(variable.parameters()[kind], found, strict=True):
        flat = p.detach().view(-1)
        for i in range(0, flat.numel(), max(1, flat.numel() // 7)):
            ends = []
            for h in (1e-6, -1e-6):
                with torch.no_grad():
                    before = float(flat[i])
                    flat[i] = before + h
                    ends.append(float((value() * toward).sum()))
                    flat[i] = before
            difference = (ends[0] - ends[1]) / 2e-6
            assert float(gradient.view(-1)[i]) == pytest.approx(difference, rel=rtol, abs=1e-7)


def test_a_weight_at_the_end_of_its_range_comes_back_when_it_is_drawn_inward() -> None:
    e = E["saturating"]
    variable = start("ste_weight", W, W, e)
    (d,) = variable.parameters()["weight"]
    top = torch.tensor(quantize(W.numpy(), e)) == e.qmax
    assert int(top.sum()) > 20
    with torch.no_grad():
        d += 3.0
    variable.bound()
    assert torch.equal(variable.hard()[top], nearest(W, e)[top])
    with torch.no_grad():
        d -= 1.0
    assert bool((variable.hard()[top] < nearest(W, e)[top]).all())


@every_grid
def test_a_signed_step_moves_a_code_by_one_at_most(grid: str) -> None:
    current = far_codes(W, E[grid])
    variable = shaken(start("signed_step", W, current, E[grid]), by=30.0)
    moved = quantize(variable.hard().numpy(), E[grid]) - quantize(current.numpy(), E[grid])
    assert set(np.unique(moved)) <= {-1, 0, 1}
    assert 0 < np.count_nonzero(moved) == variable.changed()[0]


def test_a_rectified_sigmoid_starts_soft_at_the_weight_and_stays_within_a_step_of_its_code() -> None:
    e = E["channel"]
    variable = start("rectified_sigmoid", W, W, e)
    steps = W / torch.tensor(e.scale)[:, None, None]
    inside = (steps >= e.qmin) & (steps <= e.qmax)
    assert float(inside.double().mean()) > 0.9
    torch.testing.assert_close(variable.value().detach()[inside], W[inside], rtol=1e-5, atol=1e-6)
    fraction = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(rectified_sigmoid(start_of(fraction)), fraction)


def test_the_penalty_takes_the_published_value() -> None:
    v = torch.tensor(np.random.RandomState(0).rand(1, 3, 12, 12))
    assert 0.01 * float(rounding_penalty(v, 4.636038969321072)) == pytest.approx(4.266156963161077, rel=1e-14)


@every_grid
def test_the_sigmoids_gradients_are_those_of_differences(grid: str) -> None:
    variable = start("rectified_sigmoid", W.double(), far_codes(W, E[grid]).double(), E[grid], learn_scale=True)
    toward = torch.randn(W.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for kind in ("weight", "scale"):
        _holds_by_differences(variable, toward, kind)
    (v,) = variable.parameters()["weight"]
    v.grad = None
    term = variable.penalty(3.7)
    assert term is not None
    (gradient,) = torch.autograd.grad(term, v)
    for i in range(0, v.numel(), 13):
        ends = []
        for h in (1e-6, -1e-6):
            with torch.no_grad():
                moved = v.detach().clone()
                moved.view(-1)[i] += h
            ends.append(float(rounding_penalty(moved, 3.7)))
        assert float(gradient.view(-1)[i]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-5)


@every_grid
@pytest.mark.parametrize("axes", [(None, None), (0, 1)])
def test_flexrounds_gradients_are_those_of_differences_with_the_rounding_held(
    grid: str, axes: tuple[int | None, int | None]
) -> None:
    """By a formula written out here: the weight divided, plus what its rounding added before."""
    e, w = E[grid], W.double()
    out_axis, in_axis = axes
    variable = start("flexround", w, far_codes(W, e).double(), e, learn_scale=True, out_axis=out_axis, in_axis=in_axis)
    shaken(variable, by=0.02)
    factors, (g, b) = variable.parameters()["weight"], variable.parameters()["scale"]
    low, high = (torch.tensor(end - e.zero_point).double() for end in (e.qmin, e.qmax))
    near = variable.near  # type: ignore[attr-defined]  # of flexround

    def over(value: Tensor, axis: int) -> Tensor:
        """One for each scale, over the weight, in float64: what `broadcast` does in float32."""
        index = torch.arange(W.shape[axis]) // (e.block_size or 1)
        shape = [-1 if i == axis else 1 for i in range(3)]
        return value.index_select(axis, index) if e.block_size else value.reshape(shape)

    def scaled() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            s = torch.tensor(e.scale).double() * (g.exp() * high - b.exp() * low) / (high - low)
            rows = factors[1] if out_axis is not None or e.axis is None else over(factors[1], e.axis)
            logarithm = factors[0] + rows + (factors[2] if in_axis is not None else 0.0)
            step = s if e.axis is None else over(s, e.axis)
            first = torch.tensor(e.scale).double()
            first = first if e.axis is None else over(first, e.axis)
            return near * first * torch.exp(-logarithm) / step, step

    steps, _ = scaled()
    ends = [end if e.axis is None else over(end.expand(e.scale.shape), e.axis) for end in (low, high)]
    codes = torch.clamp(steps.round(), *ends)
    inside, added = codes == steps.round(), steps.round() - steps

    def held() -> Tensor:
        now, step = scaled()
        return step * torch.where(inside, now + added, codes)

    toward = torch.randn(W.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.testing.assert_close(held(), variable.hard())
    for kind in ("weight", "scale"):
        _holds_by_differences(variable, toward, kind, held, rtol=1e-5)


def test_flexround_folds_into_a_weight_that_nearest_rounding_puts_on_the_same_codes() -> None:
    for grid in ("channel", "block"):
        variable = start("flexround", W, W, E[grid], learn_scale=True, margin=0.499, out_axis=0, in_axis=1)
        shaken(variable, by=0.05)
        value, encoding = variable.final()
        assert encoding is not None
        factors = [p.detach() for p in variable.parameters()["weight"]]
        folded = W / torch.exp(sum(factors))  # type: ignore[arg-type]  # tensors
        same = quantize(folded.numpy(), encoding) == quantize(value.numpy(), encoding)
        # Those differ that lie within a thousandth of a step of a tie, or beyond the range by more than the margin.
        assert float(np.mean(same)) > 0.99
