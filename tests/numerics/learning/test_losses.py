"""Losses by the formula, in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import softmax

from qpipe.numerics.learning.losses import (
    by_sample,
    divergence,
    features,
    fisher,
    judged_by,
    loses,
    mse,
    squared_error,
)

Y, T = (np.random.default_rng(seed).normal(size=(5, 7, 3)) for seed in (0, 1))
y, t = torch.tensor(Y), torch.tensor(T)


@pytest.mark.parametrize("axis", [1, -1])
def test_mse_sums_over_channels_and_takes_the_mean_of_the_rest(axis: int) -> None:
    assert float(mse(axis)(y, t)) == pytest.approx(np.square(Y - T).sum(axis).mean(), rel=1e-12)


def test_several_outputs_are_summed_and_one_without_channels_is_its_mean() -> None:
    flat = (torch.tensor(Y[:, 0, 0]), torch.tensor(T[:, 0, 0]))
    wanted = np.square(Y - T).sum(1).mean() + np.square(Y[:, 0, 0] - T[:, 0, 0]).mean()
    assert float(mse()((y, flat[0]), (t, flat[1]))) == pytest.approx(wanted, rel=1e-12)


def test_fisher_weighs_each_error_by_its_squared_gradient() -> None:
    g = np.random.default_rng(2).normal(size=Y.shape)
    wanted = (np.square(Y - T) * np.square(g)).sum(1).mean()
    assert float(fisher()(y, (t, torch.tensor(g)))) == pytest.approx(wanted, rel=1e-12)
    assert float(fisher()((y, y), ((t, torch.tensor(g)), (t, torch.tensor(g))))) == pytest.approx(2 * wanted, rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("axis", [1, -1])
def test_divergence_is_that_of_the_softmax(temperature: float, axis: int) -> None:
    p, q = softmax(T / temperature, axis), softmax(Y / temperature, axis)
    wanted = temperature**2 * (p * np.log(p / q)).sum(axis).mean()
    assert float(divergence(temperature, axis)(y, t)) == pytest.approx(wanted, rel=1e-12)
    assert float(divergence(temperature, axis)(t, t)) == 0.0


def test_features_count_alike_whatever_their_size() -> None:
    one = np.square(Y - T).mean() / T.var()
    found = features([T.var(), (100 * T).var()])((y, 100 * y), (t, 100 * t))
    assert float(found) == pytest.approx(2 * one, rel=1e-12)
    with pytest.raises(ValueError, match="1 variances do not fit 2 outputs"):
        features([1.0])((y, y), (t, t))


def test_judges_add_up_over_batches() -> None:
    error, energy = squared_error(y, t)
    parts = [squared_error(y[i], t[i]) for i in (slice(0, 2), slice(2, 5))]
    assert float(error) == pytest.approx(np.square(Y - T).sum(), rel=1e-12)
    assert float(energy) == pytest.approx(np.square(T).sum(), rel=1e-12)
    assert float(sum(p[0] for p in parts)) == pytest.approx(float(error), rel=1e-12)
    judge = judged_by(mse())
    parts = [judge(y[i], t[i]) for i in (slice(0, 2), slice(2, 5))]
    mean = float(sum(p[0] for p in parts)) / float(sum(p[1] for p in parts))
    assert mean == pytest.approx(float(mse()(y, t)), rel=1e-12)


def test_an_output_loses_where_its_errors_rise_by_more_than_their_noise() -> None:
    rng = np.random.default_rng(3)
    before = torch.tensor(rng.gamma(4.0, size=(100, 4)))
    noise = rng.normal(size=100)
    rise = np.stack([0.3 + noise, 0.3 * (noise - noise.mean()), 0 * noise, -rng.random(100)])
    found = loses(before, before + torch.tensor(rise.T))
    assert found.tolist() == [True, False, False, False]
    assert loses(torch.ones(1, 2), torch.tensor([[1.1, 1.0]])).tolist() == [True, False]


def test_errors_by_sample_and_output_add_up_to_the_loss() -> None:
    rows = by_sample((y, 100 * y), (t, 100 * t), [T.var(), (100 * T).var()])
    assert rows.shape == (5, 2)
    assert float(rows.mean(0).sum()) == pytest.approx(
        float(features([T.var(), (100 * T).var()])((y, 100 * y), (t, 100 * t))), rel=1e-12
    )
    with pytest.raises(ValueError, match="an output has shape"):
        by_sample((y,), (t[:1],), [1.0])


def test_an_output_of_another_shape_is_refused_rather_than_broadcast() -> None:
    with pytest.raises(ValueError, match="an output has shape"):
        mse()(y, t[:1])
    with pytest.raises(ValueError, match="argument"):
        mse()((y, y), (t,))
