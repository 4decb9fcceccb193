"""nearest: weights stand on their grid, where onnxruntime's own QuantizeLinear puts them, and are frozen."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from qpipe.errors import InputError
from qpipe.numerics.grid import Encoding
from qpipe.stages.nearest import nearest

GRAPH = """n (float[N,3,5,5] x) => (float[N,6] y) {
    t = Conv(x, w, b)  r = Relu(t)  m = GlobalAveragePool(r)  f = Flatten(m)  y = Gemm<transB=1>(f, v, c) }"""
PARAMS = {"w": (4, 3, 3, 3), "b": (4,), "v": (6, 4), "c": (6,)}


def grids() -> dict[str, Encoding]:
    per_channel = np.array([0.1, 0.2, 0.3, 0.15], np.float32)
    return {
        "w": Encoding(4, True, True, per_channel, np.zeros(4, np.int32), axis=0),
        "v": Encoding(8, False, False, np.float32(0.013), np.int32(119)),
        "x": Encoding(8, False, False, np.float32(0.02), np.int32(7)),
    }


def by_onnxruntime(w: np.ndarray, e: Encoding, kind: int) -> np.ndarray:
    """`w` through QuantizeLinear and DequantizeLinear of onnxruntime."""
    node = onnx.helper.make_node
    axis = {} if e.axis is None else {"axis": e.axis}
    scale = onnx.numpy_helper.from_array(e.scale, "s")
    zero = onnx.helper.make_tensor("z", kind, e.zero_point.shape, e.zero_point.reshape(-1))
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node("QuantizeLinear", ["w", "s", "z"], ["q"], **axis),
         node("DequantizeLinear", ["q", "s", "z"], ["y"], **axis)],
        "g", [value("w", 1, w.shape)], [value("y", 1, w.shape)], [scale, zero],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return np.asarray(onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"w": w})[0])


def test_weights_are_rounded_as_onnxruntime_rounds_them_and_frozen(network):
    model = network(GRAPH, PARAMS).with_encodings(grids())
    rounded = nearest(model)
    for name, kind in [("w", onnx.TensorProto.INT4), ("v", onnx.TensorProto.UINT8)]:
        expected = by_onnxruntime(model.param(name), grids()[name], kind)
        np.testing.assert_array_equal(rounded.param(name), expected)
        assert rounded.encodings[name].frozen
        assert not model.encodings[name].frozen
    assert not rounded.encodings["x"].frozen
    np.testing.assert_array_equal(rounded.param("b"), model.param("b"))


def test_rounding_twice_changes_nothing(network):
    once = nearest(network(GRAPH, PARAMS).with_encodings(grids()))
    loose = once.with_encodings(grids())
    np.testing.assert_array_equal(nearest(loose).param("w"), once.param("w"))


def test_tuned_weights_stay(network, notes):
    from dataclasses import replace

    model = network(GRAPH, PARAMS)
    encodings = grids() | {"w": replace(grids()["w"], frozen=True)}
    rounded = nearest(model.with_encodings(encodings), ctx=notes)
    np.testing.assert_array_equal(rounded.param("w"), model.param("w"))
    assert notes.notes == ["Tuned before, so left as they are: w."]


def test_a_model_without_weight_encodings_is_refused(network):
    with pytest.raises(InputError, match="Put the stage 'calibrate' before 'nearest'"):
        nearest(network(GRAPH, PARAMS))
