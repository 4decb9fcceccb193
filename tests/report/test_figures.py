"""The Pareto front, against all pairs."""

from __future__ import annotations

import itertools
import random

from qpipe.report.figures import front


def test_the_front_is_what_no_other_trial_beats_in_both() -> None:
    draw = random.Random(1)
    for _ in range(50):
        points = [(draw.choice([None, *range(6)]), draw.choice([None, *range(6)])) for _ in range(12)]
        found = front(points)
        known = {place for place, point in enumerate(points) if None not in point}

        def beats(a: int, b: int, points=points) -> bool:  # type: ignore[no-untyped-def]
            better = (points[a][0] >= points[b][0], points[a][1] <= points[b][1])
            return all(better) and (points[a] != points[b] or a < b)

        unbeaten = {b for b in known if not any(beats(a, b) for a in known - {b})}
        assert set(found) == unbeaten
        assert all(points[a][1] < points[b][1] for a, b in itertools.pairwise(found))
