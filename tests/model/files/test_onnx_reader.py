"""Files that cannot be read end in one sentence that says why."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import numpy as np
import onnx
import pytest

from qpipe.errors import InputError, QpipeError
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


def test_external_data_that_are_links_are_found(tmp_path: Path, proto: onnx.ModelProto) -> None:
    """As package caches keep them: hard links, and symbolic ones into a folder where files have other names."""
    (tmp_path / "store").mkdir()
    (tmp_path / "hard").mkdir()
    (tmp_path / "soft").mkdir()
    onnx.save_model(
        proto, tmp_path / "store" / "big.onnx", save_as_external_data=True, location="big.data", size_threshold=0
    )
    for name in ("big.onnx", "big.data"):
        os.link(tmp_path / "store" / name, tmp_path / "hard" / name)
        (tmp_path / "store" / name).rename(tmp_path / "store" / f"blob of {name}")
        (tmp_path / "soft" / name).symlink_to(tmp_path / "store" / f"blob of {name}")
    for folder in ("hard", "soft"):
        model = Model.load(tmp_path / folder / "big.onnx")
        assert np.array_equal(model.param("w"), normal(64, 64))
        (found,) = model.session().run(None, {"x": normal(2, 64)})
        assert np.allclose(found, normal(2, 64) @ normal(64, 64), atol=1e-4)
    elsewhere = tmp_path / "elsewhere.data"
    elsewhere.write_bytes(bytes(64 * 64 * 4))
    (tmp_path / "soft" / "big.data").unlink()
    (tmp_path / "soft" / "big.data").symlink_to(elsewhere)
    assert "outside its folder" in refusal(tmp_path / "soft" / "big.onnx")


def hostile(path: Path, proto: onnx.ModelProto, kind: str) -> None:
    """Write a file that is broken in one of the ways that parsers stumble over."""
    if kind in ("offset", "location"):
        onnx.save_model(proto, path, save_as_external_data=True, location="big.data", size_threshold=0)
        proto = onnx.load(path, load_external_data=False)
        for entry in proto.graph.initializer[0].external_data:
            if entry.key == kind:
                entry.value = {"offset": "three", "location": "big\0.data"}[kind]
    data = proto.SerializeToString()
    if kind == "op_type":
        data = data.replace(b"MatMul", b"Mat\xfful")
    elif kind == "function":
        proto.opset_import.add(domain="own", version=1)
        call = onnx.helper.make_node("F", ["a"], ["b"], domain="own")
        imports = [onnx.helper.make_opsetid("own", 1)]
        proto.functions.append(onnx.helper.make_function("own", "F", ["a"], ["b"], [call], imports))
        data = proto.SerializeToString()
    elif kind == "shape":
        proto.graph.initializer[0].dims[0] = 63
        data = proto.SerializeToString()
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("kind", "words"),
    {
        "offset": "offset 'three' of its data is no number",
        "location": "the data of tensor 'w' are in no file",
        "op_type": "is no text",
        "function": "the function 'F' calls itself",
        "shape": "initializer 'w' of shape [63, 64] holds 16384 bytes, not 16128",
    }.items(),
)
def test_what_parsers_stumble_over_is_told(tmp_path: Path, proto: onnx.ModelProto, kind: str, words: str) -> None:
    hostile(tmp_path / "net.onnx", proto, kind)
    with pytest.raises(InputError, match=re.escape(words)):
        Model.load(tmp_path / "net.onnx")


def test_files_with_a_byte_changed_are_taken_or_refused(tmp_path: Path) -> None:
    text = """net (float[T,N,4] x) => (float[M,3] y) {
        h, , c = LSTM<hidden_size=3>(x, w, r, , , , c0)  f = Reshape(h, s)  y = Gemm<alpha=0.5>(f, v, b) }"""
    tensors = {"w": normal(1, 12, 4), "r": normal(1, 12, 3), "c0": normal(1, 2, 3), "v": normal(3, 3), "b": normal(3)}
    data = parsed(text, **tensors, s=np.array([-1, 3])).SerializeToString()
    rng = np.random.default_rng(0)

    def taken() -> bool:
        changed = bytearray(data)
        changed[rng.integers(len(data))] = rng.integers(256)
        (tmp_path / "net.onnx").write_bytes(changed)
        with contextlib.suppress(QpipeError):
            return bool(Model.load(tmp_path / "net.onnx"))
        return False

    assert 20 < sum(taken() for _ in range(150)) < 130


def test_a_model_outlives_the_file_it_came_from(tmp_path: Path, proto: onnx.ModelProto) -> None:
    path = tmp_path / "net.onnx"
    onnx.save_model(proto, path)
    model = Model.load(path)
    path.unlink()
    assert np.array_equal(model.param("w"), normal(64, 64))
