"""What one QuantizeLinear or DequantizeLinear says, held against what onnxruntime computes with it."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from qpipe.errors import InputError
from qpipe.model.qdq.nodes import (
    BITWIDTH,
    clip_of_codes,
    computes_codes,
    floats_of,
    grid,
    has_constant_grid,
    has_grid,
    narrowed,
    on_codes,
    scale_sources,
)
from qpipe.numerics.grid import Encoding
from tests.model.nets import parsed


def quantizer(scale: Any, zero_point: Any = None, attributes: str = "") -> ir.Node:
    given, constants = "s", {"s": np.asarray(scale, np.float32)}
    if zero_point is not None:
        given, constants["z"] = "s, z", np.asarray(zero_point)
    text = f"m (float[N,4] x) => (uint8[N,4] y) {{ y = QuantizeLinear{attributes}(x, {given}) }}"
    return ir.from_proto(parsed(text, **constants)).graph[0]


def test_the_type_of_the_zero_point_is_that_of_the_codes_and_uint8_without() -> None:
    signed, plain = grid(quantizer(0.5, np.int8(3))), grid(quantizer(0.5))
    assert (signed.bitwidth, signed.signed, int(signed.zero_point), signed.symmetric) == (8, True, 3, False)
    assert (plain.bitwidth, plain.signed, int(plain.zero_point), plain.symmetric) == (8, False, 0, False)
    assert grid(quantizer(0.5, np.uint8(128))).symmetric
    assert grid(quantizer(0.5, np.int16(0))).symmetric


def test_an_output_type_stands_for_a_zero_point_and_the_metadata_for_fewer_bits() -> None:
    assert grid(quantizer(0.5, attributes="<output_dtype=5>")).bitwidth == 16
    node = quantizer(0.5, np.uint8(0))
    node.metadata_props[BITWIDTH] = "6"
    assert grid(node).bitwidth == 6


def test_an_activation_has_one_scale_and_a_constant_one() -> None:
    assert has_grid(quantizer(0.5))
    assert has_grid(quantizer([0.5]))
    many = quantizer([0.5, 1.0], np.zeros(2, np.int8))
    assert has_constant_grid(many)
    assert not has_grid(many)
    with pytest.raises(InputError, match="2 scales for an activation"):
        grid(many)
    text = "m (float[N,4] x, float s) => (uint8[N,4] y) { y = QuantizeLinear(x, s) }"
    assert not has_constant_grid(ir.from_proto(parsed(text)).graph[0])


def test_a_grid_that_cannot_be_is_refused_with_its_node() -> None:
    with pytest.raises(InputError, match=r"cannot be read: every scale must be finite and above 0"):
        grid(quantizer(np.inf, np.int8(0)))


SIGNED, UNSIGNED = np.arange(-8, 8, dtype=np.int8).reshape(4, 4), np.arange(16, dtype=np.uint8).reshape(4, 4)


@pytest.mark.parametrize(
    ("codes", "scale", "zero_point", "attributes"),
    [
        (SIGNED, 0.25, np.int8(3), ""),
        (UNSIGNED, 0.25, None, ""),
        (UNSIGNED, [0.1, 0.2, 0.3, 0.4], np.arange(4, dtype=np.uint8), "<axis=0>"),
        (SIGNED, [0.1, -0.2, 0.3, -0.4], None, "<axis=1>"),
        (SIGNED, [0.1, 0.0, 0.3, 0.4], np.array([1, 2, 3, 4], np.int8), "<axis=-1>"),
        (SIGNED, [[0.1, -0.2], [0.3, 0.4], [0.5, 0.6], [0.7, 0.8]], None, "<axis=1, block_size=2>"),
        (SIGNED.astype(ml_dtypes.int4), -0.5, np.int8(1).astype(ml_dtypes.int4), ""),
    ],
)
def test_codes_stand_for_what_onnxruntime_makes_of_them(
    codes: Any, scale: Any, zero_point: Any, attributes: str
) -> None:
    """Negative scales, those of 0 and blocks among them."""
    given, constants = "q, s", {"q": codes, "s": np.asarray(scale, np.float32)}
    if zero_point is not None:
        given, constants["z"] = "q, s, z", zero_point
    proto = parsed(f"m () => (float[4,4] y) {{ y = DequantizeLinear{attributes}({given}) }}", **constants)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    node = ir.from_proto(proto).graph[0]
    found = floats_of(np.asarray(codes).astype(np.int32), node, grid(node, rank=2))
    np.testing.assert_array_equal(found, session.run(None, {})[0])


@pytest.mark.parametrize(
    ("bounds", "wanted"), [((-128, 127), 8), ((-64, 63), 7), ((-8, 7), 4), ((-2, 1), 2), ((-127, 127), None)]
)
def test_codes_within_bounds_are_those_of_fewer_bits_where_the_bounds_are(bounds: Any, wanted: int | None) -> None:
    assert narrowed(Encoding(8, True, True, np.float32(1), np.int32(0)), bounds) == wanted


def test_only_a_clip_of_integers_by_constants_bounds_codes() -> None:
    text = "m (int8[4] q, float[4] x) => (int8[4] y, float[4] z) { y = Clip(q, a, b)  z = Clip(x, c, d) }"
    graph = ir.from_proto(parsed(text, a=np.int8(-64), b=np.int8(63), c=np.float32(0), d=np.float32(1))).graph
    assert [clip_of_codes(node) for node in graph] == [(-64, 63), None]


def test_what_a_scale_is_computed_from_is_its_source() -> None:
    text = """m (float[N,4] x) => (float[N,4] y) {
        s = Mul(a, b)  q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  y = Mul(d, c) }"""
    constants = {"a": np.float32(1), "b": np.float32(2), "c": np.float32(3), "z": np.uint8(0)}
    assert scale_sources(ir.from_proto(parsed(text, **constants)).graph) == {"a", "b", "z"}


@pytest.mark.parametrize(
    ("op_type", "domain", "wanted"),
    [
        *((name, "", True) for name in ("QLinearConv", "MatMulInteger", "DynamicQuantizeLinear")),
        *(("MatMulNBits", "com.microsoft", True), ("Conv", "", False), ("QLinearConv", "mine", False)),
    ],
)
def test_operators_on_codes_are_known_by_name_and_domain(op_type: str, domain: str, wanted: bool) -> None:
    node = ir.node(op_type, [], domain=domain)
    assert on_codes(node) == computes_codes(node) == wanted
    assert computes_codes(ir.from_proto(onnx.helper.make_node("QuantizeLinear", ["x", "s"], ["y"])))
