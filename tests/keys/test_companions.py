"""The content of an ONNX file with external data is that of all its files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qpipe.keys.companions import content, locations
from qpipe.keys.hashing import digest_file
from qpipe.model import Model


def write(folder: Path, external: bool, name: str = "weights.bin") -> Path:
    weight = numpy_helper.from_array(np.arange(4096, dtype=np.float32).reshape(64, 64), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    x, y = (helper.make_tensor_value_info(value, TensorProto.FLOAT, ["n", 64]) for value in "xy")
    model = helper.make_model(helper.make_graph([node], "g", [x], [y], [weight]))
    path = folder / "net.onnx"
    onnx.save(model, path, save_as_external_data=external, location=name, size_threshold=0)
    return path


def digest_of(path: Path) -> str:
    return content(path)[0]


def test_the_locations_are_those_that_onnx_reads(tmp_path: Path) -> None:
    path = write(tmp_path, external=True)
    entries = onnx.load(path, load_external_data=False).graph.initializer[0].external_data
    assert locations(path) == [entry.value for entry in entries if entry.key == "location"] == ["weights.bin"]


def test_one_changed_byte_in_a_companion_changes_the_digest(tmp_path: Path) -> None:
    path = write(tmp_path, external=True)
    before = digest_of(path)
    data = tmp_path / "weights.bin"
    held = bytearray(data.read_bytes())
    held[100] ^= 1
    data.write_bytes(held)
    assert digest_of(path) != before
    held[100] ^= 1
    data.write_bytes(held)
    assert digest_of(path) == before
    data.unlink()
    assert digest_of(path) != before


def test_a_model_that_is_links_into_a_cache_counts_by_what_they_lead_to(tmp_path: Path) -> None:
    """The cache's folder names the files by something else, as those of model hubs do."""
    path = write(tmp_path, external=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for file in (path, tmp_path / "weights.bin"):
        file.rename(tmp_path / "blobs" / f"blob of {file.name}")
        (tmp_path / "snapshot" / file.name).symlink_to(tmp_path / "blobs" / f"blob of {file.name}")
    linked = tmp_path / "snapshot" / path.name
    before = digest_of(linked)
    assert content(linked)[1].keys() == {path.name, "weights.bin"}
    held = bytearray((tmp_path / "blobs" / "blob of weights.bin").read_bytes())
    held[100] ^= 1
    (tmp_path / "blobs" / "blob of weights.bin").write_bytes(held)
    assert digest_of(linked) != before


def test_a_model_in_one_file_and_any_other_file_count_as_themselves(tmp_path: Path) -> None:
    path = write(tmp_path, external=False)
    assert locations(path) == []
    assert digest_of(path) == digest_file(path)
    other = tmp_path / "x.npz"
    other.write_bytes(b"\x0a\x08location\x12\x03abc")
    assert digest_of(other) == digest_file(other)


def test_a_folder_counts_by_what_it_holds_and_not_by_its_name(tmp_path: Path) -> None:
    for name, text in {"one": "1", "two": "1", "three": "3"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(text)
    assert digest_of(tmp_path / "one") == digest_of(tmp_path / "two") != digest_of(tmp_path / "three")
    assert content(tmp_path / "one")[1] == {"x": digest_file(tmp_path / "one" / "x")}


def test_a_location_outside_the_folder_is_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"\x0a\x08location\x12\x09../secret" + b"\x0a\x08location\x12\x04/etc")
    assert locations(path) == []


@pytest.mark.parametrize("way", ["link", "suffix", "detour"])
def test_companions_are_those_that_the_reader_opens(tmp_path: Path, way: str) -> None:
    """Through a link to the file, under another suffix, by a name that goes down and up again."""
    folder = tmp_path / "there"
    folder.mkdir()
    path = write(folder, external=True)
    (data,) = (folder / name for name in locations(path))
    if way == "link":
        given = tmp_path / "net.onnx"
        given.symlink_to(path)
    elif way == "suffix":
        given = path.rename(folder / "net.bin")
    else:
        (folder / "a").mkdir()
        proto = onnx.load(path, load_external_data=False)
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = f"a/../{entry.value}"
        given = folder / "other.onnx"
        given.write_bytes(proto.SerializeToString())
    before = digest_of(given)
    first = {name: array.copy() for name, array in Model.load(given).params.items()}
    held = bytearray(data.read_bytes())
    held[0] ^= 1
    data.write_bytes(held)
    assert any((first[name] != array).any() for name, array in Model.load(given).params.items())
    assert digest_of(given) != before
