"""kill -9 at random moments: of cold, warm and concurrent runs, of the executor and of its workers.

After every kill the same pipeline is run again. It has to end with the digests of an undisturbed run, within its time,
with nothing half-written in the cache and no process left over. Every trial has a seed of its own.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from tests.nursery import Child
from tests.trust.lab import Lab, half_written, incomplete, outputs

Pipeline = dict[str, Any]
PAUSE_S = 0.004


def pipeline(pause_s: float = PAUSE_S, factor: float = 3.0) -> Pipeline:
    """Two sources, two stages of three layers each, and what comes behind them."""
    return {
        "a": {"uses": "lab_make", "value": 2.0, "pause_s": pause_s},
        "b": {"uses": "lab_make", "value": 3.0, "rows": 5, "pause_s": pause_s},
        "m": {"uses": "lab_mix", "parts": ["a", "b"], "layers": 3, "pause_s": pause_s},
        "n": {"uses": "lab_mix", "parts": ["m", "a"], "factor": factor, "layers": 3, "pause_s": pause_s},
        "s": {"uses": "lab_score", "part": "n"},
        "f": {"uses": "lab_files", "scores": "s"},
    }


class Trials:
    """One kind of trial in one lab: what is right, how long an undisturbed run takes, and the counts."""

    def __init__(self, lab: Lab, counts: Counter[str], stages: Pipeline, warm: Pipeline | None, workers: int):
        self.lab, self.counts, self.stages, self.warm, self.workers = lab, counts, stages, warm, workers
        times = []
        for _ in range(2):
            self.prepare()
            started = time.monotonic()
            self.right = outputs(lab.finish(stages, workers=workers))
            times.append(time.monotonic() - started)
        self.duration_s = min(times)
        assert lab.survivors() == []

    def prepare(self) -> None:
        """An empty cache, or that of a run of the `warm` pipeline."""
        self.lab.clear()
        if self.warm is not None:
            self.lab.finish(self.warm)

    def begin(self) -> Child:
        return self.lab.begin(self.stages, workers=self.workers)

    def moment(self, rng: random.Random) -> float:
        """Somewhere in a run, the first moments left out, in which it only starts."""
        return rng.uniform(0.1, 1.0) * self.duration_s

    def check(self, where: str) -> None:
        """What has to hold after a kill: before the next run, of it, and behind it."""
        lab = self.lab
        assert half_written(lab.cache) == [], where
        gone(lab.survivors, where)
        lab.calls()
        record = lab.finish(self.stages)
        assert outputs(record) == self.right, where
        assert half_written(lab.cache) + incomplete(lab.cache) == [], where
        calls = Counter(lab.calls())
        assert max(calls.values(), default=0) <= 1, f"{where}: {calls}"
        self.counts["survived"] += 1
        self.counts["resumed with work to do"] += record["totals"]["ran"] > 0


def gone(survivors: Callable[[], list[int]], where: str) -> None:
    """Every process ends soon after its owner; one that was just begun has to start first, on a busy machine too."""
    deadline = time.monotonic() + 10
    while left := survivors():
        assert time.monotonic() < deadline, f"{where}: processes {left} live on"
        time.sleep(0.01)


def struck(child: Child, counts: Counter[str]) -> bool:
    """Kill a run and count it; whether it had not ended before."""
    child.kill()
    child.wait()
    landed = child.status == -signal.SIGKILL
    counts["tried"] += 1
    counts["ended before the kill"] += not landed
    return landed


KILLS = 40
"""That land, of each of four seeded series; the other tests of this file bring it to more than 200."""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("state", ["cold", "warm"])
def test_a_run_killed_at_any_moment_goes_on(
    lab: Lab, crash_report: Counter[str], state: str, seed: int
) -> None:
    warm = pipeline(factor=2.0) if state == "warm" else None
    trials = Trials(lab, crash_report, pipeline(), warm, workers=0)
    rng = random.Random(f"{state} {seed}")
    landed = 0
    while landed < KILLS:
        trials.prepare()
        moment = trials.moment(rng)
        child = trials.begin()
        time.sleep(moment)
        landed += struck(child, crash_report)
        trials.check(f"{state} {seed}, kill {landed}, after {moment:.4f} s")


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends(lab: Lab, crash_report: Counter[str]) -> None:
    """Every attempt gets a little further: what one leaves, the next takes up."""
    trials = Trials(lab, crash_report, pipeline(0.03), None, workers=0)
    rng = random.Random("again")
    for i in range(4):
        trials.prepare()
        lab.calls()
        done = Counter[str]()
        for attempt in range(12):
            child = trials.begin()
            longer = 1 + 0.2 * attempt  # lest a busy machine does not get beyond the start
            time.sleep(rng.uniform(0.5, 0.9) * trials.duration_s * longer)
            struck(child, crash_report)
            assert half_written(lab.cache) == []
            done.update(lab.calls())
            if child.status == 0:
                break
        else:
            raise AssertionError(f"round {i} gets nowhere: {done}")
        trials.check(f"round {i}")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_runs_at_once_of_which_some_are_killed(lab: Lab, crash_report: Counter[str], seed: int) -> None:
    """Three runs of one pipeline; one or two are killed, the others have to end well by themselves."""
    trials = Trials(lab, crash_report, pipeline(), None, workers=0)
    rng = random.Random(f"together {seed}")
    for i in range(12):
        trials.prepare()
        runs = [trials.begin() for _ in range(3)]
        for child in rng.sample(runs, rng.choice((1, 2))):
            moment = trials.moment(rng)
            time.sleep(moment)
            struck(child, crash_report)
        for child in runs:
            assert child.wait() in (0, -signal.SIGKILL), child.text()
        trials.check(f"together {seed}, trial {i}")


@pytest.mark.slow
def test_the_executor_of_workers_is_killed(lab: Lab, crash_report: Counter[str]) -> None:
    trials = Trials(lab, crash_report, pipeline(0.02), None, workers=2)
    rng = random.Random("executor")
    for i in range(16):
        trials.prepare()
        child = trials.begin()
        moment = trials.moment(rng)
        time.sleep(moment)
        struck(child, crash_report)
        trials.check(f"trial {i}, killed after {moment:.4f} s")


@pytest.mark.slow
def test_workers_are_killed(lab: Lab, crash_report: Counter[str]) -> None:
    """A worker's death costs its own action, or nothing where it had none; the run itself ends by itself."""
    trials = Trials(lab, crash_report, pipeline(0.03), None, workers=2)
    rng = random.Random("workers")
    for i in range(16):
        trials.prepare()
        child = trials.begin()
        time.sleep(rng.uniform(0.3, 1.0) * trials.duration_s)
        workers = lab.survivors()
        if workers:
            _kill(rng.choice(workers))
            crash_report["tried"] += 1
        assert child.wait() in (0, 1), child.text()
        trials.check(f"trial {i}")


