"""What cannot be taken: every part in one list, each with its reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qpipe.errors import InputError
from qpipe.model.canon.refusals import check_supported, refuse_unfit, unsupported
from tests.model.nets import normal, parsed


def refusal(text: str, opset: int = 21, **tensors: Any) -> str:
    with pytest.raises(InputError) as caught:
        refuse_unfit(ir.from_proto(parsed(text, opset, **tensors)))
    return str(caught.value)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = RandomNormalLike(x)", "it draws random numbers. Export the model in eval mode"),
        ("y = mine.Special(x)", "operators of the domain 'mine' are not known"),
        ("y = ai.onnx.ml.Scaler(x)", "classical machine learning is not supported"),
        ("y = NoSuchOperator(x)", "the operator is not supported. Write it in others"),
        ("o = Optional(x)  y = OptionalGetElement(o)", "sequences, maps and optionals"),
        ("a, b, c = BatchNormalization<training_mode=1>(x, g, g, g, g)  y = Relu(a)", "it is in training mode"),
        ("c = Cast<to=8>(x)  y = Relu(x)", "it holds strings"),
        ("c = Cast<to=14>(x)  y = Relu(x)", "it holds complex64, which torch cannot compute with"),
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


def test_control_flow_on_data_is_named_only_beside_other_reasons_and_after_rewriting() -> None:
    text = """m (float[N,4] x, bool c) => (float[N,4] y) {{
        y = If(c) <then_branch = t () => (float[N,4] a) {{ a = Relu(x) }},
                   else_branch = e () => (float[N,4] b) {{ b = {}(x) }}> }}"""
    refuse_unfit(ir.from_proto(parsed(text.format("Exp"))))
    assert "which branch is taken depends on the data" in refusal(text.format("NoSuch"))
    found = unsupported(ir.from_proto(parsed(text.format("Exp"))))
    assert len(found) == 1
    assert "which branch is taken depends on the data" in found[0]


def test_what_came_with_a_later_opset_and_has_no_form_is_named() -> None:
    said = refusal("m (float[N,4] x) => (float[N,4] y) { y = BitCast<to=1>(x) }", 26)
    assert "came with opset 26 and has no form in opset 21. Export the model with opset 21" in said


def test_inputs_must_say_their_type_and_rank() -> None:
    proto = parsed("m (float[N,4] x) => (float[N,4] y) { y = Relu(x) }")
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(InputError, match="input 'x': its type or its number of dimensions is not said"):
        refuse_unfit(ir.from_proto(proto))


def test_wide_unsigned_numbers_are_computed_with_where_torch_can_hold_the_bits() -> None:
    text = "m (uint32[N,4] x) => (uint32[N,4] y) {{ y = {} }}"
    check_supported(ir.from_proto(parsed(text.format("Identity(x)"))))
    (clause,) = unsupported(ir.from_proto(parsed(text.format("GatherND(x, i)"), i=np.array([[0]]))))
    assert "torch cannot compute it with uint32. Use int32 or int64 there" in clause


def test_floats_of_8_bits_are_cast_and_moved_and_not_computed_with() -> None:
    text = "m (float[N,4] x) => (float[N,4] y) {{ a = Cast<to=17>(x)  b = {}(a)  y = Cast<to=1>(b) }}"
    for op, count in (("Identity", 0), ("Relu", 1)):
        model = ir.from_proto(parsed(text.format(op)))
        for value in (model.graph[0].outputs[0], model.graph[1].outputs[0]):
            value.type = ir.TensorType(ir.DataType.FLOAT8E4M3FN)
        found = unsupported(model)
        assert ["float8e4m3fn. Use float32 there" in clause for clause in found] == [True] * count
