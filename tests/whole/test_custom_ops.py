"""A model with operators of a library of somebody else's, whole: quantized, measured, exported, cached."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qpipe.param import LIBRARIES
from tests.inprocess import carry_out, job
from tests.model.nets import normal
from tests.model.runtime.test_libraries import LIBRARY, proto
from tests.nursery import Nursery


def test_a_stage_that_has_the_artifact_alone_finds_the_library_where_the_config_says(tmp_path: Path) -> None:
    onnx.save(proto(), tmp_path / "net.onnx")

    def ran(library: Path, version: str) -> set[str]:
        source = {"uses": "load_model", "path": str(tmp_path / "net.onnx"), "custom_ops": [str(library)]}
        export = {"uses": "export", "model": "source", "encodings_format": version}
        status, watch = carry_out(job(tmp_path, {"source": source, "export": export}))
        assert status == 0, watch.failures
        assert LIBRARIES not in os.environ
        return {name for name, node in watch.records[0]["nodes"].items() if node["verdict"] == "ran"}

    first, moved, edited = (tmp_path / name for name in ("first.so", "moved.so", "edited.so"))
    shutil.copyfile(LIBRARY, first)
    assert ran(first, "1.0.0") == {"source", "export"}
    first.rename(moved)
    assert ran(moved, "1.0.0") == set()
    assert ran(moved, "2.0.0") == {"export"}
    edited.write_bytes(LIBRARY.read_bytes() + b"\0")
    assert ran(edited, "1.0.0") == {"source", "export"}


Qpipe = Callable[..., tuple[int, str, dict[str, Any]]]


@pytest.fixture
def qpipe(tmp_path: Path, nursery: Nursery) -> Qpipe:
    """The exit status of a run, what it printed, and its record."""
    onnx.save(proto(), tmp_path / "net.onnx")
    shutil.copyfile(LIBRARY, tmp_path / "lib.so")
    for seed, name in enumerate(("calibration", "evaluation")):
        np.savez(tmp_path / f"{name}.npz", x=normal(8, 3, 8, 8, seed=seed))
    base = [
        "pipeline=ptq", "model=onnx_file", "model.path=net.onnx", "data=npz", "data.calibration=calibration.npz",
        "data.evaluation=evaluation.npz", "goal.metric=sqnr_db", "goal.min_score=20", "run.workers=0", "run.threads=1",
        "hydra.run.dir=out",
    ]  # fmt: skip
    environment = os.environ | {"QPIPE_CACHE_DIR": str(tmp_path / "cache")}

    def run(*words: str) -> tuple[int, str, dict[str, Any]]:
        done = nursery.run(tmp_path, [*base, *words], environment, 240)
        record = tmp_path / "out" / "record.json"
        return done.returncode, done.stdout + done.stderr, json.loads(record.read_text()) if record.exists() else {}

    return run


def verdicts(record: dict[str, Any]) -> dict[str, str]:
    return {name: node["verdict"] for name, node in record["nodes"].items()}


@pytest.mark.slow
def test_a_model_with_operators_of_a_library(qpipe: Qpipe, tmp_path: Path) -> None:
    status, said, _ = qpipe()
    assert status == 2
    assert "model.custom_ops=[FILE]" in said

    status, said, record = qpipe("model.custom_ops=[lib.so]")
    assert status == 0, said
    assert "parity: agrees" in said
    assert (tmp_path / "out" / "export" / "model.onnx").exists()
    assert record["measured"]["export"]["latency"] > 0  # in sessions that know the library
    assert set(verdicts(record).values()) == {"ran", "hit"}

    # Elsewhere, under another name: what lies below is run with the library where it is now.
    (tmp_path / "lib.so").rename(tmp_path / "other.so")
    status, said, record = qpipe("model.custom_ops=[other.so]")
    assert status == 0, said
    assert set(verdicts(record).values()) == {"hit"}
    status, said, record = qpipe("model.custom_ops=[other.so]", "scheme=w8a16")
    assert status == 0, said
    assert verdicts(record)["source"] == "hit"
    assert verdicts(record)["parity"] == "ran"

    status, said, _ = qpipe("model.custom_ops=[lib.so]")
    assert status == 2
    assert "stages.source.custom_ops: no file or folder at 'lib.so'. Give the path of an existing one." in said

    (tmp_path / "edited.so").write_bytes(LIBRARY.read_bytes() + b"\0")
    status, said, record = qpipe("model.custom_ops=[edited.so]")
    assert status == 0, said
    again = {name for name, verdict in verdicts(record).items() if verdict == "ran"}
    assert {"source", "prepare", "score_float", "naive", "score_deployed", "parity", "export"} <= again


@pytest.mark.slow
def test_a_result_is_verified_with_the_library_that_its_model_needs(
    qpipe: Qpipe, tmp_path: Path, nursery: Nursery
) -> None:
    assert qpipe("model.custom_ops=[lib.so]")[0] == 0
    words = [
        "verify", "parity", "pipeline=ptq", "model=onnx_file", "model.path=net.onnx", "model.custom_ops=[lib.so]",
        "data=npz", "data.calibration=calibration.npz", "data.evaluation=evaluation.npz", "goal.metric=sqnr_db",
        "goal.min_score=20",
    ]  # fmt: skip
    environment = os.environ | {"QPIPE_CACHE_DIR": str(tmp_path / "cache")}
    done = nursery.run(tmp_path, words, environment, 240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "same" in done.stdout