@pytest.mark.slow
def test_the_whole_command_is_killed(lab: Lab, crash_report: Counter[str]) -> None:
    """Started by the system, with Hydra and its own interpreter, as a person does."""
    lab.pipeline(pipeline(0.05))
    command = lab.command("run", "run.workers=2")
    started = time.monotonic()
    subprocess.run(command, cwd=lab.folder, env=lab.environment, check=True, capture_output=True)
    duration_s = time.monotonic() - started
    right = outputs(lab.record())
    rng = random.Random("command")
    for _ in range(4):
        lab.clear()
        with subprocess.Popen(
            command,
            cwd=lab.folder,
            env=lab.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            time.sleep(rng.uniform(0.3, 1.0) * duration_s)
            process.kill()
        crash_report["tried"] += 1
        gone(lab.survivors, "the whole command")
        assert half_written(lab.cache) == []
        subprocess.run(command, cwd=lab.folder, env=lab.environment, check=True, capture_output=True)
        assert outputs(lab.record()) == right
        verify = lab.words("cache", "verify")
        assert verify.wait() == 0, verify.text()
        assert "all whole" in verify.text()
        crash_report["survived"] += 1


def test_workers_die_with_their_owner_in_the_middle_of_a_stage(lab: Lab) -> None:
    child = lab.begin({"a": {"uses": "lab_make", "pause_s": 30.0}}, workers=1)
    deadline = time.monotonic() + 20
    while "make-1.0" not in lab.seen():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(lab.survivors()) == 1
    child.kill()
    child.wait()
    gone(lab.survivors, "a stage that sleeps")


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):  # it ended meanwhile
        os.kill(pid, signal.SIGKILL)
