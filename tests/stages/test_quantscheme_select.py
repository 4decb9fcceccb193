"""quantscheme_select: each score is what calibrate and evaluate give, and the best of them wins."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from qpipe.errors import InputError
from qpipe.methods.placement.target import Limits
from qpipe.numerics.grid import quantize_dequantize
from qpipe.numerics.metrics import sqnr_db
from qpipe.numerics.observers import weight_encoding
from qpipe.numerics.scheme import Scheme, TensorScheme
from qpipe.stage import Samples
from qpipe.stages.calibrate import calibrate
from qpipe.stages.evaluate import evaluate
from qpipe.stages.quantscheme_select import quantscheme_select

WEIGHT = TensorScheme(4, True, True, observer="minmax", grid="max")
ACTIVATION = TensorScheme(8, False, False)
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
        model, calibration, evaluation, scheme=SCHEME, target=target, percentiles=PERCENTILES, per_weight=False
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
    choice = quantscheme_select(
        model, data, scheme=SCHEME, target=target, percentiles=PERCENTILES, per_weight=False
    )
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
        model, Samples({"x": x}), scheme=Scheme(TensorScheme(2, True, True, grid="max"), None), target=target,
        per_weight=False, weight_observers=("percentile", "minmax"), percentiles=(99.999,), ctx=notes,
    ).values  # fmt: skip
    assert all(row["score"] == pytest.approx(10 * np.log10(0.2 / 0.8), abs=0.01) for row in scores["table"])
    assert scores["weight_observer"] == "percentile"
    assert notes.notes == ["No weight observer leaves a signal (all at most 0 dB): the first one stays."]


@pytest.fixture
def layers(network):
    """Two layers: the first weight leans to one side, the second is even, and some inputs hardly count."""
    rng = np.random.default_rng(3)
    w = (rng.normal(size=(8, 12)) + 1.0).astype(np.float32)
    return network(
        "n (float[N,12] x) => (float[N,6] y) { t = Gemm<transB=1>(x, w)  y = Gemm<transB=1>(t, v) }",
        {"w": w, "v": rng.normal(size=(6, 8)).astype(np.float32)},
    )


def rows(seed: int, count: int) -> Samples:
    x = np.random.default_rng(seed).normal(size=(count, 12)) * np.linspace(0.1, 2.0, 12)
    return Samples({"x": x.astype(np.float32)})


W3 = Scheme(replace(WEIGHT, bitwidth=3, granularity="per_channel"), None)


def test_each_weight_has_the_grid_of_the_least_output_error_of_its_layer(layers, target):
    """Held against brute force: a layer's own output error with each candidate, on the float model's inputs."""
    data, observers = rows(0, 60), ("minmax", "mse")
    choice = quantscheme_select(layers, data, scheme=W3, target=target, weight_observers=observers).values
    inputs = {"w": data.arrays["x"], "v": data.arrays["x"] @ layers.param("w").T}
    for name, x in inputs.items():
        weight, errors = layers.param(name), {}
        for observer in observers:
            for grid in ("max", "signed_max", "asymmetric"):
                kind = {"symmetric": grid != "asymmetric", "grid": "max" if grid == "asymmetric" else grid}
                e = weight_encoding(weight, replace(W3.weight, observer=observer, **kind), 0)
                change = (quantize_dequantize(weight, e) - weight).astype(np.float64)
                errors[observer, grid] = np.square(x @ change.T).sum()
        found = choice["weights"][name]
        named = (found["observer"], found["grid"] if found["symmetric"] else "asymmetric")
        assert errors[named] == pytest.approx(min(errors.values()), rel=1e-3)
    line = choice["table"][-1]
    assert line["observer"] == "per_weight"
    assert choice["score"] == line["score"] > max(each["score"] for each in choice["table"][:-1])


def test_calibrate_takes_the_grid_of_each_weight(layers, target):
    data = rows(0, 60)
    choice = quantscheme_select(layers, data, scheme=W3, target=target)
    chosen = calibrate(layers, data, choice, scheme=W3, target=target)
    score = evaluate(chosen, data, layers, metric="sqnr_db").values["score"]
    assert score == pytest.approx(choice.values["score"], rel=1e-3)
    assert set(choice.values["weights"]) == {"w", "v"}
    for name, change in choice.values["weights"].items():
        assert chosen.encodings[name].free_sign == (change["grid"] == "signed_max")


def test_a_grid_that_the_target_cannot_say_is_left_out_and_refused_when_asked_for(model, target):
    plain = replace(target, name="plain", weight=Limits(symmetric=True, grids=("max", "full_range")))
    scheme = Scheme(WEIGHT, None)
    found = quantscheme_select(model, samples(0, 8), scheme=scheme, target=plain).values
    assert all(change["grid"] == "max" and change["symmetric"] for change in found.get("weights", {}).values())
    message = "weight_grids: the target 'plain' takes weights with grid max or full_range, not signed_max."
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        quantscheme_select(model, samples(0, 8), scheme=scheme, target=plain, weight_grids=("signed_max",))


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
