"""Times are those of the clock, the runs take turns, and few turns are taken by what is slow."""

from __future__ import annotations

import time
from itertools import groupby

import pytest

from qpipe.deployed.timing import FEWEST, MOST, TOTAL_S, alternated, turns


def test_two_runs_take_turns_and_have_their_own_times() -> None:
    order: list[str] = []

    def wait(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    heard: list[tuple[int, int]] = []
    first, second = alternated(
        [lambda: wait("a", 0.002), lambda: wait("b", 0.004)], lambda done, total: heard.append((done, total))
    )
    assert 0.002 <= first < second
    assert second >= 0.004
    blocks = [(name, len(list(runs))) for name, runs in groupby(order)]
    assert [name for name, _ in blocks] == ["a", "b"] * (len(blocks) // 2)
    assert min(count for _, count in blocks) >= 2
    assert heard == [(i + 1, len(heard)) for i in range(len(heard))]
    assert len(blocks) == 2 * (len(heard) + 1)


def test_what_is_slow_has_few_turns() -> None:
    assert turns([10.0, 8.0]) == FEWEST
    assert turns([1e-4, 1e-4]) == pytest.approx(TOTAL_S / 0.04, abs=2)
    assert turns([1e-9, 1e-9]) <= MOST
