"""Saved models run in onnxruntime as they are, in one file or two."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from qpipe.model import Model
from qpipe.model.writer import write_onnx
from tests.model.nets import normal, parsed


def network() -> Model:
    return Model.from_proto(
        parsed(
            "net (float[N,40] x) => (float[N,40] y) { t = Transpose(v)  a = MatMul(x, t)  y = MatMul(a, w) }",
            w=normal(40, 40),
            v=normal(40, 40, seed=1),
        )
    )


def outputs(path: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": normal(3, 40)})[0])


def test_a_float_model_is_saved_whole_and_loads_again(tmp_path: Path) -> None:
    model = network()
    path = model.save(tmp_path / "new" / "folder")
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    onnx.checker.check_model(onnx.load(path), full_check=True)
    assert np.allclose(outputs(path), model.session().run(None, {"x": normal(3, 40)})[0], atol=1e-4)
    assert Model.load(path).pack() == model.pack()


def test_the_same_model_gives_the_same_file(tmp_path: Path) -> None:
    first, second = network().save(tmp_path / "a"), network().save(tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()


def test_big_models_have_their_tensors_beside_them(tmp_path: Path) -> None:
    model = network()
    path = tmp_path / "model.onnx"
    write_onnx(model.ir, path, largest_inline_bytes=1000)
    assert (tmp_path / "model.onnx.data").stat().st_size == 8192 + 6400
    assert path.stat().st_size < 1500
    onnx.checker.check_model(str(path))
    assert np.allclose(outputs(path), model.session().run(None, {"x": normal(3, 40)})[0], atol=1e-4)
    assert Model.load(path).pack() == model.pack()
