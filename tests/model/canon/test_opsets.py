"""Opsets 1 to the newest become 21, and the numbers stay."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from qpipe.errors import InputError
from qpipe.model import Model
from tests.model.nets import error_of_import, normal, op_types, parsed

NET = """net (float[N,3,8,8] x) => (float[N,5] y) {
    c = Conv<pads=[1,1,1,1]>(x, w)  b = BatchNormalization(c, g, h, m, v)  r = Relu(b)
    p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)  a = GlobalAveragePool(p)  f = Flatten(a)
    y = Gemm<transB=1>(f, fc, fb) }"""


def tensors() -> dict[str, np.ndarray]:
    names = {name: normal(4, seed=seed) for seed, name in enumerate("ghm")}
    weights = {"w": normal(4, 3, 3, 3), "fc": normal(5, 4), "fb": normal(5)}
    return {**names, **weights, "v": np.abs(normal(4)) + 0.5}


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 17, 20, *range(21, onnx.defs.onnx_opset_version() + 1)])
def test_a_convolutional_network_of_any_opset_can_be_read(opset: int) -> None:
    proto = parsed(NET, opset=opset, **tensors())
    model = Model.from_proto(proto)
    proto = parsed(NET, opset=min(opset, 26), **tensors())  # onnxruntime knows no newer one
    assert model.ir.opset_imports == {"": 21}
    assert op_types(model)[:3] == ["Conv", "BatchNormalization", "Relu"]
    assert error_of_import(proto, model) < 1e-6


def test_attributes_that_became_inputs() -> None:
    proto = parsed(
        """net (float[N,4,6] x) => (float[N,4] y) {
        c = Clip<min=-1.0, max=1.0>(x)  u = Unsqueeze<axes=[1]>(c)  s = Squeeze<axes=[1]>(u)
        d = Dropout<ratio=0.5>(s)  y = ReduceMean<axes=[2], keepdims=0>(d) }""",
        opset=9,
    )
    model = Model.from_proto(proto)
    assert op_types(model)[0] == "Clip"
    assert op_types(model)[-1] == "ReduceMean"
    assert error_of_import(proto, model) < 1e-6


def test_upsample_becomes_resize() -> None:
    proto = parsed(
        'net (float[N,3,4,4] x) => (float[N,3,8,8] y) { y = Upsample<mode="nearest">(x, s) }',
        opset=9,
        s=np.array([1, 1, 2, 2], np.float32),
    )
    model = Model.from_proto(proto)
    assert op_types(model) == ["Resize"]
    assert error_of_import(proto, model) == 0


def test_rms_normalization_is_written_out() -> None:
    proto = parsed(
        "net (float[N,4,6] x) => (float[N,4,6] y) { y = RMSNormalization(x, w) }", opset=23, w=normal(6)
    )
    model = Model.from_proto(proto)
    assert "RMSNormalization" not in op_types(model)
    assert {"Mul", "ReduceMean"} <= set(op_types(model))
    assert np.array_equal(model.param("w"), normal(6))
    assert error_of_import(proto, model) < 1e-5


def test_swish_is_written_out() -> None:
    proto = parsed("net (float[N,4] x) => (float[N,4] y) { y = Swish(x) }", opset=24)
    model = Model.from_proto(proto)
    assert op_types(model) == ["Sigmoid", "Mul"]
    x = np.asarray(normal(2, 4), np.float64)
    found = model.session().run(None, {"x": normal(2, 4)})[0]
    assert np.allclose(found, x / (1 + np.exp(-x)), atol=1e-6)


def test_attention_is_written_out_where_quantizers_go() -> None:
    proto = parsed(
        "net (float[N,2,5,8] q, float[N,2,5,8] k, float[N,2,5,8] v) => (float[N,2,5,8] y) { y = Attention(q, k, v) }",
        opset=23,
    )
    model = Model.from_proto(proto)
    assert op_types(model).count("MatMul") == 2
    assert op_types(model).count("Softmax") == 1
    arrays = {name: normal(3, 2, 5, 8, seed=seed) for seed, name in enumerate("qkv")}
    q, k, v = (arrays[name].astype(np.float64) for name in "qkv")
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(8)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    wanted = weights / weights.sum(-1, keepdims=True) @ v
    assert np.allclose(model.session().run(None, arrays)[0], wanted, atol=1e-5)


def test_what_has_no_older_form_is_named() -> None:
    proto = parsed("net (float[2,4] x) => (int32[2,4] y) { [bits] y = BitCast<to=6>(x) }", opset=26)
    with pytest.raises(
        InputError, match=r"'bits' \(op BitCast.*came with opset 26 and has no form in opset 21"
    ):
        Model.from_proto(proto)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("form", ["", "<exclusive=1>", "<reverse=1>", "<exclusive=1, reverse=1>"])
def test_running_products_are_written_out(form: str, axis: int) -> None:
    proto = parsed(
        f"net (float[N,3,4] x) => (float[N,3,4] y) {{ y = CumProd{form}(x, axis) }}",
        opset=26,
        axis=np.int64(axis),
    )
    model, x = Model.from_proto(proto), normal(2, 3, 4)
    around = x[::-1] if axis == 0 and "reverse" in form else np.flip(x, axis) if "reverse" in form else x
    wanted = np.cumprod(around, axis)
    if "exclusive" in form:
        ones = np.ones_like(wanted.take([0], axis))
        wanted = np.concatenate([ones, np.delete(wanted, -1, axis)], axis)
    wanted = np.flip(wanted, axis) if "reverse" in form else wanted
    assert np.allclose(model.session().run(None, {"x": x})[0], wanted, atol=1e-6)
    assert np.allclose(model.to_torch()(torch.tensor(x)).numpy(), wanted, atol=1e-6)


def test_a_cache_is_written_where_each_sample_stands() -> None:
    proto = parsed(
        """net (float[N,6,2] c, float[N,3,2] u, int64[N] i) => (float[N,6,2] y) {
        y = TensorScatter<mode="circular">(c, u, i) }""",
        opset=24,
    )
    model = Model.from_proto(proto)
    cache, update, place = normal(2, 6, 2), normal(2, 3, 2, seed=1), np.array([1, 5])
    wanted = cache.copy()
    for sample in range(2):
        for step in range(3):
            wanted[sample, (place[sample] + step) % 6] = update[sample, step]
    feed = {"c": cache, "u": update, "i": place}
    assert np.array_equal(model.session().run(None, feed)[0], wanted)


@pytest.mark.parametrize("opset", [0, onnx.defs.onnx_opset_version() + 1])
def test_opsets_out_of_reach_are_refused(opset: int) -> None:
    proto = parsed("net (float[4] x) => (float[4] y) { y = Relu(x) }", opset=21)
    proto.opset_import[0].version = opset
    with pytest.raises(InputError, match=rf"opset {opset}; 1 to \d+ can be read"):
        Model.from_proto(proto)


def test_a_vector_of_slopes_was_one_for_each_channel() -> None:
    proto = parsed("net (float[N,3,4] x) => (float[N,3,4] y) { y = PRelu(x, s) }", opset=6, s=normal(3))
    model, x = Model.from_proto(proto), normal(2, 3, 4, seed=1)
    wanted = np.where(x < 0, x * normal(3)[:, None], x)
    assert np.allclose(model.to_torch()(torch.tensor(x)).detach().numpy(), wanted)


def test_addition_along_an_axis_was_spelled_out() -> None:
    proto = parsed(
        "net (float[2,3,4] x) => (float[2,3,4] y) { y = Add<broadcast=1, axis=1>(x, b) }",
        opset=6,
        b=normal(3),
    )
    model, x = Model.from_proto(proto), normal(2, 3, 4, seed=1)
    assert np.allclose(model.session().run(None, {"x": x})[0], x + normal(3)[:, None])


def test_the_long_name_of_the_default_domain_is_known() -> None:
    proto = parsed("net (float[N,4] x) => (float[N,4] y) { y = Relu(x) }")
    proto.opset_import[0].domain = proto.graph.node[0].domain = "ai.onnx"
    proto.opset_import.append(onnx.helper.make_opsetid("ai.onnx.ml", 3))
    model = Model.from_proto(proto)
    assert model.ir.opset_imports == {"": 21}
    assert model.graph[0].domain == ""
