"""How much each group loses alone, and what a score loses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qpipe.methods.mixing.sensitivity import GramSensitivity, loss_of, score_alone
from qpipe.model import Model
from qpipe.numerics.grid import quantize_dequantize
from tests.model.nets import normal, parsed
from tests.model.quantized import quantized, scheme


@pytest.mark.parametrize(
    ("metric", "score", "reference", "loss"),
    [
        ("sqnr_db", 20.0, 0.0, 0.01),
        ("sqnr_db", 0.0, 0.0, 1.0),
        ("sqnr_db", -10.0, 99.0, 10.0),
        ("top1", 0.7, 0.75, 0.05),
        ("top1", 0.8, 0.75, 0.0),  # better by chance
    ],
)
def test_a_loss_is_noise_over_signal_or_a_drop(metric: str, score: float, reference: float, loss: float) -> None:
    assert loss_of(metric, score, reference) == pytest.approx(loss)


def test_every_option_of_every_group_is_scored_alone_once_and_in_order() -> None:
    groups = [SimpleNamespace(name="w", options=("w4", "w8")), SimpleNamespace(name="y", options=("a8",))]
    choices: Any = SimpleNamespace(groups=groups, alone=lambda group, option: {group.name: option})
    told: list[tuple[int, int, str]] = []
    found = score_alone(choices, lambda group, grids: 10.0 * grids[group.name], lambda *at: told.append(at))
    assert found == [[0.0, 10.0], [0.0]]
    assert told == [(0, 3, "w w4"), (1, 3, "w w8"), (2, 3, "y a8")]


@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_the_estimate_of_a_weight_is_its_error_on_the_samples_means_included(mean: float) -> None:
    x, w = {"x": normal(50, 6) + np.float32(mean)}, normal(6, 4, seed=1)
    model = Model.from_proto(parsed("m (float[N,6] x) => (float[N,4] y) { y = MatMul(x, w) }", w=w))
    grids = {"w": quantized(model, x, scheme(weight=3)).encodings["w"]}
    gram = GramSensitivity(model, x, {}, lambda name, fn, *inputs: fn(*inputs), seed=0)
    group: Any = SimpleNamespace(weights=("w",))
    samples, error = x["x"].astype(np.float64), quantize_dequantize(w, grids["w"]).astype(np.float64) - w
    wanted = ((samples @ error) ** 2).sum() / ((samples @ w.astype(np.float64)) ** 2).sum()
    assert 10 ** (-gram.score(group, grids) / 10) == pytest.approx(wanted, rel=1e-4)
    assert gram.score(group, {}) == 300.0  # no noise at all


def test_the_estimate_of_a_weight_of_no_layer_is_its_own_error() -> None:
    w = normal(3, 6, 4, seed=1)
    model = Model.from_proto(parsed("m (float[N,3,5,6] x) => (float[N,3,5,4] y) { y = MatMul(x, w) }", w=w))
    x = {"x": normal(8, 3, 5, 6)}
    grids = {"w": quantized(model, x, scheme(weight=4)).encodings["w"]}
    gram = GramSensitivity(model, x, {}, lambda name, fn, *inputs: fn(*inputs), seed=0)
    group: Any = SimpleNamespace(weights=("w",))
    wanted = ((quantize_dequantize(w, grids["w"]) - w) ** 2).sum() / (w**2).sum()
    assert 10 ** (-gram.score(group, grids) / 10) == pytest.approx(wanted, rel=1e-4)
