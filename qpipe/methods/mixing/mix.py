"""Mixed precision on one model: the search on its groups, fewer conversions, and what to tell about both."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qpipe.errors import InputError
from qpipe.methods.mixing.choices import Choices, Cost, fewer_conversions
from qpipe.methods.mixing.work import FLOAT_BITS
from qpipe.numerics.allocation import (
    Choice,
    Option,
    beaten,
    front,
    monotone,
    total_loss,
)
from qpipe.numerics.search import Found, Goal, search

Measure = Callable[[Choice], float]


@dataclass(frozen=True)
class Problem:
    """What to choose: the groups, what each option loses alone, which cost counts, and the candidates' names."""

    choices: Choices
    losses: Sequence[Sequence[float]]
    kind: Cost

    @cached_property
    def groups(self) -> list[list[Option]]:
        """Cost and loss of each group's options; a finer option never loses more than a coarser one."""
        found = []
        for group, lost in zip(self.choices.groups, self.losses, strict=True):
            sizes = [tuple(bits or 0 for bits in pair) for pair in group.bits]
            pairs = zip(group.cost(self.kind), monotone(sizes, lost), strict=True)
            found.append([Option(*pair) for pair in pairs])
        return found

    @cached_property
    def uniform(self) -> dict[str, Choice]:
        """The choice that each candidate is."""
        return {name: self.choices.uniform(name) for name in self.choices.grids}

    @cached_property
    def largest(self) -> str:
        """The candidate that costs most, which shares of cost are shares of."""
        return max(self.uniform, key=lambda name: self.cost(self.uniform[name]))

    def cost(self, choice: Choice, kind: Cost | None = None) -> int:
        """What a choice costs, with what no choice changes."""
        costs = [
            group.cost(kind or self.kind)[i] for group, i in zip(self.choices.groups, choice, strict=True)
        ]
        return sum(costs) + self.choices.rest(kind or self.kind)

    def share(self, choice: Choice) -> float:
        """The cost as a share of that of the largest candidate."""
        return self.cost(choice) / max(1, self.cost(self.uniform[self.largest]))


@dataclass(frozen=True)
class Solution:
    """The choice, the one before conversions were saved, and how that was found."""

    choice: Choice
    before: Choice
    found: Found
    goal: Goal


def solve(
    problem: Problem, measure: Measure, least_score: float | None, budget: float | None, slack: float
) -> Solution:
    """The cheapest choice of at least `least_score`, or the best of at most `budget`, a share of the largest
    candidate's cost; then with fewer conversions, for at most `slack` of its cost more.

    Raises InputError for a budget below the cheapest choice.
    """
    goal = Goal(least_score, None if budget is None else _whole(problem, budget))
    found = search(problem.groups, problem.choices.rest(problem.kind), problem.uniform, measure, goal)
    score = found.scores
    least = goal.least_score if found.met and goal.least_score is not None else score(found.choice)
    uniform = [(problem.cost(c), score(c)) for c in problem.uniform.values()]
    uniform = [point for point in uniform if goal.allows(*point)]
    limits = [int(problem.cost(found.choice) * (1.0 + slack)), goal.budget]
    limits += [cost for cost, _ in uniform if goal.least_score is not None]
    limit = min(limit for limit in limits if limit is not None)

    def allowed(choice: Choice) -> bool:
        if problem.cost(choice) > limit or score(choice) < least:
            return False
        return not beaten((problem.cost(choice), score(choice)), uniform)

    return Solution(fewer_conversions(problem.choices, found.choice, allowed), found.choice, found, goal)


def _whole(problem: Problem, budget: float) -> int:
    cheapest = front(problem.groups)[0]
    limit = int(budget * problem.cost(problem.uniform[problem.largest]))
    if problem.cost(cheapest) > limit:
        raise InputError(
            f"A budget of {budget:g} of the {problem.kind} of {problem.largest} cannot be kept: the cheapest mix "
            f"takes {problem.share(cheapest):.4g}. Raise the budget, or name a smaller candidate."
        )
    return limit


def report(problem: Problem, solution: Solution, alone: Sequence[Sequence[float]]) -> dict[str, Any]:
    """What was tried and chosen, as JSON: `uniform`, `front`, `groups`, and the figures of the choice."""
    chosen = solution.choice
    return {
        "score": solution.found.scores(chosen),
        "share": problem.share(chosen),
        "of": problem.largest,
        "size_bytes": problem.cost(chosen, "size") // 8,
        "bitops": problem.cost(chosen, "bitops"),
        "conversions": problem.choices.conversions(chosen),
        "conversions_saved": problem.choices.conversions(solution.before)
        - problem.choices.conversions(chosen),
        "uniform": [
            {"candidate": name, **_point(problem, solution, choice)}
            for name, choice in problem.uniform.items()
        ],
        "groups": _groups(problem, chosen, alone),
        "front": [_point(problem, solution, choice) for choice in solution.found.front],
        "measured": [
            _point(problem, solution, choice)
            for choice in sorted(solution.found.scores.measured, key=lambda choice: problem.cost(choice))
        ],
        "overrides": overrides(problem.choices, chosen),
    }


def _point(problem: Problem, solution: Solution, choice: Choice) -> dict[str, Any]:
    return {
        "share": problem.share(choice),
        "loss": total_loss(problem.groups, choice),
        "score": solution.found.scores.measured.get(choice),
        "size_bytes": problem.cost(choice, "size") // 8,
        "bitops": problem.cost(choice, "bitops"),
    }


def _groups(problem: Problem, chosen: Choice, alone: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """A row for each group: its candidate, what it costs, and what each candidate scored alone."""
    rows = []
    for group, option, scores in zip(problem.choices.groups, chosen, alone, strict=True):
        cost = group.cost(problem.kind)[option]
        rows.append(
            {
                "group": group.name,
                "tensors": len(group.tensors),
                "candidate": group.options[option],
                "share": cost / max(1, problem.cost(problem.uniform[problem.largest])),
                **{f"alone {name}": scores[group.option_of[name]] for name in problem.uniform},
            }
        )
    return rows


def overrides(choices: Choices, choice: Choice) -> list[dict[str, Any]]:
    """The choice as `scheme.overrides`: what one would write by hand for the same grids. Tensors left in float are
    not in it; `target.nodes.exclude` leaves these."""
    found: dict[tuple[str, int], list[str]] = {}
    for group, option in zip(choices.groups, choice, strict=True):
        sides = (("weight", group.weights), ("activation", group.activations))
        for (side, names), bits in zip(sides, group.bits[option], strict=True):
            if bits is not None and bits != FLOAT_BITS:
                found.setdefault((side, bits), []).extend(f"value:{re.escape(name)}" for name in names)
    return [{"nodes": names, side: {"bitwidth": bits}} for (side, bits), names in found.items()]
