"""Operators written out as what they mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from qpipe.model.canon.definitions import expand, has_definition, schema
from tests.model.nets import normal, parsed


def expanded(text: str, version: int, stays: tuple[str, ...] = (), **tensors: Any) -> ir.Model:
    proto = onnx.shape_inference.infer_shapes(parsed(text, version, **tensors))
    return expand(ir.from_proto(proto), version, lambda node: node.op_type in stays)


def run(model: ir.Model, **feeds: Any) -> Any:
    proto = ir.to_proto(model)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def test_onnx_s_own_definitions_and_two_of_ours_are_known() -> None:
    assert has_definition("RMSNormalization", 23)
    assert has_definition("HardSwish", 21)
    assert has_definition("CumProd", 26)
    assert has_definition("TensorScatter", 24)
    assert not has_definition("Conv", 21)
    assert not has_definition("NoSuchOperator", 21)
    assert schema("NoSuchOperator", 21) is None
    assert schema("RMSNormalization", 21) is None


def test_a_definition_computes_what_its_operator_does() -> None:
    x = normal(3, 4)
    model = expanded("m (float[N,4] x) => (float[N,4] y) { y = HardSwish(x) }", 21)
    assert "HardSwish" not in [node.op_type for node in model.graph]
    np.testing.assert_allclose(run(model, x=x), x * np.clip(x / 6 + 0.5, 0, 1), rtol=1e-6, atol=1e-6)


def test_what_may_stay_stays() -> None:
    text = "m (float[N,4] x) => (float[N,4] y) { a = HardSwish(x)  y = Mish(a) }"
    model = expanded(text, 21, ("HardSwish",))
    found = [node.op_type for node in model.graph]
    assert "HardSwish" in found
    assert "Mish" not in found
    assert "qpipe.definition" not in model.opset_imports
    assert not model.functions


def test_a_graph_without_any_is_given_back() -> None:
    model = ir.from_proto(parsed("m (float[N,4] x) => (float[N,4] y) { y = Relu(x) }"))
    assert expand(model, 21, lambda node: False) is model


@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("reverse", [0, 1])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_running_product_is_that_of_numpy(axis: int, exclusive: int, reverse: int) -> None:
    text = f"m (float[3,4] x) => (float[3,4] y) {{ y = CumProd<exclusive={exclusive}, reverse={reverse}>(x, axis) }}"
    model = expanded(text, 26, axis=np.array(axis))
    model.opset_imports[""] = 21
    x = normal(3, 4)
    turned = np.flip(x, axis) if reverse else x
    if exclusive:
        ones = np.ones_like(turned.take([0], axis))
        turned = np.concatenate([ones, turned.take(range(turned.shape[axis] - 1), axis)], axis)
    wanted = np.cumprod(turned, axis)
    np.testing.assert_allclose(run(model, x=x), np.flip(wanted, axis) if reverse else wanted, rtol=1e-5)


def test_defaults_of_attributes_that_are_left_out_are_those_of_the_schema() -> None:
    x = normal(3, 4)
    model = expanded("m (float[N,4] x) => (float[N,4] y) { y = Selu(x) }", 21)
    scale, alpha = 1.0507009873554805, 1.6732632423543772
    np.testing.assert_allclose(run(model, x=x), scale * np.where(x > 0, x, alpha * np.expm1(x)), rtol=1e-5)
