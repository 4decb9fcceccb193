"""The layerwise rounding problem in closed form, on second moments alone: no pass over samples, no learning
rate.

With e = W - W^ and the moments of `qpipe.numerics.moments`, the error of a layer's output, each bias at its
best, is

    E |W x - W^ x^ - mean|^2 = v + 2 <C, e> + <e H, e>        per output, exactly

    1  shrink   H' = (1 - l) H + l mean(diag H) I, l chosen on the held-out samples: the codes fit H's noise
    otherwise 2  target   W* = W + a C H'^-1, which makes up for x^ != x; a in 0..1 minimizes the held-out
    error, exactly 3  scales   as given, or (option) 13 factors per row scored by greedy codes, then refitted
    to the codes found 4  codes    per row the best of: greedy in natural order, greedy and beam by
    descending diagonal, each descended 5  bias     b^ = b + W mu - W^ mu^

Never worse than nearest rounding on the held-out samples: nearest is kept otherwise, and the report says so.

Assumes: the layer is linear in its weight; the activation after it is not seen.
Source: Nagel et al., "Up or Down? Adaptive Rounding", arXiv 2004.10568 (the objective); Frantar et al.,
"GPTQ", arXiv 2210.17323; Li et al., "GPTAQ", arXiv 2504.02692 (the asymmetric target); Ledoit and Wolf, "A
Well-Conditioned Estimator for Large-Dimensional Covariance Matrices" (shrinkage).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qpipe.numerics.codes import RowGrid, Sharing, descend, objective, search, upper_factor
from qpipe.numerics.grid import Encoding, broadcast
from qpipe.numerics.moments import Moments, full_float32
from qpipe.numerics.unfold import Unfold

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
    """One layer's outcome: `codes` int32 and `values` float32 (groups, O / groups, K), the grid, the bias
    (O,).

    `report` is JSON: error_before and error_after, the output's squared error over its variance on the
    held-out samples (the fitted ones where none are held out), of plain nearest rounding and of the result;
    asymmetry, shrinkage, changed (the share of codes that differ from nearest), kept ("gram" or "nearest").
    """

    codes: Tensor
    values: Tensor
    grid: RowGrid
    bias: Tensor
    report: dict[str, Any]


def row_grid(
    e: Encoding, unfold: Unfold, shape: tuple[int, ...], device: str | torch.device = "cpu"
) -> RowGrid:
    """The grid of a weight of `shape` as rows."""
    scale, zero_point = (torch.tensor(v, device=device) for v in broadcast(e, shape))
    rows = [unfold.weight_rows(v.float().expand(shape)) for v in (scale, zero_point)]
    one_per_row = all(bool((v == v[..., :1]).all()) for v in rows)
    s, z = ((v[..., :1] if one_per_row else v).contiguous() for v in rows)
    return RowGrid(s, z, e.qmin, e.qmax, _sharing(e, unfold))


def _sharing(e: Encoding, unfold: Unfold) -> Sharing:
    if e.axis is None:
        return "tensor"
    if e.block_size is not None:
        return "fixed" if e.axis == unfold.weight_axis else "row"
    if e.axis != unfold.weight_axis:
        return "fixed"
    return "place" if unfold.kind == "conv_transpose" and unfold.groups > 1 else "row"


def row_encoding(e: Encoding, grid: RowGrid, unfold: Unfold, shape: tuple[int, ...]) -> Encoding:
    """`e` with the scales of `grid`, frozen: the inverse of `row_grid` after a scale search."""
    k = unfold.weight_rows(torch.empty(shape, device="meta")).shape[-1]
    full = unfold.weight_from_rows(grid.scale.expand(*grid.scale.shape[:2], k), shape).cpu().numpy()
    if e.axis is None:
        scale = full.reshape(-1)[0]
    elif e.block_size is None:
        scale = full.swapaxes(0, e.axis).reshape(shape[e.axis], -1)[:, 0]
    else:
        scale = full.take(range(0, shape[e.axis], e.block_size), axis=e.axis)
    return replace(e, scale=scale, frozen=True)


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
        shrinkage, asymmetry, codes = _choose(problem, grid, options, held_out is not None)
        target, h = problem.target(shrinkage, asymmetry), problem.shrunk(shrinkage)
        used = grid
        searched = options.scale_search and grid.sharing != "fixed"
        if searched:
            used, codes = _search_scales(target, grid, h, codes, options)
        codes = _codes(target, used, h, options, codes)
        if searched:
            used, codes = _refit_scales(target, used, codes, h, options)
            if problem.error(used.values(codes)) > problem.error(
                grid.values(fixed := _codes(target, grid, h, options))
            ):
                used, codes = grid, fixed
        nearest = grid.nearest(weight)
        kept = "gram"
        if problem.error(used.values(codes)) > problem.error(grid.values(nearest)):
            used, codes, kept = grid, nearest, "nearest"
        return _result(weight, grid, used, codes, kept, fit, held_out, bias, options, shrinkage, asymmetry)


class _Problem:
    """One layer's moments, and what follows from them."""

    def __init__(self, weight: Tensor, fit: Moments, judge: Moments) -> None:
        self.weight, self.fit, self.judge = weight, fit, judge
        # A layer whose inputs never vary has H = 0: any multiple of I then asks for nearest rounding.
        level = fit.cov.diagonal(dim1=1, dim2=2).mean(1)
        self._level = torch.where(level > 0, level, torch.ones_like(level))[:, None, None]
        self._shifts: dict[float, Tensor] = {}

    def shrunk(self, shrinkage: float) -> Tensor:
        """H' of `shrinkage`, float32, positive definite."""
        k = self.fit.cov.shape[-1]
        eye = torch.eye(k, dtype=self.fit.cov.dtype, device=self.fit.cov.device)
        return (1.0 - shrinkage) * self.fit.cov + (shrinkage + 1e-5) * self._level * eye

    def shift(self, shrinkage: float) -> Tensor | None:
        """C H'^-1, which makes up for the change of the inputs; None where they did not change."""
        if self.fit.cross is None:
            return None
        if shrinkage not in self._shifts:
            factor = torch.linalg.cholesky(self.shrunk(shrinkage).double())
            solved = torch.cholesky_solve(self.fit.cross.double().transpose(1, 2), factor)
            self._shifts[shrinkage] = solved.transpose(1, 2).to(self.weight.dtype)
        return self._shifts[shrinkage]

    def target(self, shrinkage: float, asymmetry: float) -> Tensor:
        """W* = W + a C H'^-1."""
        shift = self.shift(shrinkage)
        return self.weight if shift is None else self.weight + asymmetry * shift

    def best_asymmetry(self, shrinkage: float) -> float:
        """a in 0..1 of the least held-out error of the unrounded W*: the error is a parabola in a."""
        shift = self.shift(shrinkage)
        if shift is None or self.judge.cross is None:
            return 0.0 if shift is None else 1.0
        slope = float((self.judge.cross.double() * shift).sum())
        bend = float(((shift @ self.judge.cov).double() * shift).sum())
        return min(1.0, max(0.0, slope / bend)) if bend > 0 else 0.0

    def error(self, values: Tensor) -> float:
        """The judged error of the layer with these weights, summed over its outputs."""
        return float(_output_error(self.weight, values, self.judge).sum())


