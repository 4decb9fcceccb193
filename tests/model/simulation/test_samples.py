"""Samples as a model takes them: sizes of batches, types, and what does not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qpipe.errors import InputError
from qpipe.model import Model
from qpipe.model.simulation.run import run
from qpipe.model.simulation.samples import batch_axes, batches, by_sample, fitting, sample_count
from tests.model.nets import parsed

OPEN = Model.from_proto(parsed("m (float[N,2] x, int64[N] i) => (float[N,2] y) { c = Cast<to=1>(i)  y = Relu(x) }"))
FIXED = Model.from_proto(parsed("m (float[4,2] x) => (float[4,2] y) { y = Relu(x) }"))


def rows(count: int) -> np.ndarray:
    return np.arange(2.0 * count, dtype=np.float32).reshape(count, 2)


def test_the_last_batch_of_an_open_size_is_smaller() -> None:
    found = list(batches(OPEN, {"x": rows(7), "i": np.arange(7)}, 3))
    assert [(batch.count, len(batch.arrays[0])) for batch in found] == [(3, 3), (3, 3), (1, 1)]
    np.testing.assert_array_equal(np.concatenate([batch.arrays[0] for batch in found]), rows(7))


@pytest.mark.parametrize("total", [3, 7, 8])
def test_the_last_batch_of_a_fixed_size_is_filled_up_with_the_first_samples(total: int) -> None:
    found = list(batches(FIXED, {"x": rows(total)}, 100))
    assert all(batch.arrays[0].shape == (4, 2) for batch in found)
    assert sum(batch.count for batch in found) == total
    counted = [batch.arrays[0][: batch.count] for batch in found]
    np.testing.assert_array_equal(np.concatenate(counted), rows(total))
    rest = found[-1].arrays[0][found[-1].count :]
    np.testing.assert_array_equal(rest, np.resize(rows(total), (len(rest), 2)))


def test_arrays_of_several_lengths_end_with_the_shortest() -> None:
    assert sample_count(OPEN, {"x": rows(7), "i": np.arange(5)}) == 5
    found = list(batches(OPEN, {"x": rows(7), "i": np.arange(5)}, 4))
    assert [len(array) for batch in found for array in batch.arrays] == [4, 4, 1, 1]


def test_the_size_of_a_batch_is_fixed_where_the_graph_says_a_number() -> None:
    assert batch_axes(OPEN).size is None
    assert batch_axes(FIXED).size == 4
    two = Model.from_proto(parsed("m (float[4,2] x, float[3,2] z) => (float[4,2] y) { a = Relu(z)  y = Relu(x) }"))
    with pytest.raises(InputError, match=r"different fixed batch sizes: \[3, 4\].*model\.inputs="):
        batch_axes(two)


STATE = Model.from_proto(
    parsed(
        "m (float[n,5] x, float[2,n,3] h, int64 rate) => (float[5,n] y, float[2,n,3] next, float[2,n,3] scaled) "
        "{ y = Transpose(x)  next = Relu(h)  r = Cast<to=1>(rate)  scaled = Mul(h, r) }"
    )
)


def test_samples_lie_along_the_dimension_that_is_named_as_theirs() -> None:
    axes = batch_axes(STATE)
    assert (axes.size, axes.inputs, axes.outputs) == (None, (0, 1, None), (1, 1, 1))
    h = np.arange(7 * 2 * 3, dtype=np.float32).reshape(7, 2, 3)
    data = {"x": np.ones((7, 5), np.float32), "h": h, "rate": np.full(7, 16000)}
    found = list(batches(STATE, data, 4))
    assert [[array.shape for array in batch.arrays] for batch in found] == [
        [(4, 5), (2, 4, 3), ()],
        [(3, 5), (2, 3, 3), ()],
    ]
    np.testing.assert_array_equal(found[1].arrays[1][1, 2], h[6, 1])


@pytest.mark.parametrize("backend", ["simulation", "onnxruntime"])
def test_outputs_come_back_by_sample_whatever_axis_they_lie_along(backend: Any) -> None:
    rng = np.random.default_rng(0)
    data = {
        "x": rng.normal(size=(7, 5)).astype(np.float32),
        "h": rng.normal(size=(7, 2, 3)).astype(np.float32),
        "rate": np.array([1, 1, 2, 2, 2, 3, 3]),  # the samples differ in it, so they go through one by one
    }
    found = run(STATE, data, batch_size=4, backend=backend)
    np.testing.assert_allclose(found["y"], data["x"])
    np.testing.assert_allclose(found["next"], np.maximum(data["h"], 0))
    np.testing.assert_allclose(found["scaled"], data["h"] * data["rate"][:, None, None])


def test_an_output_that_does_not_tell_samples_apart_has_them_one_by_one() -> None:
    model = Model.from_proto(parsed("m (float[n,5] x) => (float y) { y = ReduceMax<keepdims=0>(x) }"))
    x = np.arange(15, dtype=np.float32).reshape(3, 5)
    assert run(model, {"x": x}, batch_size=2)["y"].tolist() == [4, 9, 14]
    fixed = Model.from_proto(parsed("m (float[3,5] x) => (float y) { y = ReduceMax<keepdims=0>(x) }"))
    assert run(fixed, {"x": x})["y"].tolist() == [14, 14, 14]  # the file wants three: what they have in common
    assert run(fixed, {"x": np.concatenate([x, x[:1] + 20])})["y"].tolist() == [14, 14, 14, 24]


def test_a_fixed_batch_is_found_on_another_axis_too() -> None:
    text = "m (float[1,5] x, float[2,1,3] h) => (float[2,1,3] y) { a = ReduceMax<keepdims=0>(x)  y = Add(h, a) }"
    axes = batch_axes(Model.from_proto(parsed(text)))
    assert (axes.size, axes.inputs, axes.outputs) == (1, (0, 1), (1,))


def test_a_name_like_batch_goes_before_the_first_dimension() -> None:
    text = "m (float[time,batch,5] x) => (float[time,batch,5] y) { y = Relu(x) }"
    assert batch_axes(Model.from_proto(parsed(text))).inputs == (1,)
    assert by_sample(np.zeros((6, 2, 5)), 1, 2).shape == (2, 6, 5)


def test_numbers_become_the_type_that_the_input_has() -> None:
    x, i = fitting(OPEN, {"i": np.arange(3, dtype=np.uint8), "x": rows(3).astype(np.float64)})
    assert (x.dtype, i.dtype) == (np.float32, np.int64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, r"no array for the model's input 'x'; they hold 'i'"),
        ({"x": np.zeros((3, 2), np.int64)}, "input 'x' is float32, the data give int64"),
        ({"i": np.zeros(3, np.float32)}, "input 'i' is int64, the data give float32"),
        ({"x": np.zeros((3, 5), np.float32)}, r"One sample of 'x' has shape \(5\), the model takes \(2\)"),
        ({"x": np.zeros((3, 2, 1), np.float32)}, r"has shape \(2, 1\), the model takes \(2\)"),
        ({"x": np.full((3, 2), 1e300)}, "numbers that float32 cannot hold"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(change: dict[str, np.ndarray], message: str) -> None:
    arrays = {"x": rows(3), "i": np.arange(3), **change}
    with pytest.raises(InputError, match=message):
        fitting(OPEN, {name: array for name, array in arrays.items() if array is not None})


def test_infinities_of_the_data_stay_what_they_are() -> None:
    (x, _) = fitting(OPEN, {"x": np.full((1, 2), np.inf), "i": np.arange(1)})
    assert np.isinf(x).all()
