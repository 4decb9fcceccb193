"""The closed-form solver: what it computes is what the samples show, and it keeps its promises."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qpipe.numerics.grid import Encoding, quantize_dequantize, same_grid
from qpipe.numerics.observers import weight_encoding
from qpipe.numerics.rounding.codes import descend, objective, search, upper_factor
from qpipe.numerics.rounding.gram import GramOptions, GramResult, _Choice, _Quadratic, _refit_scales, solve
from qpipe.numerics.rounding.moments import LayerMoments, Moments, MomentSums
from qpipe.numerics.rounding.rows import RowGrid, row_encoding, row_grid
from qpipe.numerics.rounding.unfold import Unfold
from qpipe.numerics.scheme import TensorScheme


def _inputs(seed: int, groups: int, rows: int, k: int) -> Tensor:
    """Correlated and never negative, as after a Relu."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(groups, max(2, k // 4), k, generator=torch.Generator().manual_seed(99))
    x = torch.randn(groups, rows, mix.shape[1], generator=draw) @ mix
    return torch.relu(x + 0.5 * torch.randn(groups, rows, k, generator=draw))


def _drifted(x: Tensor, size: float = 0.1) -> Tensor:
    draw = torch.Generator().manual_seed(7)
    k = x.shape[-1]
    return torch.relu(x + size * x @ torch.randn(k, k, generator=draw) / k**0.5 + size)


class _Layer:
    """A layer of 4 bits, its moments, and inputs never fitted on."""

    def __init__(
        self, groups: int, out: int, k: int, drift: float = 0.1, bits: int = 4, rows: int = 4000
    ) -> None:
        draw = torch.Generator().manual_seed(0)
        self.weight = torch.randn(groups, out, k, generator=draw)
        qmax = 2 ** (bits - 1) - 1
        scale = self.weight.abs().amax(-1, keepdim=True) / qmax
        self.grid = RowGrid(scale, torch.zeros_like(scale), -qmax - 1, qmax)
        self.bias = torch.randn(groups * out, generator=draw)
        self.x, self.test = _inputs(1, groups, rows, k), _inputs(2, groups, 4000, k)
        self.x_hat, self.test_hat = _drifted(self.x, drift), _drifted(self.test, drift)
        moments = LayerMoments(groups, k, self.weight)
        moments.update(self.x_hat, self.x, samples=rows)
        self.fit, self.held_out = moments.fit, moments.held_out

    def solve(self, **options: Any) -> GramResult:
        return solve(self.weight, self.grid, self.fit, self.held_out, self.bias, GramOptions(**options))

    def error(self, values: Tensor, bias: Tensor, fitted: bool = False) -> float:
        """The relative output error, from the samples themselves in float64."""
        x, x_hat = (self.x, self.x_hat) if fitted else (self.test, self.test_hat)
        b, b_hat = (v.double().reshape(self.weight.shape[0], 1, -1) for v in (self.bias, bias))
        y = x.double() @ self.weight.double().transpose(1, 2) + b
        y_hat = x_hat.double() @ values.double().transpose(1, 2) + b_hat
        return float((y - y_hat).square().sum() / (y - y.mean(1, keepdim=True)).square().sum())

    def nearest(self) -> Tensor:
        return self.grid.values(self.grid.nearest(self.weight))


@pytest.mark.parametrize(
    "shape", [(1, 16, 48), (24, 1, 9), (2, 8, 18)], ids=["dense", "depthwise", "grouped"]
)
def test_the_reported_error_is_that_of_samples_and_far_below_nearest(shape: tuple[int, int, int]) -> None:
    layer = _Layer(*shape)
    result = layer.solve()
    plain = layer.error(layer.nearest(), layer.bias)
    after = layer.error(result.values, result.bias)
    assert result.report["kept"] == "gram"
    assert after < 0.4 * plain
    # Held-out samples of one distribution: the two estimates differ by their noise.
    assert result.report["error_after"] == pytest.approx(after, rel=0.1)
    assert result.report["error_before"] == pytest.approx(plain, rel=0.1)


