"""adaround: weights on their grids, errors below those of nearest rounding, measured by onnxruntime."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qpipe.errors import InputError
from qpipe.methods.placement.target import Nodes
from qpipe.numerics.grid import quantize_dequantize
from qpipe.numerics.scheme import Scheme, TensorScheme
from qpipe.stage import Context, Samples
from qpipe.stages.adaround import adaround
from qpipe.stages.calibrate import calibrate
from qpipe.stages.nearest import nearest

ACTIVATION = TensorScheme(8, False, False)
W4 = Scheme(TensorScheme(4, True, True, "per_channel", observer="minmax", grid="max"), None)
W4A8 = Scheme(W4.weight, ACTIVATION)
FAST = {"solver": "gradient", "iterations": 1000, "batch_size": 16, "lr": 0.02}

SMALL_NET = """n (float[N,3,6,6] x) => (float[N,5] y) {
    t = Conv<pads=[1,1,1,1]>(x, w, b)  r = Relu(t)
    u = Conv<group=4, pads=[1,1,1,1]>(r, k, kb)  q = PRelu(u, slope)
    g = GlobalAveragePool(q)  f = Flatten(g)  y = Gemm<transB=1>(f, v, c) }"""
SMALL_PARAMS = {
    "w": (8, 3, 3, 3), "b": (8,), "k": (8, 2, 3, 3), "kb": (8,), "v": (5, 8), "c": (5,),
    "slope": np.full((8, 1, 1), 0.2, np.float32),
}  # fmt: skip


def correlated(seed, count, *shape):
    """Samples whose channels and neighbours depend on one another, as those inside a network do."""
    rng = np.random.default_rng(seed)
    sources = rng.normal(size=(count, 2, *(n + 2 for n in shape[1:])))
    for axis in range(2, sources.ndim):  # a moving average over three neighbours
        n = sources.shape[axis] - 2
        sources = sum(sources.take(range(i, i + n), axis=axis) for i in range(3)) / np.sqrt(3)
    mix = np.random.default_rng(99).normal(size=(shape[0], 2))
    x = np.einsum("cs,ns...->nc...", mix, sources) + 0.1 * rng.normal(size=(count, *shape))
    return Samples({"x": x.astype(np.float32)})


@pytest.fixture
def net(network):
    return network(SMALL_NET, SMALL_PARAMS)


def float_outputs(model, data):
    return np.asarray(model.session(quantized=False).run(None, data.arrays)[0], np.float64)


def error(model, reference, data):
    """Squared output error over the float output's, of the deployed QDQ graph in onnxruntime."""
    y = np.asarray(model.session(mode="reference").run(None, data.arrays)[0], np.float64)
    r = float_outputs(reference, data)
    return float(np.sum((y - r) ** 2) / np.sum((r - r.mean(axis=0)) ** 2))


def check_on_grid(model):
    layers = {layer.weight for layer in model.layers()}  # a PRelu's slope is on a grid too, and not tuned
    for name in model.encodings:
        if name in layers:
            assert model.encodings[name].frozen, name
            array = model.param(name)
            np.testing.assert_array_equal(quantize_dequantize(array, model.encodings[name]), array)


LAYERS = [
    ("Conv<pads=[1,1,1,1]>(x, w, b)", (6, 4, 3, 3), (4, 6, 6)),
    ('Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, w)', (6, 4, 3, 3), (4, 7, 6)),
    ("Conv<group=2, dilations=[2,1]>(x, w, b)", (6, 2, 2, 3), (4, 6, 6)),
    ("Conv<group=4, pads=[1,1,1,1]>(x, w, b)", (4, 1, 3, 3), (4, 6, 6)),
    ("Conv<pads=[1,1]>(x, w, b)", (6, 4, 3), (4, 12)),
    ("Conv(x, w, b)", (6, 4, 2, 2, 2), (4, 3, 4, 4)),
    ("ConvTranspose<strides=[2,2], pads=[1,1,1,1], output_padding=[1,0]>(x, w, b)", (4, 6, 3, 3), (4, 4, 4)),
    ("ConvTranspose<group=4, strides=[2,2]>(x, w, b)", (4, 1, 3, 3), (4, 4, 4)),
    ("ConvTranspose<group=2, strides=[2]>(x, w, b)", (4, 3, 3), (4, 8)),
    ("Gemm<transB=1>(x, w, b)", (6, 8), (8,)),
    ("Gemm(x, w)", (8, 6), (8,)),
    ("MatMul(x, w)", (8, 6), (8,)),
]


