"""What cannot be taken: every part in one list, each with its reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qpipe.errors import InputError
from qpipe.model import Model
from qpipe.model.canon.refusals import refuse_unfit
from tests.model.nets import normal, parsed


def refusal(text: str, opset: int = 21, **tensors: Any) -> str:
    with pytest.raises(InputError) as caught:
        refuse_unfit(ir.from_proto(parsed(text, opset, **tensors)))
    return str(caught.value)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = RandomNormalLike(x)", "it draws random numbers. Export the model in eval mode"),
        ("y = NoSuchOperator(x)", "there is no such operator. Export the model again"),
        ("a, b, c = BatchNormalization<training_mode=1>(x, g, g, g, g)  y = Relu(a)", "it is in training mode"),
    ],
)
def test_each_reason_comes_with_the_node(body: str, reason: str) -> None:
    text = f"m (float[N,4] x) => (float[N,4] y) {{ {body} }}"
    tensors = {"g": normal(4)} if "g," in body else {}
    said = refusal(text, **tensors)
    assert reason in said
    assert "The model has one part that cannot be taken" in said or "parts" in said


def test_all_parts_are_listed_at_once() -> None:
    said = refusal("m (float[N,4] x) => (float[N,4] y) { a = RandomNormalLike(x)  b = NoSuch(a)  y = Other(b) }")
    assert said.startswith("The model has 3 parts that cannot be taken:\n  - ")
    assert said.count("\n  - node") == 3
    assert all(name in said for name in ("RandomNormalLike", "NoSuch", "Other"))


def test_a_dropout_that_changes_nothing_is_taken_and_one_that_trains_is_not() -> None:
    text = "m (float[N,4] x) => (float[N,4] y) { y = Dropout(x, r, t) }"
    for ratio, training, fine in ((0.5, False, True), (0.0, True, True), (0.5, True, False)):
        model = ir.from_proto(parsed(text, r=np.float32(ratio), t=np.array(training)))
        if fine:
            refuse_unfit(model)
        else:
            with pytest.raises(InputError, match="training mode"):
                refuse_unfit(model)


def test_what_neither_torch_nor_onnxruntime_runs_is_refused_with_onnxruntime_s_reason() -> None:
    """Operators of a library that is not loaded; all that torch cannot compute is named."""
    proto = parsed("m (float[N,4] x) => (float[N,4] y) { a = mine.Special(x)  y = mine.Other(a) }")
    proto.opset_import.add(domain="mine", version=1)
    with pytest.raises(InputError, match="2 parts that cannot be taken") as caught:
        Model.from_proto(proto)
    said = str(caught.value)
    assert "node 'a' (op Special, domain mine): torch cannot compute it, and onnxruntime does not open" in said
    assert "mine:Special" in said


@pytest.mark.parametrize(
    ("text", "clause"),
    [
        ("m (string[N] x) => (string[N] y) { y = Identity(x) }", "output 'y': it holds strings; text is no number"),
        ("m (float[N] x) => (string[N] y) { y = Cast<to=8>(x) }", "output 'y': it holds strings"),
        ("m (float[N] x) => (seq(float[N]) y) { y = SequenceConstruct(x) }", "output 'y': it is no tensor"),
        ("m (complex64[N] x) => (float[N] y) { y = Cast<to=1>(x) }", "input 'x': it holds complex64"),
    ],
)
def test_what_goes_in_and_out_is_tensors_of_numbers(text: str, clause: str) -> None:
    with pytest.raises(InputError) as caught:
        Model.from_proto(parsed(text))
    assert clause in str(caught.value)


def test_what_came_with_a_later_opset_and_has_no_form_is_named() -> None:
    said = refusal("m (float[N,4] x) => (float[N,4] y) { y = BitCast<to=1>(x) }", 26)
    assert "came with opset 26 and has no form in opset 21. Export the model with opset 21" in said


def test_inputs_must_say_their_type_and_rank() -> None:
    proto = parsed("m (float[N,4] x) => (float[N,4] y) { y = Relu(x) }")
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(InputError, match="input 'x': its type or its number of dimensions is not said"):
        refuse_unfit(ir.from_proto(proto))
