"""Other floats become float32: tensors, types, casts and constants."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qpipe.model.canon.floats import to_float32
from tests.model.nets import parsed


def converted(text: str, **tensors: Any) -> tuple[ir.Model, list[str]]:
    model = ir.from_proto(parsed(text, **tensors))
    return model, to_float32(model)


TYPES = {"float16": np.float16, "double": np.float64, "bfloat16": ml_dtypes.bfloat16}


@pytest.mark.parametrize("name", TYPES)
def test_every_tensor_and_type_is_float32_and_the_note_says_what_it_was(name: str) -> None:
    w = np.array([0.5, -2.0]).astype(TYPES[name])
    text = f"m ({name}[2] x) => ({name}[2] y) {{ y = Add(x, w) }}"
    model, notes = converted(text, w=w)
    values = [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]
    assert {value.dtype for value in values} == {ir.DataType.FLOAT}
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), [0.5, -2])
    assert notes == [f"The model computed in {name}; it was converted to float32."]


def test_several_types_are_named_in_one_note() -> None:
    text = "m (float16[2] x) => (double[2] y) { y = Cast<to=11>(x) }"
    model, notes = converted(text)
    assert notes == ["The model computed in double and float16; it was converted to float32."]
    assert model.graph[0].attributes["to"].as_int() == ir.DataType.FLOAT


def test_the_least_of_doubles_stays_finite_and_infinities_stay_infinite() -> None:
    w = np.array([-np.finfo(np.float64).max, np.inf, -np.inf, 1e300, np.nan])
    model, _ = converted("m (double[5] x) => (double[5] y) { y = Add(x, w) }", w=w)
    found = model.graph.initializers["w"].const_value.numpy()
    largest = np.finfo(np.float32).max
    np.testing.assert_array_equal(found, np.array([-largest, np.inf, -np.inf, largest, np.nan], np.float32))


def test_constants_in_nodes_and_in_their_graphs_too() -> None:
    text = """m (bool c) => (double[2] y) {
        y = If(c) <then_branch = t () => (double[2] a) { a = Constant<value=double[2] {1.0, 2.0}>() },
                   else_branch = e () => (double[2] b) { b = Constant<value=double[2] {3.0, 4.0}>() }> }"""
    model, _ = converted(text)
    inner = [node for graph in model.graphs() for node in graph if node.op_type == "Constant"]
    assert [node.attributes["value"].as_tensor().dtype for node in inner] == [ir.DataType.FLOAT] * 2


def test_a_model_of_float32_and_integers_is_left_alone() -> None:
    model, notes = converted("m (float[2] x, int64[2] i) => (float[2] y) { a = Cast<to=1>(i)  y = Add(x, a) }")
    assert notes == []
    assert model.graph.inputs[1].dtype == ir.DataType.INT64
