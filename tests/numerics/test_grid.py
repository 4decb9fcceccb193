"""Grids: ranges to scales, the arithmetic of rounding, and bit equality with onnxruntime and torch."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from qpipe.errors import InputError
from qpipe.numerics.fake_quantize import FakeQuantize, fake_quantize
from qpipe.numerics.grid import (
    SMALLEST_SCALE,
    Encoding,
    dequantize,
    encoding_from_range,
    quantize,
    quantize_dequantize,
    same_grid,
)
from qpipe.numerics.scheme import BITWIDTHS, Scheme, TensorScheme, code_bounds

ONNX_TYPES = {
    (4, True): TensorProto.INT4,
    (4, False): TensorProto.UINT4,
    (8, True): TensorProto.INT8,
    (8, False): TensorProto.UINT8,
    (16, True): TensorProto.INT16,
    (16, False): TensorProto.UINT16,
}


def _encoding(bitwidth: int, signed: bool, shape: tuple[int, ...], **places: Any) -> Encoding:
    draw = np.random.default_rng(bitwidth)
    lo, hi = code_bounds(bitwidth, signed)
    scale = draw.uniform(0.003, 0.1, shape).astype(np.float32)
    return Encoding(bitwidth, signed, False, scale, draw.integers(lo, hi + 1, shape), **places)


def _onnxruntime_qdq(x: np.ndarray, e: Encoding) -> np.ndarray:
    kind = ONNX_TYPES[e.bitwidth, e.signed]
    attributes = {} if e.axis is None else {"axis": e.axis, "block_size": e.block_size or 0}
    constants = [
        helper.make_tensor("s", TensorProto.FLOAT, e.scale.shape, e.scale.ravel()),
        helper.make_tensor("z", kind, e.zero_point.shape, e.zero_point.ravel()),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attributes),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attributes),
    ]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name in "xy"]
    graph = helper.make_graph(nodes, "qdq", value[:1], value[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


PLACES: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((), {}),
    ((6,), {"axis": 0}),
    ((8,), {"axis": 1}),
    ((6, 2, 5), {"axis": 1, "block_size": 4}),
]


@pytest.mark.parametrize(("bitwidth", "signed"), ONNX_TYPES)
@pytest.mark.parametrize(("shape", "places"), PLACES, ids=["tensor", "axis0", "axis1", "block"])
def test_numpy_torch_and_onnxruntime_agree_bit_for_bit(
    bitwidth: int, signed: bool, shape: tuple[int, ...], places: dict[str, Any]
) -> None:
    e = _encoding(bitwidth, signed, shape, **places)
    x = np.random.default_rng(0).normal(0, 0.05 * 2.0**bitwidth, (6, 8, 5)).astype(np.float32)
    s = e.scale if not e.block_size else np.repeat(e.scale, e.block_size, e.axis)
    s = s.reshape([-1 if i == e.axis else 1 for i in range(3)]) if e.axis is not None and s.ndim == 1 else s
    x[0] = (s * (np.arange(40).reshape(1, 8, 5) - 20.5).astype(np.float32) * np.ones_like(x))[0]  # ties
    ours = quantize_dequantize(x, e)
    assert ours.tobytes() == _onnxruntime_qdq(x, e).tobytes()
    assert ours.tobytes() == FakeQuantize.from_encoding(e)(torch.from_numpy(x)).numpy().tobytes()
    direct = fake_quantize(
        torch.from_numpy(x),
        torch.tensor(e.scale),
        torch.tensor(e.zero_point),
        e.qmin,
        e.qmax,
        e.axis,
        e.block_size,
    )
    assert ours.tobytes() == direct.numpy().tobytes()


def test_a_last_block_may_be_shorter() -> None:
    e = _encoding(4, True, (2, 3), axis=1, block_size=4)
    x = np.random.default_rng(0).normal(0, 0.3, (2, 10)).astype(np.float32)
    columns = [quantize_dequantize(x[:, i], _column(e, i // 4)) for i in range(10)]
    np.testing.assert_array_equal(quantize_dequantize(x, e), np.stack(columns, 1))
    np.testing.assert_array_equal(
        FakeQuantize.from_encoding(e)(torch.from_numpy(x)).numpy(), np.stack(columns, 1)
    )


def _column(e: Encoding, block: int) -> Encoding:
    return Encoding(e.bitwidth, e.signed, False, e.scale[:, block], e.zero_point[:, block], axis=0)


schemes = st.builds(
    TensorScheme,
    bitwidth=st.sampled_from(BITWIDTHS),
    signed=st.booleans(),
    symmetric=st.booleans(),
    power_of_two=st.booleans(),
)
bounds = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(scheme=schemes, a=bounds, b=bounds)
def test_zero_is_exact_the_scale_usable_and_the_range_covered(
    scheme: TensorScheme, a: float, b: float
) -> None:
    e = encoding_from_range(min(a, b), max(a, b), scheme)
    lo, hi = min(a, b, 0.0), max(a, b, 0.0)
    assert e.scale >= np.float32(SMALLEST_SCALE)
    assert quantize_dequantize(np.zeros(1, np.float32), e)[0] == 0.0
    ends = quantize_dequantize(np.array([lo, hi], np.float32), e)
    # Half a step for each end, half a step more where the zero point was rounded.
    slack = float(e.scale) * (1.0 if not scheme.symmetric else 0.5) * 1.001
    assert abs(ends[0] - lo) <= slack
    assert abs(ends[1] - hi) <= slack
    if scheme.power_of_two:
        assert np.frexp(e.scale)[0] == 0.5


LARGEST = float(np.finfo(np.float32).max)
anywhere = st.one_of(st.sampled_from([-LARGEST, LARGEST, -LARGEST / 2, 0.0]), st.floats(-LARGEST, LARGEST, width=32))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(scheme=schemes, a=anywhere, b=anywhere)
def test_every_code_of_a_grid_stands_for_a_finite_number(scheme: TensorScheme, a: float, b: float) -> None:
    e = encoding_from_range(min(a, b), max(a, b), scheme)
    with np.errstate(over="raise"):
        ends = dequantize(np.array([e.qmin, e.qmax]), e)
    assert np.isfinite(ends).all()
    if not (scheme.power_of_two or scheme.symmetric or scheme.bitwidth < 8):
        assert float(ends[1]) - float(ends[0]) >= 0.99 * (max(a, b, 0.0) - min(a, b, 0.0))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(scheme=schemes, seed=st.integers(0, 2**16))
def test_rounding_twice_is_rounding_once_and_never_off_by_more_than_half_a_step(
    scheme: TensorScheme, seed: int
) -> None:
    x = np.random.default_rng(seed).normal(0, 2, 64).astype(np.float32)
    if scheme.symmetric and not scheme.signed:
        x = np.abs(x)
    e = encoding_from_range(float(x.min()), float(x.max()), scheme)
    once = quantize_dequantize(x, e)
    np.testing.assert_array_equal(quantize_dequantize(once, e), once)
    q = quantize(x, e)
    assert e.qmin <= q.min() <= q.max() <= e.qmax
    inside = (q > e.qmin) & (q < e.qmax)
    # Beside half a step, the last bit of float32: at 16 bits it shows.
    assert np.all(np.abs(once - x)[inside] <= 0.5001 * e.scale + 1e-6 * np.abs(x).max())


@pytest.mark.parametrize(
    ("lo", "hi", "scheme", "scale", "zero_point"),
    [
        (-1.0, 0.5, TensorScheme(8, True, True), 1 / 127, 0),
        (-1.0, 0.5, TensorScheme(8, False, True), 1 / 127, 128),
        (0.1, 1.0, TensorScheme(8, False, True), 1 / 255, 0),
        (-1.0, 3.0, TensorScheme(8, False, False), 4 / 255, 64),
        (-1.0, 3.0, TensorScheme(8, True, False), 4 / 255, -64),
        (0.5, 3.0, TensorScheme(4, False, False), 3 / 15, 0),
        (-1.0, 0.9, TensorScheme(4, True, True, power_of_two=True), 0.25, 0),
        (-1.75, 0.9, TensorScheme(4, True, True, power_of_two=True), 0.25, 0),
        (0.0, 0.0, TensorScheme(8, True, False), SMALLEST_SCALE, -128),
    ],
)
def test_ranges_become_the_scales_one_computes_by_hand(
    lo: float, hi: float, scheme: TensorScheme, scale: float, zero_point: int
) -> None:
    e = encoding_from_range(lo, hi, scheme)
    assert e.scale == np.float32(scale)
    assert e.zero_point == zero_point


def test_channels_and_blocks_keep_their_shapes() -> None:
    channel = TensorScheme(4, True, True, "per_channel")
    e = encoding_from_range(-np.ones(3), np.arange(3.0), channel, axis=1)
    assert (e.granularity, e.axis, e.scale.shape) == ("per_channel", 1, (3,))
    block = TensorScheme(4, True, True, "per_block", block_size=2)
    e = encoding_from_range(-np.ones((2, 3)), np.ones((2, 3)), block, axis=1)
    assert (e.granularity, e.block_size) == ("per_block", 2)
    assert quantize(np.ones((2, 6), np.float32), e).shape == (2, 6)
    with pytest.raises(ValueError, match="do not fit the shape"):
        quantize(np.ones((2, 8), np.float32), e)


def test_json_holds_the_same_grid_and_equality_ignores_frozen() -> None:
    e = _encoding(8, False, (5,), axis=0, frozen=True)
    again = Encoding(**json.loads(json.dumps(e.to_json())))
    assert same_grid(e, again)
    assert again.frozen
    assert not same_grid(e, _encoding(8, True, (5,), axis=0))


@pytest.mark.parametrize(
    "change",
    [
        {"bitwidth": 7},
        {"signed": True, "zero_point": np.zeros(5)},
        {"scale": np.full(5, 0.25)},
        {"zero_point": np.array([1, 2, 3, 4, 6])},
        {"axis": 1},
    ],
)
def test_grids_that_differ_in_one_part_are_two(change: dict[str, Any]) -> None:
    e = Encoding(8, False, False, np.full(5, 0.5), np.array([1, 2, 3, 4, 5]), axis=0)
    assert not same_grid(e, dataclasses.replace(e, **change))


def test_arrays_of_an_encoding_are_its_own_and_read_only() -> None:
    scale = np.ones(3, np.float32)
    e = Encoding(8, True, True, scale, np.zeros(3), axis=0)
    scale[0] = 7
    assert e.scale[0] == 1
    with pytest.raises(ValueError, match="read-only"):
        e.scale[0] = 2


def test_nan_is_refused_with_the_name_of_the_tensor() -> None:
    e = encoding_from_range(-1, 1, TensorScheme(8, True, True))
    with pytest.raises(InputError, match=r"nan in 1 of 2 elements of tensor 'conv.weight'"):
        quantize(np.array([1, np.nan], np.float32), e, name="conv.weight")
    for bad in (np.nan, np.inf):
        with pytest.raises(InputError, match="tensor 'x'"):
            encoding_from_range(-1, bad, TensorScheme(8, True, True), name="x")


def test_infinity_saturates_and_a_bias_of_32_bits_does_not_wrap() -> None:
    e = encoding_from_range(-1, 1, TensorScheme(8, True, True))
    np.testing.assert_array_equal(quantize(np.array([np.inf, -np.inf], np.float32), e), [127, -128])
    bias = Encoding(32, True, True, np.float32(1e-9), np.int32(0))
    q = quantize(np.array([100.0, -100.0, 1.0], np.float32), bias)
    np.testing.assert_array_equal(q, [2**31 - 1, -(2**31), round(float(np.float32(1) / np.float32(1e-9)))])
    assert dequantize(q, bias)[2] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bitwidth": 9}, "bitwidth must be one of 2, 3, 4, 5, 6, 7, 8, 16, got 9"),
        ({"granularity": "per_row"}, "granularity must be one of"),
        ({"observer": "max"}, "observer must be one of"),
        ({"granularity": "per_block"}, "needs a block_size"),
        ({"block_size": 32}, "block_size is for per_block"),
        ({"percentile": 0.0}, "percentile must lie"),
        ({"grid": "mirrored"}, "grid must be one of auto, max, full_range, signed_max, got mirrored"),
        ({"grid": "signed_max", "symmetric": False}, "grid signed_max is for signed symmetric codes; set grid to auto"),
        ({"grid": "full_range", "signed": False}, "grid full_range is for signed symmetric codes"),
    ],
)
def test_a_scheme_without_meaning_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TensorScheme(**{"bitwidth": 8, "signed": True, "symmetric": True, **values})


def test_activations_are_per_tensor_and_have_no_choice_of_grids() -> None:
    weight = TensorScheme(8, True, True, "per_channel")
    with pytest.raises(ValueError, match="activations are quantized per_tensor"):
        Scheme(weight, weight)
    with pytest.raises(ValueError, match=r"^grid signed_max is for weights, got it for activations\.$"):
        Scheme(weight, TensorScheme(8, True, True, grid="signed_max"))


@pytest.mark.parametrize("bitwidth", [2, 3, 4, 8])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_the_largest_magnitude_stands_where_the_grid_says(bitwidth: int, power_of_two: bool) -> None:
    lo, hi = np.array([-3.0, -1.0, -2.0, 0.0]), np.array([1.0, 3.0, 2.0, 5.0])
    largest, half = np.maximum(-lo, hi), 1 << (bitwidth - 1)

    def made(grid: Any) -> Encoding:
        scheme = TensorScheme(bitwidth, True, True, "per_channel", power_of_two=power_of_two, grid=grid)
        return encoding_from_range(lo, hi, scheme, axis=0)

    for grid, steps in (("max", half - 1), ("full_range", half), ("signed_max", half)):
        e = made(grid)
        exact = largest / steps
        np.testing.assert_allclose(e.scale, 2.0 ** np.ceil(np.log2(exact)) if power_of_two else exact, rtol=1e-6)
        np.testing.assert_array_equal(e.zero_point, [0, -1, 0, -1] if grid == "signed_max" else [0] * 4)
        assert e.symmetric
        assert e.free_sign == (grid == "signed_max")
    e = made("signed_max")
    if not power_of_two:
        signed = np.array([-3.0, 3.0, -2.0, 5.0], np.float32)
        np.testing.assert_allclose(quantize_dequantize(signed, e), signed, rtol=1e-6)


def test_mirrored_codes_round_the_negated_values() -> None:
    """codes(x; s, -1) = -1 - codes(-x; s, 0), ties and both ends among them: a negative scale says the same."""
    x = np.concatenate([np.arange(-40, 41) / 4, np.random.default_rng(0).normal(size=200) * 4]).astype(np.float32)
    plain = Encoding(4, True, True, np.float32(0.5), np.int32(0))
    mirrored = Encoding(4, True, True, np.float32(0.5), np.int32(-1), free_sign=True)
    np.testing.assert_array_equal(quantize(x, mirrored), -1 - quantize(-x, plain))
    np.testing.assert_array_equal(quantize_dequantize(x, mirrored), -quantize_dequantize(-x, plain))
    with pytest.raises(ValueError, match="codes of free sign are signed, with zero points 0 or -1"):
        Encoding(4, True, True, np.float32(0.5), np.int32(1), free_sign=True)


def test_auto_is_settled_by_bitwidth() -> None:
    for bitwidth in (2, 3, 4):
        low = TensorScheme(bitwidth, True, True).settled()
        assert (low.observer, low.grid) == ("mse", "signed_max")
        asymmetric = TensorScheme(bitwidth, True, False).settled()
        assert (asymmetric.observer, asymmetric.grid) == ("mse", "max")
    for bitwidth in (5, 6, 7, 8, 16):
        high = TensorScheme(bitwidth, True, True).settled()
        assert (high.observer, high.grid) == ("minmax", "max")
    named = TensorScheme(4, True, True, observer="percentile", grid="max")
    assert named.settled() == named


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"scale": np.float32(0)}, "finite and above 0"),
        ({"zero_point": np.int32(300)}, r"lie in -128\.\.127"),
        ({"scale": np.ones(2, np.float32)}, "scale has shape"),
        ({"axis": 0}, r"shape \(C,\)"),
        ({"block_size": 2}, "one number"),
    ],
)
def test_an_encoding_that_does_not_fit_together_is_refused(parts: dict[str, Any], message: str) -> None:
    whole = {"scale": np.float32(1), "zero_point": np.int32(0), **parts}
    with pytest.raises(ValueError, match=message):
        Encoding(8, True, True, **whole)
