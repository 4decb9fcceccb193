"""What the process is asked for, in this one: files with their data beside them, inputs made up, what goes wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qpipe.artifacts.artifact import save
from qpipe.artifacts.kinds import Files, Samples
from qpipe.cache.store import Store
from qpipe.deployed.measurement import measure
from qpipe.errors import InputError
from qpipe.model import Model
from qpipe.model.files.onnx_writer import write_onnx
from tests.model.nets import normal, parsed
from tests.whole.test_bad_inputs import net


class Asked:
    """The net, exported in float with its tensors beside the graph; requests to measure it, and what was told."""

    def __init__(self, folder: Path) -> None:
        self.model = Model.load(net(folder / "net.onnx"))
        self.store = Store(folder / "cache")
        (folder / "out").mkdir()
        write_onnx(self.model.ir, folder / "out" / "model.onnx", largest_inline_bytes=0)
        self.files = sorted((folder / "out").iterdir())
        (folder / "out" / "weights.safetensors").write_bytes(b"not deployed")
        files = Files({path.name: path for path in sorted((folder / "out").iterdir())})
        self.exported, self.float = (save(value, self.store) for value in (files, self.model))
        self.told: list[tuple[int, int, str]] = []

    def request(self, data: Samples | None = None, timed: bool = True) -> dict[str, Any]:
        artifact = save(data, self.store) if data else None
        return {
            "exported": astuple(self.exported), "float": astuple(self.float), "threads": 1, "timed": timed,
            "data": artifact and astuple(artifact), "store": self.store.address(),
        }  # fmt: skip

    def measure(self, data: Samples | None = None, timed: bool = True) -> dict[str, Any]:
        return measure(self.request(data, timed), self.store, lambda *told: self.told.append(told))


@pytest.fixture
def asked(tmp_path: Path) -> Asked:
    return Asked(tmp_path)


def test_a_file_is_as_large_as_it_and_its_data(asked: Asked) -> None:
    assert [path.name for path in asked.files] == ["model.onnx", "model.onnx.data"]
    found = asked.measure(timed=False)
    assert set(found) == {"size_bytes", "float_size_bytes"}
    assert found["size_bytes"] == sum(path.stat().st_size for path in asked.files)


def test_without_data_inputs_are_made_up(asked: Asked) -> None:
    found = asked.measure()
    assert found["batch"] == 1
    assert 0.2 < found["latency_s"] / found["float_latency_s"] < 5  # the same computation
    assert {what for _, _, what in asked.told} == {"latency", "memory"}


def test_a_model_that_takes_and_gives_bfloat16_is_measured(tmp_path: Path) -> None:
    text = "m (bfloat16[N,16] x) => (bfloat16[N,8] y) { h = MatMul(x, w)  y = Relu(h) }"
    model = Model.from_proto(parsed(text, w=normal(16, 8).astype(ml_dtypes.bfloat16)))
    with Store(tmp_path / "cache") as store:
        exported = save(Files({"model.onnx": model.save(tmp_path / "out")}), store)
        request = {"exported": astuple(exported), "float": astuple(save(model, store)), "threads": 1, "timed": True}
        request["data"] = astuple(save(Samples({"x": normal(4, 16)}), store))
        found = measure(request, store, lambda *_: None)
    assert found["latency_s"] > 0
    assert found["peak_bytes"] > 0


def test_samples_that_do_not_fit_are_told_in_one_line(asked: Asked) -> None:
    odd = Samples({"image": np.zeros((2, 1, 8, 8), np.float32)})
    with pytest.raises(InputError, match=r"One sample of 'image' has shape \(1, 8, 8\)"):
        asked.measure(odd)
    done = subprocess.run(
        [sys.executable, "-m", "qpipe.deployed.measurement"],
        input=json.dumps(asked.request(odd)) + "\n", capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0
    (line,) = map(json.loads, done.stdout.splitlines())
    assert line["error"].startswith("One sample of 'image' has shape (1, 8, 8)")
