"""Metrics against their definitions, and what they do at the edges."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest

from qpipe.errors import InputError
from qpipe.numerics.metric_names import Comparison, Metric
from qpipe.numerics.metrics import (
    HIGHEST_SQNR_DB,
    LABELLED,
    MEANS,
    METRICS,
    cosine,
    energies,
    mse,
    ranks,
    sqnr_db,
    top1,
    top5,
)

draw = np.random.default_rng(0)
LOGITS = draw.normal(size=(200, 10)).astype(np.float32)
LABELS = draw.integers(0, 10, 200)


def test_stages_can_name_every_metric_there_is() -> None:
    assert get_args(Metric) == tuple(METRICS)
    assert set(get_args(Comparison)) == set(METRICS) - LABELLED


@pytest.mark.parametrize(("metric", "k"), [(top1, 1), (top5, 5)])
def test_accuracy_agrees_with_scikit_learn(metric: object, k: int) -> None:
    from sklearn.metrics import top_k_accuracy_score

    assert callable(metric)
    assert metric(LOGITS, LABELS) == pytest.approx(top_k_accuracy_score(LABELS, LOGITS, k=k))


def test_classes_may_lie_on_axis_one_and_labels_may_have_a_last_axis_of_one() -> None:
    images = draw.normal(size=(2, 5, 4, 4))
    wanted = images.argmax(1)
    assert top1(images, wanted) == 1.0
    assert top1(np.moveaxis(images, 1, -1), wanted) == 1.0
    assert top1(LOGITS, LABELS[:, None]) == top1(LOGITS, LABELS)


def test_negative_labels_are_left_out_and_nan_outputs_are_wrong() -> None:
    outputs = np.array([[0.0, 1.0], [0.0, 1.0], [np.nan, 1.0]])
    assert top1(outputs, np.array([1, -100, 1])) == 0.5
    np.testing.assert_array_equal(ranks(outputs, np.array([0, 1, 1])), [1, 0, 2])


def test_a_tie_goes_to_the_first_class() -> None:
    assert top1(np.zeros((1, 3)), np.array([0])) == 1.0
    assert top1(np.zeros((1, 3)), np.array([1])) == 0.0


def test_sqnr_is_ten_times_the_logarithm_of_the_energy_ratio() -> None:
    reference = draw.normal(size=(50, 7))
    noise = 0.01 * draw.normal(size=(50, 7))
    expected = 10 * math.log10(np.sum(reference**2) / np.sum(noise**2))
    assert sqnr_db(reference + noise, reference) == pytest.approx(expected)
    assert sqnr_db(reference, reference) == HIGHEST_SQNR_DB
    assert sqnr_db(np.full(3, np.nan), np.ones(3)) == -HIGHEST_SQNR_DB


def test_cosine_is_the_mean_over_samples() -> None:
    a, b = draw.normal(size=(4, 2, 3)), draw.normal(size=(4, 2, 3))
    expected = np.mean(
        [np.vdot(x, y) / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a, b, strict=True)]
    )
    assert cosine(a, b) == pytest.approx(expected)
    assert cosine(np.zeros((2, 3)), np.zeros((2, 3))) == 1.0
    assert cosine(np.full((1, 2), np.nan), np.ones((1, 2))) == -1.0


def test_mse_is_lower_for_better_and_its_metric_higher() -> None:
    assert mse(np.array([1.0, 2.0]), np.array([1.0, 4.0])) == 2.0
    assert METRICS["mse"](np.array([1.0, 2.0]), np.array([1.0, 4.0])) == -2.0
    assert mse(np.array([np.nan]), np.array([1.0])) == math.inf


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(InputError, match=r"Labels of shape \(3,\)"):
        top1(LOGITS, np.arange(3))
    with pytest.raises(InputError, match="beyond the 10 classes"):
        top1(LOGITS, np.full(200, 10))
    with pytest.raises(InputError, match="no label"):
        top1(LOGITS, np.full(200, -1))
    with pytest.raises(InputError, match="cannot be compared"):
        sqnr_db(np.ones(3), np.ones(4))


def test_the_energies_of_samples_have_the_sqnr_of_the_samples() -> None:
    reference = draw.normal(size=(12, 3, 4, 4)).astype(np.float32)
    outputs = reference + draw.normal(size=reference.shape).astype(np.float32) / 9
    small, wanted = energies(outputs, reference)
    assert small.shape == wanted.shape == (12, 1)
    for rows in (slice(None), [3], [0, 5, 11]):
        found = sqnr_db(small[rows], wanted[rows])
        assert found == pytest.approx(sqnr_db(outputs[rows], reference[rows]), rel=1e-9)


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_means_are_those_of_their_halves(metric: str) -> None:
    other = LABELS if metric in LABELLED else (LOGITS + draw.normal(size=LOGITS.shape)).astype(np.float32)
    halves = [METRICS[metric](LOGITS[rows], other[rows]) for rows in (slice(0, 100), slice(100, 200))]
    is_mean = bool(np.isclose(np.mean(halves), METRICS[metric](LOGITS, other), rtol=1e-9, atol=0.0))
    assert is_mean is (metric in MEANS)
