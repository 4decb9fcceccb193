"""The content of an ONNX file with external data is that of all its files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qpipe.companions import digest_with_companions, locations
from qpipe.hashing import digest_tree


def write(folder: Path, external: bool, name: str = "weights.bin") -> Path:
    weight = numpy_helper.from_array(np.arange(4096, dtype=np.float32).reshape(64, 64), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    x, y = (helper.make_tensor_value_info(value, TensorProto.FLOAT, ["n", 64]) for value in "xy")
    model = helper.make_model(helper.make_graph([node], "g", [x], [y], [weight]))
    path = folder / "net.onnx"
    onnx.save(model, path, save_as_external_data=external, location=name, size_threshold=0)
    return path


def test_the_locations_are_those_that_onnx_reads(tmp_path: Path) -> None:
    path = write(tmp_path, external=True)
    entries = onnx.load(path, load_external_data=False).graph.initializer[0].external_data
    assert locations(path) == [entry.value for entry in entries if entry.key == "location"] == ["weights.bin"]


def test_one_changed_byte_in_a_companion_changes_the_digest(tmp_path: Path) -> None:
    path = write(tmp_path, external=True)
    before = digest_with_companions(path)
    data = tmp_path / "weights.bin"
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    assert digest_with_companions(path) != before
    content[100] ^= 1
    data.write_bytes(content)
    assert digest_with_companions(path) == before
    data.unlink()
    assert digest_with_companions(path) != before


def test_a_model_in_one_file_and_any_other_file_count_as_themselves(tmp_path: Path) -> None:
    path = write(tmp_path, external=False)
    assert locations(path) == []
    assert digest_with_companions(path) == digest_tree(path)
    other = tmp_path / "x.npz"
    other.write_bytes(b"\x0a\x08location\x12\x03abc")
    assert digest_with_companions(other) == digest_tree(other)


def test_a_location_outside_the_folder_is_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"\x0a\x08location\x12\x09../secret" + b"\x0a\x08location\x12\x04/etc")
    assert locations(path) == []
