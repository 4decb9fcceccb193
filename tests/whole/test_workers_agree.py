"""The shipped pipelines give the same with one worker, with many, and where each action has a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FRESH = """
import json, os, sys
from pathlib import Path

def alone(*arguments):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            told = {"result": perform(*arguments)}
        except Exception as error:
            told = {"error": repr(error)}
        with open(writer, "w") as pipe:
            json.dump(told, pipe)
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        told = json.load(pipe)
    os.waitpid(child, 0)
    with open(Path(__file__).with_name("started"), "a") as log:
        log.write("one\\n")
    if "error" in told:
        raise RuntimeError(told["error"])
    return told["result"]

if "qpipe.run.workers" in sys.orig_argv:
    import numpy, onnx, onnx_ir, onnxruntime, torch
    from qpipe.run import performing
    perform, performing.perform = performing.perform, alone
"""
"""Put on a worker's path as sitecustomize: each action has a fork of a process that has loaded libraries, no more."""
PIPELINES = os.environ.get("QPIPE_TEST_PIPELINES", "ptq").split()
"""`ptq autoquant adaround amp` are those that are shipped; the long ones are run by hand."""


def digests(folder: Path, name: str, *arguments: str, fresh: bool = False) -> dict[str, object]:
    """What every node gave, by a run in a cache of its own, with one thread each: sums that more threads share may
    differ in their last bits, which is what `verify` runs on the recorded number of threads for."""
    environment = dict(os.environ)
    if fresh:
        (folder / "fresh").mkdir(exist_ok=True)
        (folder / "fresh" / "sitecustomize.py").write_text(FRESH)
        environment["PYTHONPATH"] = str(folder / "fresh")
    run = subprocess.run(
        [sys.executable, "-m", "qpipe", *arguments, "run.threads=1", "run.measure=false", f"cache.dir={folder / name}",
         f"hydra.run.dir={name}-run"],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode in (0, 3), run.stderr
    record = json.loads((folder / f"{name}-run" / "record.json").read_text())
    return {node: entry["outputs"] for node, entry in record["nodes"].items() if entry.get("outputs")}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_one_worker_many_and_fresh_ones_agree(tmp_path: Path, pipeline: str) -> None:
    chosen = [f"pipeline={pipeline}", *(["scheme=w4a8"] if pipeline in ("adaround", "amp") else [])]
    one = digests(tmp_path, "one", *chosen, "run.workers=1")
    assert len(one) > 10
    assert digests(tmp_path, "many", *chosen, "run.workers=4") == one
    assert digests(tmp_path, "fresh", *chosen, "run.workers=2", fresh=True) == one
    assert len((tmp_path / "fresh" / "started").read_text().split()) >= 0.8 * len(one)  # a choice is no action
