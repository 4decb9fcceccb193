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
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qpipe.numerics.grid import encoding_from_range
from qpipe.numerics.scheme import TensorScheme, code_bounds

Array = npt.NDArray[Any]
Cost = Callable[[Array, Array], Array]

CLIP_WEIGHT = {"mse": 1.0, "sqnr": 3.0}
# 1 down to 0.01 in steps that the refinement below can bridge.
_LADDER = 0.85 ** np.arange(29)
_REFINEMENTS = (0.08, 0.04, 0.02, 0.01)
_ROWS_AT_ONCE = 1 << 20


def search(
    cost: Cost, lo: Array, hi: Array, scheme: TensorScheme, also: Array | None = None
) -> tuple[Array, Array]:
    """Per row the range (lo, hi), each shrunk towards zero by a factor of its own, of the least cost; factors
    `also` (2, rows) are tried after all others.

    `lo` and `hi` have shape (rows,). Coordinate search: both ends together down a ladder of factors, then each alone,
    then steps of 8, 4, 2 and 1 percent around the best. One-sided and symmetric ranges move both ends together.
    """
    lo, hi = np.minimum(lo, 0.0).astype(np.float64), np.maximum(hi, 0.0).astype(np.float64)
    best = np.ones((2, lo.size))

    def evaluate(factors: Array) -> Array:
        return cost(*_grids(lo * factors[0], hi * factors[1], scheme))

    least = evaluate(best)

    def offer(factors: Array) -> None:
        nonlocal best, least
        value = evaluate(factors)
        better = value < least
        least = np.where(better, value, least)
        best = np.where(better, factors, best)

    two_sided = not scheme.symmetric and bool(np.any((lo < 0) & (hi > 0)))
    for step in _LADDER[1:]:
        offer(np.full_like(best, step))
    if two_sided:
        for end in (1, 0, 1):
            for step in _LADDER:
                offer(np.where(np.arange(2)[:, None] == end, step, best))
    moves = [(1, 1), (1, 0), (0, 1), (1, -1)] if two_sided else [(1, 1)]
    for percent in _REFINEMENTS:
        for move in moves:
            for sign in (1, -1):
                offer(np.minimum(best * (1.0 + sign * percent * np.array(move)[:, None]), 1.0))
    if also is not None:
        offer(also)
    return lo * best[0], hi * best[1]


def search_signs(cost: Cost, lo: Array, hi: Array, scheme: TensorScheme) -> tuple[Array, Array]:
    """The same for `grid: signed_max`: the best range on the codes as they are or on the mirrored ones, one-sided.

    Both begin where `grid: max` does and go its way, so that what that finds never costs less.
    """
    qmin, qmax = code_bounds(scheme.bitwidth, scheme.signed)
    largest = np.maximum(-np.minimum(lo, 0.0), np.maximum(hi, 0.0)).astype(np.float64)
    reach, zero = largest * (-qmin / qmax), np.zeros(largest.shape)
    own = np.full((2, largest.size), qmax / -qmin)
    low, high = search(cost, -reach, zero, scheme, own)[0], search(cost, zero, reach, scheme, own)[1]
    mirrored = cost(*_grids(zero, high, scheme)) < cost(*_grids(low, zero, scheme))
    return np.where(mirrored, zero, low), np.where(mirrored, high, zero)


def _grids(lo: Array, hi: Array, scheme: TensorScheme) -> tuple[Array, Array]:
    """Scales and zero points of the ranges, one a row, in float64."""
    rows = replace(scheme, granularity="per_channel", block_size=0)
    e = encoding_from_range(lo, hi, rows, axis=0)
    return e.scale.astype(np.float64), e.zero_point.astype(np.float64)


def noise_of_values(values: Array, scheme: TensorScheme, clip_weight: float) -> Cost:
    """The exact cost of rounding `values` (rows, n): the sum of squared errors, clipped ones weighted."""
    qmin, qmax = code_bounds(scheme.bitwidth, scheme.signed)
    stride = max(1, _ROWS_AT_ONCE // max(1, values.shape[1]))

    def part(x: Array, scale: Array, zero_point: Array) -> Array:
        s, z = scale[:, None].astype(x.dtype), zero_point[:, None].astype(x.dtype)
        error = x / s
        error -= np.clip(np.rint(error), qmin - z, qmax - z)
        if clip_weight != 1.0:
            error[np.abs(error) > 0.5] *= np.asarray(np.sqrt(clip_weight), x.dtype)
        return np.asarray(np.einsum("rn,rn->r", error, error, dtype=np.float64) * scale**2)

    def cost(scale: Array, zero_point: Array) -> Array:
        starts = range(0, values.shape[0], stride)
        spans = [slice(start, start + stride) for start in starts]
        return np.concatenate([part(values[i], scale[i], zero_point[i]) for i in spans])

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
        cubes = d**3 / 3.0
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
