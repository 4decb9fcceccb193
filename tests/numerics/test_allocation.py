"""Choices under a budget: against brute force over all of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qpipe.numerics.allocation import (
    Option,
    first_meeting,
    front,
    least_loss,
    monotone,
    total_cost,
    total_loss,
)


def random_groups(seed: int, count: int = 6) -> list[list[Option]]:
    rng = np.random.default_rng(seed)
    return [
        [
            Option(int(rng.integers(0, 10 ** rng.integers(1, 7))), float(10.0 ** rng.uniform(-8, 0)))
            for _ in range(rng.integers(1, 5))
        ]
        for _ in range(count)
    ]


def every_choice(groups: list[list[Option]]) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(len(options)) for options in groups)))


@pytest.mark.parametrize("seed", range(12))
def test_no_choice_beats_a_point_of_the_front(seed: int) -> None:
    groups = random_groups(seed)
    points = [(total_cost(groups, c), total_loss(groups, c)) for c in every_choice(groups)]
    found = front(groups)
    costs = [total_cost(groups, choice) for choice in found]
    assert costs == sorted(costs)
    for choice, cost in zip(found, costs, strict=True):
        loss = total_loss(groups, choice)
        assert all(other >= loss * (1 - 1e-12) for c, other in points if c <= cost)
    assert costs[0] == min(c for c, _ in points)
    assert total_loss(groups, found[-1]) == pytest.approx(min(loss for _, loss in points), rel=1e-12)
    assert all(sum(a != b for a, b in zip(x, y, strict=True)) == 1 for x, y in itertools.pairwise(found))


@pytest.mark.parametrize("seed", range(12))
def test_the_integer_programme_is_the_best_of_all_choices(seed: int) -> None:
    groups = random_groups(seed)
    points = sorted((total_cost(groups, c), total_loss(groups, c)) for c in every_choice(groups))
    rng = np.random.default_rng(seed)
    for cost, _ in [points[0], points[-1], *(points[i] for i in rng.integers(0, len(points), 6))]:
        choice = least_loss(groups, cost)
        assert choice is not None
        assert total_cost(groups, choice) <= cost
        best = min(loss for c, loss in points if c <= cost)
        assert total_loss(groups, choice) == pytest.approx(best, rel=1e-6)
    assert least_loss(groups, points[0][0] - 1) is None


def test_costs_that_differ_by_one_in_a_trillion_keep_the_budget() -> None:
    groups = [[Option(10**12, 1.0), Option(10**12 + 1, 0.5)] for _ in range(4)]
    for spare in range(5):
        choice = least_loss(groups, 4 * 10**12 + spare)
        assert choice is not None
        assert sum(choice) == spare


def test_a_budget_that_is_missed_by_less_than_the_solver_sees_is_kept() -> None:
    """HiGHS takes a constraint for met that is missed by a millionth."""
    groups = [[Option(0, 1.0), Option(10**9 + 1, 0.5)]]
    assert least_loss(groups, 10**9) == (0,)
    assert least_loss(groups, 10**9 + 1) == (1,)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 33])
def test_bisection_finds_the_first_that_meets_and_asks_few(count: int) -> None:
    for first in range(count + 1):
        asked: list[int] = []

        def meets(i: int, first: int = first, asked: list[int] = asked) -> bool:
            asked.append(i)
            return i >= first

        assert first_meeting(count, meets) == (first if first < count else None)
        assert len(asked) <= 2 + np.log2(count)


def test_a_finer_option_never_loses_more_than_a_coarser_one() -> None:
    sizes = [(4, 8), (8, 8), (8, 16), (4, 16)]
    assert monotone(sizes, [0.5, 0.7, 0.2, 0.4]) == [0.5, 0.5, 0.2, 0.4]
