"""The QDQ form: what it says, and that onnxruntime runs it on integers and computes what the simulation does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from qpipe.model import Model
from qpipe.model.qdq.writer import qdq_model, to_qdq
from tests.model.nets import Mobile, UNet, exported, normal, parsed
from tests.model.quantized import quantized, scheme

CNN = """net (float[N,3,16,16] x) => (float[N,10] y) {
    a = Conv<pads=[1,1,1,1]>(x, w1, b1)  r = Relu(a)
    d = Conv<pads=[1,1,1,1], group=8>(r, w2, b2)  c = Clip(d, low, high)
    p = Conv(c, w3, b3)  s = Add(p, r)  m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(s)
    g = GlobalAveragePool(m)  f = Flatten(g)  y = Gemm<transB=1>(f, w4, b4) }"""


def cnn() -> Model:
    """Conv, depthwise Conv, residual sum, pools and Gemm, with biases."""
    shapes = {"w1": (8, 3, 3, 3), "w2": (8, 1, 3, 3), "w3": (8, 8, 1, 1), "w4": (10, 8)}
    tensors: dict[str, Any] = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    tensors |= {f"b{i}": normal(n, seed=9 + i) for i, n in ((1, 8), (2, 8), (3, 8), (4, 10))}
    return Model.from_proto(parsed(CNN, low=np.float32(0), high=np.float32(6), **tensors))


X = {"x": normal(16, 3, 16, 16, seed=5)}


def optimized(proto: onnx.ModelProto, path: Path) -> Counter[str]:
    """The operators that onnxruntime makes of the graph."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 4
    onnxruntime.InferenceSession(proto.SerializeToString(), options)
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def types(proto: onnx.ModelProto) -> dict[str, str]:
    """The types of the initializers by name."""
    return {t.name: onnx.TensorProto.DataType.Name(t.data_type) for t in proto.graph.initializer}


def zero_point(proto: onnx.ModelProto, name: str) -> str:
    """The initializer that is the zero point of the value `name`."""
    return next(str(node.input[2]) for node in proto.graph.node if name in node.output)


def test_codes_scales_and_names() -> None:
    model = quantized(cnn(), X)
    proto = to_qdq(model)
    onnx.checker.check_model(proto, full_check=True)
    assert [entry.version for entry in proto.opset_import if entry.domain == ""] == [21]
    found = types(proto)
    assert found["w1__quantized"] == "INT8"
    assert found["b1__quantized"] == "INT32"
    assert found[zero_point(proto, "r")] == "UINT8"
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    np.testing.assert_array_equal(arrays["w1__scale"], model.encodings["w1"].scale)
    np.testing.assert_array_equal(
        arrays["b1__scale"], model.encodings["x"].scale * model.encodings["w1"].scale
    )
    assert not {"w1", "b1"} & set(arrays)
    assert [entry.name for entry in proto.graph.input] == ["x"]
    assert [entry.name for entry in proto.graph.output] == ["y"]


def test_grids_with_the_same_numbers_are_one_constant() -> None:
    model = quantized(cnn(), X)
    proto = to_qdq(model)
    tensors = [onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer]
    grids = {name for node in proto.graph.node if "Linear" in node.op_type for name in node.input[1:]}
    named = zip(proto.graph.initializer, tensors, strict=True)
    kept = [(array.dtype, array.shape, array.tobytes()) for tensor, array in named if tensor.name in grids]
    assert len(kept) == len(set(kept)) == len(grids)


def test_the_float_model_is_not_touched() -> None:
    model = quantized(cnn(), X)
    before = [(node.name, [v.name if v else None for v in node.inputs]) for node in model.graph]
    to_qdq(model)
    assert before == [(node.name, [v.name if v else None for v in node.inputs]) for node in model.graph]


def test_onnxruntime_runs_a_cnn_on_integers(tmp_path: Path) -> None:
    found = optimized(to_qdq(quantized(cnn(), X)), tmp_path / "optimized.onnx")
    assert found["QLinearConv"] == 3
    assert found["QLinearAdd"] == 1
    assert found["QGemm"] == 1
    assert found["Conv"] == found["Relu"] == found["Clip"] == found["Gemm"] == 0


SCHEMES = {
    "w8a8": scheme(),
    "w8a8 per tensor": scheme(granularity="per_tensor"),
    "w8a8 signed": scheme(signed=True),
    "w8a8 signed symmetric": scheme(signed=True, symmetric=True),
    "w4a8": scheme(weight=4),
    "w3a6": scheme(weight=3, activation=6),
    "w2a2": scheme(weight=2, activation=2),
    "w4a4": scheme(weight=4, activation=4),
    "w8a16": scheme(activation=16),
    "w16a16": scheme(weight=16, activation=16),
}


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("mode", ["reference", "deploy"])
def test_onnxruntime_computes_what_the_simulation_does(name: str, mode: Any) -> None:
    model = quantized(cnn(), X, SCHEMES[name])
    simulated = model.to_torch()(torch.tensor(X["x"])).numpy()
    found = model.session(mode).run(None, X)[0]
    steps = np.abs(simulated - found) / model.encodings["y"].scale
    # One flipped rounding at the front moves a 16-bit output by some of its small steps.
    assert steps.max() <= (1.01 if "16" not in name else 16)
    assert np.mean(steps > 0.5) <= (0.02 if "16" not in name else 1)


