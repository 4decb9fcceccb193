"""What a first_within takes: the plainest that nothing behind it clearly beats, and within a goal the cheapest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qpipe.language.spec import Candidate, FirstWithin, Ref
from qpipe.plan.choice import Choice, Contest, Wanted, better, gains

RNG = np.random.default_rng(11)
RIGHT = RNG.random(200) < 0.9
"""Of 200 samples, whether the plain model is right."""


def scored(right: Any, db: float | None = None, wobble: float = 0.1) -> dict[str, Any]:
    """Scores of a model that is right on these samples, with the parts that say so, and so many dB."""
    right = np.asarray(right, float)
    parts = [float(right[part::20].mean()) for part in range(20)]
    held: dict[str, Any] = {"top1": {"score": float(right.mean()), "parts": parts}}
    if db is not None:
        noise = wobble * np.sin(np.arange(20.0) + db)
        held["sqnr_db"] = {"score": db, "parts": list(db + noise)}
    return {"score": 0.5, "metric": "top1", "held_out": held}


def with_wrong(count: int, start: int = 0) -> Any:
    right = RIGHT.copy()
    right[np.flatnonzero(right)[start : start + count]] = False
    return right


def test_a_gain_is_measured_on_the_same_samples() -> None:
    (gain,) = gains(scored(RIGHT), scored(with_wrong(10)))
    assert gain.amount == pytest.approx(10 / 200)
    both = np.asarray(scored(RIGHT)["held_out"]["top1"]["parts"]) - scored(with_wrong(10))["held_out"]["top1"]["parts"]
    assert gain.noise == pytest.approx(3 * np.std(both, ddof=1) / np.sqrt(20))
    assert gain.clear


@pytest.mark.parametrize(
    ("now", "before", "wins"),
    [
        (scored(RIGHT, 20.0), scored(with_wrong(20), 20.0), True),  # more are right, clearly
        (scored(RIGHT, 20.0), scored(with_wrong(20), 30.0), True),  # whatever the outputs say
        (scored(with_wrong(20), 30.0), scored(RIGHT, 20.0), False),
        (scored(with_wrong(1), 25.0), scored(RIGHT, 20.0), True),  # within the noise: nearer to float
        (scored(with_wrong(1), 20.0), scored(RIGHT, 25.0), False),
        (scored(RIGHT, 20.0), scored(with_wrong(1), 20.01), False),  # within the noise of both: the plainer one
        (scored(RIGHT), scored(RIGHT), False),
        (scored(with_wrong(1), -3.0), scored(RIGHT, -9.0), False),  # both are noise
    ],
)
def test_the_score_decides_where_it_can_then_the_outputs_then_plainness(
    now: dict[str, Any], before: dict[str, Any], wins: bool
) -> None:
    assert better(now, before) is wins


def test_scores_without_held_out_samples_are_compared_as_they_are() -> None:
    plain, other = {"score": 0.8, "metric": "top1"}, {"score": 0.81, "metric": "top1"}
    assert better(other, plain)
    assert not better(plain, other)
    assert not better(plain, plain)
    assert better(other | {"held_out": {}}, plain | scored(RIGHT) | {"score": 0.8})


def node(costs: int, **given: Any) -> FirstWithin:
    """Four candidates, the first `costs` of them with one."""
    candidates = tuple(
        Candidate(Ref(f"m{i}"), Ref(f"s{i}"), Ref(f"c{i}") if i < costs else None) for i in range(4)
    )
    given = {"max_drop": 0.1, "least_saving": 0.0, **given}
    return FirstWithin("best", candidates, Ref("float"), **given)


def played(contest: Contest, scores: list[float], costs: list[float], least: float | None) -> tuple[Any, list[str]]:
    """What is taken, and what was asked for, in order."""
    asked: list[str] = []
    while isinstance(found := contest.step(least), Wanted):
        for place in found.places:
            if found.scores:
                contest.asked.add(place)
                contest.scores[place] = {"score": scores[place], "metric": "toy"}
                asked.append(f"s{place}")
            if found.cost and contest.node.candidates[place].cost is not None:
                contest.weighed.add(place)
                contest.costs[place] = costs[place]
                asked.append(f"c{place}")
    return found, asked


def test_the_first_within_the_goal_is_taken_where_no_other_is_cheaper() -> None:
    found, asked = played(Contest(node(4)), [0.5, 0.9, 0.9, 0.9], [1.0, 1.0, 1.0, 1.2], 0.8)
    assert found == Choice(1, met=True)
    assert asked == ["s0", "c0", "s1", "c1", "c2", "c3"]  # no score of those that save nothing


def test_a_cheaper_one_behind_it_is_asked_for_and_taken() -> None:
    contest = Contest(node(3))
    found, asked = played(contest, [0.5, 0.9, 0.85, 0.9], [1.0, 1.0, 0.5, 0.1], 0.8)
    assert found == Choice(2, met=True)
    assert "s3" not in asked  # nobody says what it costs
    assert contest.fates == {0: "missed", 1: "costs_more", 2: "taken"}


def test_a_cheaper_one_that_misses_the_goal_is_not() -> None:
    contest = Contest(node(4))
    found, _ = played(contest, [0.5, 0.9, 0.7, 0.9], [1.0, 1.0, 0.5, 0.9], 0.8)
    assert found == Choice(3, met=True)
    found, asked = played(Contest(node(4, least_saving=None)), [0.5, 0.9, 0.7, 0.9], [1.0, 1.0, 0.5, 0.9], 0.8)
    assert (found, asked) == (Choice(1, met=True), ["s0", "c0", "s1", "c1"])  # nothing behind the first is looked at
    found, asked = played(Contest(node(4, least_saving=0.25)), [0.5, 0.9, 0.7, 0.9], [1.0, 1.0, 0.5, 0.9], 0.8)
    assert found == Choice(1, met=True)
    assert asked[-2:] == ["s2", "c3"] or asked[-1] == "c3"


def test_a_step_that_gains_nothing_is_dropped_and_said() -> None:
    contest = Contest(node(0, max_drop=None))
    found, asked = played(contest, [0.5, 0.4, 0.9, 0.9], [], None)
    assert found == Choice(2, met=False)
    assert asked == ["s0", "s1", "s2", "s3"]
    assert contest.fates == {0: "kept", 1: "dropped", 2: "taken", 3: "dropped"}
    assert contest.told("wxyz") == (
        "x is dropped: toy -0.1, of which 0 may be noise",
        "z is dropped: toy +0, of which 0 may be noise",
    )
