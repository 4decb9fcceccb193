"""kill -9 in the middle of a real adaround, then the same command: it finishes, with an undisturbed run's digests."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

OVERRIDES = (
    "pipeline=adaround",
    "targets=[export]",
    "scheme=w4a8",
    "scheme.weight.granularity=per_channel",
    "stages.adaround.solver=gradient",
    "stages.adaround.iterations=40",
    "stages.adaround.limit=32",
    "run.workers=1",
    "run.measure=false",
    "run.threads=1",
)


def start(folder: Path, cache: str, *more: str) -> subprocess.Popen[str]:
    environment = os.environ | {"QPIPE_CACHE_DIR": str(folder / cache)}
    command = [sys.executable, "-m", "qpipe", *OVERRIDES, *more]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def finish(folder: Path, cache: str, *more: str) -> dict[str, Any]:
    process = start(folder, cache, *more)
    _, told = process.communicate(timeout=280)
    assert process.returncode in (0, 3), told
    paths = sorted(folder.glob("outputs/*/*/record.json"), key=lambda path: path.stat().st_mtime_ns)
    record: dict[str, Any] = json.loads(paths[-1].read_text())
    return record


def tuned_layers(folder: Path, cache: str) -> int:
    """The sub-results of adaround in the cache: one a layer."""
    results = (folder / cache).glob("actions/*/*.json")
    found = (json.loads(path.read_text())["result"]["ingredients"] for path in results)
    return sum(1 for made in found if made.get("stage") == "adaround" and "memo" in made)


@pytest.mark.slow
def test_a_killed_adaround_goes_on_and_ends_with_the_same_digests(tmp_path: Path) -> None:
    finish(tmp_path, "disturbed", "targets=[start]")  # all that goes before is not disturbed
    shutil.copytree(tmp_path / "disturbed", tmp_path / "undisturbed")
    undisturbed = finish(tmp_path, "undisturbed")
    whole = tuned_layers(tmp_path, "undisturbed")
    process = start(tmp_path, "disturbed")
    deadline = time.monotonic() + 200
    while tuned_layers(tmp_path, "disturbed") < whole // 2:
        assert time.monotonic() < deadline
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = tuned_layers(tmp_path, "disturbed")
    assert whole // 2 <= before < whole
    resumed = finish(tmp_path, "disturbed")
    assert resumed["nodes"]["adaround"]["verdict"] == "ran"
    assert resumed["nodes"]["calibrate"]["verdict"] == "hit"
    for name, node in undisturbed["nodes"].items():
        assert resumed["nodes"][name]["outputs"] == node["outputs"], name
    assert tuned_layers(tmp_path, "disturbed") == whole
