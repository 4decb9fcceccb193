"""Which candidate a first_within takes: the plainest of those that nothing behind it clearly beats.

A candidate beats one before it where its score on the held-out samples is higher by more than the noise; where the
scores are equal within that, where its outputs are nearer to float's (sqnr_db) by more than the noise of that. That
noise is three standard errors of the difference on the same samples (qpipe.numerics.jackknife). Scores without a
held-out part are compared as they are. The goal is another question: it is asked of the evaluation's score.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from qpipe.language.spec import FirstWithin
from qpipe.numerics.metric_names import least_score

ERRORS = 3.0
"""Standard errors that a difference has to exceed."""
SILENCE_DB = 0.0
"""Below it there is more noise than signal, and how much more says nothing."""

Values = Mapping[str, Any]
"""Of a Scores artifact."""
Fate = Literal["taken", "kept", "dropped", "missed"]
"""`taken` is what comes out, `kept` was best when its turn came, `dropped` was not better than what stood before it,
`missed` the goal."""


@dataclass(frozen=True)
class Gain:
    """What a candidate has more than the best before it, in the metric's unit, and the noise of that."""

    metric: str
    amount: float
    noise: float

    @property
    def clear(self) -> bool:
        """Whether it is more than noise."""
        return abs(self.amount) > self.noise


class Choice(NamedTuple):
    """The place of what is taken, and whether it is within a goal."""

    place: int
    met: bool


class Wanted(NamedTuple):
    """What a choice cannot do without: the scores of the candidates at these places; what each costs is shown."""

    places: tuple[int, ...]


def gains(now: Values, before: Values) -> list[Gain]:
    """By the metric, then by sqnr_db, on the samples that both were held out for."""
    own = str(now.get("metric", ""))
    held = [values.get("held_out") or {} for values in (now, before)]
    found = [
        Gain(name, *_apart(*(each[name] for each in held)))
        for name in dict.fromkeys((own, "sqnr_db"))
        if all(name in each for each in held)
    ]
    return found or [Gain(own, now["score"] - before["score"], 0.0)]


def better(now: Values, before: Values) -> bool:
    """Whether the one of the scores `now` beats a plainer one of those `before`."""
    for gain in gains(now, before):
        if gain.clear:
            return gain.amount > 0 and not _drowned(gain, now)
    return False


def telling(found: list[Gain]) -> Gain:
    """The gain that decided: the first that is more than noise, else the first."""
    return next((gain for gain in found if gain.clear), found[0])


def _apart(now: Values, before: Values) -> tuple[float, float]:
    """The difference of two scores, and its noise; none where the parts of the samples have no scores."""
    parts = [(a - b) for a, b in zip(now["parts"], before["parts"], strict=False)]
    noise = ERRORS * statistics.stdev(parts) / math.sqrt(len(parts)) if len(parts) > 1 else 0.0
    return now["score"] - before["score"], noise


def _drowned(gain: Gain, now: Values) -> bool:
    held = now.get("held_out") or {}
    return gain.metric == "sqnr_db" != now.get("metric") and held["sqnr_db"]["score"] <= SILENCE_DB


@dataclass
class Contest:
    """The candidates of one first_within, as their scores and costs become known."""

    node: FirstWithin
    scores: dict[int, Values] = field(default_factory=dict)
    costs: dict[int, float] = field(default_factory=dict)
    asked: set[int] = field(default_factory=set)
    fates: dict[int, Fate] = field(default_factory=dict)
    gained: dict[int, Gain] = field(default_factory=dict)
    """What each had more than the best before it, by its place; where that was asked."""

    def step(self, least: float | None) -> Wanted | Choice | None:
        """What is wanted next, or what is taken, where `least` is the score that the goal asks for; None where no
        candidate has one."""
        unknown = tuple(place for place in range(len(self.node.candidates)) if place not in self.asked)
        if least is None:
            return Wanted(unknown) if unknown else self._best()
        for place in sorted(self.scores):
            met = self.scores[place]["score"] >= least
            self.fates[place] = "taken" if met else "missed"
            if met:
                return Choice(place, True)
        return Wanted(unknown[:1]) if unknown else self._best()

    def _best(self) -> Choice | None:
        """The plainest that nothing behind it beats."""
        if not self.scores:
            return None
        places = sorted(self.scores)
        best = places[0]
        self.fates[best] = "kept"
        for place in places[1:]:
            found = gains(self.scores[place], self.scores[best])
            self.gained[place] = telling(found)
            wins = better(self.scores[place], self.scores[best])
            self.fates[place] = "kept" if wins else "dropped"
            best = place if wins else best
        self.fates[best] = "taken"
        return Choice(best, False)

    def told(self, names: Iterable[str]) -> tuple[str, ...]:
        """A sentence for each candidate that was dropped; `names` are those of all."""
        found = []
        for place, name in enumerate(names):
            gain = self.gained.get(place)
            if gain is not None and self.fates.get(place) == "dropped":
                more = f"{gain.metric} {gain.amount:+.4g}, of which {gain.noise:.2g} may be noise"
                found.append(f"{name} is dropped: {more}")
        return tuple(found)


def least_of(node: FirstWithin, reference: Values, metric: str) -> float | None:
    """The score that the goal of `node` asks for, `reference` being float's; None for no goal."""
    named = str(reference.get("metric", metric))
    return least_score(named, reference["score"], node.max_drop, node.min_score)
