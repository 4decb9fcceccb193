"""export: what leaves can be read without qpipe, and says the same as the model."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.numpy import load

from qpipe.model import Model
from qpipe.numerics.grid import encoding_from_range
from qpipe.numerics.scheme import TensorScheme
from qpipe.stages.export import export

WEIGHT = TensorScheme(8, signed=True, symmetric=True)
ACTIVATION = TensorScheme(8, signed=False, symmetric=False)


@pytest.fixture
def quantized(network):
    model = network(
        "n (float[N,4,5,5] x) => (float[N,6,5,5] y) { t = Conv(x, w, b)  y = Relu(t) }",
        {"w": (6, 4, 1, 1), "b": (6,)},
    )
    return model.with_encodings(
        {
            "x": encoding_from_range(-3.0, 3.0, ACTIVATION),
            "y": encoding_from_range(0.0, 9.0, ACTIVATION),
            "w": encoding_from_range(-3.0, 3.0, WEIGHT),
        }
    )


def written(files, folder):
    for name in files.contents:
        (folder / name).write_bytes(bytes(files.read(name)))
    return folder


@pytest.mark.parametrize("version", ["0.6.1", "1.0.0", "2.0.0"])
def test_a_quantized_model_leaves_as_qdq_with_encodings_and_weights(quantized, tmp_path, version, notes):
    folder = written(export(quantized, encodings_format=version, ctx=notes), tmp_path)
    assert sorted(file.name for file in folder.iterdir()) == [
        "encodings.json",
        "model.onnx",
        "weights.safetensors",
    ]
    assert json.loads((folder / "encodings.json").read_text())["version"] == version
    weights = load((folder / "weights.safetensors").read_bytes())
    assert np.array_equal(weights["w"], quantized.param("w"))
    x = np.random.default_rng(0).normal(size=(2, 4, 5, 5)).astype(np.float32)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x})
    (expected,) = quantized.session(mode="deploy").run(None, {"x": x})
    assert np.array_equal(found, expected)
    assert "loads model.onnx; it takes x" in notes.notes[0]


def test_a_float_model_leaves_as_one_file(network, tmp_path):
    model = network("n (float[N,4] x) => (float[N,5] y) { y = MatMul(x, w) }", {"w": (4, 5)})
    files = export(model)
    assert list(files.contents) == ["model.onnx"]
    again = Model.load(written(files, tmp_path) / "model.onnx")
    assert np.array_equal(again.param("w"), model.param("w"))


def test_weights_leave_under_torchs_names_and_in_its_layout(tmp_path):
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.Flatten(), torch.nn.Linear(144, 5)
    )
    model = Model.from_torch(module, torch.randn(2, 3, 8, 8))
    quantized = model.with_encodings({"0.weight": encoding_from_range(-1.0, 1.0, WEIGHT)})
    weights = load(bytes(export(quantized).read("weights.safetensors")))
    state = module.state_dict()
    assert set(weights) >= set(state)
    for name, value in state.items():
        assert np.array_equal(weights[name], value.numpy())


def test_the_same_model_leaves_as_the_same_bytes(quantized):
    first, second = export(quantized), export(quantized)
    assert {n: bytes(first.read(n)) for n in first.contents} == {
        n: bytes(second.read(n)) for n in second.contents
    }
