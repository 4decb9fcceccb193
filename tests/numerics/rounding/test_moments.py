"""Moments against float64 numpy over all rows at once, whatever the batches; held-out samples; the way to arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qpipe.errors import InputError
from qpipe.numerics.rounding.moments import LayerMoments, Moments, MomentSums, to_arrays

draw = np.random.default_rng(0)
GROUPS, ROWS, K, OUT = 2, 600, 5, 3
X = torch.tensor(
    draw.normal(30.0, 1.0, (GROUPS, ROWS, K)) @ draw.normal(size=(GROUPS, K, K)), dtype=torch.float32
)
X_HAT = X + 0.01 * torch.tensor(draw.normal(size=(GROUPS, ROWS, K)), dtype=torch.float32) + 0.02
W = torch.tensor(draw.normal(size=(GROUPS, OUT, K)), dtype=torch.float32)


def _sums(x_hat: Tensor, x: Tensor | None, parts: int) -> Moments:
    sums = MomentSums(GROUPS, K, W)
    for piece, x_piece in zip(
        x_hat.chunk(parts, 1), x.chunk(parts, 1) if x is not None else [None] * parts, strict=True
    ):
        sums.update(piece, x_piece)
    return sums.moments()


@pytest.mark.parametrize("parts", [1, 7])
def test_moments_are_those_of_all_rows_in_float64(parts: int) -> None:
    m = _sums(X_HAT, X, parts)
    assert m.count == ROWS
    assert m.cross is not None
    assert m.drift is not None
    assert m.energy is not None
    for g in range(GROUPS):
        x, x_hat, w = (v[g].double().numpy() for v in (X, X_HAT, W))
        np.testing.assert_allclose(m.mean[g], x.mean(0), rtol=1e-6)
        np.testing.assert_allclose(m.mean_hat[g], x_hat.mean(0), rtol=1e-6)
        np.testing.assert_allclose(m.cov[g], np.cov(x_hat.T, bias=True), rtol=1e-4, atol=1e-4)
        drift = (x - x_hat) @ w.T
        # The drift is 1 % of inputs around 30: float32 holds it to about 1e-5 of its size.
        centred = (drift - drift.mean(0)).T @ (x_hat - x_hat.mean(0)) / ROWS
        np.testing.assert_allclose(m.cross[g], centred, rtol=2e-3, atol=1e-4)
        np.testing.assert_allclose(m.drift[g], drift.var(0), rtol=2e-3)
        np.testing.assert_allclose(m.energy[g], (x @ w.T).var(0), rtol=1e-4)


def test_without_float_inputs_there_is_no_drift() -> None:
    m = _sums(X_HAT, None, 3)
    assert m.cross is None
    assert m.drift is None
    torch.testing.assert_close(m.mean, m.mean_hat)


def test_every_tenth_sample_is_held_out_whatever_the_batches() -> None:
    samples, positions = 40, ROWS // 40
    whole = LayerMoments(GROUPS, K, W)
    whole.update(X_HAT, X, samples=samples)
    parts = LayerMoments(GROUPS, K, W)
    for first in range(0, samples, 3):
        rows = slice(first * positions, (first + 3) * positions)
        parts.update(X_HAT[:, rows], X[:, rows], samples=min(3, samples - first))
    apart = np.repeat(np.arange(samples) % 10 == 4, positions)
    for one in (whole, parts):
        assert one.held_out is not None
        assert one.held_out.count == 4 * positions
        for moments, chosen in ((one.fit, ~apart), (one.held_out, apart)):
            expected = _sums(X_HAT[:, torch.tensor(chosen)], X[:, torch.tensor(chosen)], 1)
            torch.testing.assert_close(moments.cov, expected.cov, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(moments.cross, expected.cross, rtol=2e-3, atol=1e-4)


def test_fewer_than_five_samples_hold_none_out() -> None:
    few = LayerMoments(GROUPS, K)
    few.update(X_HAT, samples=4)
    assert few.held_out is None
    assert few.fit.count == ROWS


def test_arrays_hold_the_same_moments() -> None:
    m = _sums(X_HAT, X, 1)
    arrays = to_arrays(m)
    assert arrays.pop("count") == m.count
    assert set(arrays) == {"mean", "mean_hat", "cov", "cross", "drift", "energy"}
    for name, array in arrays.items():
        assert np.array_equal(array, getattr(m, name).numpy())
    assert set(to_arrays(_sums(X_HAT, None, 1))) == {"count", "mean", "mean_hat", "cov", "energy"}


def test_what_cannot_be_summed_is_refused() -> None:
    with pytest.raises(ValueError, match="need the layer's weight"):
        MomentSums(GROUPS, K).update(X_HAT, X)
    sums = MomentSums(GROUPS, K, W)
    with pytest.raises(ValueError, match="no rows"):
        sums.moments()
    sums.update(X_HAT, X)
    with pytest.raises(ValueError, match="every batch or with none"):
        sums.update(X_HAT)
    broken = LayerMoments(GROUPS, K, name="conv1")
    broken.update(X_HAT * float("inf"), samples=4)
    with pytest.raises(InputError, match="inputs of layer 'conv1' hold nan or infinity"):
        _ = broken.fit
