"""The parts of a score say what a textbook does of its noise."""

from __future__ import annotations

import numpy as np
import pytest

from qpipe.numerics.jackknife import pseudo_values
from qpipe.numerics.metrics import sqnr_db

RNG = np.random.default_rng(5)


def test_of_a_mean_they_are_the_means_of_the_parts() -> None:
    values = RNG.normal(size=60)
    found = pseudo_values(lambda rows: float(values[rows].mean()), 60, parts=6)
    np.testing.assert_allclose(found, [values[part::6].mean() for part in range(6)], rtol=1e-9)


def test_a_mean_may_be_asked_for_each_part_alone() -> None:
    values = RNG.normal(size=60)
    of = lambda rows: float(values[rows].mean())  # noqa: E731
    np.testing.assert_allclose(pseudo_values(of, 60, mean=True), pseudo_values(of, 60), rtol=1e-9)


def test_of_few_samples_there_is_one_for_each() -> None:
    values = RNG.normal(size=7)
    found = pseudo_values(lambda rows: float(values[rows].mean()), 7)
    np.testing.assert_allclose(found, values, rtol=1e-9)


def test_of_a_ratio_in_db_their_noise_is_that_of_the_delta_method() -> None:
    """10 log10(sum a / sum b): the variance of its linear form, 100 / ln(10)^2 var(a / mean a - b / mean b) / n."""
    signal, noise = RNG.normal(3, 1, (400, 5)), RNG.normal(0, 0.4, (400, 5))
    found = pseudo_values(lambda rows: sqnr_db((signal + noise)[rows], signal[rows]), 400, parts=400)
    a, b = (signal**2).sum(1), (noise**2).sum(1)
    expected = 10 / np.log(10) * np.std(a / a.mean() - b / b.mean(), ddof=1) / np.sqrt(400)
    assert np.std(found, ddof=1) / np.sqrt(400) == pytest.approx(expected, rel=0.02)
