"""Grids with mirrored codes in files: negative scales and zero points 0, which onnxruntime's kernels compute with as
the simulation does, and which read back as the grids that they were."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime
import pytest

from qpipe.methods.comparison.parity import parity
from qpipe.model import Model
from qpipe.model.qdq.writer import to_qdq
from qpipe.model.structure.operands import find_operands
from qpipe.numerics.grid import Encoding, encoding_from_range, quantize, quantize_dequantize, same_grid
from qpipe.numerics.observers import weight_encoding
from qpipe.numerics.scheme import Granularity, TensorScheme
from tests.model.nets import normal, parsed

A8 = TensorScheme(8, False, False)
IMAGE, ROWS = normal(4, 4, 8, 8), normal(4, 5, 64)
OPS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "Conv": ("y = Conv<pads=[1,1,1,1]>(x, w, b)", {"w": normal(6, 4, 3, 3), "b": normal(6)}, IMAGE),
    "depthwise": ("y = Conv<group=4, pads=[1,1,1,1]>(x, w, b)", {"w": normal(4, 1, 3, 3), "b": normal(4)}, IMAGE),
    "ConvTranspose": (
        "y = ConvTranspose<group=2, strides=[2,2]>(x, w, b)", {"w": normal(4, 3, 2, 2), "b": normal(6)}, IMAGE,
    ),
    "Gemm": ("y = Gemm<transB=1>(x, w, b)", {"w": normal(6, 64), "b": normal(6)}, ROWS[:, 0]),
    "MatMul": ("t = MatMul(x, w)  y = Add(t, b)", {"w": normal(64, 6), "b": normal(6)}, ROWS),
}  # fmt: skip
KERNELS: list[tuple[str, bool, int, Granularity, str]] = [
    ("Conv", True, 8, "per_channel", "QLinearConv"),
    ("Conv", True, 5, "per_tensor", "QLinearConv"),
    ("depthwise", True, 8, "per_channel", "QLinearConv"),
    ("depthwise", True, 6, "per_channel", "QLinearConv"),
    ("depthwise", True, 8, "per_tensor", "QLinearConv"),
    ("Conv", True, 3, "per_channel", "Conv"),
    ("ConvTranspose", True, 8, "per_channel", "ConvTranspose"),
    ("Gemm", True, 8, "per_channel", "QGemm"),
    ("Gemm", True, 8, "per_tensor", "QGemm"),
    ("Gemm", False, 8, "per_channel", "QGemm"),
    ("MatMul", False, 8, "per_channel", "MatMulIntegerToFloat"),
    ("MatMul", False, 8, "per_tensor", "MatMulIntegerToFloat"),
    ("MatMul", False, 4, "per_channel", "MatMul"),
    ("MatMul", False, 4, "per_block", "MatMulNBits"),
]


def built(op: str, bits: int, granularity: Granularity, output: bool = True) -> tuple[Model, str, Any]:
    """A layer on a grid whose scales have both signs, or the one that is negative where there is one alone."""
    body, given, x = OPS[op]
    dims = ",".join(map(str, x.shape[1:]))
    outputs = f"float[n,{','.join('pqr'[: x.ndim - 1])}] y"
    model = Model.from_proto(parsed(f"m (float[n,{dims}] x) => ({outputs}) {{ {body} }}", **given))
    (operand,) = find_operands(model)
    block = 16 if granularity == "per_block" else 0
    axis = operand.inner_axis if block else operand.channel_axis
    kind = TensorScheme(bits, True, True, granularity, block, grid="signed_max")
    e = weight_encoding(model.param("w"), kind, axis or 0, "w")
    if granularity == "per_tensor":
        e = replace(e, zero_point=np.full((), -1))
    encodings = {"w": e} if block else {"w": e, "x": encoding_from_range(-4, 4, A8)}
    if output:
        encodings["y"] = encoding_from_range(-9, 9, A8)
    return model.with_encodings(encodings), "w", x


def constants(proto: onnx.ModelProto, name: str) -> list[Any]:
    """Codes, scale and zero point of the DequantizeLinear that gives `name`."""
    tensors = {each.name: onnx.numpy_helper.to_array(each) for each in proto.graph.initializer}
    (node,) = (node for node in proto.graph.node if node.output[0] == name)
    return [tensors[given] for given in node.input]


@pytest.mark.parametrize(("op", "output", "bits", "granularity", "kernel"), KERNELS)
def test_kernels_give_the_numbers_of_the_simulation(
    op: str, output: bool, bits: int, granularity: Granularity, kernel: str, tmp_path: Path
) -> None:
    model, weight, x = built(op, bits, granularity, output)
    points = model.encodings[weight].zero_point
    assert np.any(points == -1)
    assert points.ndim == 0 or np.any(points == 0)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    # Else a product with weights of 4 bits rounds its inputs to 8.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    proto = to_qdq(model)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert kinds[kernel] == 1, kinds
    (found,) = session.run(None, {"x": x})
    import torch

    expected = model.to_torch()(torch.tensor(x)).detach().numpy()
    # Sums of 64 products, in another order.
    tolerance = 0.0 if output else 2e-5 * float(np.abs(expected).max())
    assert float(np.abs(found - expected).max()) <= tolerance


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("op", ["Conv", "Gemm", "ConvTranspose"])
def test_a_file_holds_mirrored_codes_and_reads_back(op: str, granularity: Granularity, bits: int) -> None:
    model, weight, x = built(op, bits, granularity)
    e, w = model.encodings[weight], model.param(weight)
    proto = to_qdq(model)
    stored, scale, point = constants(proto, "w")
    np.testing.assert_array_equal(scale, np.where(e.zero_point == -1, -e.scale, e.scale))
    assert not point.any()
    codes, shape = quantize(w, e), [1] * w.ndim
    if e.axis is not None:
        shape[e.axis] = -1
    mirrored = (e.zero_point == -1).reshape(shape)
    np.testing.assert_array_equal(stored.astype(np.int32), np.where(mirrored, -1 - codes, codes))
    signs = np.sign(constants(proto, "b")[1])
    np.testing.assert_array_equal(signs, np.tile(np.sign(scale), signs.size // scale.size).reshape(signs.shape))
    again = Model.from_proto(proto)
    assert same_grid(again.encodings[weight], e)
    assert again.encodings[weight].free_sign
    np.testing.assert_array_equal(again.param(weight), quantize_dequantize(w, e))
    expected, found = (each.session().run(None, {"x": x})[0] for each in (model, again))
    np.testing.assert_array_equal(found, expected)


def test_parity_counts_no_step_with_mirrored_codes() -> None:
    model, _, x = built("Conv", 8, "per_channel")
    report = parity(model, {"x": x})
    assert report.units
    assert all(unit.within(0) == 1.0 for unit in report.units)


def test_other_zero_points_stay_what_they_are() -> None:
    model, weight, _ = built("Gemm", 8, "per_channel")
    e = replace(model.encodings[weight], symmetric=False, free_sign=False)
    others: list[Encoding] = [
        e,
        replace(e, zero_point=np.where(np.arange(6) == 2, -2, e.zero_point)),
        Encoding(8, False, False, e.scale, np.where(e.zero_point == -1, 127, 128), 0),
    ]
    for other in others:
        proto = to_qdq(model.with_encodings({**model.encodings, weight: other}))
        _, scale, point = constants(proto, "w")
        np.testing.assert_array_equal(point, other.zero_point)
        assert (scale > 0).all()
