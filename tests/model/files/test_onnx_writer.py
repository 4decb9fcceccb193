"""Saved models run in onnxruntime as they are, in one file or two."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from safetensors.numpy import load_file

from qpipe.model import Model
from qpipe.model.files.onnx_writer import write_onnx
from qpipe.model.runtime.options import session_options
from qpipe.numerics.grid import Encoding
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
    session = onnxruntime.InferenceSession(str(path), session_options(), providers=["CPUExecutionProvider"])
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


def test_what_every_reader_infers_is_not_written(tmp_path: Path) -> None:
    """Types behind an operator of onnxruntime's own are no such thing."""
    text = "m (float[N,4] x) => (float[N,4] y) { a = Relu(x)  b = com.microsoft.QuickGelu(a)  c = Neg(b)  y = Abs(c) }"
    model = Model.from_proto(parsed(text))
    path = model.save(tmp_path)
    assert [value.name for value in onnx.load(path).graph.value_info] == ["b"]
    assert Model.load(path).pack() == model.pack()


def test_a_quantized_model_is_saved_with_its_grids_and_its_float_weights(tmp_path: Path) -> None:
    model = network()
    w = model.param("w")
    scale = (np.abs(w).max(0) / 7).astype(np.float32)
    four_bits = Encoding(4, True, True, scale, np.zeros(40, np.int32), axis=1)
    eight_bits = Encoding(8, False, False, np.array(0.05, np.float32), np.array(128, np.int32))
    quantized = model.with_encodings({"w": four_bits, "x": eight_bits})
    path = quantized.save(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "encodings.json",
        "model.onnx",
        "weights.safetensors",
    ]
    onnx.checker.check_model(onnx.load(path), full_check=True)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert "QuantizeLinear" in kinds
    assert "DequantizeLinear" in kinds
    assert np.allclose(outputs(path), quantized.session().run(None, {"x": normal(3, 40)})[0], atol=1e-4)
    weights = load_file(tmp_path / "weights.safetensors")
    assert np.array_equal(weights["v"], normal(40, 40, seed=1))  # as its source has it, not transposed
    assert json.loads((tmp_path / "encodings.json").read_text())