def test_each_step_of_the_recipe_pays() -> None:
    layer = _Layer(1, 32, 64)
    plain = layer.solve(beam=1, asymmetry=0.0, shrinkage=0.003)
    aimed = layer.solve(beam=1, shrinkage=0.003)
    beamed = layer.solve(beam=16)
    scaled = layer.solve(beam=16, scale_search=True)
    errors = [layer.error(r.values, r.bias) for r in (plain, aimed, beamed, scaled)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.8 * errors[0]


def test_with_a_fine_grid_the_target_is_the_least_squares_solution() -> None:
    layer = _Layer(1, 6, 12, drift=0.3, bits=16)
    # Room for a target that leaves the range of W.
    layer.grid = replace(layer.grid, scale=4 * layer.grid.scale)
    result = layer.solve(asymmetry=1.0, shrinkage=1e-6)
    ones = torch.ones(layer.x_hat.shape[1], 1, dtype=torch.float64)
    keep = torch.arange(layer.x_hat.shape[1]) % 10 != 4
    design = torch.cat([layer.x_hat[0].double(), ones], 1)[keep]
    y = (layer.x[0].double() @ layer.weight[0].double().T + layer.bias.double())[keep]
    solution = torch.linalg.lstsq(design, y).solution.T
    torch.testing.assert_close(result.values[0].double(), solution[:, :-1], rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(result.bias.double(), solution[:, -1], rtol=5e-2, atol=5e-2)


def test_the_bias_makes_the_mean_error_zero() -> None:
    layer = _Layer(2, 4, 10)
    result = layer.solve()
    keep = torch.arange(layer.x.shape[1]) % 10 != 4
    x, x_hat = layer.x[:, keep].double(), layer.x_hat[:, keep].double()
    y = x @ layer.weight.double().transpose(1, 2) + layer.bias.double().reshape(2, 1, 4)
    y_hat = x_hat @ result.values.double().transpose(1, 2) + result.bias.double().reshape(2, 1, 4)
    torch.testing.assert_close(y.mean(1), y_hat.mean(1), rtol=1e-4, atol=1e-4)


def test_a_bias_that_may_not_move_does_not_and_the_codes_make_up_for_it() -> None:
    layer = _Layer(1, 8, 24)
    kept = layer.solve(update_bias=False)
    assert torch.equal(kept.bias, layer.bias)
    moved = layer.solve()
    assert layer.error(kept.values, kept.bias) < layer.error(moved.values, layer.bias)
    assert kept.report["error_after"] == pytest.approx(layer.error(kept.values, kept.bias), rel=0.1)


def test_a_missing_bias_is_zero() -> None:
    layer = _Layer(1, 4, 8)
    without = solve(layer.weight, layer.grid, layer.fit, layer.held_out)
    torch.testing.assert_close(without.bias, layer.solve().bias - layer.bias)


def test_with_independent_inputs_and_no_drift_the_codes_are_nearest() -> None:
    weight = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))
    scale = weight.abs().amax(-1, keepdim=True) / 7
    grid = RowGrid(scale, torch.zeros_like(scale), -8, 7)
    cov = torch.diag_embed(torch.rand(2, 16, generator=torch.Generator().manual_seed(4)) + 0.5)
    mean = torch.ones(2, 16, dtype=torch.float64)
    result = solve(weight, grid, Moments(1000, mean, mean, cov))
    assert torch.equal(result.codes.float(), grid.nearest(weight))
    assert result.report["changed"] == 0.0


def test_nearest_is_kept_and_said_where_the_held_out_samples_ask_for_it() -> None:
    layer = _Layer(1, 8, 32, drift=0.0)
    misleading = torch.ones(1, 32, 32) + 1e-3 * torch.eye(32)
    fit = replace(layer.fit, cov=misleading)
    assert layer.held_out is not None
    held_out = replace(layer.held_out, cov=torch.eye(32)[None], cross=None, drift=None)
    result = solve(layer.weight, layer.grid, fit, held_out, layer.bias, GramOptions(shrinkage=0.0))
    assert result.report["kept"] == "nearest"
    assert torch.equal(result.values, layer.nearest())


