"""calibrate: grids follow the ranges that onnxruntime's values have, where the target wants them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qpipe.errors import InputError
from qpipe.methods.placement.target import Nodes
from qpipe.numerics.grid import encoding_from_range, same_grid
from qpipe.numerics.observers import HistogramObserver, weight_encoding
from qpipe.numerics.scheme import Scheme, TensorScheme
from qpipe.stage import Context, Samples, Scores
from qpipe.stages.calibrate import calibrate

WEIGHT, ACTIVATION = TensorScheme(8, True, True), TensorScheme(8, False, False)
SCHEME = Scheme(WEIGHT, ACTIVATION)
GRAPH = """n (float[N,3,6,6] x) => (float[N,5] y) {
    t = Conv<pads=[1,1,1,1]>(x, w, b)  r = Relu(t)
    u = Conv<pads=[1,1,1,1]>(r, k)  s = Add(u, r)
    m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(s)
    g = GlobalAveragePool(m)  f = Flatten(g)  y = Gemm<transB=1>(f, v, c) }"""
PARAMS = {"w": (4, 3, 3, 3), "b": (4,), "k": (4, 4, 3, 3), "v": (5, 4), "c": (5,)}


@pytest.fixture
def model(network):
    return network(GRAPH, PARAMS)


@pytest.fixture
def data():
    return Samples({"x": np.random.default_rng(2).normal(size=(23, 3, 6, 6)).astype(np.float32)})


def values(model, data, names):
    """What onnxruntime computes for the values `names`."""
    session = model.session(quantized=False, outputs=list(names))
    return dict(zip(names, session.run(None, data.arrays), strict=True))


def test_minmax_grids_cover_the_values_of_onnxruntime(model, data, target):
    calibrated = calibrate(model, data, scheme=SCHEME, target=target, batch_size=5)
    assert set(calibrated.encodings) == {"w", "k", "v", "x", "r", "u", "s", "m", "g", "f", "y"}
    seen = values(model, data, ["r", "u", "g", "y"])
    for name, array in {**seen, "x": data.arrays["x"]}.items():
        expected = encoding_from_range(array.min(), array.max(), ACTIVATION)
        np.testing.assert_allclose(calibrated.encodings[name].scale, expected.scale, rtol=1e-5)
        assert calibrated.encodings[name].zero_point == expected.zero_point
    for name in ("w", "k", "v"):
        assert same_grid(calibrated.encodings[name], weight_encoding(model.param(name), WEIGHT))
        assert not calibrated.encodings[name].frozen
        np.testing.assert_array_equal(calibrated.param(name), model.param(name))


@pytest.mark.parametrize(("bitwidth", "observer", "grid"), [(4, "mse", "signed_max"), (5, "minmax", "max")])
def test_what_a_scheme_leaves_to_auto_follows_the_table_of_defaults(model, data, target, bitwidth, observer, grid):
    """docs/grids.md, weights and activations alike."""
    left = Scheme(replace(WEIGHT, bitwidth=bitwidth), replace(ACTIVATION, bitwidth=bitwidth))
    named = Scheme(replace(left.weight, observer=observer, grid=grid), replace(left.activation, observer=observer))
    found, expected = (calibrate(model, data, scheme=each, target=target).encodings for each in (left, named))
    assert all(same_grid(found[name], expected[name]) for name in expected)


def test_values_that_are_only_moved_share_one_grid(model, data, target):
    encodings = calibrate(model, data, scheme=SCHEME, target=target).encodings
    assert same_grid(encodings["s"], encodings["m"])
    assert same_grid(encodings["g"], encodings["f"])
    observer = HistogramObserver()
    observer.update(values(model, data, ["m"])["m"])  # what the pool passes over does not count
    percentile = replace(ACTIVATION, observer="percentile", percentile=90.0)
    scheme = replace(SCHEME, activation=percentile)
    found = calibrate(model, data, scheme=scheme, target=target).encodings["m"]
    np.testing.assert_allclose(found.scale, observer.encoding(percentile).scale, rtol=1e-3)


def test_batches_and_the_order_of_samples_do_not_matter(model, data, target):
    scheme = replace(SCHEME, activation=replace(ACTIVATION, observer="mse"))
    turned = Samples({"x": data.arrays["x"][::-1]})
    encodings = [
        calibrate(model, samples, scheme=scheme, target=target, batch_size=size).encodings
        for samples, size in [(data, 23), (data, 4), (turned, 7)]
    ]
    for other in encodings[1:]:
        for name, encoding in encodings[0].items():
            np.testing.assert_allclose(other[name].scale, encoding.scale, rtol=1e-4)


def test_the_choice_replaces_the_observers(model, data, target):
    choice = Scores(
        {"weight_observer": "mse", "activation_observer": "percentile", "activation_percentile": 95.0}
    )
    found = calibrate(model, data, choice, scheme=SCHEME, target=target).encodings
    direct = Scheme(
        replace(WEIGHT, observer="mse"), replace(ACTIVATION, observer="percentile", percentile=95.0)
    )
    expected = calibrate(model, data, scheme=direct, target=target).encodings
    plain = calibrate(model, data, scheme=SCHEME, target=target).encodings
    assert all(same_grid(found[name], expected[name]) for name in expected)
    assert not same_grid(found["r"], plain["r"])


def test_the_granularity_of_weights_can_be_replaced(model, data, target):
    found = calibrate(model, data, scheme=SCHEME, target=target, weight_granularity="per_channel").encodings
    assert found["w"].granularity == "per_channel"
    largest = np.abs(model.param("w")).max(axis=(1, 2, 3))
    np.testing.assert_allclose(found["w"].scale, largest / 127, rtol=1e-6)


def test_weights_only_needs_no_activations(model, data, target):
    found = calibrate(model, data, scheme=Scheme(WEIGHT, None), target=target).encodings
    assert set(found) == {"w", "k", "v"}


def test_tuned_weights_keep_their_grid(model, data, target, notes):
    own = replace(weight_encoding(model.param("w"), TensorScheme(4, True, True)), frozen=True)
    found = calibrate(
        model.with_encodings({"w": own}), data, scheme=SCHEME, target=target, ctx=notes
    ).encodings
    assert found["w"].frozen
    assert same_grid(found["w"], own)
    assert notes.notes[-1] == "Tuned before, so their grid stays: w."


class Remembering(Context):
    """Keeps the inputs and the results of memo, and serves them."""

    def __init__(self) -> None:
        self.kept: dict = {}
        self.calls = 0

    def memo(self, name, fn, *inputs):
        from qpipe.keys.hashing import digest

        key = digest(name, list(inputs))
        if key not in self.kept:
            self.calls += 1
            self.kept[key] = fn(*inputs)
        return self.kept[key]


def test_one_observer_pass_serves_every_scheme(model, data, target):
    ctx = Remembering()
    schemes = [SCHEME, Scheme(replace(WEIGHT, bitwidth=4), replace(ACTIVATION, bitwidth=16, observer="sqnr"))]
    for scheme in schemes:
        remembered = calibrate(model, data, scheme=scheme, target=target, ctx=ctx).encodings
        fresh = calibrate(model, data, scheme=scheme, target=target).encodings
        assert all(same_grid(remembered[name], fresh[name]) for name in fresh)
    assert ctx.calls == 1
    calibrate(model, data, scheme=SCHEME, target=target, limit=9, ctx=ctx)
    other = model.with_params({"k": model.param("k") * 2})
    calibrate(other, data, scheme=SCHEME, target=target, ctx=ctx)
    assert ctx.calls == 3


def test_data_that_do_not_fit_are_refused(model, target):
    wrong = Samples({"image": np.zeros((2, 3, 6, 6), np.float32)})
    with pytest.raises(InputError, match="no array for the model's input 'x'; they hold 'image'"):
        calibrate(model, wrong, scheme=SCHEME, target=target)


def test_a_target_that_quantizes_nothing_is_refused(model, data, target):
    with pytest.raises(InputError, match="The target 'none' quantizes nothing in this model"):
        calibrate(model, data, scheme=SCHEME, target=replace(target, name="none", nodes=Nodes((".*",))))


def test_a_model_that_takes_an_image_of_bytes_is_quantized(network, target):
    """uint8 -> Cast -> Conv, beside a float input, as deployed."""
    from qpipe.methods.comparison.compare import outputs_error
    from qpipe.model.simulation.run import run

    model = network(
        """n (uint8[N,3,8,8] image, float[N,4] other) => (float[N,4] y) {
            f = Cast<to=1>(image)  s = Mul(f, c)  t = Conv(s, w)  r = Relu(t)  g = GlobalAveragePool(r)
            a = Flatten(g)  b = MatMul(other, v)  y = Add(a, b) }""",
        {"w": (4, 3, 3, 3), "v": (4, 4), "c": np.array(1 / 255, np.float32)},
    )
    rng = np.random.default_rng(0)
    arrays = {
        "image": rng.integers(0, 256, (32, 3, 8, 8)).astype(np.uint8),
        "other": rng.normal(size=(32, 4)).astype(np.float32),
    }
    quantized = calibrate(model, Samples(arrays), scheme=SCHEME, target=target)
    assert {"w", "v", "s"} <= set(quantized.encodings)
    wanted, found = (run(each, arrays, backend="onnxruntime")["y"] for each in (model, quantized))
    assert 20 * np.log10(np.linalg.norm(wanted) / np.linalg.norm(found - wanted)) > 25
    assert outputs_error(model, quantized, arrays) < 1e-6  # the float model inside is the same


@pytest.mark.parametrize(
    ("granularity", "block", "hard"),
    [("per_tensor", 0, True), ("per_channel", 0, False), ("auto", 0, False), ("per_block", 4, False)],
)
def test_one_scale_per_tensor_is_called_the_hard_case_where_the_target_takes_more(
    network, target, notes, granularity, block, hard
):
    model = network("n (float[N,8] x) => (float[N,4] y) { y = MatMul(x, w) }", {"w": (8, 4)})
    scheme = replace(SCHEME, weight=replace(WEIGHT, granularity=granularity, block_size=block))
    calibrate(model, Samples({"x": np.ones((4, 8), np.float32)}), scheme=scheme, target=target, ctx=notes)
    assert any("the hard case" in note for note in notes.notes) is hard
