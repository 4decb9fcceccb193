"""What was exported is measured once for each machine, holds against the goal, and never fails a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qpipe.cache.store import Store
from qpipe.errors import ConfigError
from qpipe.report.measured import verdict
from qpipe.run.deployment import with_ratios
from qpipe.run.sweep import Job, plan_jobs, run_jobs
from tests.inprocess import Quiet, carry_out, job
from tests.whole.test_bad_inputs import net

SIZES = ("size_bytes", "float_size_bytes")


class Listening(Quiet):
    """A watch that also keeps what begins."""

    def __init__(self, stop: bool = False) -> None:
        super().__init__()
        self.begun: list[str] = []
        self._stop = stop

    def started(self, node: str, stage: str) -> None:
        self.begun.append(node)

    def progress(self, node: str, done: int, total: int, what: str) -> None:
        if self._stop:
            raise KeyboardInterrupt


def pipeline(folder: Path, run: dict[str, Any] | None = None, **goal: Any) -> Job:
    """The net of the samples, exported as it is."""
    net(folder / "net.onnx")
    rng = np.random.default_rng(0)
    np.savez(folder / "samples.npz", image=rng.standard_normal((4, 3, 8, 8)).astype(np.float32))
    stages = {
        "samples": {"uses": "load_data", "path": str(folder / "samples.npz")},
        "source": {"uses": "load_model", "path": str(folder / "net.onnx"), "data": "samples"},
        "export": {"uses": "export", "model": "source"},
    }
    return job(folder, stages, goal={"metric": "top1", "max_drop": None, **goal}, run={"measure": True} | (run or {}))


def listened(one: Job, watch: Listening) -> int:
    with Store(Path(str(one.spec.cache_dir))) as store:
        return run_jobs([one], store, watch, ["qpipe"])


def figures(watch: Quiet) -> dict[str, Any]:
    found: dict[str, Any] = watch.records[-1]["measured"]["export"]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the pipeline ran, and was measured."""
    folder = tmp_path_factory.mktemp("measured")
    assert carry_out(pipeline(folder))[0] == 0
    return folder


def test_a_float_file_is_as_large_as_the_float_model_and_its_operators_are_in_float(folder: Path) -> None:
    status, watch = carry_out(pipeline(folder))
    found = figures(watch)
    exported = Path(watch.records[0]["files"]["export"][0])
    assert (status, exported.name) == (0, "model.onnx")
    assert found["size_bytes"] == found["float_size_bytes"] == exported.stat().st_size
    assert found["size"] == 1
    assert found["kernels"]["layers"] == {"integer": 0, "all": 2}
    assert (found["batch"], found["threads"], found["real_samples"]) == (1, 1, True)
    assert 0 < found["latency_s"] < 0.1
    assert found["latency"] == found["latency_s"] / found["float_latency_s"]
    assert found["peak_bytes"] > 0


def test_what_is_known_of_this_machine_is_not_measured_again(folder: Path) -> None:
    watches = [Listening(), Listening()]
    assert [listened(pipeline(folder), watch) for watch in watches] == [0, 0]
    assert [watch.begun for watch in watches] == [[], []]
    assert figures(watches[0]) == figures(watches[1])
    other = Listening()
    assert listened(pipeline(folder, {"threads": 2}), other) == 0
    assert other.begun == ["measure export"]
    assert figures(other)["threads"] == 2


@pytest.mark.parametrize(
    ("goal", "status", "said"),
    [
        ({"max_latency": 0.001}, 3, "goal missed: latency "),
        ({"max_latency": 90}, 0, "goal met: latency "),
        ({"max_size": 0.5}, 3, "goal missed: file 1.000 of float (at most 0.5 asked)"),
        ({"max_size": "1 GB"}, 0, "goal met: file "),
        ({"max_size": "1 B"}, 3, "goal missed: file "),
    ],
)
def test_the_goal_is_held_against_what_was_measured(folder: Path, goal: dict[str, Any], status: int, said: str) -> None:
    found, watch = carry_out(pipeline(folder, **goal))
    (record,) = watch.records
    assert (found, record["goal"]["met"]) == (status, status == 0)
    assert record["status"] == ("done" if status == 0 else "goal_missed")
    assert (verdict(record) or "").startswith(said)


def test_sizes_need_no_session(tmp_path: Path, folder: Path) -> None:
    status, watch = carry_out(pipeline(folder, {"measure": False}, max_size=0.5))
    assert status == 3
    assert set(figures(watch)) >= set(SIZES)
    assert "latency" not in figures(watch)
    assert "measured" not in carry_out(pipeline(folder, {"measure": False}))[1].records[0]


def test_a_measurement_that_fails_is_one_line_and_fails_no_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = tmp_path / "python"
    dead.write_text("#!/bin/sh\nexit 9\n")
    dead.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dead))
    status, watch = carry_out(pipeline(folder, {"threads": 3}, max_latency=2.0))
    (record,) = watch.records
    assert (status, record["goal"]["met"]) == (0, None)
    assert watch.messages == ["export is not measured: its process ended with status 9"]
    assert record["measured"] == {"export": {"error": "its process ended with status 9"}}
    assert verdict(record) == "goal not decided: latency not measured (at most 2 asked)"


def test_an_interrupt_ends_the_measurement_and_keeps_the_record(folder: Path) -> None:
    before, watch = children(), Listening(stop=True)
    assert listened(pipeline(folder, {"threads": 4}), watch) == 130
    (record,) = watch.records
    assert record["status"] == "interrupted"
    assert "measured" not in record
    assert Path(record["files"]["export"][0]).exists()
    assert children() <= before  # it is gone, and has been waited for


def children() -> set[str]:
    """The processes that this one started, of those that it has not waited for."""
    return {pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def test_a_run_that_may_compute_nothing_measures_nothing_new(folder: Path) -> None:
    watch = Listening()
    assert listened(pipeline(folder, {"threads": 5, "expect": "cached"}), watch) == 0
    assert (watch.begun, "measured" in watch.records[0]) == ([], False)


def refused(one: Job) -> None:
    with Store(Path(str(one.spec.cache_dir))) as store:
        plan_jobs([one], store)


@pytest.mark.parametrize("value", [float("nan"), -1, 0, 1e6])
@pytest.mark.parametrize("name", ["max_latency", "max_size"])
def test_a_limit_that_is_none_is_refused_before_anything_runs(tmp_path: Path, name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^goal\.{name}: expected a share of what the float model takes"):
        pipeline(tmp_path, **{name: value})


def test_a_limit_of_what_is_not_measured_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^goal\.max_latency: nothing is measured with run\.measure=false"):
        pipeline(tmp_path, {"measure": False}, max_latency=0.8)
    with pytest.raises(ConfigError, match=r"^goal\.max_size: expected a size such as 20GB"):
        pipeline(tmp_path, max_size="-4MB")
    stages = {"source": {"uses": "load_model", "path": str(tmp_path / "net.onnx"), "data": None}}
    goals: Sequence[dict[str, Any]] = ({"max_latency": 0.8}, {"max_size": 0.5}, {"max_size": "4MB"})
    for goal in goals:
        with pytest.raises(ConfigError, match=r"none of the targets exports a model"):
            refused(job(tmp_path, stages, goal={"metric": "top1", "max_drop": None, **goal}))


def test_a_ratio_needs_a_figure_of_float() -> None:
    sizes = {"size_bytes": 2, "float_size_bytes": 8}
    assert with_ratios(sizes) == {**sizes, "size": 0.25}
    assert with_ratios({"peak_bytes": 2, "float_peak_bytes": 0}).get("memory") is None