@pytest.mark.parametrize(("layer", "weight", "sample"), LAYERS)
@pytest.mark.parametrize("solver", ["gram", pytest.param("gradient", marks=pytest.mark.slow)])
def test_every_kind_of_layer_errs_less_than_nearest(network, target, layer, weight, sample, solver):
    dims = ",".join(map(str, sample))
    out = ",".join("NOPQR"[i] for i in range(len(sample) + 1))
    channels = {"Conv": weight[0], "Gemm": 6, "MatMul": 6}.get(layer.partition("<")[0].partition("(")[0])
    if channels is None:
        channels = weight[1] * (4 if "group=4" in layer else 2 if "group=2" in layer else 1)
    params = {"w": weight, **({"b": (channels,)} if ", b)" in layer else {})}
    model = network(f"n (float[N,{dims}] x) => (float[{out}] y) {{ y = {layer} }}", params)
    data, test = correlated(0, 200, *sample), correlated(1, 100, *sample)
    calibrated = calibrate(model, data, scheme=W4, target=target)
    options = FAST if solver == "gradient" else {}
    tuned = adaround(calibrated, data, **options)
    check_on_grid(tuned)
    (report,) = tuned.metadata["adaround"]["layers"].values()
    assert report["kept"] == solver
    assert report["error_after"] < report["error_before"]
    assert error(tuned, model, test) < 0.95 * error(nearest(calibrated), model, test)


@pytest.mark.parametrize("options", [{}, FAST])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_block"])
def test_tokens_blocks_of_scales_and_written_out_activations(network, target, options, granularity):
    text = """n (float[N,6,8] x) => (float[N,6,8] y) {
        a = MatMul(x, w)  h = Add(a, b)  s = Sigmoid(h)  g = Mul(h, s)  y = MatMul(g, v) }"""
    model = network(text, {"w": (8, 16), "b": (16,), "v": (16, 8)})
    assert len(model.layers()[0].activation) == 2
    data, test = (
        Samples({"x": np.ascontiguousarray(correlated(seed, n, 8, 6).arrays["x"].swapaxes(1, 2))})
        for seed, n in [(0, 120), (1, 60)]
    )
    block_size = 4 if granularity == "per_block" else 0
    weight = replace(W4.weight, granularity=granularity, block_size=block_size)
    calibrated = calibrate(model, data, scheme=Scheme(weight, ACTIVATION), target=target)
    assert calibrated.encodings["v"].granularity == granularity
    tuned = adaround(calibrated, data, **options)
    check_on_grid(tuned)
    first = tuned.metadata["adaround"]["layers"][model.layers()[0].name]
    assert first["error_after"] < 0.7 * first["error_before"]
    assert [layer.bias for layer in tuned.layers()] == ["b", None]
    if not options:  # the gradient moves a weight by one step: too little for two layers of such inputs
        assert error(tuned, model, test) < 0.3 * error(nearest(calibrated), model, test)


