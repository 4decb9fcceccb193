"""The layerwise rounding problem in closed form, on second moments alone: no pass over samples, no learning rate.

With e = W - W^ and the moments of `moments`, the error of a layer's output, each bias at its best, is

    E |W x - W^ x^ - mean|^2 = v + 2 <C, e> + <e H, e>        per output, exactly

    1  shrink   H' = (1 - l) H + l mean(diag H) I: the codes fit H's noise otherwise; l chosen on the held-out samples
    2  target   W* = W + a C H'^-1, which makes up for x^ != x; a in 0..1 minimizes the held-out error of W*, exactly
    3  scales   as given, or (option) the best of 13 factors per row, by greedy codes, on the codes as they are or
                mirrored where the sign is free, then refitted to the codes found
    4  codes    per row the best of greedy in natural order, greedy and beam by descending diagonal, each descended
    5  bias     b^ = b + W mu - W^ mu^

Never worse than nearest rounding on the held-out samples: nearest is kept otherwise, and the report says so.

Assumes: the layer is linear in its weight; the activation after it is not seen.
Source: Nagel et al., "Up or Down? Adaptive Rounding", arXiv 2004.10568 (the objective); Frantar et al.,
"GPTQ", arXiv 2210.17323; Li et al., "GPTAQ", arXiv 2504.02692 (the asymmetric target); Ledoit and Wolf, "A
Well-Conditioned Estimator for Large-Dimensional Covariance Matrices" (shrinkage).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from qpipe.numerics.rounding.codes import descend, objective, search, upper_factor
from qpipe.numerics.rounding.moments import Moments, full_float32
from qpipe.numerics.rounding.rows import RowGrid

Order = Literal["natural", "descending"]

SCALE_FACTORS = tuple(round(0.40 + 0.06 * i, 2) for i in range(13))
_SHRINKAGES = (0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.6)
_SHRINKAGES_LARGE = (0.01, 0.1, 0.3)


@dataclass(frozen=True)
class GramOptions:
    """How hard to look. `beam` is used up to `beam_limit` inputs per output, the greedy rule alone beyond.

    `scale_search` lets scales move, by powers of two where `power_of_two`. `update_bias` False keeps the
    bias, and then means count in the error. `asymmetry` and `shrinkage` fix a and l; None chooses them.
    """

    beam: int = 8
    beam_limit: int = 1200
    scale_search: bool = False
    scale_factors: tuple[float, ...] = SCALE_FACTORS
    power_of_two: bool = False
    update_bias: bool = True
    asymmetry: float | None = None
    shrinkage: float | None = None


@dataclass(frozen=True, eq=False)
class GramResult:
    """One layer's outcome: `codes` int32 and `values` float32 (groups, O / groups, K), grid, bias (O,).

    `report` is JSON: error_before and error_after, the output's squared error over its variance on the
    held-out samples (the fitted ones where none are held out), of plain nearest rounding and of the result;
    asymmetry, shrinkage, changed (the share of codes that differ from nearest), kept ("gram" or "nearest").
    """

    codes: Tensor
    values: Tensor
    grid: RowGrid
    bias: Tensor
    report: dict[str, Any]


def solve(
    weight: Tensor,
    grid: RowGrid,
    fit: Moments,
    held_out: Moments | None = None,
    bias: Tensor | None = None,
    options: GramOptions | None = None,
) -> GramResult:
    """Codes, bias and, where asked, scales for `weight` (groups, O / groups, K), judged on `held_out`.

    Everything runs on the tensors' device, in float32 with the factorizations in float64; the same inputs
    and number of threads give the same bits.
    """
    options = options or GramOptions()
    weight = weight.float()
    with full_float32(), torch.no_grad():
        problem = _Problem(weight, _moments(fit, weight, options), _moments(held_out or fit, weight, options))
        choice = _choose(problem, grid, options, held_out is not None)
        (used, codes), kept = _best(problem, choice, grid, options), "gram"
        nearest = grid.nearest(weight)
        if problem.error(used.values(codes)) > problem.error(grid.values(nearest)):
            used, codes, kept = grid, nearest, "nearest"
        values, change = used.values(codes), _mean_change(weight, used.values(codes), fit)
        if not options.update_bias:
            change = torch.zeros_like(change)
        judge = held_out or fit
        report = {
            "error_before": _full_error(weight, grid.values(nearest), judge, torch.zeros_like(change)),
            "error_after": _full_error(weight, values, judge, change),
            "asymmetry": choice.asymmetry if kept == "gram" else 0.0,
            "shrinkage": choice.shrinkage,
            "changed": float((codes != nearest).double().mean()),
            "kept": kept,
        }
    change = change.reshape(-1)
    new_bias = change if bias is None else bias.double() + change
    return GramResult(codes.to(torch.int32), values, used, new_bias.float(), report)


class _Quadratic:
    """H' of one shrinkage, float32, and its triangular factors, float64, once they are asked for."""

    def __init__(self, h: Tensor) -> None:
        self.h = h
        natural = torch.arange(h.shape[-1], device=h.device).expand(h.shape[0], -1)
        descending = h.diagonal(dim1=1, dim2=2).argsort(dim=-1, descending=True, stable=True)
        self._orders: dict[Order, Tensor] = {"natural": natural, "descending": descending}
        self._factors: dict[Order, Tensor] = {}

    def search(self, target: Tensor, grid: RowGrid, order: Order, beam: int) -> Tensor:
        """Codes by beam search in `order`."""
        return search(target, grid, self._factor(order), self._orders[order], beam)

    def divide(self, rows: Tensor) -> Tensor:
        """rows H'^-1, for rows (groups, n, K)."""
        index = self._orders["descending"][:, None].expand(-1, rows.shape[1], -1)
        turned = rows.double().gather(2, index).flip(-1).transpose(1, 2)
        solved = torch.cholesky_solve(turned, self._factor("descending").flip(1, 2)).transpose(1, 2).flip(-1)
        return torch.empty_like(solved).scatter_(2, index, solved).to(rows.dtype)

    def _factor(self, order: Order) -> Tensor:
        if order not in self._factors:
            places, k = self._orders[order], self.h.shape[-1]
            rows = self.h.gather(1, places[:, :, None].expand(-1, -1, k))
            self._factors[order] = upper_factor(rows.gather(2, places[:, None].expand(-1, k, -1)))
        return self._factors[order]


