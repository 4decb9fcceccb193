"""Seconds of two things that do the same, held against each other: they take turns, so that whatever else the machine
does meets both.

A turn is a block of runs, the first of which does not count where they are short: threads of the other session still
turn for a moment when their run is over, and caches hold its weights.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

BLOCK_S = 0.02
LONG_S = 0.2
"""A run of more than this needs none before it, and is a turn by itself."""
TOTAL_S = 1.0
FEWEST, MOST = 3, 25
"""Turns of each."""
FIRM, PRECISION = 8, 0.004
"""No more turns are taken once there are so many and the medians are known to this share, by how the turns scatter."""

Run = Callable[[], object]


def alternated(runs: Sequence[Run], tell: Callable[[int, int], None] = lambda done, total: None) -> list[float]:
    """The seconds that each of `runs` takes: the median over its turns of the median in a turn. They are run twice
    before, to warm up. `tell` hears how many turns of how many are over; where they scatter little there are fewer."""
    warm = [min(_seconds(run), _seconds(run)) for run in runs]
    count = turns(warm)
    found: list[list[float]] = [[] for _ in runs]
    for turn in range(count):
        for run, before, taken in zip(runs, warm, found, strict=True):
            taken.append(_seconds(run) if before > LONG_S else _block(run))
        enough = all(map(settled, found))
        tell(turn + 1, turn + 1 if enough else count)
        if enough:
            break
    return [statistics.median(taken) for taken in found]


def turns(seconds: Sequence[float]) -> int:
    """How often runs that take so long have their turn, so that all is over in about TOTAL_S."""
    turn_s = sum(taken if taken > LONG_S else taken + max(taken, BLOCK_S) for taken in seconds)
    return max(FEWEST, min(MOST, int(TOTAL_S / turn_s)))


def settled(taken: Sequence[float]) -> bool:
    """Whether the median of these is known well enough: its standard error is 1.2533 sigma / sqrt(n), with sigma 1.4826
    times the median distance from it, which single turns that something disturbed do not move."""
    median = statistics.median(taken)
    apart = statistics.median(abs(each - median) for each in taken)
    return len(taken) >= FIRM and 1.2533 * 1.4826 * apart <= PRECISION * median * math.sqrt(len(taken))


def _block(run: Run) -> float:
    """The median of as many runs as BLOCK_S holds, at least one, behind one that warms up."""
    _seconds(run)
    end, taken = time.perf_counter() + BLOCK_S, [_seconds(run)]
    while time.perf_counter() < end:
        taken.append(_seconds(run))
    return statistics.median(taken)


def _seconds(run: Run) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
