"""Searches for codes against brute force and GPTQ's own form; descent to a point where no single change helps."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from qpipe.numerics.rounding.codes import descend, objective, search, upper_factor
from qpipe.numerics.rounding.rows import RowGrid


def _problem(
    seed: int, groups: int, rows: int, k: int, bits: int, columns: bool = False
) -> tuple[Tensor, RowGrid, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, 4 * k, k, generator=draw) @ torch.randn(groups, k, k, generator=draw)
    h = x.transpose(1, 2) @ x / x.shape[1] + 1e-3 * torch.eye(k)
    target = torch.randn(groups, rows, k, generator=draw)
    scale = 0.2 + torch.rand(groups, rows, k if columns else 1, generator=draw)
    zero_point = torch.randint(0, 2**bits, scale.shape, generator=draw).float()
    return target, RowGrid(scale, zero_point, 0, 2**bits - 1), h


def _natural(h: Tensor) -> Tensor:
    return torch.arange(h.shape[-1]).expand(len(h), -1)


def _exhaustive(target: Tensor, grid: RowGrid, h: Tensor) -> Tensor:
    """The least J of each row over all codes."""
    k = target.shape[-1]
    every = torch.tensor(
        list(itertools.product(range(grid.qmin, grid.qmax + 1), repeat=k)), dtype=torch.float32
    )
    best = torch.full(target.shape[:2], float("inf"), dtype=torch.float64)
    for g, r in np.ndindex(*target.shape[:2]):
        e = (target[g, r] - (every - grid.zero_point[g, r]) * grid.scale[g, r]).double()
        best[g, r] = ((e @ h[g].double()) * e).sum(1).min()
    return best


@pytest.mark.parametrize("columns", [False, True])
def test_a_wide_beam_and_descent_find_the_exhaustive_optimum_of_almost_every_row(columns: bool) -> None:
    target, grid, h = _problem(0, groups=4, rows=16, k=5, bits=2, columns=columns)
    best = _exhaustive(target, grid, h)
    codes, _ = descend(target, search(target, grid, upper_factor(h), _natural(h), 16), grid, h)
    found = objective(target, grid.values(codes), h)
    assert bool((found >= best * (1 - 1e-5)).all())
    # Only two codes branch at a time, so clipped rows can miss the optimum; few do, and not by much.
    assert float((found <= best * (1 + 1e-4)).double().mean()) > 0.85
    assert float(found.sum() / best.sum()) < 1.05


def test_a_wider_beam_costs_no_more_on_average() -> None:
    target, grid, h = _problem(1, groups=2, rows=64, k=70, bits=4)
    costs = [
        float(
            objective(target, grid.values(search(target, grid, upper_factor(h), _natural(h), beam)), h).sum()
        )
        for beam in (1, 2, 8, 32)
    ]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.85 * costs[0]


def _gptq(w: np.ndarray, scale: np.ndarray, zero: np.ndarray, qmax: int, h: np.ndarray) -> np.ndarray:
    """The published loop, in float64: round a column, spread its error by the Cholesky factor of the inverse."""
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    w, codes = w.copy(), np.zeros_like(w)
    for j in range(w.shape[1]):
        codes[:, j] = np.clip(np.rint(w[:, j] / scale[:, 0]) + zero[:, 0], 0, qmax)
        error = (w[:, j] - (codes[:, j] - zero[:, 0]) * scale[:, 0]) / u[j, j]
        w[:, j:] -= np.outer(error, u[j, j:])
    return codes


@pytest.mark.parametrize("k", [9, 80])
def test_greedy_search_is_gptq(k: int) -> None:
    target, grid, h = _problem(2, groups=1, rows=20, k=k, bits=4)
    ours = search(target.double(), _double(grid), upper_factor(h), _natural(h), 1)
    expected = _gptq(
        target[0].double().numpy(),
        grid.scale[0].double().numpy(),
        grid.zero_point[0].numpy(),
        15,
        h[0].double().numpy(),
    )
    np.testing.assert_array_equal(ours[0].numpy(), expected)


def _double(grid: RowGrid) -> RowGrid:
    return RowGrid(grid.scale.double(), grid.zero_point.double(), grid.qmin, grid.qmax)


def test_an_order_permutes_the_problem_and_not_the_answer_s_places() -> None:
    target, grid, h = _problem(3, groups=2, rows=8, k=40, bits=3, columns=True)
    order = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(g)) for g in range(2)])
    permuted = torch.stack([h[g][order[g]][:, order[g]] for g in range(2)])
    codes = search(target, grid, upper_factor(permuted), order, 4)
    for g in range(2):
        own = RowGrid(grid.scale[g : g + 1, :, order[g]], grid.zero_point[g : g + 1, :, order[g]], 0, 7)
        alone = search(
            target[g : g + 1, :, order[g]], own, upper_factor(permuted[g : g + 1]), _natural(h[:1]), 4
        )
        assert torch.equal(codes[g][:, order[g]], alone[0])


def test_groups_and_rows_do_not_meet() -> None:
    target, grid, h = _problem(4, groups=5, rows=3, k=9, bits=3)
    together, _ = descend(target, search(target, grid, upper_factor(h), _natural(h), 4), grid, h)
    for g, r in np.ndindex(5, 3):
        own = RowGrid(grid.scale[g, r][None, None], grid.zero_point[g, r][None, None], 0, 7)
        t, own_h = target[g, r][None, None], h[g : g + 1]
        alone, _ = descend(t, search(t, own, upper_factor(own_h), _natural(own_h), 4), own, own_h)
        assert torch.equal(together[g, r], alone[0, 0])


@pytest.mark.parametrize("seed", range(5))
def test_descent_never_raises_the_objective_and_ends_where_no_single_change_lowers_it(seed: int) -> None:
    target, grid, h = _problem(seed, groups=2, rows=6, k=12, bits=3, columns=bool(seed % 2))
    start = grid.nearest(target)
    codes, changes = descend(target, start, grid, h)
    before, after = (objective(target, grid.values(c), h) for c in (start, codes))
    assert bool((after <= before * (1 + 1e-6)).all())
    assert changes >= int(((codes != start).any(-1)).sum())
    assert float(codes.min()) >= 0
    assert float(codes.max()) <= 7
    for j in range(12):
        for value in range(8):
            other = codes.clone()
            other[..., j] = value
            cost = objective(target, grid.values(other), h)
            assert bool((cost >= after * (1 - 1e-4)).all())


def test_with_a_diagonal_h_every_search_is_nearest_rounding() -> None:
    target, grid, _ = _problem(6, groups=2, rows=6, k=20, bits=4, columns=True)
    h = torch.diag_embed(torch.rand(2, 20, generator=torch.Generator().manual_seed(0)) + 0.1)
    nearest = grid.nearest(target)
    for beam in (1, 4):
        assert torch.equal(search(target, grid, upper_factor(h), _natural(h), beam), nearest)
    codes, changes = descend(target, nearest, grid, h)
    assert torch.equal(codes, nearest)
    assert changes == 0


def test_the_factor_is_upper_triangular_and_returns_h() -> None:
    _, _, h = _problem(7, groups=3, rows=1, k=10, bits=2)
    m = upper_factor(h)
    torch.testing.assert_close(m @ m.transpose(1, 2), h.double(), rtol=1e-5, atol=1e-5)
    assert torch.equal(m, m.triu())


def test_moments_that_rounding_made_indefinite_have_a_factor_too() -> None:
    """By group: what is positive definite keeps its own bits, the other is lifted as little as does."""
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    exact = (x.T @ x / 4 + 1e-3 * torch.eye(300)).double()
    broken = exact - 2e-3 * torch.eye(300)  # its smallest eigenvalues are -1e-3, where the mean of its diagonal is 1
    factor = upper_factor(torch.stack([exact, broken]))
    assert torch.equal(factor[:1], upper_factor(exact[None]))
    made = factor @ factor.transpose(1, 2)
    lifted = (made[1] - broken).diagonal()
    assert torch.allclose(lifted, lifted.mean().expand(300), atol=1e-9)
    assert 1e-3 < float(lifted.mean()) < 2e-2
    with pytest.raises(torch.linalg.LinAlgError):
        upper_factor(torch.full((1, 3, 3), torch.nan))
    with pytest.raises(torch.linalg.LinAlgError):
        upper_factor(-torch.eye(3)[None])
