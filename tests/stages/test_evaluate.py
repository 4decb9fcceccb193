"""evaluate: scores are those that numpy computes from onnxruntime's outputs."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from qpipe.errors import InputError, StageError
from qpipe.numerics.grid import Encoding
from qpipe.stage import Samples
from qpipe.stages.evaluate import evaluate

RNG = np.random.default_rng(3)


@pytest.fixture
def classifier(network):
    return network(
        """n (float[N,3,6,6] x) => (float[N,8] y) {
            t = Conv<pads=[1,1,1,1]>(x, w, b)  r = Relu(t)  m = GlobalAveragePool(r)  f = Flatten(m)
            y = Gemm<transB=1>(f, v, c) }""",
        {"w": (4, 3, 3, 3), "b": (4,), "v": (8, 4), "c": (8,)},
    )


@pytest.fixture
def quantized(classifier):
    """Coarse weights, 3 bits: scores move, but stay finite."""
    grid = Encoding(3, True, True, np.float32(0.7), np.int32(0))
    return classifier.with_encodings({"w": grid, "v": grid})


@pytest.fixture
def data():
    return Samples({"x": RNG.normal(size=(41, 3, 6, 6)).astype(np.float32)}, RNG.integers(0, 8, 41))


def rounded(model):
    """The model with its weights rounded by hand."""
    params = {name: model.param(name) for name in ("w", "v")}
    scale = np.float32(0.7)
    return model.with_encodings({}).with_params(
        {name: np.clip(np.rint(array / scale), -4, 3) * scale for name, array in params.items()}
    )


def test_top1_and_top5_count_the_labels(classifier, data, run):
    (logits,) = run(classifier, data.arrays)
    order = np.argsort(-logits, axis=1)
    for metric, places in [("top1", 1), ("top5", 5)]:
        scores = evaluate(classifier, data, metric=metric, batch_size=16).values
        expected = np.mean([label in row[:places] for row, label in zip(order, data.labels, strict=True)])
        assert scores["score"] == pytest.approx(expected, abs=1e-12)
        assert (scores["metric"], scores["n"]) == (metric, 41)


def test_scores_against_the_float_model(classifier, quantized, data, run):
    (y,), (r,) = run(rounded(quantized), data.arrays), run(classifier, data.arrays)
    y, r = y.astype(np.float64), r.astype(np.float64)
    cosine = np.mean(np.sum(y * r, 1) / np.linalg.norm(y, axis=1) / np.linalg.norm(r, axis=1))
    expected = {
        "sqnr_db": 10 * np.log10(np.sum(r**2) / np.sum((y - r) ** 2)),
        "cosine": cosine,
        "mse": -np.mean((y - r) ** 2),
    }
    for metric, score in expected.items():
        found = evaluate(quantized, data, classifier, metric=metric).values["score"]
        assert found == pytest.approx(score, rel=1e-4), metric


def test_the_float_weights_score_when_asked(classifier, quantized, data):
    assert evaluate(quantized, data, metric="top1", quantized=False).values["score"] == pytest.approx(
        evaluate(classifier, data, metric="top1").values["score"]
    )


def test_the_score_does_not_depend_on_the_batch_size(classifier, quantized, data):
    scores = {
        size: evaluate(quantized, data, classifier, metric="sqnr_db", batch_size=size).values["score"]
        for size in (1, 7, 64)
    }
    assert max(scores.values()) - min(scores.values()) < 1e-3


def test_the_limit_spreads_evenly_over_samples_and_their_labels(classifier, data):
    rows = np.arange(10) * 41 // 10
    spread = Samples({"x": data.arrays["x"][rows]}, data.labels[rows])
    limited = evaluate(classifier, data, metric="top1", limit=10).values
    assert (limited["score"], limited["n"]) == (
        evaluate(classifier, spread, metric="top1").values["score"],
        10,
    )
    assert evaluate(classifier, data, metric="top1", limit=1000).values["n"] == 41


@pytest.fixture
def own_metrics(tmp_path, monkeypatch):
    (tmp_path / "own_metrics_for_test.py").write_text(
        "def share_positive(outputs, labels):\n    return (outputs > 0).mean()\n"
        "def count_labels(outputs, labels):\n    return len(labels) + 0 * outputs.sum()\n"
        "def broken(outputs, labels):\n    return {}['accuracy']\n"
        "def text(outputs, labels):\n    return 'good'\n"
        "def many(outputs, labels):\n    return outputs.mean(axis=0)\n"
        "def nan(outputs, labels):\n    return float('nan')\n"
    )
    monkeypatch.chdir(tmp_path)
    yield "own_metrics_for_test"
    sys.modules.pop("own_metrics_for_test", None)
    if str(tmp_path) in sys.path:
        sys.path.remove(str(tmp_path))


def test_a_metric_of_the_users_own(classifier, data, run, own_metrics):
    (logits,) = run(classifier, data.arrays)
    found = evaluate(classifier, data, metric=f"{own_metrics}:share_positive").values
    assert found["score"] == pytest.approx(np.mean(logits > 0), abs=2 / logits.size)
    assert found["metric"] == f"{own_metrics}:share_positive"
    labels = evaluate(classifier, data, metric=f"{own_metrics}:count_labels", limit=9).values
    assert labels["score"] == pytest.approx(9)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("broken", "The metric {}:broken raised KeyError: 'accuracy'"),
        ("text", "The metric {}:text returned 'good'; it has to return one number."),
        ("many", "The metric {}:many returned an array of shape (8,); it has to return one number."),
        ("nan", "The metric {}:nan returned nan; a score has to be finite."),
    ],
)
def test_a_metric_that_fails_is_named_in_one_line(classifier, data, own_metrics, function, message):
    with pytest.raises(StageError) as caught:
        evaluate(classifier, data, metric=f"{own_metrics}:{function}")
    assert str(caught.value) == message.format(own_metrics)


def test_missing_labels_and_float_model_are_refused(classifier, data):
    with pytest.raises(InputError, match="The metric 'top1' needs labels, and the data have none"):
        evaluate(classifier, Samples(data.arrays), metric="top1")
    with pytest.raises(InputError, match="'sqnr_db' compares with the float model: wire `float_model`"):
        evaluate(classifier, data, metric="sqnr_db")


def test_several_outputs_count_alike(network):
    model = network(
        "n (float[N,4] x) => (float[N,3] y, float[N,5] z) { y = MatMul(x, v)  z = MatMul(x, w) }",
        {"v": (4, 3), "w": (4, 5)},
    )
    grid = Encoding(4, True, True, np.float32(0.3), np.int32(0))
    quantized = model.with_encodings({"v": grid, "w": grid})
    x = RNG.normal(size=(20, 4)).astype(np.float32)
    scores = []
    for name in ("v", "w"):
        w = model.param(name)
        error = x @ (np.clip(np.rint(w / np.float32(0.3)), -8, 7) * np.float32(0.3) - w)
        scores.append(10 * np.log10(np.sum((x @ w) ** 2) / np.sum(error**2)))
    found = evaluate(quantized, Samples({"x": x}), model, metric="sqnr_db").values["score"]
    assert found == pytest.approx(np.mean(scores), rel=1e-4)


def test_the_simulation_scores_as_the_deployed_model_does(classifier, data, target):
    from qpipe.numerics.scheme import Scheme, TensorScheme
    from qpipe.stages.calibrate import calibrate

    scheme = Scheme(TensorScheme(8, True, True), TensorScheme(8, False, False))
    model = calibrate(classifier, data, scheme=scheme, target=target)
    scores = [
        evaluate(model, data, classifier, metric="sqnr_db", backend=backend).values["score"]
        for backend in ("simulation", "onnxruntime")
    ]
    assert scores[0] == pytest.approx(scores[1], abs=0.2)  # a step of the grid here and there
    assert 15 < scores[0] < 60


@pytest.fixture
def detector(network):
    """Boxes, scores, and the input's ids, which pass through."""
    return network(
        """n (float[N,8] x, int64[N] ids) => (float[N,4] boxes, float[N,2] scores, int64[N] same) {
            boxes = MatMul(x, w)  scores = MatMul(x, v)  same = Identity(ids) }""",
        {"w": (8, 4), "v": (8, 2)},
    )