def _choose(
    problem: _Problem, grid: RowGrid, options: GramOptions, judged: bool
) -> tuple[float, float, Tensor]:
    """Shrinkage, asymmetry, and the codes that were found while choosing them."""
    k = problem.weight.shape[-1]
    if options.shrinkage is not None:
        ladder: tuple[float, ...] = (options.shrinkage,)
    elif judged:
        ladder = _SHRINKAGES if k <= options.beam_limit else _SHRINKAGES_LARGE
    else:
        ladder = (min(0.3, k / (2.0 * problem.fit.count)),)
    best: tuple[float, float, float, Tensor] | None = None
    for shrinkage in ladder:
        a = options.asymmetry
        if a is None:
            a = problem.best_asymmetry(shrinkage) if judged else 1.0
        target, h = problem.target(shrinkage, a), problem.shrunk(shrinkage)
        order = _descending(h)
        codes, _ = descend(target, search(target, grid, _factor(h, order), order, 1), grid, h)
        error = problem.error(grid.values(codes))
        if best is None or error < best[0]:
            best = (error, shrinkage, a, codes)
    assert best is not None
    return best[1], best[2], best[3]


def _codes(
    target: Tensor, grid: RowGrid, h: Tensor, options: GramOptions, known: Tensor | None = None
) -> Tensor:
    """Per row the best of all searches, each descended; `known` are greedy ones by descending diagonal."""
    k = target.shape[-1]
    natural = torch.arange(k, device=h.device).expand(h.shape[0], -1)
    descending = _descending(h)
    runs = [(natural, 1)]
    if known is None:
        runs.append((descending, 1))
    if options.beam > 1 and k <= options.beam_limit:
        runs.append((descending, options.beam))
    best = known
    least = None if known is None else objective(target, grid.values(known), h)
    for order, beam in runs:
        codes, _ = descend(target, search(target, grid, _factor(h, order), order, beam), grid, h)
        cost = objective(target, grid.values(codes), h)
        if best is None or least is None:
            best, least = codes, cost
        else:
            better = cost < least
            best, least = torch.where(better[..., None], codes, best), torch.where(better, cost, least)
    assert best is not None
    return best