WEIGHTS_ONLY = {
    "int8": scheme(activation=None),
    "int4": scheme(weight=4, activation=None),
    "int4 blocks": scheme(4, None, "per_block", 8),
    "int8 blocks": scheme(8, None, "per_block", 8),
    "3 bits": scheme(weight=3, activation=None),
}


@pytest.mark.parametrize("name", WEIGHTS_ONLY)
def test_weights_alone(name: str) -> None:
    text = "n (float[N,5,32] x) => (float[N,5,16] y) { t = MatMul(x, w)  y = Add(t, b) }"
    x = {"x": normal(4, 5, 32)}
    model = quantized(Model.from_proto(parsed(text, w=normal(32, 16), b=normal(16))), x, WEIGHTS_ONLY[name])
    simulated = model.to_torch()(torch.tensor(x["x"])).numpy()
    np.testing.assert_allclose(model.session("deploy").run(None, x)[0], simulated, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("net", [Mobile, UNet])
def test_networks_from_torch(net: type[torch.nn.Module]) -> None:
    x = {"x": normal(8, 3, 32, 32)}
    model = quantized(exported(net)[1], x)
    simulated = model.to_torch()(torch.tensor(x["x"])).numpy()
    found = model.session("deploy").run(None, x)[0]
    steps = np.abs(simulated - found) / model.encodings[model.outputs[0].name].scale
    assert steps.max() <= 2.01
    assert np.mean(steps > 0.5) <= 0.02


def test_a_value_between_is_the_rounded_one_under_its_own_name() -> None:
    model = quantized(cnn(), X)
    (r,) = model.session(outputs=["r"]).run(None, X)
    codes = r / model.encodings["r"].scale
    np.testing.assert_allclose(codes, np.rint(codes), atol=1e-3)


def test_a_quantized_output_that_is_read_inside_keeps_its_name() -> None:
    proto = parsed(
        "n (float[N,4] x) => (float[N,4] a, float[N,4] y) { a = MatMul(x, w)  y = MatMul(a, v) }",
        w=normal(4, 4), v=normal(4, 4, seed=1),
    )  # fmt: skip
    x = {"x": normal(16, 4)}
    model = quantized(Model.from_proto(proto), x)
    a, y = model.session("deploy").run(["a", "y"], x)
    simulated = model.to_torch()(torch.tensor(x["x"]))
    np.testing.assert_allclose(a, simulated[0].numpy(), atol=float(model.encodings["a"].scale) / 2)
    np.testing.assert_allclose(y, simulated[1].numpy(), atol=float(model.encodings["y"].scale) * 1.01)


def test_tied_weights_are_written_once_and_a_shared_bias_per_layer() -> None:
    proto = parsed(
        "n (float[N,4] x) => (float[N,4] y) { a = Gemm(x, w, b)  y = Gemm(a, w, b) }",
        w=normal(4, 4),
        b=normal(4),
    )
    x = {"x": normal(16, 4)}
    model = quantized(Model.from_proto(proto), x)
    found = types(to_qdq(model))
    assert [name for name in found if name.startswith("w")] == ["w__quantized", "w__scale"]
    assert sum(kind == "INT32" for name, kind in found.items() if name.endswith("__quantized")) == 2
    simulated = model.to_torch()(torch.tensor(x["x"])).numpy()
    step = float(model.encodings["y"].scale)
    np.testing.assert_allclose(model.session("deploy").run(None, x)[0], simulated, atol=1.01 * step)


def test_four_bit_activations_are_stored_in_eight_and_clipped() -> None:
    proto = to_qdq(quantized(cnn(), X, scheme(activation=4)))
    assert types(proto)[zero_point(proto, "r")] == "UINT8"
    assert "r__clip" in {node.name for node in proto.graph.node}
    # What MaxPool moves has 4-bit codes already.
    assert "m__clip" not in {node.name for node in proto.graph.node}


def test_four_bit_weights_are_packed() -> None:
    proto = to_qdq(quantized(cnn(), X, scheme(weight=4)))
    (stored,) = [t for t in proto.graph.initializer if t.name == "w3__quantized"]
    assert stored.data_type == onnx.TensorProto.INT4
    assert len(stored.raw_data) == 32


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("activation", [8, 16, None])
def test_block_scales_run_in_a_plain_session(bits: int, activation: int | None) -> None:
    text = "n (float[N,5,32] x) => (float[N,5,16] y) { t = MatMul(x, w)  y = Add(t, b) }"
    x = {"x": normal(4, 5, 32)}
    model = Model.from_proto(parsed(text, w=normal(32, 16), b=normal(16)))
    model = quantized(model, x, scheme(bits, activation, "per_block", 8))
    # 4-bit weights alone become MatMulNBits, which rounds activations unless told not to.
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    found = onnxruntime.InferenceSession(to_qdq(model).SerializeToString(), options).run(None, x)[0]
    simulated = model.to_torch()(torch.tensor(x["x"])).numpy()
    np.testing.assert_allclose(found, simulated, rtol=1e-5, atol=1e-5)


def test_a_model_without_encodings_is_written_as_it_is() -> None:
    model = cnn()
    assert [node.name for node in qdq_model(model).graph] == [node.name for node in model.graph]
