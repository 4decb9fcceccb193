"""The end of a sweep: what is best, what is on the front, what mattered."""

from __future__ import annotations

from typing import Any

from qpipe.report.terminal.leaderboard import leaderboard


def record(score: float | None, size: float | None = None) -> dict[str, Any]:
    return {
        "status": "done",
        "goal": {"metric": "top1", "scores": "s", "reached": score, "float": 0.99, "met": None},
        "figures": {"score": score, "drop": None if score is None else 0.99 - score, "size": size, "cost": 0.5},
        "nodes": {},
        "totals": {"ran": 1, "hit": 2},
    }


TRIALS = [
    (0, ["bits=8", "seed=0"], record(0.98, 0.3)),
    (1, ["bits=4", "seed=0"], record(0.97, 0.2)),
    (2, ["bits=4", "seed=1"], record(0.96, 0.2)),
    (3, ["bits=2", "seed=0"], record(0.50, 0.1)),
    (4, ["bits=2", "seed=1"], record(None)),
]


def rows(aim: dict[str, Any] | None = None) -> dict[str, list[str]]:
    """By the number of a trial the cells of its line."""
    found = [line.split() for line in leaderboard(TRIALS, "all", 100, aim=aim)]
    return {cells[cells[0] in "*>"]: cells for cells in found if len(cells) > 5 and cells[-1].isdecimal()}


def test_the_front_of_score_and_size_is_marked_and_what_all_have_alike_is_no_column() -> None:
    found = rows()
    assert list(found) == ["0", "1", "2", "3", "4"]
    assert [cells[0] for cells in found.values()] == [">", "*", "2", "*", "4"]
    assert found["1"][2:] == ["4", "0", "97.00", "%", "-2.00", "0.20", "1", "2"]
    text = "\n".join(leaderboard(TRIALS, "all", 100))
    assert "* 3 trials that no other one beats in top1 and size at once" in text
    assert "what mattered" not in text  # of four trials nothing can be said
    assert "`qpipe rerun all/0`" in text


def test_a_search_ends_with_what_it_was_for() -> None:
    assert list(rows({"objectives": ["score"], "within": {"size": 0.2}})) == ["1", "2", "3", "0", "4"]
    assert list(rows({"objectives": ["size"], "within": {"drop": 0.04}})) == ["1", "2", "0", "3", "4"]


def test_what_mattered_is_said_with_how_sure_that_is() -> None:
    pairs = [(i % 2, i // 2 % 2) for i in range(16)]
    trials = [(i, [f"a={a}", f"b={b}"], record(0.9 + 0.01 * a + 0.001 * b)) for i, (a, b) in enumerate(pairs)]
    text = " ".join(leaderboard(trials, "all", 100))
    assert "what mattered, by the share of the variance of top1 over 16 trials: a 0.99 ± " in text
    assert ", b 0.01 ± " in text