def _search_scales(
    target: Tensor, grid: RowGrid, h: Tensor, known: Tensor, options: GramOptions
) -> tuple[RowGrid, Tensor]:
    """The grid with each row's best factor by greedy codes, and those codes."""
    order = _descending(h)
    factor = _factor(h, order)
    cost = grid.pooled(objective(target, grid.values(known), h))
    best, scale = known, grid.scale
    for f in (0.25, 0.5, 2.0) if options.power_of_two else options.scale_factors:
        trial = replace(grid, scale=grid.scale * f)
        codes = search(target, trial, factor, order, 1)
        value = grid.pooled(objective(target, trial.values(codes), h))
        better = value < cost
        cost = torch.where(better, value, cost)
        best, scale = (
            torch.where(better[..., None], codes, best),
            torch.where(better[..., None], trial.scale, scale),
        )
    used = replace(grid, scale=scale)
    codes, _ = descend(target, best, used, h)
    return used, codes


def _refit_scales(
    target: Tensor, grid: RowGrid, codes: Tensor, h: Tensor, options: GramOptions, rounds: int = 3
) -> tuple[RowGrid, Tensor]:
    """Scales by least squares for the codes and codes by descent for the scales, in turn."""
    if grid.scale.shape[-1] != 1 or options.power_of_two:
        return grid, codes
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


def _result(
    weight: Tensor,
    given: RowGrid,
    used: RowGrid,
    codes: Tensor,
    kept: str,
    fit: Moments,
    held_out: Moments | None,
    bias: Tensor | None,
    options: GramOptions,
    shrinkage: float,
    asymmetry: float,
) -> GramResult:
    values = used.values(codes)
    delta = _mean_change(weight, values, fit).reshape(-1)
    old = torch.zeros_like(delta) if bias is None else bias.double()
    judge = held_out or fit
    plain = given.nearest(weight)
    after = _moved_error(weight, values, judge, delta if options.update_bias else torch.zeros_like(delta))
    before = _moved_error(weight, given.values(plain), judge, torch.zeros_like(delta))
    return GramResult(
        codes.to(torch.int32),
        values,
        used,
        (old + delta if options.update_bias else old).float(),
        {
            "error_before": before,
            "error_after": after,
            "asymmetry": asymmetry if kept == "gram" else 0.0,
            "shrinkage": shrinkage,
            "changed": float((codes != plain).double().mean()),
            "kept": kept,
        },
    )


def _moved_error(weight: Tensor, values: Tensor, m: Moments, bias_change: Tensor) -> float:
    """The output's mean squared error over its variance, means included."""
    means = _mean_change(weight, values, m) - bias_change.reshape(weight.shape[:2])
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


def _descending(h: Tensor) -> Tensor:
    return h.diagonal(dim1=1, dim2=2).argsort(dim=-1, descending=True, stable=True)


def _factor(h: Tensor, order: Tensor) -> Tensor:
    k = h.shape[-1]
    rows = h.gather(1, order[:, :, None].expand(-1, -1, k))
    return upper_factor(rows.gather(2, order[:, None].expand(-1, k, -1)))
