"""The pipelines on a transformer with a few channels far larger than the rest: nothing ends below what is plainer."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qpipe.model import Model
from qpipe.model.files.onnx_writer import write_onnx
from tests.nursery import Nursery
from tests.trained import vit, waves, with_outliers

Runs = Callable[..., dict[str, Any]]
CHEAP = ("run.workers=0", "run.measure=false", "targets=[best]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network as outliers.onnx, and its samples."""
    found = tmp_path_factory.mktemp("outliers")
    images, labels = waves(600, seed=2)
    module = with_outliers(vit(), factor=60.0)
    model = Model.from_torch(module, (torch.from_numpy(images[:2]),))
    name = model.inputs[0].name
    write_onnx(model.ir, found / "outliers.onnx")
    np.savez(found / "calibration.npz", **{name: images}, labels=labels)
    images, labels = waves(2000, seed=3)
    np.savez(found / "evaluation.npz", **{name: images}, labels=labels)
    return found


@pytest.fixture
def ran(folder: Path, nursery: Nursery) -> Runs:
    """The record of a run upon the network; its cache is that of the module."""

    def run(*overrides: str) -> dict[str, Any]:
        data = ("data=npz", "data.calibration=calibration.npz", "data.evaluation=evaluation.npz")
        words = ["model=onnx_file", "model.path=outliers.onnx", *data, *CHEAP, *overrides]
        done = nursery.run(folder, words, os.environ | {"QPIPE_CACHE_DIR": str(folder / "cache")})
        assert done.returncode in (0, 3), done.stderr
        paths = sorted(folder.glob("outputs/*/*/record.json"), key=lambda path: path.stat().st_mtime_ns)
        record: dict[str, Any] = json.loads(paths[-1].read_text())
        return record

    return run


def scores(record: dict[str, Any]) -> dict[str, float]:
    return {row["node"]: row["score"] for row in record["ladder"] if row["score"] is not None}


@pytest.mark.slow
def test_outliers_behind_norms_cost_nothing_where_norms_take_part(ran: Runs) -> None:
    """W8A8 within 0.3 points of float, with what costs nothing at run time, and without amp or adaround."""
    record = ran("pipeline=autoquant", "goal.max_drop=0.003")
    found = scores(record)
    assert record["goal"]["met"]
    assert found["score_float"] - record["best"]["score"] <= 0.003
    assert found["score_naive"] < found["score_float"] - 0.003  # else there was nothing to do
    assert {record["nodes"][name]["verdict"] for name in ("adaround", "equalized", "amp")} == {"not_needed"}
    taken = next(row for row in record["ladder"] if row["best"])
    assert taken["node"] == "score_normed"
    assert taken["cost"] == next(row["cost"] for row in record["ladder"] if row["node"] == "score_naive")


@pytest.mark.slow
def test_a_mix_is_of_what_gains_in_float_already(ran: Runs) -> None:
    record = ran("pipeline=amp", "scheme=w8a8", "targets=[start]")
    fates = {row["node"]: row["choice"]["fate"] for row in record["ladder"] if "choice" in row}
    assert fates == {"score_naive": "kept", "score_uniform": "taken"}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [(), ("scheme=w4a8",)])
def test_no_pipeline_ends_below_a_plainer_one(ran: Runs, scheme: tuple[str, ...]) -> None:
    ptq, adaround = (ran(f"pipeline={name}", "stages.cle.norms=false", *scheme) for name in ("ptq", "adaround"))
    noise = 0.005  # of 2000 samples in which few differ; choices are made on others
    assert ptq["best"]["score"] >= scores(ptq)["score_naive"] - noise
    assert adaround["best"]["score"] >= ptq["best"]["score"] - noise
    for record in (ptq, adaround):
        chosen = [row["choice"] for row in record["ladder"] if "choice" in row]
        assert all(choice["fate"] in ("taken", "kept", "dropped") for choice in chosen)
        assert [row["best"] for row in record["ladder"] if row.get("choice", {}).get("fate") == "taken"] == [True]