@pytest.mark.parametrize("options", [{}, {"asymmetric": False}, {"bias_correction": False}, FAST])
def test_a_network_errs_less_than_nearest_with_quantized_activations(net, target, options):
    data, test = correlated(0, 160, 3, 6, 6), correlated(1, 100, 3, 6, 6)
    calibrated = calibrate(net, data, scheme=W4A8, target=target)
    tuned = adaround(calibrated, data, **options)
    check_on_grid(tuned)
    assert len(tuned.metadata["adaround"]["layers"]) == 3
    assert error(tuned, net, test) < 0.6 * error(nearest(calibrated), net, test)
    for name in set(calibrated.encodings) - {"w", "k", "v"}:
        assert tuned.encodings[name] is calibrated.encodings[name]


def test_biases_make_up_for_the_means_of_what_the_quantized_prefix_gives(net, target):
    """b^ = b + W E[x] - W^ E[x^], the means taken from onnxruntime: x^ behind its activation quantizer."""
    data = correlated(0, 50, 3, 6, 6)
    calibrated = calibrate(net, data, scheme=W4A8, target=target)
    tuned = adaround(calibrated, data, positions=36)
    fitted = np.arange(50) % 10 != 4  # every tenth sample is held out
    x = np.asarray(net.session(quantized=False, outputs=["f"]).run(None, data.arrays)[0])[fitted]
    x_hat = np.asarray(tuned.session(outputs=["f"]).run(None, data.arrays)[0])[fitted]
    expected = net.param("c") + net.param("v") @ x.mean(axis=0) - tuned.param("v") @ x_hat.mean(axis=0)
    np.testing.assert_allclose(tuned.param("c"), expected, atol=2e-4)
    assert np.abs(tuned.param("c") - net.param("c")).max() > 5e-3


def test_targets_of_the_gradient_stand_behind_the_activation(network, target):
    """Outputs that Relu cuts off do not count: with a bias of -100 there is nothing to learn."""
    text = "n (float[N,3,6,6] x) => (float[N,4,6,6] y) { t = Conv<pads=[1,1,1,1]>(x, w, b)  y = Relu(t) }"
    model = network(text, {"w": (4, 3, 3, 3), "b": np.array([-100, 0, 0, 0], np.float32)})
    data = correlated(0, 64, 3, 6, 6)
    calibrated = calibrate(model, data, scheme=W4, target=target)
    tuned = adaround(calibrated, data, **FAST)
    rounded = nearest(calibrated).param("w")
    np.testing.assert_array_equal(tuned.param("w")[0], rounded[0])
    assert (tuned.param("w")[1:] != rounded[1:]).any()


class Killed(Exception):
    pass


class Resuming(Context):
    """Keeps sub-results; dies after `lives` new ones."""

    def __init__(self, lives=10**9):
        self.kept, self.lives, self.new, self.notes, self.steps = {}, lives, 0, [], []

    def memo(self, name, fn, *inputs):
        from qpipe.keys.hashing import digest

        key = digest(name, list(inputs))
        if key not in self.kept:
            if self.new == self.lives:
                raise Killed
            self.new += 1
            self.kept[key] = fn(*inputs)
        return self.kept[key]

    def note(self, sentence):
        self.notes.append(sentence)

    def progress(self, done, total, what=""):
        self.steps.append((done / total, what))


@pytest.mark.parametrize("options", [{}, {**FAST, "iterations": 50}])
def test_a_killed_run_goes_on_at_the_layer_where_it_was(net, target, options):
    data = correlated(0, 40, 3, 6, 6)
    calibrated = calibrate(net, data, scheme=W4A8, target=target)
    whole = adaround(calibrated, data, **options)
    ctx = Resuming(lives=2)
    with pytest.raises(Killed):
        adaround(calibrated, data, **options, ctx=ctx)
    ctx.lives, ctx.new = 10**9, 0
    resumed = adaround(calibrated, data, **options, ctx=ctx)
    assert ctx.new == 1
    for name in net.params:
        np.testing.assert_array_equal(resumed.param(name), whole.param(name))
    adaround(calibrated, Samples({"x": data.arrays["x"] * 1.5}), **options, ctx=ctx)
    assert ctx.new == 4


