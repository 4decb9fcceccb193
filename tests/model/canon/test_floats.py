"""Other floats become float32: tensors, types, casts and constants."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qpipe.methods.comparison.check import verify_import
from qpipe.model import Model
from qpipe.model.canon.floats import to_float32
from qpipe.model.simulation.constants import array_of, tensor_of
from tests.model.nets import normal, parsed


def converted(text: str, **tensors: Any) -> tuple[ir.Model, list[str]]:
    model = ir.from_proto(parsed(text, **tensors))
    return model, to_float32(model)


TYPES = {"float16": np.float16, "double": np.float64, "bfloat16": ml_dtypes.bfloat16}


def casts(model: ir.Model) -> list[tuple[str, str, int]]:
    return [
        (str(node.inputs[0].name), str(node.outputs[0].name), node.attributes["to"].as_int())
        for node in model.graph
        if node.op_type == "Cast" and node.inputs[0] is not None
    ]


@pytest.mark.parametrize("name", TYPES)
def test_every_tensor_inside_is_float32_and_the_note_says_what_it_was(name: str) -> None:
    w = np.array([0.5, -2.0]).astype(TYPES[name])
    text = f"m ({name}[2] x) => ({name}[2] y) {{ y = Add(x, w) }}"
    model, notes = converted(text, w=w)
    (add,) = (node for node in model.graph if node.op_type == "Add")
    assert {value.dtype for value in [*add.inputs, *add.outputs] if value is not None} == {ir.DataType.FLOAT}
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), [0.5, -2])
    assert notes == [f"The model computed in {name}; it was converted to float32."]


@pytest.mark.parametrize("name", TYPES)
def test_inputs_and_outputs_keep_their_type(name: str) -> None:
    text = f"m ({name}[N,4] x, {name}[N,3] s) => ({name}[N,3] y, {name}[N,3] same, {name}[N,3] z) {{ "
    text += "a = MatMul(x, w)  y = Add(a, s)  same = Identity(s)  z = Relu(y) }"
    proto = parsed(text, w=normal(4, 3).astype(TYPES[name]))
    model = Model.from_proto(proto)
    dtype = np.dtype(TYPES[name])
    assert {spec.dtype for spec in (*model.inputs, *model.outputs)} == {dtype.name}
    assert [spec.name for spec in (*model.inputs, *model.outputs)] == ["x", "s", "y", "same", "z"]
    inputs = {"x": normal(5, 4).astype(dtype), "s": normal(5, 3).astype(dtype)}
    given = model.session().run(None, inputs)
    assert {array.dtype for array in given} == {np.dtype(np.float32) if name == "bfloat16" else dtype}
    simulated = model.to_torch()(*map(tensor_of, inputs.values()))
    assert {array_of(tensor).dtype for tensor in simulated} == {dtype}
    for found, wanted in zip(simulated, given, strict=True):
        np.testing.assert_allclose(array_of(found).astype(np.float32), wanted.astype(np.float32), rtol=1e-2)
    if name != "bfloat16":  # onnxruntime has no MatMul of it
        assert verify_import(model, proto.SerializeToString()).equal


def test_a_deep_model_in_float16_is_taken() -> None:
    """Its source rounds what it hands on to 11 bits, the import does not."""
    lines = " ".join(f"h{i + 1} = MatMul(t{i}, w{i})  t{i + 1} = Tanh(h{i + 1})" for i in range(16))
    tensors = {f"w{i}": (normal(32, 32, seed=i) / 4).astype(np.float16) for i in range(16)}
    proto = parsed(f"m (float16[N,32] x) => (float16[N,32] y) {{ t0 = Relu(x) {lines} y = Identity(t16) }}", **tensors)
    assert verify_import(Model.from_proto(proto), proto.SerializeToString()).equal


def test_several_types_are_named_in_one_note() -> None:
    text = "m (float16[2] x) => (double[2] y) { y = Cast<to=11>(x) }"
    model, notes = converted(text)
    assert notes == ["The model computed in double and float16; it was converted to float32."]
    assert casts(model) == [
        ("x", "x_float32", ir.DataType.FLOAT),
        ("x_float32", "y_float32", ir.DataType.FLOAT),
        ("y_float32", "y", ir.DataType.DOUBLE),
    ]


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
