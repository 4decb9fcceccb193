"""What a technique asks of the model that it gets."""

from __future__ import annotations

import pytest

from qpipe.errors import InputError
from qpipe.methods.preconditions import float_weights
from qpipe.model import Model
from tests.model.nets import normal, parsed
from tests.model.quantized import quantized

X = {"x": normal(8, 4)}


def model() -> Model:
    return Model.from_proto(parsed("m (float[N,4] x) => (float[N,4] y) { y = MatMul(x, w) }", w=normal(4, 4)))


def test_float_weights_may_be_changed() -> None:
    notes: list[str] = []
    assert float_weights(model(), "cle", notes.append)
    assert notes == []


def test_a_model_that_came_quantized_is_left_with_a_note() -> None:
    notes: list[str] = []
    assert not float_weights(Model.from_proto(quantized(model(), X).to_qdq()), "cle", notes.append)
    assert notes == ["The model came quantized, and its weights stay on their grids: cle leaves it as it is."]


def test_a_model_that_a_stage_has_quantized_is_refused() -> None:
    with pytest.raises(InputError, match=r"cle takes a float model, .* Put cle before quantization\."):
        float_weights(quantized(model(), X), "cle", print)
