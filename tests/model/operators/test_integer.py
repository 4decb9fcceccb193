"""The operators on integer codes against onnxruntime, code for code."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from tests.model.nets import normal, parsed
from tests.model.operators.test_operators import both

Array = np.ndarray[Any, Any]
WIDE = np.float32([[0, 0.05, -0.05, 0.15, 0.25, 1e30, -1e30, np.inf, -np.inf, 12.74, -12.85, 6553.5]])
"""Ties of a scale of 0.1 and 0.5, what saturates, and what overflows 32 bits."""


def codes(dtype: Any, *shape: int, seed: int = 0) -> Array:
    """Codes over the whole range of a type."""
    info = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(info.min, info.max + 1, shape).astype(dtype)


def assert_equal(proto: onnx.ModelProto, *arrays: Array) -> None:
    ours, theirs = both(proto, *arrays)
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16"])
@pytest.mark.parametrize("scale", [0.1, 0.5])
def test_rounding_half_to_even_and_saturation(dtype: str, scale: float) -> None:
    zero = np.dtype(dtype).type(3)
    text = f"n (float[1,12] x) => ({dtype}[1,12] y) {{ y = QuantizeLinear(x, s, z) }}"
    assert_equal(parsed(text, s=np.float32(scale), z=zero), WIDE)
    back = f"n ({dtype}[4,50] x) => (float[4,50] y) {{ y = DequantizeLinear(x, s, z) }}"
    assert_equal(parsed(back, s=np.float32(scale), z=zero), codes(dtype, 4, 50))


@pytest.mark.parametrize(("axis", "block"), [(0, 0), (1, 0), (-1, 0), (0, 2), (1, 3), (-1, 2)])
@pytest.mark.parametrize("dtype", ["int8", "uint16"])
def test_scales_per_channel_and_per_block(axis: int, block: int, dtype: str) -> None:
    shape = [4, 6, 8]
    count = shape[axis] // (block or 1)
    scales = [count] if not block else [count if i == axis % 3 else n for i, n in enumerate(shape)]
    tensors = {"s": np.abs(normal(*scales)) + 0.1, "z": codes(dtype, *scales)}
    given = f"axis={axis}" + (f", block_size={block}" if block else "")
    text = f"n (float[4,6,8] x) => ({dtype}[4,6,8] y) {{ y = QuantizeLinear<{given}>(x, s, z) }}"
    assert_equal(parsed(text, **tensors), 50 * normal(*shape, seed=1))
    back = f"n ({dtype}[4,6,8] x) => (float[4,6,8] y) {{ y = DequantizeLinear<{given}>(x, s, z) }}"
    assert_equal(parsed(back, **tensors), codes(dtype, *shape))


@pytest.mark.parametrize("output_dtype", [2, 3, 4, 5])
def test_without_a_zero_point_the_attribute_says_the_type(output_dtype: int) -> None:
    name = {2: "uint8", 3: "int8", 4: "uint16", 5: "int16"}[output_dtype]
    text = (
        f"n (float[1,12] x) => ({name}[1,12] y) {{ y = QuantizeLinear<output_dtype={output_dtype}>(x, s) }}"
    )
    assert_equal(parsed(text, s=np.float32(0.1)), WIDE)


@pytest.mark.parametrize("output", ["y", "s", "z"])
@pytest.mark.parametrize("shift", [-9.0, 0.0, 9.0])
def test_dynamic_grids(output: str, shift: float) -> None:
    kind = {"y": "uint8[3,40]", "s": "float", "z": "uint8"}[output]
    text = f"n (float[3,40] x) => ({kind} {output}) {{ y, s, z = DynamicQuantizeLinear(x) }}"
    assert_equal(parsed(text), normal(3, 40) + np.float32(shift))
    assert_equal(parsed(text), np.zeros((3, 40), np.float32))


CONVS = [(2, "pads=[1,1,1,1], group=2"), (2, "strides=[2,1], dilations=[1,2]"), (1, "pads=[2,0]")]


@pytest.mark.parametrize(("rank", "form"), CONVS)
@pytest.mark.parametrize("per_channel", [False, True])
def test_integer_convolutions(rank: int, form: str, per_channel: bool) -> None:
    channels = 2 if "group" in form else 4
    w, b = codes(np.int8, 6, channels, *[3] * rank), codes(np.int16, 6).astype(np.int32)
    count = [6] if per_channel else []
    dims = ",".join(["9"] * rank)
    x = codes(np.uint8, 2, 4, *[9] * rank, seed=1)
    text = f"n (uint8[2,4,{dims}] x) => (int32 y) {{ y = ConvInteger<{form}>(x, w, xz, wz) }}"
    assert_equal(parsed(text, w=w, xz=np.uint8(77), wz=np.int8(0)), x)
    tensors = {"xs": np.float32(0.02), "xz": np.uint8(77), "ys": np.float32(3.1), "yz": np.uint8(120)}
    tensors |= {"ws": np.abs(normal(*count)) + np.float32(0.1), "wz": np.zeros(count, np.int8)}
    text = (
        f"n (uint8[2,4,{dims}] x) => (uint8 y) {{ y = QLinearConv<{form}>(x, xs, xz, w, ws, wz, ys, yz, b) }}"
    )
    assert_equal(parsed(text, w=w, b=b, **tensors), x)


@pytest.mark.parametrize("kind", ["uint8", "int8"])
@pytest.mark.parametrize("columns", [(), (7,)])
def test_integer_products(kind: str, columns: tuple[int, ...]) -> None:
    x, w = codes(kind, 3, 5, 16), codes(np.int8, 16, 7, seed=2)
    zero = np.dtype(kind).type(9)
    text = f"n ({kind}[3,5,16] x) => (int32[3,5,7] y) {{ y = MatMulInteger(x, w, xz, wz) }}"
    assert_equal(parsed(text, w=w, xz=zero, wz=codes(np.int8, *columns, seed=3)), x)
    tensors = {"xs": np.float32(0.02), "xz": zero, "ys": np.float32(2.3), "yz": zero}
    tensors |= {"ws": np.abs(normal(*columns)) + np.float32(0.1), "wz": np.zeros(columns, np.int8)}
    text = f"n ({kind}[3,5,16] x) => ({kind}[3,5,7] y) {{ y = QLinearMatMul(x, xs, xz, w, ws, wz, ys, yz) }}"
    assert_equal(parsed(text, w=w, **tensors), x)


def test_zero_points_per_row_are_those_of_the_rows() -> None:
    from onnx.reference import ReferenceEvaluator

    a, b = codes(np.uint8, 4, 6), codes(np.uint8, 6, 3, seed=1)
    zero = codes(np.uint8, 4, seed=2)
    text = "n (uint8[4,6] a, uint8[6,3] b, uint8[4] z) => (int32[4,3] y) { y = MatMulInteger(a, b, z) }"
    import torch

    from qpipe.model import Model

    found = Model.from_proto(parsed(text)).to_torch()(*map(torch.tensor, (a, b, zero)))
    # onnxruntime takes one zero point for a; ONNX's reference subtracts a column as it is given one.
    column = text.replace("uint8[4] z", "uint8[4,1] z")
    (wanted,) = ReferenceEvaluator(parsed(column)).run(None, {"a": a, "b": b, "z": zero[:, None]})
    np.testing.assert_array_equal(found.numpy(), wanted)


FLOAT8 = ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"]
_EDGES = [0, 240, 247, 248, 249, 256, 448, 463, 464, 465, 480, 57344, 61439, 61440, 1e9, np.inf]
_SMALL = [2**-10, 3 * 2**-11, 2**-17, 3 * 2**-18]
EDGES = np.float32([_EDGES + _SMALL])


@pytest.mark.parametrize("kind", FLOAT8)
def test_8_bit_floats_round_and_saturate(kind: str) -> None:
    number = onnx.TensorProto.DataType.Value(kind.replace("_", "").upper())
    x = np.concatenate([EDGES, -EDGES])
    text = f"n (float[2,20] x) => (float[2,20] y) {{ c = Cast<to={number}>(x)  y = Cast<to=1>(c) }}"
    assert_equal(parsed(text), x)
    text = f"""n (float[2,20] x) => (float[2,20] y) {{
        q = QuantizeLinear<output_dtype={number}>(x, s)  y = DequantizeLinear(q, s) }}"""
    assert_equal(parsed(text, s=np.float32(0.5)), x)


@pytest.mark.parametrize("kind", FLOAT8)
def test_without_saturation_what_is_too_large_is_no_number(kind: str) -> None:
    import ml_dtypes
    import torch

    from qpipe.model.operators.registry import converted

    # Not onnxruntime here: it makes 480, which float8_e4m3fn has not, a number.
    wanted = EDGES.astype(getattr(ml_dtypes, kind)).astype(np.float32)
    found = converted(torch.tensor(EDGES), getattr(torch, kind), saturate=0).to(torch.float32)
    np.testing.assert_array_equal(found.numpy(), wanted)


def test_an_8_bit_float_weight_stays_one() -> None:
    import ml_dtypes
    import torch

    from qpipe.model import Model

    weight = normal(4, 3).astype(ml_dtypes.float8_e4m3fn)
    text = "n (float[N,4] x) => (float[N,3] y) { w = DequantizeLinear(c, s)  y = MatMul(x, w) }"
    proto = parsed(text, s=np.float32(0.5))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "c"))
    model, x = Model.from_proto(proto), normal(6, 4)
    found = model.to_torch()(torch.tensor(x)).detach().numpy()
    np.testing.assert_allclose(found, x @ (weight.astype(np.float32) * 0.5), rtol=1e-5, atol=1e-6)
    meta, blobs = model.pack()
    again = Model.unpack(meta, lambda name: memoryview(blobs[name]))
    np.testing.assert_array_equal(again.to_torch()(torch.tensor(x)).detach().numpy(), found)
    assert "compute with codes" in model.metadata["notes"][0]


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32"])
def test_interpolated_integers_are_cut_off_as_onnxruntime_does(dtype: str) -> None:
    text = f'n ({dtype}[1,3,7,5] x) => ({dtype}[1,3,14,10] y) {{ y = Resize<mode="linear">(x, , s) }}'
    assert_equal(parsed(text, s=np.float32([1, 1, 2, 2])), (codes(np.int8, 1, 3, 7, 5) // 2).astype(dtype))
