"""Inputs that become constants and dimensions that are fixed: what follows is decided, and what cannot be is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qpipe.errors import InputError
from qpipe.methods.comparison.check import verify_import
from qpipe.model import Model
from qpipe.model.canon.form import canonical_network
from qpipe.model.files.given import fix_inputs, fix_shapes
from qpipe.stages.load_model import load_model
from tests.model.nets import normal, op_types, parsed

BY_RATE = """m (float[n,T] x, int64 sr, float[2,n,3] state) => (float[n,4] y, float[2,n,3] next) {
    fast = Equal(sr, rate)  h = If(fast) <then_branch = a () => (float[n,4] p) { p = MatMul(x, w) },
                                          else_branch = b () => (float[n,4] q) { q = MatMul(x, v) }>
    y = Relu(h)  next = Neg(state) }"""
RATED = {"rate": np.array(16000), "w": normal(8, 4), "v": normal(8, 4, seed=1)}


def given(inputs: dict[str, Any], shapes: dict[str, Any], proto: onnx.ModelProto) -> tuple[Model, dict[str, Any]]:
    source = ir.from_proto(proto)
    fix_shapes(source, shapes)
    fixed = fix_inputs(source, inputs)
    return Model.of(canonical_network(source)), fixed


@pytest.mark.parametrize(("rate", "weight"), [(16000, "w"), (8000, "v")])
def test_an_input_that_is_given_decides_a_branch(rate: int, weight: str) -> None:
    proto = parsed(BY_RATE, **RATED)
    model, fixed = given({"sr": rate}, {}, proto)
    assert sorted(op_types(model)) == ["MatMul", "Neg", "Relu"]
    assert set(model.params) == {weight}
    assert [spec.name for spec in model.inputs] == ["x", "state"]
    x, state = normal(3, 8), normal(2, 3, 3)
    found = model.session().run(None, {"x": x, "state": state})[0]
    np.testing.assert_allclose(found, np.maximum(x @ RATED[weight], 0), rtol=1e-5)
    assert verify_import(model, proto.SerializeToString(), given=fixed).equal


def test_a_dimension_that_is_given_decides_a_branch_under_an_open_batch() -> None:
    text = """m (float[n,C,4] x) => (float[n,4] y) {
        s = Shape(x)  channels = Gather(s, at)  single = Equal(channels, one)
        y = If(single) <then_branch = a () => (float[n,4] p) { p = Squeeze(x, axis) },
                        else_branch = b () => (float[n,4] q) { q = ReduceMean<keepdims=0>(x, axis) }> }"""
    tensors = {"at": np.array(1), "one": np.array(1), "axis": np.array([1])}
    for channels, op in ((1, "Squeeze"), (3, "ReduceMean")):
        model, _ = given({}, {"x": [None, channels, None]}, parsed(text, **tensors))
        assert op in op_types(model)
        assert "If" not in op_types(model)
        assert model.inputs[0].shape == ("n", channels, 4)
    known = text.replace("float[n,C,4]", "float[n,1,4]")
    assert "If" not in op_types(Model.from_proto(parsed(known, **tensors)))  # the file knows it
    sliced = known.replace("Gather(s, at)", "Slice(s, axis, two)").replace("(channels, one)", "(channels, axis)")
    assert "If" not in op_types(Model.from_proto(parsed(sliced, **tensors, two=np.array([2]))))


@pytest.mark.parametrize(
    ("inputs", "shapes", "message"),
    [
        ({"rate": 1}, {}, "The model has no input 'rate'. Its inputs: 'x', 'sr', 'state'."),
        ({"sr": 0.5}, {}, "inputs: 'sr' is int64, got 0.5."),
        ({"sr": "fast"}, {}, "inputs: 'sr' is int64, got 'fast'."),
        ({"sr": [1, 2]}, {}, r"inputs: 'sr' has the shape [], got [1, 2] of shape [2]."),
        ({"state": 0}, {}, r"inputs: 'state' has the shape [2, n, 3], got 0 of shape []."),
        ({}, {"x": [1]}, r"shapes: input 'x' has 2 dimensions [n, T], not 1."),
        ({}, {"state": [3, 1, 3]}, "shapes: dimension 0 of 'state' is 2 in the file, not 3."),
        ({}, {"x": [0, 8]}, "shapes: dimension 0 of 'x' has to be at least 1, got 0."),
        ({}, {"y": [1]}, "The model has no input 'y'."),
    ],
)
def test_what_cannot_be_given_is_told(inputs: dict[str, Any], shapes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        given(inputs, shapes, parsed(BY_RATE, **RATED))
    assert str(caught.value).startswith(message)


def test_a_number_fills_an_input_of_a_fixed_shape() -> None:
    model, fixed = given({"state": 0}, {"state": [2, 1, 3]}, parsed(BY_RATE, **RATED))
    np.testing.assert_array_equal(fixed["state"], np.zeros((2, 1, 3), np.float32))
    assert [spec.name for spec in model.inputs] == ["x", "sr"]
    fed = {"x": normal(1, 8), "sr": np.array(16000)}
    np.testing.assert_array_equal(model.session().run(["next"], fed)[0], np.zeros((2, 1, 3)))


def test_the_stage_takes_both_and_says_what_is_left(tmp_path: Path) -> None:
    from tests.stages.conftest import Notes

    onnx.save(parsed(BY_RATE, **RATED), tmp_path / "net.onnx")
    notes = Notes()
    model = load_model(path=tmp_path / "net.onnx", inputs={"sr": 16000}, shapes={"x": ("n", 8)}, ctx=notes)
    assert [(spec.name, spec.shape) for spec in model.inputs] == [("x", ("n", 8)), ("state", (2, "n", 3))]
    assert "The inputs sr are constants now; the model has 2 left." in notes.notes
    assert notes.notes[-1].startswith("The import computes what its source does")
    with pytest.raises(InputError, match="`inputs` and `shapes` go with `path`"):
        load_model(factory="nets:build", inputs={"sr": 1})
