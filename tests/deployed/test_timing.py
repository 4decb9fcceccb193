"""Times are those of the clock, the runs take turns, and few turns are taken by what is slow."""

from __future__ import annotations

import time
from itertools import groupby

import pytest

from qpipe.deployed.timing import FEWEST, FIRM, MOST, TOTAL_S, alternated, settled, turns


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
    assert [done for done, _ in heard] == [i + 1 for i in range(len(heard))]
    assert heard[-1][0] == heard[-1][1]
    assert len(blocks) == 2 * (len(heard) + 1)


def test_what_is_slow_has_few_turns() -> None:
    assert turns([10.0, 8.0]) == FEWEST
    assert turns([1e-4, 1e-4]) == pytest.approx(TOTAL_S / 0.04, abs=2)
    assert turns([1e-9, 1e-9]) <= MOST


def test_turns_end_once_they_scatter_little() -> None:
    alike = [1.0, 1.004, 0.996, 1.001, 0.999, 1.003, 0.997, 5.0]
    assert len(alike) == FIRM
    assert settled(alike)  # one that was disturbed says nothing of the median
    assert not settled(alike[1:])
    assert not settled([1.0, 1.04, 0.96, 1.01, 0.99, 1.03, 0.97, 1.02])
    assert settled([1.0, 1.04, 0.96, 1.01, 0.99, 1.03, 0.97, 1.02] * 20)
