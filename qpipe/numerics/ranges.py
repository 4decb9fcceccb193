"""The range of a tensor that costs least: what the observers minimize, and the search that they share.

For a grid with scale s and codes that stand for a..b steps, and u = x / s, r = clip(round(u), a, b):

    mse       E[(x - s r)^2]
    sqnr      the same, with clipped elements counted threefold (known as tf_enhanced)
    entropy   KL(P || Q), P the histogram with clipped mass moved to its ends, Q what the codes keep of it

Each is a function of arrays (scale, zero_point) of shape (rows,), one row per range that is looked for, so that the
channels of a weight are searched together. `search` never returns a range that costs more than minmax.

Source: Migacz, "8-bit Inference with TensorRT", GTC 2017 (entropy); the rounding error's antiderivative is elementary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from qpipe.numerics.grid import grid_from_range
from qpipe.numerics.scheme import TensorScheme, code_bounds

Array = npt.NDArray[Any]
Cost = Callable[[Array, Array], Array]

CLIP_WEIGHT = {"mse": 1.0, "sqnr": 3.0}
# 1 down to 0.01 in steps that the refinement below can bridge.
_LADDER = 0.85 ** np.arange(29)
_REFINEMENTS = (0.08, 0.04, 0.02, 0.01)
# Of rounding, where what clipping costs is held against what was found.
_MARGIN = 1.0 + 1e-4
# Elements: a part and two arrays beside it stay in the processor's cache.
_CHUNK = 1 << 16


def search(
    cost: Cost, lo: Array, hi: Array, scheme: TensorScheme, also: Array | None = None, clipped: Cost | None = None
) -> tuple[Array, Array]:
    """Per row the range (lo, hi), each end shrunk towards zero by a factor of its own, of the least cost; factors
    `also` (rows,) of both ends are tried after all others.

    `lo` and `hi` have shape (rows,). Coordinate search: both ends together down a ladder of factors, then each alone,
    then steps of 8, 4, 2 and 1 percent around the best. One-sided and symmetric ranges move both ends together.
    `clipped`, what no range further down its ladder costs less than, spares the rest of a ladder where that alone is
    above the least cost of every row.
    """
    lo, hi = np.minimum(lo, 0.0).astype(np.float64), np.maximum(hi, 0.0).astype(np.float64)
    two_sided = not scheme.symmetric and bool(np.any((lo < 0) & (hi > 0)))
    best, least = np.ones((1 + two_sided, lo.size)), np.full(lo.size, np.inf)

    def offer(factors: Array) -> bool:
        """Whether all is had that any row can gain on this ladder."""
        grids = grid_from_range(lo * factors[0], hi * factors[-1], scheme)
        value = cost(*grids)
        better = value < least
        if not better.any():
            return clipped is not None and bool(np.all(clipped(*grids) >= _MARGIN * least))
        np.copyto(best, factors, where=better)
        np.copyto(least, value, where=better)
        return False

    def descend(moved: Array) -> None:
        for step in _LADDER:
            if offer(np.where(moved, step, best)):
                break

    descend(np.ones((len(best), 1), bool))
    if two_sided:
        for end in (1, 0, 1):
            descend(np.arange(2)[:, None] == end)
    moves = [(1, 1), (1, 0), (0, 1), (1, -1)] if two_sided else [(1,)]
    for percent in _REFINEMENTS:
        for move in moves:
            for sign in (1, -1):
                offer(np.minimum(best * (1.0 + sign * percent * np.array(move)[:, None]), 1.0))
    if also is not None:
        offer(np.broadcast_to(also, best.shape))
    return lo * best[0], hi * best[-1]


def search_signs(
    cost: Cost, lo: Array, hi: Array, scheme: TensorScheme, clipped: Cost | None = None
) -> tuple[Array, Array]:
    """The same for `grid: signed_max`: the best range on the codes as they are or on the mirrored ones, one-sided.

    Both begin where `grid: max` does and go its way, so that what that finds never costs less.
    """
    qmin, qmax = code_bounds(scheme.bitwidth, scheme.signed)
    largest = np.maximum(-np.minimum(lo, 0.0), np.maximum(hi, 0.0)).astype(np.float64)
    reach, zero = largest * (-qmin / qmax), np.zeros(largest.shape)
    own = np.full(largest.size, qmax / -qmin)
    low = search(cost, -reach, zero, scheme, own, clipped)[0]
    high = search(cost, zero, reach, scheme, own, clipped)[1]
    mirrored = cost(*grid_from_range(zero, high, scheme)) < cost(*grid_from_range(low, zero, scheme))
    return np.where(mirrored, zero, low), np.where(mirrored, high, zero)


def search_values(rows: Array, lo: Array, hi: Array, scheme: TensorScheme) -> tuple[Array, Array]:
    """The ranges of `rows` (ranges, n) of numbers, nan where there is none, by the scheme's mse or sqnr.

    As many rows at once as the processor's cache holds: each is searched as if it were alone.
    """
    stride = max(1, _CHUNK // max(1, rows.shape[1]))
    find = search_signs if scheme.grid == "signed_max" else search
    found = []
    for start in range(0, len(rows), stride):
        part = slice(start, start + stride)
        values = np.ascontiguousarray(np.nan_to_num(rows[part], nan=0.0))
        cost = noise_of_values(values, scheme, CLIP_WEIGHT[scheme.observer])
        found.append(find(cost, lo[part], hi[part], scheme, clipped=clipped_of_values(values, scheme)))
    low, high = zip(*found, strict=True)
    return np.concatenate(low), np.concatenate(high)


def noise_of_values(values: Array, scheme: TensorScheme, clip_weight: float) -> Cost:
    """The exact cost of rounding `values` (rows, n): the sum of squared errors, clipped ones weighted."""
    qmin, qmax = code_bounds(scheme.bitwidth, scheme.signed)

    def error(x: Array, scale: Array, zero_point: Array, steps: Array, codes: Array) -> Array:
        np.divide(x, scale, out=steps)
        np.rint(steps, out=codes)
        _clip(codes, qmin - zero_point, qmax - zero_point, codes)
        steps -= codes
        if clip_weight != 1.0:
            np.multiply(steps, np.sqrt(clip_weight), out=steps, where=np.abs(steps, out=codes) > 0.5)
        return steps

    return _squares(values, error)


def clipped_of_values(values: Array, scheme: TensorScheme) -> Cost:
    """What `values` (rows, n) cost at least where they lie beyond the grid: no grid of a smaller scale costs less. One
    with a zero point has ends that follow the range by half a step, so what lies beyond by a step counts."""
    qmin, qmax = code_bounds(scheme.bitwidth, scheme.signed)
    spare = 0 if scheme.symmetric else 1

    def error(x: Array, scale: Array, zero_point: Array, steps: Array, codes: Array) -> Array:
        np.divide(x, scale, out=steps)
        _clip(steps, qmin - zero_point - spare, qmax - zero_point + spare, codes)
        steps -= codes
        return steps

    return _squares(values, error)


def _clip(x: Array, low: Array, high: Array, out: Array) -> None:
    """`x` (rows, n) between `low` and `high` (rows, 1). numpy's own clip takes five times as long with arrays."""
    if np.ptp(low) == 0.0:
        np.clip(x, low[0, 0], high[0, 0], out=out)
    else:
        np.maximum(x, low, out=out)
        np.minimum(out, high, out=out)


