"""Two things that would score differently have two digests; what does not count changes none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qpipe.methods.mixing.fingerprint import float_fingerprint, grids_fingerprint
from qpipe.model import Model
from qpipe.numerics.grid import Encoding
from tests.model.nets import normal, parsed
from tests.model.quantized import quantized

TEXT = "m (float[N,4] x) => (float[N,4] y) {{ a = MatMul(x, w)  y = {}(a) }}"
X, LABELS = {"x": normal(6, 4)}, np.arange(6)


def model(op: str = "Relu", scale: float = 1.0) -> Model:
    return Model.from_proto(parsed(TEXT.format(op), w=scale * normal(4, 4)))


def test_grids_and_words_about_a_float_model_do_not_count() -> None:
    plain = float_fingerprint(model(), X, LABELS)
    assert float_fingerprint(quantized(model(), X), X, LABELS) == plain
    assert float_fingerprint(model().with_metadata({"notes": ["other words"]}), X, LABELS) == plain


def test_graph_weights_biases_samples_and_labels_count() -> None:
    others: list[tuple[Model, dict[str, Any], Any]] = [
        (model(), X, LABELS),
        (model("Tanh"), X, LABELS),
        (model(scale=1.5), X, LABELS),
        (model().with_facts(biases="float"), X, LABELS),
        (model(), {"x": X["x"][:5]}, LABELS),
        (model(), {"x": X["x"].astype(np.float64)}, LABELS),
        (model(), {"x": X["x"].reshape(3, 8)}, LABELS),
        (model(), {"z": X["x"]}, LABELS),
        (model(), X, LABELS[::-1]),
        (model(), X, None),
    ]
    assert len({float_fingerprint(*each) for each in others}) == len(others)


def test_an_input_that_is_called_labels_is_not_taken_for_them() -> None:
    arrays = {"x": X["x"], "labels": LABELS}
    assert float_fingerprint(model(), arrays) != float_fingerprint(model(), X, LABELS)


GRID = Encoding(8, True, True, np.array([0.5, 0.25], np.float32), np.zeros(2, np.int32), axis=0)


@pytest.mark.parametrize(
    "change",
    [
        {"bitwidth": 7},
        {"signed": False},
        {"axis": 1},
        {"scale": np.array([0.25, 0.5], np.float32)},
        {"zero_point": np.array([0, 1], np.int32)},
        {"scale": np.float32(0.5), "zero_point": np.int32(0), "axis": None},
    ],
)
def test_every_part_of_a_grid_counts(change: dict[str, Any]) -> None:
    assert grids_fingerprint({"w": replace(GRID, **change)}) != grids_fingerprint({"w": GRID})


def test_names_count_and_their_order_and_whether_a_grid_is_frozen_do_not() -> None:
    other = replace(GRID, bitwidth=4)
    one = grids_fingerprint({"a": GRID, "b": other})
    assert grids_fingerprint({"b": other, "a": replace(GRID, frozen=True)}) == one
    assert grids_fingerprint({"a": other, "b": GRID}) != one
    assert grids_fingerprint({}) != grids_fingerprint({"a": GRID})
