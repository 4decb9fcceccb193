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


def node(max_drop: float | None = 0.1) -> FirstWithin:
    """Four candidates."""
    candidates = tuple(Candidate(Ref(f"m{i}"), Ref(f"s{i}")) for i in range(4))
    return FirstWithin("best", candidates, Ref("float"), max_drop)


def played(contest: Contest, scores: list[float], least: float | None) -> tuple[Any, list[int]]:
    """What is taken, and which were asked for, in order."""
    asked: list[int] = []
    while isinstance(found := contest.step(least), Wanted):
        contest.asked.update(found.places)
        contest.scores |= {place: {"score": scores[place], "metric": "toy"} for place in found.places}
        asked += found.places
    return found, asked


def test_the_first_within_the_goal_is_taken_and_nothing_behind_it_is_asked_for() -> None:
    contest = Contest(node())
    assert played(contest, [0.5, 0.9, 0.95, 0.9], 0.8) == (Choice(1, met=True), [0, 1])
    assert contest.fates == {0: "missed", 1: "taken"}


def test_a_step_that_gains_nothing_is_dropped_and_said() -> None:
    contest = Contest(node(max_drop=None))
    assert played(contest, [0.5, 0.4, 0.9, 0.9], None) == (Choice(2, met=False), [0, 1, 2, 3])
    assert contest.fates == {0: "kept", 1: "dropped", 2: "taken", 3: "dropped"}
    assert contest.told("wxyz") == (
        "x is dropped: toy -0.1, of which 0 may be noise",
        "z is dropped: toy +0, of which 0 may be noise",
    )