@pytest.mark.parametrize("options", [{}, {**FAST, "iterations": 50}])
def test_another_bitwidth_of_one_layer_solves_that_layer_and_those_behind_it(net, target, options):
    data = correlated(0, 40, 3, 6, 6)
    calibrated = calibrate(net, data, scheme=W4A8, target=target)
    finer = calibrate(
        net, data, scheme=Scheme(replace(W4A8.weight, bitwidth=6), W4A8.activation), target=target
    )
    ctx = Resuming()
    adaround(calibrated, data, **options, ctx=ctx)
    weights = [layer.weight for layer in calibrated.layers()]
    assert ctx.new == len(weights) == 3
    for place, weight in enumerate(weights):
        ctx.new = 0
        mixed = {**calibrated.encodings, weight: finer.encodings[weight]}
        tuned = adaround(calibrated.with_encodings(mixed), data, **options, ctx=ctx)
        assert tuned.encodings[weight].bitwidth == 6
        assert ctx.new == len(weights) - place


def test_progress_names_the_layers_and_ends_at_all_of_them(net, target):
    data = correlated(0, 20, 3, 6, 6)
    ctx = Resuming()
    calibrated = calibrate(net, data, scheme=W4, target=target)
    tuned = adaround(calibrated, data, solver="gradient", iterations=20, ctx=ctx)
    shares = [share for share, _ in ctx.steps]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert {what for _, what in ctx.steps} == set(tuned.metadata["adaround"]["layers"])


def test_the_same_inputs_give_the_same_bits(net, target):
    data = correlated(0, 40, 3, 6, 6)
    calibrated = calibrate(net, data, scheme=W4A8, target=target)
    for options in ({}, {**FAST, "iterations": 60}):
        first, second = (adaround(calibrated, data, **options) for _ in range(2))
        assert first.pack()[1].keys() == second.pack()[1].keys()
        for name, blob in first.pack()[1].items():
            assert bytes(blob) == bytes(second.pack()[1][name]), name


def test_skipping_a_layer_changes_no_other(network, target):
    text = """n (float[N,8] x) => (float[N,6] y, float[N,6] z) {
        y = Gemm<transB=1>(x, v, a)  z = Gemm<transB=1>(x, w, b) }"""
    model = network(text, {"v": (6, 8), "a": (6,), "w": (6, 8), "b": (6,)})
    data = correlated(0, 60, 8)
    calibrated = calibrate(model, data, scheme=W4, target=target)
    frozen = {**calibrated.encodings, "v": replace(calibrated.encodings["v"], frozen=True)}
    for options in ({"positions": 1}, {**FAST, "iterations": 60}):
        both = adaround(calibrated, data, **options)
        alone = adaround(calibrated.with_encodings(frozen), data, **options)
        np.testing.assert_array_equal(alone.param("w"), both.param("w"))
        np.testing.assert_array_equal(alone.param("v"), model.param("v"))
        assert (both.param("v") != model.param("v")).any()


def test_layers_that_are_not_tuned_are_named_with_their_reason(network, target):
    text = """n (float[N,8] x, float[N,8] z) => (float[N,8] y) {
        a = MatMul(x, w)  r = Relu(a)  b = MatMul(r, w)  c = MatMul(b, v)  d = MatMul(c, u)
        e = MatMul(d, s)  y = Add(e, z) }"""
    model = network(text, {"w": (8, 8), "v": (8, 8), "u": (8, 8), "s": (8, 8)})
    data = Samples({"x": correlated(0, 40, 8).arrays["x"], "z": np.ones((40, 8), np.float32)})
    names = {layer.output: layer.name for layer in model.layers()}
    calibrated = calibrate(model, data, scheme=W4, target=replace(target, nodes=Nodes(exclude=("u",))))
    encodings = {**calibrated.encodings, "v": replace(calibrated.encodings["v"], frozen=True)}
    ctx = Resuming()
    tuned = adaround(calibrated.with_encodings(encodings), data, ctx=ctx)
    expected = {
        names["b"]: f"it shares the weight of '{names['a']}' and is tuned there",
        names["c"]: "its weight was tuned before",
        names["d"]: "its weight has no encoding",
    }
    assert tuned.metadata["adaround"]["not_tuned"] == expected
    assert ctx.notes == [f"'{name}' is not tuned: {reason}." for name, reason in expected.items()]
    assert set(tuned.metadata["adaround"]["layers"]) == {names["a"], names["e"]}


