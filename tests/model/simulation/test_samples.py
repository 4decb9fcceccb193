"""Samples as a model takes them: sizes of batches, types, and what does not fit."""

from __future__ import annotations

import numpy as np
import pytest

from qpipe.errors import InputError
from qpipe.model import Model
from qpipe.model.simulation.samples import batches, fitting, fixed_batch_size, sample_count
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
    assert fixed_batch_size(OPEN) is None
    assert fixed_batch_size(FIXED) == 4
    two = Model.from_proto(parsed("m (float[4,2] x, float[3,2] z) => (float[4,2] y) { a = Relu(z)  y = Relu(x) }"))
    with pytest.raises(InputError, match=r"different fixed batch sizes: \[3, 4\]"):
        fixed_batch_size(two)


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
