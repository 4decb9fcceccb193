"""Fewer samples are evenly spread over all there are."""

from __future__ import annotations

import numpy as np
import pytest

from qpipe.numerics.thinning import spread, thinned


def test_indices_are_evenly_spread() -> None:
    assert spread(3, 5) == spread(3, None) == [0, 1, 2]
    assert spread(7, 3) == [0, 2, 4]
    assert spread(0, 3) == []


def test_thinned_data_keep_every_class_of_sorted_ones() -> None:
    labels = np.repeat(np.arange(5), 20)
    few = thinned({"x": np.arange(100) * 2.0, "labels": labels}, 10)
    np.testing.assert_array_equal(few["labels"], np.repeat(np.arange(5), 2))
    np.testing.assert_array_equal(few["x"], np.arange(10) * 20.0)


@pytest.mark.parametrize("limit", [None, 100, 1000])
def test_where_no_more_are_there_all_are_kept(limit: int | None) -> None:
    labels = np.repeat(np.arange(5), 20)
    np.testing.assert_array_equal(thinned({"labels": labels}, limit)["labels"], labels)


def test_a_single_number_has_no_samples_to_leave_out() -> None:
    assert thinned({"x": np.array(3.0)}, 2) == {"x": np.array(3.0)}
