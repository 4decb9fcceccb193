"""amp in real runs on a real cache: what a new budget measures, and what a killed run had measured already."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.whole.test_bad_inputs import net

OVERRIDES = (
    "pipeline=amp", "targets=[amp]", "model=onnx_file", "model.path=net.onnx", "data=npz", "data.calibration=c.npz",
    "data.evaluation=c.npz", "goal.metric=sqnr_db", "goal.min_score=30", "stages.amp.batch_size=1",
    "run.workers=1", "run.threads=1",
)  # fmt: skip


def write_inputs(folder: Path) -> None:
    net(folder / "net.onnx")
    samples = np.random.default_rng(0).normal(size=(200, 3, 8, 8)).astype(np.float32)
    np.savez(folder / "c.npz", image=samples, labels=np.arange(200) % 4)


def start(folder: Path, cache: str, *more: str) -> subprocess.Popen[str]:
    environment = os.environ | {"QPIPE_CACHE_DIR": str(folder / cache)}
    command = [sys.executable, "-m", "qpipe", *OVERRIDES, *more]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def finish(folder: Path, cache: str, *more: str) -> dict[str, Any]:
    """The amp node of the run's record."""
    process = start(folder, cache, *more)
    _, told = process.communicate(timeout=250)
    assert process.returncode in (0, 3), told
    paths = sorted(folder.glob("outputs/*/*/record.json"), key=lambda path: path.stat().st_mtime_ns)
    node: dict[str, Any] = json.loads(paths[-1].read_text())["nodes"]["amp"]
    return node


def kept(folder: Path, cache: str) -> Counter[str]:
    """The sub-results of amp in the cache, by name."""
    results = (folder / cache).glob("actions/*/*.json")
    found = (json.loads(path.read_text())["result"]["ingredients"] for path in results)
    return Counter(made["memo"] for made in found if made.get("stage") == "amp" and "memo" in made)


@pytest.mark.slow
def test_a_new_budget_runs_no_new_sensitivity_and_a_killed_run_keeps_what_it_measured(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    first = finish(tmp_path, "whole")
    assert first["verdict"] == "ran"
    whole = kept(tmp_path, "whole")
    options = sum(
        len({name for name in group if name.startswith("alone")}) for group in first["scores"]["groups"]
    )
    assert 0 < whole["alone"] <= options
    assert whole["observers"] == 1

    other = finish(tmp_path, "whole", "stages.amp.max_drop=null", "stages.amp.min_score=null", "stages.amp.budget=0.6")
    assert other["verdict"] == "ran"
    assert kept(tmp_path, "whole") - whole == Counter(
        {"mix": len(other["scores"]["measured"]) - len(shared(first, other))}
    )

    process = start(tmp_path, "killed")
    deadline = time.monotonic() + 200
    while kept(tmp_path, "killed")["alone"] < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 3 <= kept(tmp_path, "killed")["alone"] < whole["alone"]
    resumed = finish(tmp_path, "killed")
    assert resumed["outputs"] == first["outputs"]
    assert kept(tmp_path, "killed") == whole


def shared(first: dict[str, Any], other: dict[str, Any]) -> list[dict[str, Any]]:
    """The mixes that both runs measured; they are told apart by cost and score."""
    measured = first["scores"]["measured"]
    return [row for row in other["scores"]["measured"] if any(same(row, known) for known in measured)]


def same(row: dict[str, Any], known: dict[str, Any]) -> bool:
    return (row["share"], row["score"]) == (known["share"], known["score"])


@pytest.mark.slow
def test_autoquant_comes_to_amp_where_nothing_before_it_meets_the_goal(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    given = [word for word in OVERRIDES if word.startswith(("model", "data", "run", "goal.metric"))]
    command = [sys.executable, "-m", "qpipe", *given, "scheme=w4a8", "goal.min_score=45"]
    environment = os.environ | {"QPIPE_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("outputs/*/*/record.json")
    record = json.loads(path.read_text())
    assert record["best"]["node"] == "mixed"
    nodes = record["nodes"]
    assert nodes["score_adaround"]["scores"]["score"] < 45.0 <= nodes["score_mixed"]["scores"]["score"]
    assert nodes["score_deployed"]["scores"]["score"] == pytest.approx(
        nodes["score_mixed"]["scores"]["score"], abs=0.1
    )
    assert "Mixed precision" in (path.parent / "report.html").read_text()