def test_inputs_that_never_vary_leave_nearest_rounding() -> None:
    layer = _Layer(1, 4, 8)
    mean = torch.ones(1, 8, dtype=torch.float64)
    result = solve(layer.weight, layer.grid, Moments(100, mean, mean, torch.zeros(1, 8, 8)))
    assert torch.equal(result.values, layer.nearest())
    expected = ((layer.weight - result.values).double() @ mean[0]).reshape(-1)
    torch.testing.assert_close(result.bias.double(), expected, rtol=1e-5, atol=1e-5)


def test_few_samples_are_not_overfitted() -> None:
    layer = _Layer(1, 16, 96, rows=150)
    chosen, eager = layer.solve(), layer.solve(shrinkage=0.001)
    assert chosen.report["shrinkage"] >= 0.1
    assert layer.error(chosen.values, chosen.bias) < 0.9 * layer.error(eager.values, eager.bias)
    assert layer.error(chosen.values, chosen.bias) < layer.error(layer.nearest(), layer.bias)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_block"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["conv", "grouped", "conv_transpose", "linear", "linear_transposed"])
def test_the_result_lies_on_the_grid_of_its_encoding(granularity: Any, symmetric: bool, kind: str) -> None:
    unfold, shape, axis = {
        "conv": (Unfold("conv", kernel_shape=(3, 3)), (6, 4, 3, 3), 0),
        "grouped": (Unfold("conv", kernel_shape=(3, 3), groups=2), (6, 4, 3, 3), 0),
        "conv_transpose": (Unfold("conv_transpose", kernel_shape=(2,), groups=2), (8, 3, 2), 1),
        "linear": (Unfold("linear"), (5, 16), 0),
        "linear_transposed": (Unfold("linear", weight_axis=1), (16, 5), 1),
    }[kind]
    block = 4 if granularity == "per_block" else 0
    scheme = TensorScheme(4, True, symmetric, granularity, block)
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    e = weight_encoding(w, scheme, axis=1 - axis if granularity == "per_block" else axis)
    rows = unfold.weight_rows(torch.tensor(w))
    grid = row_grid(e, unfold, shape)
    x = _inputs(0, rows.shape[0], 500, rows.shape[2])
    moments = MomentSums(rows.shape[0], rows.shape[2], rows)
    moments.update(x)
    nearest = unfold.weight_from_rows(grid.values(grid.nearest(rows)), shape)
    np.testing.assert_array_equal(nearest.numpy(), quantize_dequantize(w, e))
    for scales in (False, True):
        options = GramOptions(scale_search=scales)
        result = solve(rows, grid, moments.moments(), None, None, options)
        values = unfold.weight_from_rows(result.values, shape).numpy()
        used = row_encoding(e, result.grid, unfold, shape)
        assert used.frozen
        np.testing.assert_array_equal(quantize_dequantize(values, used), values)
        assert scales or same_grid(used, e)
        assert result.report["error_after"] <= result.report["error_before"] * (1 + 1e-6)


def test_scales_that_must_be_powers_of_two_stay_so() -> None:
    layer = _Layer(1, 8, 24)
    power = 2.0 ** layer.grid.scale.log2().ceil()
    layer.grid = replace(layer.grid, scale=power)
    fixed, moved = layer.solve(), layer.solve(scale_search=True, power_of_two=True)
    assert bool((moved.grid.scale.log2() % 1 == 0).all())
    assert moved.report["error_after"] <= fixed.report["error_after"]


