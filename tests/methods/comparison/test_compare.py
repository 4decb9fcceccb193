"""How far outputs moved: the measure, the inputs it is taken on."""

from __future__ import annotations

import numpy as np
import pytest

from qpipe.methods.comparison.compare import outputs_error, relative_error
from qpipe.methods.comparison.inputs import random_inputs
from qpipe.model import Model
from tests.model.nets import normal, parsed

LINEAR = "m (float[N,4] x) => (float[N,4] y, float[N,4] z) { y = MatMul(x, w)  z = Mul(y, v) }"


def model(w: float = 1.0, v: float = 1.0) -> Model:
    return Model.from_proto(parsed(LINEAR, w=w * normal(4, 4), v=np.full(4, v, np.float32)))


@pytest.mark.parametrize(
    ("wanted", "found", "error"),
    [
        ([1.0, -2.0], [1.0, -2.5], 0.25),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([np.inf, 1.0], [np.inf, 1.0], 0.0),
        ([np.nan, 1.0], [np.nan, 2.0], 1.0),
        ([np.inf, 1.0], [1.0, 1.0], np.inf),
        ([1.0, 1.0], [np.nan, 1.0], np.inf),
        ([np.inf], [-np.inf], np.inf),
        ([[1.0]], [1.0], np.inf),
        ([], [], 0.0),
    ],
)
def test_the_error_is_the_largest_over_the_largest(wanted: list[float], found: list[float], error: float) -> None:
    assert relative_error(np.array(wanted), np.array(found)) == error


def test_the_error_of_a_model_is_that_of_its_worst_output() -> None:
    assert outputs_error(model(), model()) == 0.0
    assert outputs_error(model(), model(v=1.25)) == pytest.approx(0.25, rel=1e-5)
    assert outputs_error(model(), model(w=2.0)) == pytest.approx(1.0, rel=1e-5)


def test_samples_are_looked_at_up_to_a_size() -> None:
    bent = Model.from_proto(parsed(LINEAR.replace("MatMul(x, w)", "Relu(x)"), v=np.ones(4, np.float32)))
    straight = Model.from_proto(parsed(LINEAR.replace("MatMul(x, w)", "Identity(x)"), v=np.ones(4, np.float32)))
    x = {"x": np.concatenate([np.ones((32, 4)), -np.ones((1, 4))]).astype(np.float32)}
    assert outputs_error(straight, bent, x) == 0.0
    assert outputs_error(straight, bent, x, size=33) == 1.0


def test_random_inputs_are_those_that_a_model_can_take() -> None:
    text = """m (float[batch,3,L] x, int64[batch] i, bool[2] b) => (float[batch,3,L] y) {
        c = Cast<to=1>(i)  d = Cast<to=1>(b)  y = Relu(x) }"""
    proto = Model.from_proto(parsed(text))
    found = random_inputs(proto, batch=5)
    assert {name: (array.shape, array.dtype.name) for name, array in found.items()} == {
        "x": ((5, 3, 8), "float32"),
        "i": ((5,), "int64"),
        "b": ((2,), "bool"),
    }
    assert set(np.unique(found["i"])) <= {0, 1}
    assert np.array_equal(random_inputs(proto)["x"], random_inputs(proto)["x"])
    assert not np.array_equal(random_inputs(proto)["x"], random_inputs(proto, seed=1)["x"])
