"""Which choices mattered: of a full grid the analysis of variance, by its closed form."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qpipe.report.importance import importance

EFFECTS = {"a": {"x": 0.0, "y": 3.0}, "b": {"1": 0.0, "2": 1.0, "3": -1.0}, "c": {"p": 0.0, "q": 0.0}}


def test_of_a_full_grid_the_shares_are_those_of_an_analysis_of_variance() -> None:
    choices = [dict(zip(EFFECTS, each, strict=True)) for each in itertools.product(*EFFECTS.values())]
    rest = np.random.default_rng(0).normal(0, 0.5, len(choices))
    scores = np.array([sum(EFFECTS[key][value] for key, value in each.items()) for each in choices]) + rest
    found = importance(choices, list(scores))
    assert found is not None
    assert found.trials == 12
    for each in found.shares:
        column = np.array([choice[each.key] for choice in choices])
        means = {value: scores[column == value].mean() for value in set(column)}
        between = np.mean([(means[value] - scores.mean()) ** 2 for value in column])
        assert each.share == pytest.approx(between / scores.var())
        assert each.error > 0
    assert [each.key for each in found.shares][:2] == ["a", "b"]
    assert found.together == pytest.approx(sum(each.share for each in found.shares))


def test_what_goes_together_with_another_choice_explains_nothing_alone() -> None:
    choices = [{"a": str(i % 2), "b": str(i % 2), "c": str(i % 3)} for i in range(24)]
    found = importance(choices, [i % 2 + 0.1 * (i % 3) for i in range(24)])
    assert found is not None
    shares = {each.key: each.share for each in found.shares}
    assert shares["a"] == shares["b"] == pytest.approx(0.0, abs=1e-9)
    assert found.together == pytest.approx(1.0)


def test_many_numbers_are_grouped() -> None:
    values = np.random.default_rng(1).uniform(0, 1, 60)
    found = importance([{"rate": str(each)} for each in values], list(values))
    assert found is not None
    assert 0.9 < found.together < 1.0  # four steps along a line leave 1/16


@pytest.mark.parametrize("count", [4, 10])
def test_of_few_trials_nothing_is_said(count: int) -> None:
    choices = [{"a": str(i % 5), "b": str(i % 4), "c": str(i % 3)} for i in range(count)]
    assert importance(choices, [float(i) for i in range(count)]) is None
    assert importance([{"a": "1"}] * 20, [float(i) for i in range(20)]) is None
