"""Searches by the command line, with real optuna: what they leave, and how they go on."""

from __future__ import annotations

import csv
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.toy import Toy

NODES = {
    "a": {"uses": "toy_number", "value": 1},
    "b": {"uses": "toy_add", "scores": "a", "amount": 1},
    "c": {"uses": "toy_refuse", "scores": "b", "limit": 5},
}
SEARCH = ("-m", "hydra/sweeper=qpipe_search", "hydra.sweep.dir=found", "goal.scores=c", "goal.max_drop=null")


def the_search(toy: Toy) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((toy.folder / "found" / "sweep.json").read_text())
    return found


@pytest.mark.slow
def test_a_search_leaves_what_a_sweep_does_and_goes_on_where_it_was(toy: Toy) -> None:
    toy.pipeline(NODES)
    words = (*SEARCH, "run.workers=0", "stages.b.amount=range(0,8)", "hydra.sweeper.max_trials=3")
    assert toy.run(*words).returncode in (0, 2)  # a score above 5 is refused
    assert toy.calls().count("number") == 1
    resumed = toy.run("run", "--resume", "found", "hydra.sweeper.max_trials=100")  # of 8 that there are
    assert resumed.returncode == 2, resumed.stderr
    calls = toy.calls()
    assert (calls.count("number"), calls.count("refuse")) == (0, 5)
    sweep = the_search(toy)
    assert sweep["search"] == {"objectives": ["score"], "within": {}}
    assert [trial["number"] for trial in sweep["trials"]] == list(range(8))
    by_amount = {trial["overrides"][-1]: trial["goal"]["reached"] for trial in sweep["trials"]}
    expected = {f"stages.b.amount={i}": 1.0 + i if i <= 4 else None for i in range(8)}
    assert by_amount == expected
    with (toy.folder / "found" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    best = max((row for row in rows if row["score"]), key=lambda row: float(row["score"]))
    assert (best["stages.b.amount"], best["score"], best["status"]) == ("4", "5.0", "done")
    again = toy.run(*shlex.split(best["command"])[1:], "run.expect=cached")
    assert again.returncode == 0, again.stderr
    assert "#" in resumed.stdout
    assert toy.run(*words, "hydra.sweeper.max_trials=100").returncode == 0  # the same command goes on, too
    assert toy.calls() == []


def test_a_wrong_value_is_said_before_anything_runs(toy: Toy) -> None:
    toy.pipeline(NODES)
    run = toy.run(*SEARCH, "run.workers=0", "stages.a.value=1,2", "stages.b.amount=1,x")
    assert run.returncode == 2
    assert "stages.b.amount: expected int, got 'x'" in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
    assert toy.calls() == []
    assert not (toy.folder / "found").exists()


def test_only_the_folder_of_a_sweep_goes_on(toy: Toy) -> None:
    run = toy.run("run", "--resume", "nowhere")
    assert run.returncode == 2
    assert "there is no 'nowhere/multirun.yaml'" in run.stderr


def ended(toy: Toy, number: int, after: Callable[[], bool]) -> tuple[int, str]:
    """A search of slow trials, to which the signal is sent once `after` holds."""
    words = (*SEARCH, "run.workers=2", "stages.b.amount=range(0,40)", "stages.b.seconds=0.3", "stages.c.limit=100")
    process = subprocess.Popen(
        toy.command(*words), env=toy.environment, cwd=toy.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 100
    while not after() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, number)
    said, _ = process.communicate(timeout=100)
    return process.returncode, said


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_search_that_is_ended_goes_on_and_computes_nothing_twice(toy: Toy, number: int) -> None:
    toy.pipeline(NODES)
    records = toy.folder / "found"
    status, said = ended(toy, number, lambda: len(list(records.glob("*/record.json"))) >= 3)
    assert status == (130 if number == signal.SIGINT else -number)
    if number == signal.SIGINT:
        assert "qpipe --resume" in said
        done = [trial for trial in the_search(toy)["trials"] if trial["status"] == "done"]
        assert len(done) >= 3
    assert toy.run("run", "--resume", "found", "hydra.sweeper.max_trials=8", "stages.b.seconds=0.3").returncode == 0
    sweep = the_search(toy)
    assert [trial["status"] for trial in sweep["trials"]] == ["done"] * len(sweep["trials"])
    assert [trial["number"] for trial in sweep["trials"]] == list(range(max(8, len(sweep["trials"]))))
    calls = toy.calls()
    assert 0 <= calls.count("refuse") - len(sweep["trials"]) <= 2  # those that a worker was at when it was ended
    assert calls.count("number") == 1


@pytest.mark.slow
def test_under_another_launcher_a_search_is_the_same(toy: Toy) -> None:
    toy.pipeline(NODES)
    words = (*SEARCH, "run.workers=0", "stages.b.amount=range(0,8)", "hydra.sweeper.max_trials=6")
    assert toy.run(*words).returncode == toy.run(*words, "hydra.sweep.dir=basic", "hydra/launcher=basic").returncode
    own, other = the_search(toy), json.loads((toy.folder / "basic" / "sweep.json").read_text())
    assert [trial["overrides"] for trial in own["trials"]] == [trial["overrides"] for trial in other["trials"]]
    assert [trial["goal"] for trial in own["trials"]] == [trial["goal"] for trial in other["trials"]]
