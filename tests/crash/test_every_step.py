"""A kill before every call by which a run reaches the disk: between any two steps of publishing, and within them."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.trust.lab import Lab, half_written, incomplete, outputs

PIPELINE = {
    "a": {"uses": "lab_make", "rows": 1},
    "m": {"uses": "lab_mix", "parts": ["a"], "layers": 1},
}
FEWEST = {"open": 10, "write": 5, "fsync": 10, "link": 3, "replace": 3, "unlink": 5, "flock": 5, "sqlite": 30}
"""Steps that the enumeration has to find, lest it count past what it is about."""


def steps(lab: Lab) -> list[str]:
    """The names of the calls of one undisturbed cold run, in order."""
    log = lab.folder / "steps.log"
    lab.clear()
    child = lab.begin(PIPELINE, fault={"at": 0, "log": str(log)})
    assert child.wait() == 0, child.text()
    return [line.split()[1] for line in log.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_a_kill_at_every_step_leaves_nothing_half_written_and_the_next_run_is_right(
    lab: Lab, part: int, crash_report: Counter[str]
) -> None:
    right = outputs(lab.finish(PIPELINE))
    found = steps(lab)
    counts = Counter(found)
    assert all(counts[name] >= least for name, least in FEWEST.items()), counts
    kills = [(n, False) for n in range(1, len(found) + 1)]
    kills += [(n, True) for n, name in enumerate(found, 1) if name == "write"]
    for n, torn in kills[part::4]:
        lab.clear()
        child = lab.begin(PIPELINE, fault={"at": n, "torn": torn})
        assert child.wait() == -signal.SIGKILL, f"step {n} of {len(found)} was not reached: {child.text()}"
        crash_report["killed at a step"] += 1
        where = f"killed at step {n}, {found[n - 1]}{', torn' if torn else ''}"
        assert half_written(lab.cache) == [], where
        assert incomplete(lab.cache) == [], where
        lab.calls()
        record = lab.finish(PIPELINE)
        assert outputs(record) == right, where
        assert half_written(lab.cache) == [], where
        calls = Counter(lab.calls())
        assert max(calls.values(), default=0) <= 1, f"{where}: {calls}"


def test_a_kill_at_every_step_of_a_run_that_only_reads_changes_nothing(
    lab: Lab, crash_report: Counter[str]
) -> None:
    right = outputs(lab.finish(PIPELINE))
    before = sorted(path.name for path in lab.cache.glob("*/*/*"))
    lab.calls()
    n = 0
    while True:
        n += 1 if n < 24 else 4
        child = lab.begin(PIPELINE, fault={"at": n})
        if child.wait() == 0:
            break
        assert child.status == -signal.SIGKILL, child.text()
        crash_report["killed at a step"] += 1
        assert sorted(path.name for path in lab.cache.glob("*/*/*")) == before
    assert n > 3
    assert outputs(lab.finish(PIPELINE)) == right
    assert lab.calls() == []


def test_a_record_is_whole_or_not_there(lab: Lab) -> None:
    """Whatever kills the run, record.json can be read wherever it lies."""
    count = len(steps(lab))
    for n in range(max(1, count - 60), count + 1, 3):
        lab.begin(PIPELINE, fault={"at": n}).wait()
        for path in lab.folder.glob("outputs/*/record.json"):
            assert isinstance(json.loads(Path(path).read_text()), dict)
