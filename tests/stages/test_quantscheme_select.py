"""quantscheme_select: each score is what calibrate and evaluate give, and the best of them wins."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from qpipe.numerics.metrics import sqnr_db
from qpipe.numerics.scheme import Scheme, TensorScheme
from qpipe.stage import Samples
from qpipe.stages.calibrate import calibrate
from qpipe.stages.evaluate import evaluate
from qpipe.stages.quantscheme_select import quantscheme_select

WEIGHT, ACTIVATION = TensorScheme(4, True, True), TensorScheme(8, False, False)
SCHEME = Scheme(WEIGHT, ACTIVATION)
PERCENTILES = (99.0, 99.9)


@pytest.fixture
def model(network):
    rng = np.random.default_rng(5)
    w = rng.normal(size=(16, 3, 3, 3)).astype(np.float32)
    w[0, 0, 0, 0] = 6.0  # one outlier: minmax is a poor choice
    return network(
        """n (float[N,3,6,6] x) => (float[N,5] y) {
            t = Conv<pads=[1,1,1,1]>(x, w, b)  r = Relu(t)  g = GlobalAveragePool(r)  f = Flatten(g)
            y = Gemm<transB=1>(f, v, c) }""",
        {"w": w, "b": (16,), "v": (5, 16), "c": (5,)},
    )


def samples(seed: int, count: int) -> Samples:
    return Samples({"x": np.random.default_rng(seed).normal(size=(count, 3, 6, 6)).astype(np.float32)})


def test_scores_are_those_of_each_side_alone(model, target):
    calibration, evaluation = samples(0, 40), samples(1, 30)
    scores = quantscheme_select(
        model, calibration, evaluation, scheme=SCHEME, target=target, percentiles=PERCENTILES
    ).values
    assert [(row["side"], row["observer"], row["percentile"]) for row in scores["table"]] == [
        (side, observer, percentile)
        for side, more in [("weight", []), ("activation", ["moving_average"])]
        for observer in ["minmax", *more, "sqnr", "mse", "percentile", "entropy"]
        for percentile in (PERCENTILES if observer == "percentile" else [None])
    ]
    reference = model.session(quantized=False).run(None, evaluation.arrays)[0]
    for row in scores["table"]:
        observer = {"observer": row["observer"], "percentile": row["percentile"] or 99.99}
        if row["side"] == "weight":
            scheme = Scheme(replace(WEIGHT, **observer), None)
        else:
            scheme = Scheme(WEIGHT, replace(ACTIVATION, **observer))
        encodings = calibrate(model, calibration, scheme=scheme, target=target).encodings
        alone = {
            name: e for name, e in encodings.items() if (name in ("w", "v")) == (row["side"] == "weight")
        }
        outputs = model.with_encodings(alone).to_torch()
        import torch

        y = outputs(torch.tensor(evaluation.arrays["x"])).detach().numpy()
        assert row["score"] == pytest.approx(sqnr_db(y, reference), rel=1e-3), row


def test_the_best_of_each_side_wins_and_calibrate_takes_it(model, target):
    data = samples(0, 40)
    choice = quantscheme_select(model, data, scheme=SCHEME, target=target, percentiles=PERCENTILES)
    for side in ("weight", "activation"):
        rows = [row for row in choice.values["table"] if row["side"] == side]
        best = max(row["score"] for row in rows)
        winner = next(row for row in rows if row["score"] == best)
        assert choice.values[f"{side}_observer"] == winner["observer"]
        assert choice.values[f"{side}_percentile"] == winner["percentile"]
    assert choice.values["weight_observer"] != "minmax"
    chosen = calibrate(model, data, choice, scheme=SCHEME, target=target)
    plain = calibrate(model, data, scheme=SCHEME, target=target)
    score = {
        name: evaluate(each, data, model, metric="sqnr_db").values["score"]
        for name, each in [("chosen", chosen), ("plain", plain)]
    }
    assert score["chosen"] == pytest.approx(choice.values["score"], rel=1e-3)
    assert score["chosen"] > score["plain"] + 1


def test_a_tie_goes_to_the_candidate_that_stands_first(model, target):
    scores = quantscheme_select(
        model, samples(0, 8), scheme=SCHEME, target=target,
        weight_observers=("mse", "mse"), activation_observers=("minmax", "minmax"),
    ).values  # fmt: skip
    assert (scores["weight_observer"], scores["activation_observer"]) == ("mse", "minmax")
    assert scores["table"][0]["score"] == scores["table"][1]["score"]


def test_weights_only_chooses_no_observer_of_activations(model, target):
    scores = quantscheme_select(
        model, samples(0, 8), scheme=Scheme(WEIGHT, None), target=target, weight_granularity="per_channel"
    ).values
    assert "activation_observer" not in scores
    assert {row["side"] for row in scores["table"]} == {"weight"}


def test_scores_below_the_noise_choose_nothing(network, target, notes):
    """Two inputs that cancel: 0.6 - 0.4 becomes 1 - 0 on a grid of 2 bits, whichever the observer."""
    w = np.array([[0.6, 0.4], [1.0, 0.6]], np.float32)
    model = network("n (float[N,2] x) => (float[N,2] y) { y = Gemm<transB=1>(x, w) }", {"w": w})
    x = np.random.default_rng(1).normal(size=(40, 1)).astype(np.float32) * np.array([[1, -1]], np.float32)
    scores = quantscheme_select(
        model, Samples({"x": x}), scheme=Scheme(TensorScheme(2, True, True), None), target=target,
        weight_observers=("percentile", "minmax"), percentiles=(99.999,), ctx=notes,
    ).values  # fmt: skip
    assert all(row["score"] == pytest.approx(10 * np.log10(0.2 / 0.8), abs=0.01) for row in scores["table"])
    assert scores["weight_observer"] == "percentile"
    assert notes.notes == ["No weight observer leaves a signal (all at most 0 dB): the first one stays."]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_observers": ()}, "weight_observers is empty; name at least one."),
        ({"weight_observers": ("moving_average",)},
         "observer moving_average follows batches of activations, got it for weights."),
        ({"percentiles": (99.9, 101.0)}, "percentile must lie above 50 and be at most 100, got 101.0."),
        ({"weight_granularity": "per_block"}, "per_block needs a block_size of at least 1, got 0."),
    ],
)  # fmt: skip
def test_candidates_that_cannot_be_are_refused_before_anything_runs(model, target, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        quantscheme_select(model, samples(0, 4), scheme=SCHEME, target=target, **options)
    parameters = quantscheme_select.__stage__.params
    given = {name: param.default for name, param in parameters.items()}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        quantscheme_select.__stage__.check({**given, "scheme": SCHEME, "target": target, **options})
