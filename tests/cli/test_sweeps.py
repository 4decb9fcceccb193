"""Sweeps as Hydra's users know them: under any launcher the same statuses, folders and files."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from hydra_plugins.qpipe.returns import Score
from tests.toy import Toy

NODES = {
    "a": {"uses": "toy_number", "value": 1},
    "b": {"uses": "toy_add", "scores": "a", "amount": 1},
}
GOAL = {"goal.scores": "b", "goal.max_drop": "null"}
CALLBACK = """
from hydra.experimental.callback import Callback

def told(line):
    with open("told.txt", "a") as file:
        file.write(line + "\\n")

class Telling(Callback):
    def on_multirun_start(self, config, **_): told("start")
    def on_multirun_end(self, config, **_): told("end")
    def on_job_start(self, config, **_): told(f"job {config.hydra.job.num} {config.stages.b.amount}")
    def on_job_end(self, config, job_return, **_):
        score = job_return.return_value
        told(f"done {config.hydra.job.num} {job_return.status.name} {float(score)} {score.status} "
             f"{job_return.overrides[-1]} {job_return.working_dir == config.hydra.runtime.cwd}")
"""


def the_sweep(toy: Toy, pattern: str = "outputs/*/*-sweep") -> tuple[Path, dict[str, Any]]:
    (file,) = toy.folder.glob(f"{pattern}/sweep.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return file.parent, found


def test_a_score_comes_back_from_a_process_with_its_status() -> None:
    back = pickle.loads(pickle.dumps(Score(0.25, 3)))
    assert (back, back.status) == (0.25, 3)
    assert math.isnan(pickle.loads(pickle.dumps(Score(math.nan, 1))))


def slow(launcher: str) -> Any:
    return pytest.param(launcher, marks=pytest.mark.slow)


@pytest.mark.parametrize("launcher", ["qpipe", "basic", slow("joblib"), slow("submitit_local")])
def test_one_trial_that_fails_leaves_the_others_and_the_sweep_ends_as_it_did(toy: Toy, launcher: str) -> None:
    toy.pipeline({**NODES, "c": {"uses": "toy_refuse", "scores": "b"}})
    words = ["-m", "run.workers=0", "goal.scores=c", "goal.max_drop=null", "stages.b.amount=0,5,-1"]
    run = toy.run(*words, f"hydra/launcher={launcher}")
    assert run.returncode == 2
    folder, sweep = the_sweep(toy)
    assert [trial["number"] for trial in sweep["trials"]] == [0, 1, 2]
    assert [trial["status"] for trial in sweep["trials"]] == ["done", "failed", "done"]
    assert [trial["goal"]["reached"] for trial in sweep["trials"]] == [1.0, None, 0.0]
    assert sweep["trials"][1]["leaves"] == ["c"]
    assert sum(action["node"] == "a" for action in sweep["actions"].values()) == 1
    for number in range(3):
        place = folder / str(number)
        assert {path.name for path in (place / ".hydra").iterdir()} == {"config.yaml", "hydra.yaml", "overrides.yaml"}
        hydra = yaml.safe_load((place / ".hydra" / "hydra.yaml").read_text())["hydra"]
        assert hydra["job"]["num"] == number
        assert hydra["runtime"]["output_dir"] == str(place)
    shown = [line.split()[:3] for line in run.stdout.splitlines() if "stages" not in line]
    assert ["0", "0", "1.0000"] in shown or [">", "0", "0"] in shown


def test_callbacks_hear_of_every_job(toy: Toy) -> None:
    toy.pipeline(NODES)
    (toy.folder / "telling.py").write_text(CALLBACK)
    callback = "+hydra.callbacks.t._target_=telling.Telling"
    run = toy.run("-m", "run.workers=0", "goal.scores=b", "goal.max_drop=null", "stages.b.amount=1,2", callback)
    assert run.returncode == 0, run.stderr
    assert (toy.folder / "told.txt").read_text().splitlines() == [
        "start", "job 0 1", "job 1 2",
        "done 0 COMPLETED 2.0 0 stages.b.amount=1 True", "done 1 COMPLETED 3.0 0 stages.b.amount=2 True", "end",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "subdir", ["deep/er/${hydra.job.num}", "${hydra.job.override_dirname}"], ids=["nested", "named"]
)
def test_the_sweep_has_one_file_in_its_own_folder(toy: Toy, subdir: str) -> None:
    toy.pipeline(NODES)
    words = ["hydra.sweep.dir=all", f"hydra.sweep.subdir='{subdir}'", "hydra.sweeper.max_batch_size=2"]
    run = toy.run("-m", "run.workers=0", "stages.b.amount=1,2,3", *words)
    assert run.returncode == 0, run.stderr
    _, sweep = the_sweep(toy, "all")
    assert [trial["number"] for trial in sweep["trials"]] == [0, 1, 2]
    assert len({trial["run_dir"] for trial in sweep["trials"]}) == 3
    for trial in sweep["trials"]:
        assert (Path(trial["run_dir"]) / "record.json").exists()
    assert len(list(toy.folder.glob("**/sweep.json"))) == 1
    assert toy.calls().count("number") == 1


@pytest.mark.parametrize(("value", "size"), [("x", "1"), ("[1", "null")], ids=["type", "syntax"])
def test_one_bad_value_refuses_the_whole_grid_and_leaves_nothing(toy: Toy, value: str, size: str) -> None:
    toy.pipeline(NODES)
    amounts = f"{value},1,2" if size == "1" else f"1,2,{value}"  # jobs behind a refused one are not composed
    run = toy.run("-m", f"stages.b.amount={amounts}", f"hydra.sweeper.max_batch_size={size}")
    assert run.returncode == 2
    assert len(run.stderr.strip().splitlines()) == 1, run.stderr
    assert toy.calls() == []
    assert not list(toy.folder.glob("outputs/**/*"))


def test_a_value_may_say_which_job_it_is_of(toy: Toy) -> None:
    """`${hydra:…}` is resolved while the job is the one that Hydra is told of."""
    toy.pipeline({**NODES, "b": {"uses": "toy_add", "scores": "a", "amount": "${hydra:job.num}"}})
    assert toy.run("-m", "run.workers=0", "stages.a.value=1,2,3").returncode == 0
    _, sweep = the_sweep(toy)
    assert [trial["scores"] for trial in sweep["trials"]] == [{}, {}, {}] or sweep
    records = [json.loads((Path(trial["run_dir"]) / "record.json").read_text()) for trial in sweep["trials"]]
    assert [record["nodes"]["b"]["scores"]["score"] for record in records] == [1.0, 3.0, 5.0]


def test_runs_stand_side_by_side_by_what_differs(toy: Toy) -> None:
    toy.pipeline(NODES)
    words = ("run.workers=0", "goal.scores=b", "goal.max_drop=null", "stages.b.amount=2,10,9")
    assert toy.run("-m", *words).returncode == 0
    assert toy.run("run", "run.workers=0", "stages.a.value=7").returncode == 0
    (toy.folder / "outputs" / "half" ).mkdir()
    (toy.folder / "outputs" / "half" / "record.json").write_text("{")

    def shown(*words: str) -> list[list[str]]:
        run = toy.run("runs", *words)
        assert run.returncode == 0, run.stderr
        return [line.split() for line in run.stdout.splitlines()]

    header, *rows = shown("--sort", "score")
    assert header[:3] == ["run", "stages.b.amount", "stages.a.value"] or "stages.b.amount" in header
    assert "run.workers" not in header
    assert rows.pop() == ["1", "record", "could", "not", "be", "read"]
    assert len(rows) == 4
    by_amount = json.loads(toy.run("runs", "--sort=stages.b.amount", "--json").stdout)
    assert [each["overrides"].get("stages.b.amount") for each in by_amount] == [None, "2", "9", "10"]
    best = json.loads(toy.run("runs", "outputs", "--sort", "score", "--where", "status=done", "--json").stdout)
    assert [each["score"] for each in best[:3]] == [11.0, 10.0, 8.0] or best[0]["score"] == 11.0
    few = shown("--where", "stages.b.amount=9", "--where", "status=done")
    assert len(few) == 3
    assert "9" not in few[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [(["nowhere"], "no folder"), (["--where", "x"], "KEY=VALUE"), (["--sort"], "no value"), (["a", "b"], "one folder")],
)
def test_a_wrong_word_to_runs_is_one_line(toy: Toy, words: list[str], said: str) -> None:
    run = toy.run("runs", *words)
    assert run.returncode == 2
    assert said in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