def _squares(values: Array, error: Callable[..., Array]) -> Cost:
    """Per row the squares of `error`, in steps of the grid, times that of the step: summed in float64 over parts that
    the processor's cache holds, each in the precision of the values."""
    part = min(values.shape[1], _CHUNK // 2)
    steps, codes = np.empty((2, values.shape[0], part), values.dtype)

    def cost(scale: Array, zero_point: Array) -> Array:
        s, z = scale[:, None].astype(values.dtype), zero_point[:, None].astype(values.dtype)
        total = np.zeros(len(values))
        for start in range(0, values.shape[1], max(1, part)):
            x = values[:, start : start + part]
            e = error(x, s, z, steps[:, : x.shape[1]], codes[:, : x.shape[1]])
            total += np.einsum("rn,rn->r", e, e)
        return np.asarray(total * scale.astype(np.float64) ** 2)

    return cost


def noise_of_histogram(counts: Array, edges: Array, scheme: TensorScheme, clip_weight: float) -> Cost:
    """The same for one histogram whose mass lies evenly within its bins; exact for steps below a bin's width too.

    `counts` (bins,), `edges` (bins + 1,) evenly spaced. The antiderivative of (u - r(u))^2 is r / 12 + (u - r)^3 / 3.
    """
    qmin, qmax = code_bounds(scheme.bitwidth, scheme.signed)
    width = float(edges[1] - edges[0])

    def cost(scale: Array, zero_point: Array) -> Array:
        s, z = scale[:, None], zero_point[:, None]
        u = edges / s
        r = np.clip(np.rint(u), qmin - z, qmax - z)
        d = u - r
        cubes = d * d * d / 3.0  # numpy's d**3 takes 30 times as long
        integral = r / 12.0 + cubes
        if clip_weight != 1.0:
            clipped = np.abs(d) > 0.5
            integral += (clip_weight - 1.0) * np.where(clipped, cubes - np.sign(d) / 24.0, 0.0)
        return np.asarray((np.diff(integral, axis=1) @ counts) * scale**3 / width)

    return cost


def entropy_of_histograms(counts: Array, edges: Array, scheme: TensorScheme) -> Cost:
    """KL divergence in nats of each row's histogram from what its codes keep; infinite for codes finer than bins.

    `counts` (rows, bins), `edges` (rows, bins + 1). Mass outside the range counts in P at the range's ends
    and not at all in Q, which spreads each code's mass evenly over the code's bins that hold any.
    """
    qmin, qmax = code_bounds(scheme.bitwidth, scheme.signed)
    centres = (edges[:, 1:] + edges[:, :-1]) / 2.0
    widths = edges[:, 1] - edges[:, 0]

    def one(n: Array, x: Array, width: float, scale: float, zero_point: float) -> float:
        low, high = (qmin - zero_point - 0.5) * scale, (qmax - zero_point + 0.5) * scale
        inside = (x >= low) & (x <= high)
        covers_all = bool(inside[n > 0].all())
        if not inside.any() or (scale < width and not covers_all):
            return float("inf")
        kept, total = n[inside], float(n.sum())
        first, last = np.flatnonzero(inside)[[0, -1]]
        p = kept.copy()
        p[0] += n[:first].sum()
        p[-1] += n[last + 1 :].sum()
        codes = np.clip(np.rint(x[inside] / scale), qmin - zero_point, qmax - zero_point).astype(np.int64)
        codes -= codes[0]
        mass = np.bincount(codes, kept)
        filled = np.bincount(codes, kept > 0)
        q = np.where(kept > 0, mass[codes] / np.maximum(filled[codes], 1.0), 0.0) / max(
            float(kept.sum()), 1.0
        )
        p = p / total
        # A clipped end whose own bin was empty has no mass in Q: the least that a bin can hold stands in.
        q = np.maximum(q, 1.0 / (total * total))
        seen = p > 0
        return float(np.sum(p[seen] * np.log(p[seen] / q[seen])))

    def cost(scale: Array, zero_point: Array) -> Array:
        rows = zip(counts, centres, widths, scale, zero_point, strict=True)
        return np.array([one(n, x, float(w), float(s), float(z)) for n, x, w, s, z in rows])

    return cost
