"""One option for each of many groups: the least loss for what it costs, and the least cost for what it loses.

    front            the corners of the convex front: from the cheapest choice, always the step that gains most per cost
    least_loss       min sum of losses, sum of costs <= budget: an integer programme (multiple-choice knapsack)
    first_meeting    the cheapest point of the front that meets a goal, by bisection

Costs and losses of groups add up. Costs are whole numbers, so that budgets are kept exactly.

Source: Sinha, Zoltners, "The Multiple-Choice Knapsack Problem", Operations Research 27 (1979), for the front;
scipy's HiGHS solves the integer programme.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """What one choice for one group costs, and what it loses."""

    cost: int
    loss: float


NODES = 20_000
"""Where the solver stops branching, so that its time is bounded; its best choice so far counts then."""

Groups = Sequence[Sequence[Option]]
Choice = tuple[int, ...]
"""The number of the option that each group has."""


def total_cost(groups: Groups, choice: Choice) -> int:
    """The costs of a choice, added up."""
    return sum(options[i].cost for options, i in zip(groups, choice, strict=True))


def total_loss(groups: Groups, choice: Choice) -> float:
    """The losses of a choice, added up."""
    return sum(options[i].loss for options, i in zip(groups, choice, strict=True))


def monotone(sizes: Sequence[tuple[int, ...]], losses: Sequence[float]) -> list[float]:
    """`losses` in which an option never loses more than one that is nowhere larger: noise in a score must not
    make a finer grid look worse. `sizes` are the bitwidths of each option."""
    return [
        min(
            loss
            for other, loss in zip(sizes, losses, strict=True)
            if all(a <= b for a, b in zip(other, size, strict=True))
        )
        for size in sizes
    ]


def front(groups: Groups) -> list[Choice]:
    """The choices at the corners of the convex front, cheapest first: none of them is beaten by any choice.

    Between neighbours one group changes. A corner's loss is the least of all choices that cost no more.
    """
    hulls = [_hull(options) for options in groups]
    steps = sorted(
        (-_gain(groups[g][a], groups[g][b]), g, k, b)
        for g, hull in enumerate(hulls)
        for k, (a, b) in enumerate(itertools.pairwise(hull))
    )
    choice = [hull[0] for hull in hulls]
    found = [tuple(choice)]
    for _, group, _, option in steps:
        choice[group] = option
        found.append(tuple(choice))
    return found


def _hull(options: Sequence[Option]) -> list[int]:
    """The options on the lower left convex hull of (cost, loss), cheapest first."""
    order = sorted(range(len(options)), key=lambda i: (options[i].cost, options[i].loss, i))
    hull: list[int] = []
    for i in order:
        if hull and options[i].loss >= options[hull[-1]].loss:
            continue
        while len(hull) > 1 and _gain(options[hull[-2]], options[hull[-1]]) <= _gain(
            options[hull[-2]], options[i]
        ):
            hull.pop()
        hull.append(i)
    return hull


def _gain(cheap: Option, fine: Option) -> float:
    """The loss that each unit of cost takes away."""
    return (cheap.loss - fine.loss) / (fine.cost - cheap.cost)


def least_loss(groups: Groups, budget: int) -> Choice | None:
    """The choice that loses least among those that cost at most `budget`; None where none costs so little.

    Among choices that lose the same, one that no single change makes cheaper.
    """
    if sum(min(option.cost for option in options) for options in groups) > budget:
        return None
    corners = [choice for choice in front(groups) if total_cost(groups, choice) <= budget]
    best = min((_solve(groups, budget), *corners[-1:]), key=lambda choice: total_loss(groups, choice))
    return _polished(groups, best, budget)


def _solve(groups: Groups, budget: int) -> Choice:
    """The integer programme: x[g, i] in {0, 1}, one option a group, costs within the budget, least loss."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    owner = np.repeat(np.arange(len(groups)), [len(options) for options in groups])
    flat = [option for options in groups for option in options]
    losses = np.array([option.loss for option in flat], np.float64)
    # In units of the largest one: the solver's tolerances are absolute.
    losses /= max(float(np.abs(losses).max(initial=0.0)), 1e-300)
    # Beyond the cheapest choice, in whole numbers: what all options of a group cost takes no digits.
    least = [min(option.cost for option in options) for options in groups]
    costs = np.array([o.cost - c for o, c in zip(flat, (least[g] for g in owner), strict=True)], np.float64)
    unit = max(float(costs.max(initial=0.0)), 1.0)
    one = csr_matrix((np.ones(len(flat)), (owner, np.arange(len(flat)))), shape=(len(groups), len(flat)))
    room, step = float(budget - sum(least)), 1e-6 * unit
    while room >= 0:
        limits = [LinearConstraint(one, 1, 1), LinearConstraint(costs[None] / unit, -np.inf, room / unit)]
        found = milp(
            losses, integrality=np.ones(len(flat)), bounds=Bounds(0, 1), constraints=limits,
            options={"mip_rel_gap": 0.0, "node_limit": NODES},
        )  # fmt: skip
        if found.x is None:
            break
        taken = np.flatnonzero(found.x > 0.5)
        choice = tuple(int(i - np.searchsorted(owner, owner[i])) for i in taken)
        over = total_cost(groups, choice) - budget
        if over <= 0:
            return choice
        # Within the solver's tolerance, but not within the budget: again with a little less.
        room, step = room - max(over, step), 2 * step
    return tuple(min(range(len(o)), key=lambda i: (o[i].cost, o[i].loss)) for o in groups)


def _polished(groups: Groups, choice: Choice, budget: int) -> Choice:
    """`choice` after single changes that lose less within the budget, or cost less for the same loss."""
    current, cost = list(choice), total_cost(groups, choice)
    changed = True
    while changed:
        changed = False
        for group, options in enumerate(groups):
            now = options[current[group]]
            fitting = [i for i, o in enumerate(options) if cost - now.cost + o.cost <= budget]
            best = min(fitting, key=lambda i: (options[i].loss, options[i].cost, i))
            if (options[best].loss, options[best].cost) < (now.loss, now.cost):
                cost += options[best].cost - now.cost
                current[group], changed = best, True
    return tuple(current)


def first_meeting(count: int, meets: Callable[[int], bool]) -> int | None:
    """The first of `count` points that meets a goal which all behind it meet too; None where the last does not.

    Asks for about log2(count) of them.
    """
    if not count or not meets(count - 1):
        return None
    low, high = 0, count - 1
    while low < high:
        middle = (low + high) // 2
        if meets(middle):
            high = middle
        else:
            low = middle + 1
    return high


def beaten(point: tuple[float, float], others: Iterable[tuple[float, float]]) -> bool:
    """Whether one of `others` (cost, score) is no costlier and no worse than `point`, and one of both better."""
    cost, score = point
    return any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in others)