def test_integer_outputs_do_not_count_and_the_worst_is_told(detector, notes, run):
    data = Samples({"x": RNG.normal(size=(16, 8)).astype(np.float32), "ids": np.arange(16)})
    coarse = detector.with_encodings({"v": Encoding(3, True, True, np.float32(0.7), np.int32(0))})
    boxes = evaluate(coarse, data, detector, metric="sqnr_db", outputs=["boxes"]).values
    scores = evaluate(coarse, data, detector, metric="sqnr_db", outputs=["scores"]).values
    assert boxes["score"] > 100 > scores["score"]
    both = evaluate(coarse, data, detector, metric="sqnr_db", ctx=notes).values
    assert both["score"] == pytest.approx((boxes["score"] + scores["score"]) / 2)
    assert (both["worst"], both["worst_output"]) == (scores["score"], "scores")
    assert notes.notes[-1].startswith("sqnr_db of the worst output, 'scores': ")
    with pytest.raises(InputError, match=r"goal\.outputs: no output 'box'. Outputs: boxes, scores, same\."):
        evaluate(coarse, data, detector, metric="sqnr_db", outputs=["box"])


def test_labels_are_compared_with_the_output_that_is_named(detector):
    data = Samples({"x": RNG.normal(size=(16, 8)).astype(np.float32), "ids": np.arange(16)}, np.zeros(16, np.int64))
    named = [evaluate(detector, data, outputs=[name]).values["score"] for name in ("boxes", "scores")]
    assert evaluate(detector, data).values["score"] == named[0] != named[1]


