"""encodings.json in AIMET's formats: the numbers give the grids back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qpipe.errors import InputError
from qpipe.model import Model
from qpipe.model.encodings_file import encodings_document, write_encodings
from qpipe.numerics.grid import Encoding
from tests.model.nets import normal, parsed
from tests.model.quantized import quantized, scheme
from tests.model.test_qdq import X, cnn


def by_name(entries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The entries of a list by name."""
    return {entry["name"]: entry for entry in entries}


def test_version_1_0_0_gives_scales_and_offsets() -> None:
    model = quantized(cnn(), X)
    document = encodings_document(model)
    assert document["version"] == "1.0.0"
    weight = by_name(document["param_encodings"])["w1"]
    assert {k: weight[k] for k in ("enc_type", "dtype", "bw", "is_sym")} == {
        "enc_type": "PER_CHANNEL",
        "dtype": "INT",
        "bw": 8,
        "is_sym": True,
    }
    assert weight["offset"] == [-128] * 8
    assert weight["scale"] == model.encodings["w1"].scale.tolist()
    activation = by_name(document["activation_encodings"])["x"]
    e = model.encodings["x"]
    assert activation["enc_type"] == "PER_TENSOR"
    assert activation["scale"] == [float(e.scale)]
    assert activation["offset"] == [-int(e.zero_point)]
    assert activation["is_sym"] is False


def test_biases_are_listed_with_32_bits() -> None:
    model = quantized(cnn(), X)
    bias = by_name(encodings_document(model)["param_encodings"])["b1"]
    assert (bias["bw"], bias["enc_type"]) == (32, "PER_CHANNEL")
    assert bias["offset"] == [-(2**31)] * 8
    expected = model.encodings["x"].scale * model.encodings["w1"].scale
    assert bias["scale"] == expected.tolist()


def test_version_0_6_1_gives_the_ranges() -> None:
    model = quantized(cnn(), X)
    document = encodings_document(model, "0.6.1")
    (entry,) = document["activation_encodings"]["r"]
    e = model.encodings["r"]
    assert entry["min"] == 0.0
    assert entry["max"] == pytest.approx(255 * float(e.scale))
    assert entry["is_symmetric"] == "False"
    channels = document["param_encodings"]["w1"]
    assert len(channels) == 8
    assert channels[3]["is_symmetric"] == "True"
    assert channels[3]["min"] == pytest.approx(-128 * float(model.encodings["w1"].scale[3]))
    assert document["quantizer_args"]["param_bitwidth"] == 8
    assert document["quantizer_args"]["per_channel_quantization"] is True


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_block"])
def test_version_2_0_0_gives_every_grid_back(granularity: Any) -> None:
    block = 4 if granularity == "per_block" else 0
    text = "n (float[N,8] x) => (float[N,6] y) { y = MatMul(x, w) }"
    model = quantized(
        Model.from_proto(parsed(text, w=normal(8, 6))), {"x": normal(9, 8)}, scheme(4, 8, granularity, block)
    )
    entries = by_name(encodings_document(model, "2.0.0")["encodings"])
    assert set(entries) == set(model.encodings)
    for name, e in model.encodings.items():
        entry = entries[name]
        dtype = entry["output_dtype"]
        scale = np.asarray(entry["y_scale"], np.float32)
        found = Encoding(
            int(dtype.removeprefix("u").removeprefix("int")),
            not dtype.startswith("u"),
            e.symmetric,
            scale,
            np.broadcast_to(np.asarray(entry.get("y_zero_point", 0), np.int32), scale.shape),
            entry.get("axis"),
            entry.get("block_size"),
        )
        np.testing.assert_array_equal(found.scale, e.scale)
        np.testing.assert_array_equal(found.zero_point, e.zero_point)
        assert (found.bitwidth, found.signed, found.axis, found.block_size) == (
            e.bitwidth,
            e.signed,
            e.axis,
            e.block_size,
        )


def test_blocks_are_listed_channel_by_channel() -> None:
    text = "n (float[N,8] x) => (float[N,6] y) { y = MatMul(x, w) }"
    model = quantized(
        Model.from_proto(parsed(text, w=normal(8, 6))), {"x": normal(9, 8)}, scheme(4, 8, "per_block", 4)
    )
    entry = by_name(encodings_document(model)["param_encodings"])["w"]
    assert (entry["enc_type"], entry["block_size"]) == ("PER_BLOCK", 4)
    assert entry["scale"] == model.encodings["w"].scale.T.reshape(-1).tolist()
    with pytest.raises(InputError, match="block scales of 'w'"):
        encodings_document(model, "0.6.1")


def test_an_unknown_version_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"0\.6\.1, 1\.0\.0, 2\.0\.0, got '3'"):
        encodings_document(quantized(cnn(), X), "3")  # type: ignore[arg-type]  # what a user may write


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_encodings(quantized(cnn(), X), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert json.loads((tmp_path / "a").read_text())["version"] == "1.0.0"
