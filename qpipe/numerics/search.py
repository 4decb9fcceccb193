"""Which mix of precisions to take: the cheapest that meets a goal, or the best that a budget allows.

Losses of groups, measured alone, propose; the score of the whole model, measured on the choice itself, decides.
Uniform choices are always measured, so that no mix is taken which one of them beats. Scores may be noisy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qpipe.errors import InputError
from qpipe.numerics.allocation import Choice, Groups, first_meeting, front, least_loss, total_cost

REFINEMENTS = 4
"""Choices between two corners of the front that are measured."""


@dataclass(frozen=True)
class Goal:
    """At least `least_score` for at most `budget`; None asks for nothing. One of them has to be given."""

    least_score: float | None
    budget: int | None

    def allows(self, cost: int, score: float) -> bool:
        """Whether both are kept."""
        return (self.budget is None or cost <= self.budget) and (
            self.least_score is None or score >= self.least_score
        )


class Scores:
    """Gives the score of a choice, for which `measure` is called once; `measured` holds all that were asked for."""

    def __init__(self, measure: Callable[[Choice], float]) -> None:
        self._measure = measure
        self.measured: dict[Choice, float] = {}

    def __call__(self, choice: Choice) -> float:
        if choice not in self.measured:
            self.measured[choice] = self._measure(choice)
        return self.measured[choice]


@dataclass(frozen=True)
class Found:
    """The choice, whether it meets the goal, the front it was looked for on, and the scores: all that were measured,
    and the way to measure more."""

    choice: Choice
    met: bool
    front: tuple[Choice, ...]
    scores: Scores


def search(
    groups: Groups, rest: int, uniform: Mapping[str, Choice], measure: Callable[[Choice], float], goal: Goal
) -> Found:
    """The cheapest choice that keeps the goal; where `least_score` is None or cannot be had, the best one.

    `rest` is what costs come on top. Raises InputError for a budget below the cheapest choice.
    """
    score = Scores(measure)

    def cost(choice: Choice) -> int:
        return rest + total_cost(groups, choice)

    def meets(choice: Choice) -> bool:
        return goal.allows(cost(choice), score(choice))

    path = front(groups)
    if goal.budget is not None and cost(path[0]) > goal.budget:
        raise InputError(f"The budget of {goal.budget:,} is below the cheapest choice, {cost(path[0]):,}.")
    within = [choice for choice in path if goal.budget is None or cost(choice) <= goal.budget]
    for choice in uniform.values():
        score(choice)
    if goal.least_score is not None:
        first = first_meeting(len(within), lambda i: meets(within[i]))
        if first:
            _refine(groups, rest, cost(within[first - 1]), cost(within[first]), meets)
    if not any(map(meets, list(score.measured))) or goal.least_score is None:
        score(within[-1])
        if goal.budget is not None:
            score(least_loss(groups, goal.budget - rest) or within[-1])
    chosen = _chosen(score.measured, cost, goal)
    return Found(chosen, meets(chosen), tuple(path), score)


def _chosen(scores: Mapping[Choice, float], cost: Callable[[Choice], int], goal: Goal) -> Choice:
    """The cheapest measured choice that keeps the goal; where none does, or no score is asked for, the best that the
    budget allows."""
    meeting = [choice for choice, score in scores.items() if goal.allows(cost(choice), score)]
    if meeting and goal.least_score is not None:
        return min(meeting, key=lambda choice: (cost(choice), -scores[choice]))
    affordable = [choice for choice in scores if goal.budget is None or cost(choice) <= goal.budget]
    return max(affordable, key=lambda choice: (scores[choice], -cost(choice)))


def _refine(groups: Groups, rest: int, low: int, high: int, meets: Callable[[Choice], bool]) -> None:
    """Asks for the best choices between two neighbours of the front, of which the costlier one meets the goal: the
    front has corners only, and the integer programme knows what lies between them."""
    for _ in range(REFINEMENTS):
        choice = least_loss(groups, (low + high) // 2 - rest)
        if choice is None or rest + total_cost(groups, choice) <= low:
            return
        if meets(choice):
            high = rest + total_cost(groups, choice)
        else:
            low = (low + high) // 2
