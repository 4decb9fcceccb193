"""From data to ranges: one streaming pass over activations that serves every observer, exact search for weights.

`HistogramObserver` keeps the exact minimum and maximum, a moving average of both, and a histogram whose bins
have the width 2^k and edges at whole multiples of it. When the data outgrow it, neighbouring bins merge and
the width doubles, which is exact: the histogram depends on the data alone, neither on their order nor on
their batches. Memory is bounded by the number of bins. Only `moving_average` knows batches: one call of
`update` is one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qpipe.errors import InputError
from qpipe.numerics.grid import Encoding, encoding_from_range, refuse_nan
from qpipe.numerics.ranges import (
    CLIP_WEIGHT,
    Cost,
    entropy_of_histograms,
    noise_of_histogram,
    search,
    search_values,
)
from qpipe.numerics.scheme import TensorScheme

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]

MOVING_AVERAGE = 0.01
"""The weight of each new batch in the moving average of minimum and maximum, after the first."""
# Chunks that stay in the processor's cache: twice as fast as whole feature maps.
_CHUNK = 1 << 16
# Bin numbers stay whole in float32, and 1 / width finite.
_INDEX_BITS, _LOWEST_EXPONENT = 24, -120
_SEARCH_BINS = 2048
_WEIGHT_BINS = 2048


class HistogramObserver:
    """Streaming statistics of one activation tensor; `bins` bounds the memory, `name` is for messages.

    Infinities are left out of every statistic and counted in `infinite`: on any grid they saturate.
    """

    def __init__(self, bins: int = 8192, name: str = "") -> None:
        if bins < 2:
            raise ValueError(f"an observer needs at least 2 bins, got {bins}.")
        self.bins, self.name = bins, name
        self.count = self.zeros = self.infinite = 0
        self.min, self.max = math.inf, -math.inf
        self.average: tuple[float, float] | None = None
        self._exponent, self._first = 0, 0
        self._counts: npt.NDArray[np.int64] = np.zeros(0, np.int64)

    def update(self, x: Array | Tensor) -> None:
        """Takes in one batch, of any shape. Raises InputError, with the tensor's name, for a nan."""
        values = _as_numpy(x).reshape(-1)
        if not values.size:
            return
        low, high = float(values.min()), float(values.max())
        if not math.isfinite(low) or not math.isfinite(high):
            refuse_nan(values, self.name)
            finite = values[np.isfinite(values)]
            self.infinite += values.size - finite.size
            values = finite
            if not values.size:
                return
            low, high = float(values.min()), float(values.max())
        before = self.average or (low, high)
        self.average = tuple(a + MOVING_AVERAGE * (b - a) for a, b in zip(before, (low, high), strict=True))  # type: ignore[assignment]
        self.min, self.max = min(self.min, low), max(self.max, high)
        self.count += values.size
        self._widen()
        self._add(values)

    def range(self, scheme: TensorScheme) -> tuple[float, float]:
        """The range that the scheme's observer chooses. Raises InputError where no data were seen."""
        if not self.count:
            raise InputError(f"No data were observed for tensor '{self.name}': its range is not known.")
        scheme = replace(scheme, grid="max").settled()
        lo, hi = min(self.min, 0.0), max(self.max, 0.0)
        if scheme.observer == "minmax" or lo == hi:
            return self.min, self.max
        if scheme.observer == "moving_average":
            assert self.average is not None
            return self.average
        if scheme.observer == "percentile":
            return self._percentile(scheme)
        low, high = search(self._cost(scheme), np.array([lo]), np.array([hi]), scheme)
        return float(low[0]), float(high[0])

    def encoding(self, scheme: TensorScheme) -> Encoding:
        """The per-tensor grid over `range(scheme)`."""
        return encoding_from_range(*self.range(scheme), scheme, name=self.name)

    def noise(self, e: Encoding) -> float:
        """The share of the signal's energy that rounding onto the per-tensor grid `e` turns into noise."""
        counts, edges = self._without_zeros()
        energy = float((np.diff(edges**3) @ counts) / (3.0 * (edges[1] - edges[0])))
        if energy <= 0.0:
            return 0.0
        scheme = TensorScheme(e.bitwidth, e.signed, e.symmetric)
        cost = noise_of_histogram(counts, edges, scheme, 1.0)
        scale, zero_point = e.scale.astype(np.float64).reshape(1), e.zero_point.reshape(1)
        return float(cost(scale, zero_point)[0]) / energy

    def histogram(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Counts (n,) and edges (n + 1,), n <= bins; exact zeros are in them too."""
        edges = np.ldexp(
            np.arange(self._first, self._first + self._counts.size + 1, dtype=np.float64), self._exponent
        )
        return self._counts.copy(), edges

    def state(self) -> dict[str, Array]:
        """Everything, as arrays; `from_state` goes on from it."""
        average = self.average or (math.nan, math.nan)
        return {
            "counts": self._counts.copy(),
            "integers": np.array(
                [self.bins, self.count, self.zeros, self.infinite, self._exponent, self._first], np.int64
            ),
            "numbers": np.array([self.min, self.max, *average], np.float64),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Array], name: str = "") -> HistogramObserver:
        """The observer that `state` was taken from."""
        bins, count, zeros, infinite, exponent, first = (int(v) for v in state["integers"])
        observer = cls(bins, name)
        observer.count, observer.zeros, observer.infinite = count, zeros, infinite
        observer._exponent, observer._first = exponent, first
        observer.min, observer.max, low, high = (float(v) for v in state["numbers"])
        observer.average = None if math.isnan(low) else (low, high)
        observer._counts = np.array(state["counts"], np.int64)
        return observer

    def _widen(self) -> None:
        """Makes the bins reach from min to max: more of them, or wider ones when `bins` do not suffice."""
        largest = max(abs(self.min), abs(self.max))
        lowest = max(_LOWEST_EXPONENT, math.frexp(largest)[1] - _INDEX_BITS if largest else _LOWEST_EXPONENT)
        exponent = max(self._exponent, lowest) if self._counts.size else lowest
        while _index(self.max, exponent) - _index(self.min, exponent) >= self.bins:
            exponent += 1
        first, last = _index(self.min, exponent), _index(self.max, exponent)
        if (exponent, first, last) == (self._exponent, self._first, self._first + self._counts.size - 1):
            return
        counts = np.zeros(last - first + 1, np.int64)
        old = self._first + np.arange(self._counts.size)
        merged = np.clip(old >> max(exponent - self._exponent, 0), first, last)
        np.add.at(counts, merged - first, self._counts)
        self._exponent, self._first, self._counts = exponent, first, counts

    def _add(self, values: npt.NDArray[np.float32]) -> None:
        per_width = np.float32(math.ldexp(1.0, -self._exponent))
        size = min(_CHUNK, values.size)
        scaled, index = np.empty(size, np.float32), np.empty(size, np.int64)
        for start in range(0, values.size, size):
            chunk = values[start : start + size]
            n = chunk.size
            np.multiply(chunk, per_width, out=scaled[:n])
            np.floor(scaled[:n], out=scaled[:n])
            index[:n] = scaled[:n]
            if self._first:
                index[:n] -= self._first
            self._counts += np.bincount(index[:n], minlength=self._counts.size)
            self.zeros += n - int(np.count_nonzero(chunk))

    def _without_zeros(self) -> tuple[Array, Array]:
        """The histogram less the exact zeros, which no grid moves, as float64."""
        counts, edges = self.histogram()
        if self.zeros:
            counts[-self._first] -= self.zeros
        return counts.astype(np.float64), edges

    def _cost(self, scheme: TensorScheme) -> Cost:
        counts, edges = self._without_zeros()
        if scheme.observer == "entropy":
            return entropy_of_histograms(counts[None], edges[None], scheme)
        merge = -(-counts.size // _SEARCH_BINS)
        spare = -counts.size % merge
        counts = np.pad(counts, (0, spare)).reshape(-1, merge).sum(1)
        edges = edges[0] + (edges[1] - edges[0]) * merge * np.arange(counts.size + 1)
        return noise_of_histogram(counts, edges, scheme, CLIP_WEIGHT[scheme.observer])

    def _percentile(self, scheme: TensorScheme) -> tuple[float, float]:
        counts, edges = self.histogram()
        beyond = 1.0 - scheme.percentile / 100.0
        if not scheme.symmetric:
            low, high = _quantiles(counts, edges, np.array([beyond, 1.0 - beyond]))
            return max(low, self.min), min(high, self.max)
        # Of |x|: the mirror image of the negative bins is added to the positive ones.
        width = edges[1] - edges[0]
        half = np.zeros(max(-self._first, self._first + counts.size, 1), np.int64)
        number = self._first + np.arange(counts.size)
        np.add.at(half, np.where(number < 0, -1 - number, number), counts)
        (limit,) = _quantiles(half, width * np.arange(half.size + 1), np.array([1.0 - beyond]))
        return max(-limit, self.min), min(limit, self.max)


def weight_encoding(w: Array, scheme: TensorScheme, axis: int = 0, name: str = "") -> Encoding:
    """The grid of a weight by the scheme's observer, searched on its elements, all channels or blocks at once.

    `axis` is that of the output channels per channel, the blocked one per block, and unread per tensor.
    Raises InputError, with the `name`, for a nan or an infinity.
    """
    w, scheme = np.asarray(w, np.float32), scheme.settled()
    refuse_nan(w, name)
    rows, shape = _rows(w, scheme, axis)
    lo, hi = np.nanmin(rows, 1, initial=0.0), np.nanmax(rows, 1, initial=0.0)
    if scheme.observer != "minmax" and rows.size and np.isfinite(lo).all() and np.isfinite(hi).all():
        lo, hi = _row_ranges(rows, lo, hi, scheme)
    return encoding_from_range(lo.reshape(shape), hi.reshape(shape), scheme, axis, name)


def _row_ranges(rows: Array, lo: Array, hi: Array, scheme: TensorScheme) -> tuple[Array, Array]:
    if scheme.observer == "percentile":
        beyond = 1.0 - scheme.percentile / 100.0
        if scheme.symmetric:
            limit = np.nanquantile(np.abs(rows), 1.0 - beyond, axis=1)
            return np.maximum(-limit, lo), np.minimum(limit, hi)
        low, high = np.nanquantile(rows, [beyond, 1.0 - beyond], axis=1)
        return low, high
    if scheme.observer == "entropy":
        return search(_row_entropy(np.nan_to_num(rows, nan=0.0), lo, hi, scheme), lo, hi, scheme)
    return search_values(rows, lo, hi, scheme)


def _row_entropy(values: Array, lo: Array, hi: Array, scheme: TensorScheme) -> Cost:
    tiny = float(np.finfo(np.float32).tiny)
    width = np.maximum((hi.astype(np.float64) - lo) / _WEIGHT_BINS, tiny)[:, None]
    number = np.clip((values - lo[:, None]) / width, 0, _WEIGHT_BINS - 1).astype(np.int64)
    number += _WEIGHT_BINS * np.arange(len(values))[:, None]
    counts = np.bincount(number.ravel(), minlength=_WEIGHT_BINS * len(values)).reshape(-1, _WEIGHT_BINS)
    return entropy_of_histograms(
        counts.astype(np.float64), lo[:, None] + width * np.arange(_WEIGHT_BINS + 1), scheme
    )


def _rows(w: Array, scheme: TensorScheme, axis: int) -> tuple[Array, tuple[int, ...]]:
    """The elements that share a scale as rows (ranges, n), nan filling a short block; the scale's shape."""
    if scheme.granularity == "per_tensor":
        return w.reshape(1, -1), ()
    if scheme.granularity in ("per_channel", "auto"):
        return np.moveaxis(w, axis, 0).reshape(w.shape[axis], -1), (w.shape[axis],)
    size = scheme.block_size
    spare = -w.shape[axis] % size
    padded = np.pad(w, [(0, spare if i == axis else 0) for i in range(w.ndim)], constant_values=np.nan)
    shape = tuple(n // size if i == axis else n for i, n in enumerate(padded.shape))
    split = padded.reshape(*shape[:axis], shape[axis], size, *shape[axis + 1 :])
    return np.moveaxis(split, axis + 1, -1).reshape(-1, size), shape


def _quantiles(counts: Array, edges: Array, shares: Array) -> tuple[float, ...]:
    """The values below which the given shares of a histogram's mass lie, evenly spread within a bin."""
    below = np.concatenate([[0], np.cumsum(counts)])
    wanted = shares * below[-1]
    i = np.clip(np.searchsorted(below, wanted, side="left") - 1, 0, counts.size - 1)
    inside = (wanted - below[i]) / np.maximum(counts[i], 1)
    return tuple(float(v) for v in edges[i] + inside * (edges[i + 1] - edges[i]))


def _index(value: float, exponent: int) -> int:
    # In float32, as the elements themselves: what underflows there must underflow here.
    return math.floor(np.float32(value) * np.float32(math.ldexp(1.0, -exponent)))


def _as_numpy(x: Array | Tensor) -> npt.NDArray[np.float32]:
    if isinstance(x, np.ndarray):
        return np.ascontiguousarray(x, np.float32)
    return np.ascontiguousarray(x.detach().float().cpu().numpy())