class _Problem:
    """One layer's moments, and what follows from them."""

    def __init__(self, weight: Tensor, fit: Moments, judge: Moments) -> None:
        self.weight, self.fit, self.judge = weight, fit, judge
        # A layer whose inputs never vary has H = 0: any multiple of I then asks for nearest rounding.
        level = fit.cov.diagonal(dim1=1, dim2=2).mean(1)
        self._level = torch.where(level > 0, level, torch.ones_like(level))[:, None, None]

    def shrunk(self, shrinkage: float) -> _Quadratic:
        """H' of `shrinkage`, positive definite."""
        k = self.fit.cov.shape[-1]
        eye = torch.eye(k, dtype=self.fit.cov.dtype, device=self.fit.cov.device)
        return _Quadratic((1.0 - shrinkage) * self.fit.cov + (shrinkage + 1e-5) * self._level * eye)

    def best_asymmetry(self, shift: Tensor) -> float:
        """a in 0..1 of the least held-out error of the unrounded W + a shift: the error is a parabola in a."""
        if self.judge.cross is None:
            return 1.0
        slope = float((self.judge.cross.double() * shift).sum())
        bend = float(((shift @ self.judge.cov).double() * shift).sum())
        return min(1.0, max(0.0, slope / bend)) if bend > 0 else 0.0

    def error(self, values: Tensor) -> float:
        """The judged error of the layer with these weights, summed over its outputs."""
        return float(_output_error(self.weight, values, self.judge).sum())


@dataclass(frozen=True, eq=False)
class _Choice:
    """What the hold-out chose: l and a, the target and H' that follow, and greedy codes for them, descended."""

    error: float
    shrinkage: float
    asymmetry: float
    target: Tensor
    quadratic: _Quadratic
    codes: Tensor


def _choose(problem: _Problem, grid: RowGrid, options: GramOptions, judged: bool) -> _Choice:
    k = problem.weight.shape[-1]
    if options.shrinkage is not None:
        ladder: tuple[float, ...] = (options.shrinkage,)
    elif judged:
        ladder = _SHRINKAGES if k <= options.beam_limit else _SHRINKAGES_LARGE
    else:
        ladder = (min(0.3, k / (2.0 * problem.fit.count)),)
    best: _Choice | None = None
    for shrinkage in ladder:
        quadratic = problem.shrunk(shrinkage)
        target, a = problem.weight, 0.0
        if problem.fit.cross is not None:
            shift = quadratic.divide(problem.fit.cross)
            a = options.asymmetry if options.asymmetry is not None else 1.0
            if options.asymmetry is None and judged:
                a = problem.best_asymmetry(shift)
            target = target + a * shift
        start = quadratic.search(target, grid, "descending", 1)
        codes, _ = descend(target, start, grid, quadratic.h)
        error = problem.error(grid.values(codes))
        if best is None or error < best.error:
            best = _Choice(error, shrinkage, a, target, quadratic, codes)
    assert best is not None
    return best


def _best(problem: _Problem, choice: _Choice, grid: RowGrid, options: GramOptions) -> tuple[RowGrid, Tensor]:
    """The best codes found on the grid, or, where `scale_search` finds better ones, on one of other scales."""
    codes = _codes(choice, grid, choice.codes, options)
    if options.scale_search and grid.sharing != "fixed":
        moved, found = _search_scales(choice, grid, options)
        moved, found = _refit_scales(choice, moved, _codes(choice, moved, found, options), options)
        if problem.error(moved.values(found)) < problem.error(grid.values(codes)):
            return moved, found
    return grid, codes


