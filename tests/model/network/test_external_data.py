"""Tensors in a file: each on a page of its own, at the place that the graph says."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from qpipe.model.network.packing import set_place, write_data


def test_each_tensor_begins_on_a_page_and_is_there_whole(tmp_path: Path) -> None:
    arrays = {
        "b": np.arange(5000, dtype=np.float32),
        "a": np.arange(3, dtype=np.int64),
        "c": np.arange(-8, 8).astype(ml_dtypes.int4),
        "d": np.zeros(0, np.float32),
    }
    offsets = write_data({name: ir.tensor(array) for name, array in arrays.items()}, tmp_path / "data")
    content = (tmp_path / "data").read_bytes()
    assert all(offset % 4096 == 0 for offset in offsets.values())
    assert len(set(offsets.values()) - {offsets["d"]}) == 3
    for name in "ab":
        found = np.frombuffer(content, arrays[name].dtype, arrays[name].size, offsets[name])
        np.testing.assert_array_equal(found, arrays[name])
    packed = np.frombuffer(content, np.uint8, 8, offsets["c"])
    halves = np.stack([packed & 15, packed >> 4], 1).reshape(-1)
    np.testing.assert_array_equal(np.where(halves > 7, halves.astype(int) - 16, halves), np.arange(-8, 8))


def test_the_graph_says_where_a_tensor_lies(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    offset = write_data({"first": ir.tensor(np.ones(9)), "w": ir.tensor(array)}, tmp_path / "data")["w"]
    proto = onnx.TensorProto(name="w", dims=[2, 3], data_type=onnx.TensorProto.FLOAT, data_location=1)
    set_place(proto, "elsewhere", 0, 1)
    set_place(proto, "data", offset, array.nbytes)
    onnx.external_data_helper.load_external_data_for_tensor(proto, str(tmp_path))
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(proto), array)