def test_a_layer_that_gains_nothing_keeps_nearest_and_says_so(network, target):
    """Weights that lie on the grid already: no rounding can be better."""
    w = (np.random.default_rng(0).integers(-7, 8, (6, 8)) / 8).astype(np.float32)
    w[:, 0] = 7 / 8
    model = network("n (float[N,8] x) => (float[N,6] y) { y = Gemm<transB=1>(x, w, b) }", {"w": w, "b": (6,)})
    data = correlated(0, 60, 8)
    calibrated = calibrate(model, data, scheme=W4, target=target)
    for options in ({}, {**FAST, "iterations": 30}):
        tuned = adaround(calibrated, data, **options)
        np.testing.assert_array_equal(tuned.param("w"), w)
        np.testing.assert_allclose(tuned.param("b"), model.param("b"), atol=1e-6)


def test_scales_move_only_when_asked_and_stay_powers_of_two(net, target):
    data, test = correlated(0, 160, 3, 6, 6), correlated(1, 100, 3, 6, 6)
    for power_of_two in (False, True):
        scheme = Scheme(replace(W4.weight, power_of_two=power_of_two), None)
        calibrated = calibrate(net, data, scheme=scheme, target=target)
        fixed, moved = (adaround(calibrated, data, scale_search=search) for search in (False, True))
        np.testing.assert_array_equal(fixed.encodings["w"].scale, calibrated.encodings["w"].scale)
        assert (moved.encodings["w"].scale != calibrated.encodings["w"].scale).any()
        assert error(moved, net, test) < error(fixed, net, test)
        check_on_grid(moved)
        if power_of_two:
            assert (np.frexp(moved.encodings["w"].scale)[0] == 0.5).all()


def test_selective_update_keeps_a_layer_only_where_the_outputs_err_less(net, target):
    """Layers tuned on far too few samples: kept or dropped as onnxruntime says of the model at that point."""
    data = correlated(0, 8, 3, 6, 6)
    calibrated = calibrate(net, data, scheme=W4A8, target=target)
    ctx = Resuming()
    options = {"solver": "gradient", "iterations": 60, "lr": 0.3, "batch_size": 4}
    tuned = adaround(calibrated, data, **options, selective_update=True, ctx=ctx)
    check_on_grid(tuned)
    now, reports = nearest(calibrated), tuned.metadata["adaround"]["layers"]
    for layer in tuned.layers():
        report, before = reports[layer.name], error(now, net, data)
        weights = {layer.weight: tuned.param(layer.weight)}
        if report["kept"] == "gradient":
            now = now.with_params(weights)
            assert error(now, net, data) < before
            assert report["outputs_after"] < report["outputs_before"]
        else:
            np.testing.assert_array_equal(tuned.param(layer.weight), now.param(layer.weight))
            note = f"'{layer.name}' keeps nearest rounding: tuning did not lower that of the model's outputs."
            assert note in ctx.notes
    assert {report["kept"] for report in reports.values()} == {"gradient", "nearest"}
    assert error(tuned, net, data) < error(nearest(calibrated), net, data)
    whole = adaround(calibrated, correlated(0, 160, 3, 6, 6), selective_update=True)
    assert all(report["kept"] == "gram" for report in whole.metadata["adaround"]["layers"].values())