def _codes(choice: _Choice, grid: RowGrid, known: Tensor, options: GramOptions) -> Tensor:
    """Per row the best of `known`, greedy in natural order, and a beam, each descended."""
    target, quadratic = choice.target, choice.quadratic
    runs: list[tuple[Order, int]] = [("natural", 1)]
    if options.beam > 1 and target.shape[-1] <= options.beam_limit:
        runs.append(("descending", options.beam))
    best, least = known, objective(target, grid.values(known), quadratic.h)
    for order, beam in runs:
        codes, _ = descend(target, quadratic.search(target, grid, order, beam), grid, quadratic.h)
        cost = objective(target, grid.values(codes), quadratic.h)
        better = cost < least
        best, least = torch.where(better[..., None], codes, best), torch.where(better, cost, least)
    return best


def _search_scales(choice: _Choice, grid: RowGrid, options: GramOptions) -> tuple[RowGrid, Tensor]:
    """The grid with each row's best factor, and sign where it is free, by greedy codes; those codes, descended."""
    target, quadratic = choice.target, choice.quadratic
    cost = grid.pooled(objective(target, grid.values(choice.codes), quadratic.h))
    best, used = choice.codes, grid
    factors = (0.25, 0.5, 2.0) if options.power_of_two else options.scale_factors
    signs = [grid, grid.mirrored()] if grid.free_sign else [grid]
    for trial in [replace(sign, scale=sign.scale * f) for sign in signs for f in factors]:
        codes = quadratic.search(target, trial, "descending", 1)
        value = grid.pooled(objective(target, trial.values(codes), quadratic.h))
        better = (value < cost)[..., None]
        cost = torch.where(better[..., 0], value, cost)
        best, used = torch.where(better, codes, best), used.replaced(better, trial)
    codes, _ = descend(target, best, used, quadratic.h)
    return used, codes


def _refit_scales(
    choice: _Choice, grid: RowGrid, codes: Tensor, options: GramOptions, rounds: int = 3
) -> tuple[RowGrid, Tensor]:
    """Scales by least squares for the codes and codes by descent for the scales, in turn."""
    if grid.scale.shape[-1] != 1 or options.power_of_two:
        return grid, codes
    target, h = choice.target, choice.quadratic.h
    for _ in range(rounds):
        steps = codes - grid.zero_point
        through = (steps @ h).double()
        top, bottom = (grid.pooled((through * v).sum(-1))[..., None] for v in (target, steps))
        ratio = (top / bottom).to(grid.scale.dtype)
        usable = (bottom > 0) & (ratio > 0.2 * grid.scale) & (ratio < 5.0 * grid.scale)
        grid = replace(grid, scale=torch.where(usable, ratio, grid.scale))
        codes, changes = descend(target, codes, grid, h)
        if not changes:
            break
    return grid, codes


def _full_error(weight: Tensor, values: Tensor, m: Moments, bias_change: Tensor) -> float:
    """The output's mean squared error over its variance, means included."""
    means = _mean_change(weight, values, m) - bias_change
    error = _output_error(weight, values, m) + means.square()
    energy = m.energy if m.energy is not None else objective(weight, torch.zeros_like(weight), m.cov)
    return float(error.sum() / energy.sum().clamp(min=1e-30))


def _mean_change(weight: Tensor, values: Tensor, m: Moments) -> Tensor:
    """W mu - W^ mu^, (groups, rows), float64."""
    mean, mean_hat = m.mean.double(), m.mean_hat.double()
    kept = torch.einsum("grk,gk->gr", weight.double(), mean - mean_hat)
    return kept + torch.einsum("grk,gk->gr", (weight - values).double(), mean_hat)


def _output_error(weight: Tensor, values: Tensor, m: Moments) -> Tensor:
    """v + 2 <C, e> + <e H, e>, (groups, rows), float64."""
    error = objective(weight, values, m.cov)
    if m.cross is None or m.drift is None:
        return error
    return m.drift + 2.0 * (m.cross.double() * (weight - values)).sum(-1) + error


def _moments(m: Moments, weight: Tensor, options: GramOptions) -> Moments:
    """The moments that the objective reads: about the means where the bias moves, else about zero."""
    if options.update_bias:
        return m
    mean_hat = m.mean_hat.double()
    cov = (m.cov.double() + mean_hat[:, :, None] * mean_hat[:, None, :]).float()
    if m.cross is None or m.drift is None:
        return replace(m, cov=cov)
    moved = torch.einsum("grk,gk->gr", weight.double(), m.mean.double() - mean_hat)
    cross = (m.cross.double() + moved[:, :, None] * mean_hat[:, None, :]).float()
    return replace(m, cov=cov, cross=cross, drift=m.drift + moved.square())