def test_held_out_samples_are_scored_by_the_metric_and_against_float(classifier, quantized, data):
    scores = evaluate(quantized, data.head(5), classifier, data, metric="top1").values
    held = scores["held_out"]
    assert scores["score"] == evaluate(quantized, data.head(5), metric="top1").values["score"]
    for metric in ("top1", "sqnr_db"):
        wanted = evaluate(quantized, data, classifier, metric=metric).values["score"]
        assert held[metric]["score"] == pytest.approx(wanted, rel=1e-6), metric
        assert len(held[metric]["parts"]) == 20
    assert np.mean(held["top1"]["parts"]) == pytest.approx(held["top1"]["score"], abs=0.01)


def test_held_out_samples_without_labels_are_held_against_float_alone(classifier, quantized, data):
    unlabelled = Samples(data.arrays)
    assert set(evaluate(quantized, data, classifier, unlabelled, metric="top1").values["held_out"]) == {"sqnr_db"}
    assert set(evaluate(quantized, data, classifier, unlabelled, metric="cosine").values["held_out"]) == {
        "cosine", "sqnr_db",
    }  # fmt: skip
    assert evaluate(quantized, data, None, unlabelled, metric="top1").values["held_out"] == {}


def test_a_metric_that_fails_on_a_part_has_no_noise_and_one_that_fails_on_all_is_done_without(
    classifier, quantized, data, notes, tmp_path, monkeypatch
):
    (tmp_path / "picky_metric.py").write_text(
        "def whole(outputs, labels):\n    assert len(labels) >= 41\n    return 0.5\n"
        "def larger(outputs, labels):\n    assert len(labels) >= 42\n    return 0.5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    held = evaluate(quantized, data, classifier, data, metric="picky_metric:whole").values["held_out"]
    assert held["picky_metric:whole"] == {"score": 0.5, "parts": []}
    more = Samples({"x": np.concatenate([data.arrays["x"]] * 2)}, np.concatenate([data.labels] * 2))
    held = evaluate(quantized, more, classifier, data, metric="picky_metric:larger", ctx=notes).values["held_out"]
    assert set(held) == {"sqnr_db"}
    assert "cannot be scored by picky_metric:larger" in notes.notes[-1]
