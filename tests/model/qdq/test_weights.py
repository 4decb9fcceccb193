"""Constants stored as codes: the floats and the grids that they become."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from qpipe.model.network.facts import Facts
from qpipe.model.qdq.weights import Grids, follow_weights, read_weights
from tests.model.nets import normal, parsed

CODES = np.arange(-8, 8, dtype=np.int8).reshape(4, 4)
SCALES = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
ZEROS = np.zeros(4, np.int8)


def read(text: str, **tensors: Any) -> tuple[ir.Graph, Grids]:
    graph, grids = ir.from_proto(parsed(text, **tensors)).graph, Grids()
    assert read_weights(graph, grids)
    return graph, grids


def test_codes_become_the_floats_of_onnxruntime_on_a_frozen_grid() -> None:
    text = "m (float[N,4] x) => (float[N,4] y) {{ w = DequantizeLinear<axis=1>({}, s, z)  {} }}"
    tensors = {"s": SCALES, "z": ZEROS}
    graph, grids = read(text.format("w_quantized", "y = MatMul(x, w)"), w_quantized=CODES, **tensors)
    proto = parsed("m () => (float[4,4] w) { w = DequantizeLinear<axis=1>(q, s, z) }", q=CODES, **tensors)
    wanted = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {})[0]
    np.testing.assert_array_equal(graph.initializers["w"].const_value.numpy(), wanted)
    encoding = grids.encodings["w"]
    assert (encoding.axis, encoding.bitwidth, encoding.frozen) == (1, 8, True)
    assert graph[-1].inputs[1] is graph.initializers["w"]


def test_a_float_weight_that_is_rounded_stays_what_it_was() -> None:
    text = """m (float[N,4] x) => (float[N,4] y) {
        q = QuantizeLinear<axis=1>(w, s, z)  d = DequantizeLinear<axis=1>(q, s, z)  y = MatMul(x, d) }"""
    weight = normal(4, 4)
    graph, grids = read(text, w=weight, s=SCALES, z=ZEROS)
    np.testing.assert_array_equal(graph.initializers["w"].const_value.numpy(), weight)
    assert grids.encodings["w"].frozen
    assert graph[-1].inputs[1].name == "w"


def test_a_float_weight_that_somebody_reads_unrounded_gets_a_rounded_copy() -> None:
    text = """m (float[N,4] x) => (float[N,4] y) {
        q = QuantizeLinear(w, s, z)  d = DequantizeLinear(q, s, z)  a = MatMul(x, d)  y = MatMul(a, w) }"""
    _, grids = read(text, w=normal(4, 4), s=np.float32(0.1), z=np.int8(0))
    assert list(grids.encodings) == ["w_rounded"]


def test_a_quantizer_and_a_dequantizer_of_two_grids_are_no_weight() -> None:
    text = """m (float[N,4] x) => (float[N,4] y) {
        q = QuantizeLinear(w, s, z)  d = DequantizeLinear(q, t, z)  y = MatMul(x, d) }"""
    graph = ir.from_proto(parsed(text, w=normal(4, 4), s=np.float32(0.1), t=np.float32(0.2), z=np.int8(0))).graph
    assert not read_weights(graph, Grids())


def test_a_bias_of_32_bits_is_a_fact_and_no_grid() -> None:
    text = """m (float[N,4] x) => (float[N,4] y) {
        w = DequantizeLinear(wq, s, z)  b = DequantizeLinear(bq, t)  y = Gemm(x, w, b) }"""
    tensors = {"wq": CODES, "s": np.float32(0.1), "z": np.int8(0)}
    _, grids = read(text, **tensors, bq=np.arange(4, dtype=np.int32), t=np.float32(0.01))
    assert len(grids.encodings) == 1
    assert grids.facts() == Facts(biases="int32", came_quantized=True)
    _, without = read("m () => (float[4,4] y) { y = DequantizeLinear(wq, s, z) }", **tensors)
    assert without.facts() == Facts(biases="float", came_quantized=True)
    assert Grids().facts() == Facts()


def test_two_nodes_that_say_the_same_of_one_constant_make_one_weight() -> None:
    text = """m (float[N,4] x) => (float[N,4] y) {
        a = DequantizeLinear(q, s, z)  b = DequantizeLinear(q, s, z)  c = MatMul(x, a)  y = MatMul(c, b) }"""
    graph, grids = read(text, q=CODES, s=np.float32(0.1), z=np.int8(0))
    assert len(grids.encodings) == 1
    assert graph[-1].inputs[1] is graph[-2].inputs[1]


@pytest.mark.parametrize(
    ("props", "shape", "axis"),
    [
        ({"permutation": "[1, 0]"}, (4, 2), 1),
        ({"torch_shape": "[2, 4]"}, (2, 2, 2), 0),
        ({"torch_shape": "[2, 4]"}, (1, 2, 4), 1),
        ({"torch_shape": "[2, 4]"}, (8,), None),
        ({}, (2, 4), 0),
    ],
)
def test_a_grid_goes_along_with_its_tensor_or_is_lost_with_a_note(
    props: dict[str, str], shape: tuple[int, ...], axis: int | None
) -> None:
    text = "m (float[N,4] x) => (float[2,4] y) { y = DequantizeLinear<axis=0>(q, s, z) }"
    graph, grids = read(text, q=CODES[:2], s=SCALES[:2], z=ZEROS[:2])
    (name,) = grids.encodings
    value = graph.initializers[name]
    value.metadata_props.update(props)
    value.shape = ir.Shape(shape)
    follow_weights(graph, grids)
    assert (grids.encodings[name].axis if grids.encodings else None) == axis
    lost = f"The grid of '{name}' was lost: it was reshaped. Its values are the same."
    assert grids.notes == ([lost] if axis is None else [])
