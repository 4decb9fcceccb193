"""What is folded: what follows from constants alone, a computed weight, and never a parameter."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from qpipe.model import Model
from qpipe.model.canon import folding
from qpipe.model.canon.folding import fold_constants, fold_weights
from qpipe.model.network.invariants import lift_constants
from qpipe.model.network.naming import SCOPE
from qpipe.model.network.shapes import infer_shapes
from tests.model.nets import normal, parsed


def model_of(text: str, **tensors: Any) -> ir.Model:
    model = ir.from_proto(parsed(text, **tensors))
    lift_constants(model.graph)
    infer_shapes(model)
    return model


def folded(text: str, parameters: Collection[str] = (), **tensors: Any) -> dict[str, Any]:
    """The initializers that the last node reads after folding, by name."""
    model = model_of(text, **tensors)
    fold_constants(model, parameters)
    read = [value for value in model.graph[-1].inputs if value is not None and value.is_initializer()]
    return {str(value.name): value.const_value.numpy() for value in read}


SUM = "m (float[N,4] x) => (float[N,4] y) { a = Mul(u, v)  b = Exp(a)  y = Add(x, b) }"


def test_what_follows_from_constants_alone_is_computed_once() -> None:
    u, v = normal(4), normal(4, seed=1)
    np.testing.assert_allclose(folded(SUM, u=u, v=v)["b"], np.exp(u * v), rtol=1e-6)


def test_what_follows_from_a_parameter_is_not() -> None:
    assert folded(SUM, {"v"}, u=normal(4), v=normal(4)) == {}


@pytest.mark.parametrize(
    "op", ["RandomNormalLike(u)", "QuantizeLinear(u, s)", "DequantizeLinear(k, s)", "Bernoulli(u)"]
)
def test_random_numbers_and_codes_are_left(op: str) -> None:
    text = f"m (float[N,4] x) => (float[N,4] y) {{ a = {op}  b = Cast<to=1>(a)  y = Add(x, b) }}"
    tensors = {"u": normal(4), "s": np.float32(1), "k": np.arange(4, dtype=np.uint8)}
    used = {name: array for name, array in tensors.items() if f"({name}" in text or f" {name})" in text}
    assert folded(text, **used) == {}


def test_what_the_model_returns_stays_computed() -> None:
    model = model_of("m (float[4] x) => (float[4] y, float[4] a) { a = Exp(u)  y = Add(x, a) }", u=normal(4))
    assert not fold_constants(model, ())
    assert [node.op_type for node in model.graph] == ["Exp", "Add"]


def test_a_constant_that_would_be_too_large_stays_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "m (float[4,4] x) => (float[4,4] y) { a = Expand(u, s)  y = Add(x, a) }"
    monkeypatch.setattr(folding, "LARGEST_BYTES", 64)
    assert list(folded(text, u=np.float32(2), s=[4, 4])) == ["a"]
    monkeypatch.setattr(folding, "LARGEST_BYTES", 63)
    assert folded(text, u=np.float32(2), s=[4, 4]) == {}


def test_what_onnxruntime_cannot_compute_keeps_nothing_else_from_being_folded() -> None:
    text = """m (float[2] x) => (float[2] y) { a = Reshape(u, wrong)  b = Exp(v)  c = Add(x, b)  d = ReduceSum(a)
        y = Add(c, d) }"""
    model = model_of(text, u=normal(4), wrong=[3, 3], v=normal(2))
    assert fold_constants(model, ())
    np.testing.assert_allclose(model.graph.initializers["b"].const_value.numpy(), np.exp(normal(2)), rtol=1e-6)


def weights(text: str, scope: str = "", **tensors: Any) -> tuple[ir.Model, list[str]]:
    model = model_of(text, **tensors)
    for node in model.graph:
        if scope and node.op_type == "Conv":
            node.metadata_props[SCOPE] = scope
    return model, fold_weights(model)


NORMED = """m (float[N,3,5] x) => (float[N,4,p] y) {
    n = ReduceL2(v, axes)  d = Div(v, n)  w = Mul(d, g)  y = Conv(x, w) }"""


def test_a_weight_that_is_computed_becomes_one_tensor_called_after_its_module() -> None:
    v, g = normal(4, 3, 2), normal(4, 1, 1, seed=1)
    model, notes = weights(NORMED, "layer.conv", v=v, g=g, axes=np.array([1, 2]))
    wanted = v / np.sqrt((v.astype(np.float64) ** 2).sum((1, 2), keepdims=True)) * g
    (name,) = {str(node.inputs[1].name) for node in model.graph if node.op_type == "Conv"}
    assert name == "layer.conv.weight"
    np.testing.assert_allclose(model.graph.initializers[name].const_value.numpy(), wanted, rtol=1e-5)
    assert notes == ["The parameter 'layer.conv.weight' is what the model computes from 'g' and 'v'."]


def test_a_parameter_that_is_only_transposed_is_left_to_who_shares_it() -> None:
    text = "m (float[N,4] x) => (float[N,5] y) { t = Transpose(w)  y = MatMul(x, t) }"
    model, notes = weights(text, w=normal(5, 4))
    assert notes == []
    assert [node.op_type for node in model.graph] == ["Transpose", "MatMul"]


def test_what_is_computed_for_no_layer_stays_computed() -> None:
    model, notes = weights("m (float[N,4] x) => (float[N,4] y) { e = Exp(w)  y = Mul(x, e) }", w=normal(4))
    assert notes == []
    assert [node.op_type for node in model.graph] == ["Exp", "Mul"]


@pytest.mark.parametrize("scale", [np.float32(0.05), np.array([0.01, 0.02, 0.03, 0.04, 0.05], np.float32)])
def test_a_computed_weight_that_is_quantized_has_the_grid_of_a_weight(scale: Any) -> None:
    text = """m (float[N,8] x) => (float[N,5] y) {
        w = Mul(v, g)  q = QuantizeLinear(w, c, z)  d = DequantizeLinear(q, c, z)  y = MatMul(x, d) }"""
    proto = parsed(text, v=normal(8, 5), g=normal(8, 1, seed=1), c=scale, z=np.zeros(scale.shape, np.int8))
    model = Model.from_proto(proto)
    assert [node.op_type for node in model.graph] == ["MatMul"]
    encoding = model.encodings["w"]
    assert (encoding.frozen, encoding.axis) == (True, 1 if scale.ndim else None)
    np.testing.assert_array_equal(encoding.scale, scale)
    np.testing.assert_allclose(model.param("w"), normal(8, 5) * normal(8, 1, seed=1), rtol=1e-6)
    assert model.metadata["notes"] == ["The parameter 'w' is what the model computes from 'g' and 'v'."]
    proto.graph.output.append(onnx.helper.make_tensor_value_info("d", onnx.TensorProto.FLOAT, [8, 5]))
    x = normal(16, 8, seed=2)
    (rounded,) = onnxruntime.InferenceSession(proto.SerializeToString()).run(["d"], {"x": x})
    np.testing.assert_allclose(model.session().run(None, {"x": x})[0], x @ rounded, atol=1e-5)