GRADIENT = {"solver": "gradient", "iterations": 40}


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        (GRADIENT, [{"iterations": 41}, {"batch_size": 8}, {"lr": 0.1}, {"reg_param": 1.0},
                    {"beta_range": (3.0, 1.0)}, {"warm_start": 0.9}, {"early_stop": 2}, {"seed": 1},
                    {"asymmetric": False}, {"limit": 20}, {"positions": 9}, {"lr_adjust": (0.0, 0.1)},
                    {"drop_ratio": 0.5}]),
        ({}, [{"beam": 2}, {"scale_search": True}, {"bias_correction": False}, {"positions": 9}, {"seed": 1},
              {"asymmetric": False}, {"limit": 20}]),
    ],
)  # fmt: skip
def test_what_was_solved_with_other_settings_is_not_taken(net, target, options, changes):
    data = correlated(0, 40, 3, 6, 6)
    calibrated = calibrate(net, data, scheme=W4A8, target=target)
    ctx = Resuming()
    adaround(calibrated, data, **options, ctx=ctx)
    assert ctx.new == 3
    adaround(calibrated, data, **options, ctx=ctx)
    assert ctx.new == 3
    for changed in changes:
        before = ctx.new
        adaround(calibrated, data, **{**options, **changed}, ctx=ctx)
        assert ctx.new > before, changed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 1000, "reg_param": 0.1},
         "adaround: the solver 'gram' does not read 'iterations', 'reg_param'. Leave it out, or set solver: gradient."),
        ({"lr_adjust": (0.1, 0.1), "drop_ratio": 0.5},
         "adaround: the solver 'gram' does not read 'lr_adjust', 'drop_ratio'. Leave it out, or set solver: gradient."),
        ({"selective_update": True, "asymmetric": False},
         "adaround: 'selective_update' needs asymmetric: true, got false. Leave one of them out."),
        ({"solver": "gradient", "drop_ratio": 0.5, "asymmetric": False},
         "adaround: 'drop_ratio' needs asymmetric: true, got false. Leave one of them out."),
        ({"solver": "gradient", "beam": 16},
         "adaround: the solver 'gradient' does not read 'beam'. Leave it out, or set solver: gram."),
    ],
)  # fmt: skip
def test_options_that_the_solver_does_not_read_are_refused(net, options, message):
    with pytest.raises(InputError) as caught:
        adaround(net, correlated(0, 4, 3, 6, 6), **options)
    assert str(caught.value) == message


def test_models_without_anything_to_tune_are_refused(net, target):
    data = correlated(0, 8, 3, 6, 6)
    with pytest.raises(InputError, match=r"its weight has no encoding.* Put the stage 'calibrate' before"):
        adaround(net, data)
    with pytest.raises(InputError, match="Every weight of the model was tuned before"):
        adaround(nearest(calibrate(net, data, scheme=W4, target=target)), data)


def test_where_calibrate_was_there_already_nothing_tells_to_put_it_before(network, target):
    """A weight of rank 3 has a grid, and is no layer that could be tuned; a network without a weight has neither."""
    data = Samples({"x": np.random.default_rng(0).normal(size=(8, 4, 6, 8)).astype(np.float32)})
    graph = "n (float[N,4,6,8] x) => (float[N,4,6,5] y) { y = MatMul(x, w) }"
    calibrated = calibrate(network(graph, {"w": (4, 8, 5)}), data, scheme=W4, target=target)
    with pytest.raises(InputError, match=r"weight has 3 dimensions.*put 'nearest' in the place of") as caught:
        adaround(calibrated, data)
    assert "calibrate" not in str(caught.value)
    assert nearest(calibrated).encodings["w"].frozen
    graph = "n (float[N,4,6,8] x) => (float[N,4,6,8] y) { y = Relu(x) }"
    bare = calibrate(network(graph, {}), data, scheme=W4A8, target=target)
    with pytest.raises(InputError, match=r"there is no layer.*left every weight in float.*leave 'adaround' out"):
        adaround(bare, data)
