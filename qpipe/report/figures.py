"""What trials are compared by: their figures, how far they keep limits, which is better, and which none other beats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

FIGURES = ("score", "drop", "size", "cost", "bitops", "latency")
"""The score of the goal, and what it lies below float; bytes, cost by the graph, bit operations and measured latency,
as shares of float's. Of the score more is better, of all others less."""
PRICES = FIGURES[2:]

_ROUNDING = 1e-9
"""A difference of scores is not off by so little."""

Figures = Mapping[str, float | None]


def beyond(within: Mapping[str, float], figures: Figures) -> list[float]:
    """By how much each limit is missed, above 0, or kept: of the score the least that is asked, of others the most;
    infinite where nothing is known of it."""
    found = []
    for name, limit in within.items():
        figure = figures.get(name)
        off = math.inf if figure is None else limit - figure if name == "score" else figure - limit
        found.append(0.0 if abs(off) <= _ROUNDING else off)
    return found


def rank(objective: str, within: Mapping[str, float], figures: Figures) -> tuple[float, float, float] | None:
    """What is greater is better: first by how far limits are missed, then by the objective, then by the score. None
    where the trial says nothing of the objective."""
    value = figures.get(objective)
    if value is None:
        return None
    missed = sum(max(0.0, each) for each in beyond(within, figures))
    score = figures.get("score")
    return -missed, value if objective == "score" else -value, -math.inf if score is None else score


def front(points: Sequence[tuple[float | None, float | None]]) -> list[int]:
    """The places of those points (gain, more is better; price, less is better) that no other is at least as good as in
    both and better in one, the cheapest first; of equal ones the first. What is not known is not on it."""
    known = [
        (price, -gain, place)
        for place, (gain, price) in enumerate(points)
        if gain is not None and price is not None
    ]
    found: list[int] = []
    best = math.inf
    for _, loss, place in sorted(known):
        if loss < best:
            best = loss
            found.append(place)
    return found
