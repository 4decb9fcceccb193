"""Mixed precision as a problem of numbers: costs, goals, conversions and what is told, on groups made by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qpipe.errors import InputError
from qpipe.methods.mixing.choices import Choices, Group
from qpipe.methods.mixing.mix import Problem, Solution, overrides, report, solve
from qpipe.numerics.allocation import Choice
from qpipe.numerics.grid import Encoding

BITS = {"w4a8": (4, 8), "w8a8": (8, 8), "w8a16": (8, 16)}


def group(name: str, cost: int) -> Group:
    """A weight and an activation of that name; bit operations are `cost` times both bitwidths."""
    bits = tuple(BITS.values())
    size, bitops = tuple(cost * w for w, _ in bits), tuple(cost * w * a for w, a in bits)
    option_of = {candidate: i for i, candidate in enumerate(BITS)}
    return Group(name, (f"{name}.w",), (f"{name}.x",), tuple(BITS), option_of, bits, size, bitops)


def choices(count: int = 4, rest: int = 100) -> Choices:
    groups = tuple(group(f"g{i}", 10 * (i + 1)) for i in range(count))
    grids: dict[str, dict[str, Encoding]] = {
        name: {
            tensor: Encoding(b, False, False, np.float32(1), np.int32(0))
            for g in groups
            for tensor, b in ((g.weights[0], w), (g.activations[0], a))
        }
        for name, (w, a) in BITS.items()
    }
    settled = {"z": Encoding(8, False, False, np.float32(1), np.int32(0))}
    return Choices(groups, grids, settled, rest, rest, tuple(itertools.pairwise(range(count))))


LOSSES = [[0.4, 0.1, 0.01], [0.8, 0.2, 0.02], [0.1, 0.3, 0.001], [0.2, 0.05, 0.004]]


def problem(kind: Any = "bitops") -> Problem:
    return Problem(choices(), LOSSES, kind)


def additive(of: Problem) -> Callable[[Choice], float]:
    return lambda choice: -sum(options[i].loss for options, i in zip(of.groups, choice, strict=True))


def test_a_finer_option_never_loses_more_than_a_coarser_one() -> None:
    assert [option.loss for option in problem().groups[2]] == [0.1, 0.1, 0.001]


def test_costs_are_those_of_the_groups_and_what_no_choice_changes() -> None:
    of = problem()
    assert of.cost((0, 1, 2, 0)) == 100 + 10 * 32 + 20 * 64 + 30 * 128 + 40 * 32
    assert of.cost((0, 1, 2, 0), "size") == 100 + 10 * 4 + 20 * 8 + 30 * 8 + 40 * 4
    assert of.largest == "w8a16"
    assert of.share((2, 2, 2, 2)) == 1.0
    assert of.uniform == {"w4a8": (0,) * 4, "w8a8": (1,) * 4, "w8a16": (2,) * 4}


@pytest.mark.parametrize("least", [-1.4, -0.5, -0.2, -0.05])
def test_the_cheapest_of_all_that_keep_the_goal_is_taken(least: float) -> None:
    of = problem()
    measure = additive(of)
    found = solve(of, measure, least, None, slack=0.0)
    every = [choice for choice in itertools.product(range(3), repeat=4) if measure(choice) >= least]
    assert found.found.met
    assert measure(found.choice) >= least
    assert of.cost(found.choice) <= 1.05 * min(map(of.cost, every))


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8])
def test_within_a_budget_the_best_of_all_is_taken(budget: float) -> None:
    of = problem()
    measure = additive(of)
    found = solve(of, measure, None, budget, slack=0.0)
    every = [c for c in itertools.product(range(3), repeat=4) if of.share(c) <= budget]
    assert of.share(found.before) <= budget
    assert measure(found.choice) == pytest.approx(max(map(measure, every)))


def test_a_budget_below_the_cheapest_is_one_line() -> None:
    with pytest.raises(InputError, match=r"^A budget of 0\.1 of the bitops of w8a16 cannot be kept: the cheapest mix"):
        solve(problem(), lambda choice: 0.0, None, 0.1, slack=0.0)


WORST_IN_G1 = [[0.1, 0.05, 0.01], [9.0, 5.0, 0.01], [0.1, 0.05, 0.01]]


def test_conversions_are_saved_for_at_most_the_slack() -> None:
    """All that counts is that g1 has 16 bits: its neighbours follow it where that costs little."""
    of = Problem(choices(3), WORST_IN_G1, "bitops")

    def measure(choice: Choice) -> float:
        return float(choice[1] == 2)

    tight, loose = (solve(of, measure, 1.0, None, slack=slack) for slack in (0.0, 10.0))
    assert tight.choice == tight.before == loose.before == (0, 2, 0)
    assert of.choices.conversions(tight.choice) == 2
    assert loose.choice == (2, 2, 2)
    between = of.cost((2, 2, 0)) / of.cost((0, 2, 0)) - 1
    assert solve(of, measure, 1.0, None, slack=between + 1e-9).choice == (2, 2, 0)
    assert solve(of, measure, 1.0, None, slack=between - 1e-9).choice == (0, 2, 0)


def test_no_conversion_is_saved_where_the_goal_is_lost_by_it() -> None:
    of = Problem(choices(3), WORST_IN_G1, "bitops")
    lost = {(2, 2, 0), (0, 2, 2)}
    found = solve(of, lambda choice: float(choice[1] == 2 and choice not in lost), 1.0, None, slack=10.0)
    assert found.choice == found.before == (0, 2, 0)


def test_no_score_is_measured_twice() -> None:
    of, asked = problem(), list[Choice]()

    def measure(choice: Choice) -> float:
        asked.append(choice)
        return additive(of)(choice)

    solve(of, measure, -0.2, 0.9, slack=0.2)
    assert len(asked) == len(set(asked))


def solved() -> tuple[Problem, Solution]:
    of = problem()
    return of, solve(of, additive(of), -0.5, None, slack=0.0)


def test_the_report_says_what_was_tried_and_what_it_costs() -> None:
    of, solution = solved()
    told = report(of, solution, LOSSES)
    assert told["share"] == of.share(solution.choice)
    assert told["size_bytes"] == of.cost(solution.choice, "size") // 8
    assert told["bitops"] == of.cost(solution.choice, "bitops")
    assert [row["candidate"] for row in told["uniform"]] == list(BITS)
    assert [row["share"] for row in told["measured"]] == sorted(row["share"] for row in told["measured"])
    assert all(row["score"] is not None for row in told["measured"])
    assert [row["alone w8a8"] for row in told["groups"]] == [0.1, 0.2, 0.3, 0.05]
    assert sum(row["share"] for row in told["groups"]) + 100 / of.cost((2,) * 4) == pytest.approx(told["share"])


def test_overrides_name_every_tensor_by_its_bitwidth() -> None:
    found = overrides(choices(2), (0, 2))
    assert found == [
        {"nodes": ["value:g0\\.w"], "weight": {"bitwidth": 4}},
        {"nodes": ["value:g0\\.x"], "activation": {"bitwidth": 8}},
        {"nodes": ["value:g1\\.w"], "weight": {"bitwidth": 8}},
        {"nodes": ["value:g1\\.x"], "activation": {"bitwidth": 16}},
    ]
    assert len(overrides(choices(2), (1, 1))) == 2


def test_encodings_of_a_choice_are_those_of_its_options_and_what_is_settled() -> None:
    found = choices(2).encodings((0, 2))
    assert {name: e.bitwidth for name, e in found.items()} == {"z": 8, "g0.w": 4, "g0.x": 8, "g1.w": 8, "g1.x": 16}
