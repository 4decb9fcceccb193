"""Single flight: who holds an action's lock dies while others wait, and one of them takes over at once."""

from __future__ import annotations

import time
from collections import Counter

import pytest

from tests.nursery import Child
from tests.trust.lab import Lab

GATE = {"g": {"uses": "lab_gate"}, "z": {"uses": "toy_add", "scores": "g"}}
TAKE_OVER_S = 1.0


def gates(lab: Lab) -> int:
    return lab.log.read_text().split().count("gate") if lab.log.exists() else 0


def until(condition: object, what: str, limit_s: float = 20.0) -> float:
    started = time.monotonic()
    while not condition():  # type: ignore[operator]
        assert time.monotonic() - started < limit_s, what
        time.sleep(0.005)
    return time.monotonic() - started


def waits(child: Child) -> bool:
    return "another process computes it; waiting" in child.text()


@pytest.mark.parametrize("workers", [0, 1])
def test_the_holder_is_killed_while_three_wait(lab: Lab, crash_report: Counter[str], workers: int) -> None:
    for _ in range(3):
        lab.clear()
        lab.calls()
        lab.gate.touch()
        holder = lab.begin(GATE, workers=workers)
        until(lambda: gates(lab) == 1, "the first never begins")
        waiting = [lab.begin(GATE, workers=0, folder=f"w{i}") for i in range(3)]
        for child in waiting:
            until(lambda child=child: waits(child), "it does not wait")
        holder.kill()
        took_s = until(lambda: gates(lab) == 2, "nobody takes over")
        assert took_s < TAKE_OVER_S
        lab.gate.unlink()
        assert [child.wait() for child in waiting] == [0, 0, 0], [child.text() for child in waiting]
        holder.wait()
        assert Counter(lab.calls()) == {"gate": 2, "add": 1}
        verdicts = [lab.record_of(f"w{i}")["nodes"]["g"]["verdict"] for i in range(3)]
        assert sorted(verdicts) == ["hit", "hit", "ran"]
        crash_report["taken over"] += 1


def test_two_cold_runs_at_once_execute_every_action_once(lab: Lab) -> None:
    for workers in (0, 2):
        lab.clear()
        lab.calls()
        runs = [lab.begin(GATE, workers=workers) for _ in range(2)]
        assert [child.wait() for child in runs] == [0, 0]
        assert Counter(lab.calls()) == {"gate": 1, "add": 1}


def test_who_waits_in_its_own_process_does_not_spin(lab: Lab) -> None:
    """Waiting costs next to no processor time."""
    lab.gate.touch()
    holder = lab.begin(GATE, workers=0)
    until(lambda: gates(lab) == 1, "the first never begins")
    child = lab.begin(GATE, workers=0)
    until(lambda: waits(child), "it does not wait")
    before = cpu_s(child.pid)
    time.sleep(0.5)
    assert cpu_s(child.pid) - before < 0.2
    lab.gate.unlink()
    assert [holder.wait(), child.wait()] == [0, 0]


def cpu_s(pid: int) -> float:
    import os

    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
