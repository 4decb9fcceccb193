"""A message that is written tensor by tensor is the one that protobuf would write."""

from __future__ import annotations

import io

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qpipe.model.files.onnx_writer import _varint, write_whole
from qpipe.model.network.packing import graph_proto
from tests.model.nets import normal, parsed


def test_what_is_written_piece_by_piece_reads_back_whole() -> None:
    tensors = {
        "w": normal(70, 70),
        "small": np.float32(3),
        "codes": np.arange(4096).astype(ml_dtypes.int4),
        "empty": np.zeros((0, 3), np.float32),
        "i": np.arange(2000),
    }
    text = "m (float[70] x) => (float[70] y) { a = Add(x, w)  y = Mul(a, small) }"
    source = ir.from_proto(parsed(text, **tensors))
    proto, outside = graph_proto(source)
    assert set(outside) == {"w", "codes", "i"}
    file = io.BytesIO()
    write_whole(proto, outside, file)
    again = onnx.load_from_string(file.getvalue())
    assert not any(t.external_data for t in again.graph.initializer)
    assert {t.name: t for t in again.graph.initializer}.keys() == tensors.keys()
    for tensor in again.graph.initializer:
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), tensors[tensor.name])
    assert [node.op_type for node in again.graph.node] == ["Add", "Mul"]
    assert again.opset_import[0].version == 21
    assert len(file.getvalue()) == again.ByteSize()


@pytest.mark.parametrize("number", [0, 1, 127, 128, 300, 16383, 16384, 2**31, 2**40])
def test_a_varint_has_seven_bits_a_byte_the_lowest_first(number: int) -> None:
    made = _varint(number)
    assert sum((byte & 127) << 7 * place for place, byte in enumerate(made)) == number
    assert [byte >> 7 for byte in made] == [1] * (len(made) - 1) + [0]
