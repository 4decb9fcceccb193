"""Files that cannot be read end in one sentence that says why."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest

from qpipe.errors import InputError
from qpipe.model import Model
from tests.model.nets import normal, parsed


@pytest.fixture
def proto() -> onnx.ModelProto:
    return parsed("net (float[N,64] x) => (float[N,64] y) { y = MatMul(x, w) }", w=normal(64, 64))


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        Model.load(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_bad_files(tmp_path: Path, proto: onnx.ModelProto) -> None:
    good = proto.SerializeToString()
    contents = {
        "empty.onnx": (b"", "is empty"),
        "text.onnx": (b"this is no model, it is a letter to a friend", "not an ONNX file"),
        "short.onnx": (good[: len(good) // 2], "cut off or damaged"),
        "torch.onnx": (b"PK\x03\x04 and so on", "zip archive"),
        "tensor.onnx": (onnx.numpy_helper.from_array(normal(3)).SerializeToString(), "ONNX"),
    }
    for name, (data, words) in contents.items():
        (tmp_path / name).write_bytes(data)
        assert words in refusal(tmp_path / name)
    assert "does not exist" in refusal(tmp_path / "missing.onnx")
    assert "is a folder" in refusal(tmp_path)


def test_external_data_are_found_beside_the_file(tmp_path: Path, proto: onnx.ModelProto) -> None:
    path = tmp_path / "big.onnx"
    onnx.save_model(proto, path, save_as_external_data=True, location="big.data", size_threshold=0)
    model = Model.load(path)
    assert np.array_equal(model.param("w"), normal(64, 64))
    x = normal(2, 64)
    assert np.allclose(model.session().run(None, {"x": x})[0], x @ normal(64, 64), atol=1e-4)


def test_external_data_that_are_missing_cut_off_or_elsewhere(tmp_path: Path, proto: onnx.ModelProto) -> None:
    path = tmp_path / "big.onnx"
    data = tmp_path / "big.data"
    onnx.save_model(proto, path, save_as_external_data=True, location="big.data", size_threshold=0)
    os.truncate(data, 100)
    assert "cut off: tensor 'w'" in refusal(path)
    data.unlink()
    assert "the data of tensor 'w' are missing" in refusal(path)
    broken = onnx.load(path, load_external_data=False)
    for entry in broken.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = "../elsewhere.data"
    path.write_bytes(broken.SerializeToString())
    assert "outside its folder" in refusal(path)


def test_a_model_outlives_the_file_it_came_from(tmp_path: Path, proto: onnx.ModelProto) -> None:
    path = tmp_path / "net.onnx"
    onnx.save_model(proto, path)
    model = Model.load(path)
    path.unlink()
    assert np.array_equal(model.param("w"), normal(64, 64))
