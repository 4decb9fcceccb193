"""The search against all choices: goals are kept, uniform choices never beat what is found, noise or not."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qpipe.errors import InputError
from qpipe.numerics.allocation import Choice, Option, beaten, total_cost, total_loss
from qpipe.numerics.search import Goal, search

REST = 1000


def problem(seed: int) -> tuple[list[list[Option]], list[Choice]]:
    """Six groups of three options, ever costlier and finer, and all their choices."""
    rng = np.random.default_rng(seed)
    groups = [
        [
            Option(int(cost), float(loss))
            for cost, loss in zip(
                np.cumsum(rng.integers(1, 1000, 3)), np.sort(10 ** rng.uniform(-4, 0, 3))[::-1], strict=True
            )
        ]
        for _ in range(6)
    ]
    return groups, list(itertools.product(range(3), repeat=6))


UNIFORM = {name: (i,) * 6 for i, name in enumerate(["coarse", "middle", "fine"])}


@pytest.mark.parametrize("seed", range(10))
def test_where_losses_add_up_it_finds_nearly_the_cheapest_of_all(seed: int) -> None:
    groups, everything = problem(seed)
    asked: list[Choice] = []

    def measure(choice: Choice) -> float:
        asked.append(choice)
        return -total_loss(groups, choice)

    for least in (-2.0, -1.0, -0.3):
        asked.clear()
        meeting = [c for c in everything if -total_loss(groups, c) >= least]
        found = search(groups, REST, UNIFORM, measure, Goal(least, None))
        assert found.met == bool(meeting)
        assert len(asked) == len(set(asked)) <= 3 + 6 + 4
        if meeting:
            assert measure(found.choice) >= least
            cheapest = min(total_cost(groups, c) for c in meeting)
            spread = total_cost(groups, (2,) * 6) - total_cost(groups, (0,) * 6)
            assert total_cost(groups, found.choice) <= cheapest + 0.05 * spread


@pytest.mark.parametrize("seed", range(30))
def test_no_uniform_choice_that_keeps_the_goal_beats_it_under_noise(seed: int) -> None:
    groups, _ = problem(seed)
    noise = np.random.default_rng(seed).normal(size=3**6)

    def measure(choice: Choice) -> float:
        return -total_loss(groups, choice) + float(noise[int("".join(map(str, choice)), 3)])

    def point(choice: Choice) -> tuple[int, float]:
        return REST + total_cost(groups, choice), measure(choice)

    costs = [point(choice)[0] for choice in UNIFORM.values()]
    for goal in (Goal(-1.0, None), Goal(-1.0, costs[1]), Goal(None, costs[1]), Goal(5.0, None)):
        found = search(groups, REST, UNIFORM, measure, goal)
        assert found.met == (goal.least_score is None or measure(found.choice) >= goal.least_score)
        affordable = [point(c) for c in UNIFORM.values() if goal.budget is None or point(c)[0] <= goal.budget]
        assert not beaten(point(found.choice), affordable if not found.met or goal.least_score is None else [])
        if found.met and goal.least_score is not None:
            assert all(point(found.choice)[0] <= p[0] for p in affordable if p[1] >= goal.least_score)


def test_with_goal_and_budget_the_cheapest_that_keeps_both_else_the_best_within_the_budget() -> None:
    groups, everything = problem(0)

    def measure(choice: Choice) -> float:
        return -total_loss(groups, choice)

    budget = total_cost(groups, (1,) * 6)
    best = max(measure(c) for c in everything if total_cost(groups, c) <= budget)
    easy = search(groups, 0, UNIFORM, measure, Goal(best - 1.0, budget))
    assert easy.met
    assert total_cost(groups, easy.choice) < budget
    hard = search(groups, 0, UNIFORM, measure, Goal(best + 1e-6, budget))
    assert not hard.met
    assert measure(hard.choice) == pytest.approx(best, rel=1e-6)


def test_a_budget_below_the_cheapest_is_refused() -> None:
    groups, _ = problem(0)
    with pytest.raises(InputError, match=r"^The budget of [\d,]+ is below the cheapest choice, [\d,]+\.$"):
        search(groups, REST, UNIFORM, lambda choice: 0.0, Goal(None, total_cost(groups, (0,) * 6)))