@pytest.mark.parametrize(("factor", "fitted"), [(1.0, 1.0), (1.5, 1.5), (4.9, 4.9), (5.1, 1.0), (20.0, 1.0)])
def test_a_scale_is_refitted_by_least_squares_to_at_most_five_times_itself(factor: float, fitted: float) -> None:
    """All weights lie at `factor` times the largest value of the grid: that scale alone has no error."""
    grid = RowGrid(torch.full((1, 1, 1), 0.125), torch.zeros(1, 1, 1), -8, 7)
    mean = torch.zeros(1, 4, dtype=torch.float64)
    options = GramOptions(scale_search=True, scale_factors=(1.0,), beam=1)
    weight = torch.full((1, 1, 4), 7 * 0.125 * factor)
    result = solve(weight, grid, Moments(1000, mean, mean, torch.eye(4)[None]), options=options)
    assert float(result.grid.scale) == pytest.approx(0.125 * fitted, rel=1e-6)


@pytest.mark.parametrize(("factor", "fitted"), [(0.21, 0.21), (0.19, 1.0), (-1.0, 1.0), (5.1, 1.0)])
def test_codes_that_say_next_to_nothing_of_the_weights_do_not_move_the_scale(factor: float, fitted: float) -> None:
    grid = RowGrid(torch.full((1, 1, 1), 0.125), torch.zeros(1, 1, 1), -8, 7)
    target, codes = torch.full((1, 1, 4), 0.125 * factor), torch.ones(1, 1, 4)
    choice = _Choice(0.0, 0.0, 0.0, target, _Quadratic(torch.eye(4)[None]), codes)
    moved, _ = _refit_scales(choice, grid, codes, GramOptions(), rounds=1)
    assert float(moved.scale) == pytest.approx(0.125 * fitted, rel=1e-6)


def test_no_row_costs_more_than_a_beam_by_descending_diagonal_finds() -> None:
    """The beam itself, run by hand on H' = (1 - l) H + l mean(diag H) I with its columns in that order."""
    layer = _Layer(1, 64, 32, drift=0.0, bits=3)
    spread = torch.logspace(-1, 1, 32)[torch.randperm(32, generator=torch.Generator().manual_seed(1))]
    cov = layer.fit.cov * spread[:, None] * spread
    fit = replace(layer.fit, cov=cov, cross=None, drift=None)
    result = solve(layer.weight, layer.grid, fit, None, layer.bias, GramOptions(beam=4, shrinkage=0.03))
    h = 0.97 * cov + (0.03 + 1e-5) * cov[0].diagonal().mean() * torch.eye(32)
    order = torch.tensor(np.argsort(-h[0].diagonal().numpy(), kind="stable"))[None]
    permuted = h[:, order[0]][:, :, order[0]]
    found = search(layer.weight, layer.grid, upper_factor(permuted), order, 4)
    codes, _ = descend(layer.weight, found, layer.grid, h)
    by_hand, kept = (objective(layer.weight, layer.grid.values(c.float()), h) for c in (codes, result.codes))
    assert result.report["kept"] == "gram"
    assert bool((kept <= by_hand * (1 + 1e-6)).all())


def test_blocks_across_outputs_keep_their_scales() -> None:
    w = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    e = weight_encoding(w, TensorScheme(4, True, True, "per_block", 2), axis=0)
    assert row_grid(e, Unfold("linear"), (4, 6)).sharing == "fixed"


def test_the_same_inputs_give_the_same_bits() -> None:
    one, other = _Layer(2, 8, 20).solve(scale_search=True), _Layer(2, 8, 20).solve(scale_search=True)
    assert torch.equal(one.values, other.values)
    assert torch.equal(one.bias, other.bias)
    assert one.report == other.report


def test_scales_stay_where_they_are_unless_asked() -> None:
    layer = _Layer(1, 4, 8)
    assert torch.equal(layer.solve().grid.scale, layer.grid.scale)
    assert not torch.equal(layer.solve(scale_search=True).grid.scale, layer.grid.scale)


def test_an_encoding_of_blocks_becomes_scales_of_columns() -> None:
    e = Encoding(4, True, True, np.array([[1.0, 2.0]], np.float32), np.zeros((1, 2)), axis=1, block_size=2)
    grid = row_grid(e, Unfold("linear"), (1, 4))
    assert grid.scale.tolist() == [[[1.0, 1.0, 2.0, 2.0]]]
