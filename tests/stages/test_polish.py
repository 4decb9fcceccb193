"""polish: nearer to float than what it began with, in onnxruntime; grids that stay grids; kept, resumed, refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qpipe.errors import InputError
from qpipe.model.simulation.run import run
from qpipe.numerics.grid import quantize_dequantize, same_grid
from qpipe.numerics.metrics import sqnr_db
from qpipe.numerics.observers import weight_encoding
from qpipe.numerics.scheme import Scheme, TensorScheme
from qpipe.stage import Context, Samples
from qpipe.stages.adaround import adaround
from qpipe.stages.calibrate import calibrate
from qpipe.stages.cle import cle
from qpipe.stages.nearest import nearest
from qpipe.stages.polish import polish
from qpipe.stages.qat import qat

W2A8 = Scheme(TensorScheme(2, True, True, "per_channel", observer="mse"), TensorScheme(8, False, False))
NET = """n (float[N,3,8,8] x) => (float[N,5] y) {
    t = Conv<pads=[1,1,1,1]>(x, w, b)  r = Relu(t)  m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
    u = Conv<pads=[1,1,1,1]>(m, k, kb)  q = Relu(u)  s = Add(q, m)
    g = GlobalAveragePool(s)  f = Flatten(g)  y = Gemm<transB=1>(f, v, c) }"""
PARAMS = {"w": (8, 3, 3, 3), "b": (8,), "k": (8, 8, 3, 3), "kb": (8,), "v": (5, 8), "c": (5,)}


def samples(seed, count):
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(count, 2, 8, 8)) + 0.5 * rng.normal(size=(count, 2, 1, 1))
    return Samples({"x": np.einsum("cs,nshw->nchw", [[1, 0.2], [0.5, -1], [-0.3, 0.8]], mixed).astype(np.float32)})


def error(model, float_model, data):
    """Squared error of the deployed graph's outputs in onnxruntime, over the variance of float's."""
    y = np.asarray(model.session(mode="deploy").run(None, dict(data.arrays))[0], np.float64)
    r = np.asarray(float_model.session(quantized=False).run(None, dict(data.arrays))[0], np.float64)
    return float(np.square(y - r).sum() / np.square(r - r.mean(0)).sum())


@pytest.fixture
def net(network):
    return network(NET, PARAMS)


@pytest.fixture
def calibrated(net, target):
    return calibrate(net, samples(0, 200), scheme=W2A8, target=target)


@pytest.fixture
def tuned(calibrated):
    return adaround(calibrated, samples(0, 200))


FAST = {"iterations": 60, "lr": 1e-3, "lr_scales": 3e-3, "lr_biases": 1e-2}


def test_outputs_come_nearer_to_float_on_other_samples(tuned, calibrated):
    data, test = samples(0, 200), samples(1, 300)
    found = polish(tuned, data, calibrated, **FAST)
    report = found.metadata["polish"]
    assert report["kept"] == "after"
    assert report["error_after"] < report["error_before"]
    assert report["tuning_after"] < report["tuning_before"]
    assert error(found, calibrated, test) < 0.95 * error(tuned, calibrated, test)


def test_weights_are_on_their_grids_and_what_moved_goes_together(tuned, calibrated):
    found = polish(tuned, samples(0, 200), calibrated, **FAST)
    for name in ("w", "k", "v"):
        encoding = found.encodings[name]
        assert encoding.frozen
        np.testing.assert_array_equal(quantize_dequantize(found.param(name), encoding), found.param(name))
        assert not same_grid(encoding, tuned.encodings[name])
    assert not same_grid(found.encodings["r"], tuned.encodings["r"])
    assert same_grid(found.encodings["r"], found.encodings["m"])  # a MaxPool moves numbers
    for name, encoding in found.encodings.items():
        np.testing.assert_array_equal(encoding.zero_point, tuned.encodings[name].zero_point)


def test_what_is_simulated_while_learning_is_what_the_network_gives(tuned, calibrated):
    """With float biases, the function that is learned on is the network's own, bit for bit, at its start."""
    import torch

    from qpipe.methods.learning.whole import Whole

    data = samples(1, 20)
    whole = Whole(tuned, data.arrays, {"y": np.zeros((20, 5), np.float32)})
    values = {name: variable.hard() for name, variable in whole.start(calibrated).items()}
    found = whole(values, torch.arange(20))[0].numpy()
    np.testing.assert_array_equal(found, run(tuned.with_facts(biases="float"), data.arrays)["y"])


def test_features_are_what_the_blocks_of_both_give(tuned, calibrated):
    """Beside the graph cut at the end of each block, run by itself."""
    import torch

    from qpipe.methods.learning.whole import Whole
    from qpipe.model.network.parts import block

    data, index, draw = samples(1, 20), torch.arange(20), torch.Generator()
    whole = Whole(tuned, data.arrays, {"y": np.zeros((20, 5), np.float32)}, like=calibrated)
    values = {name: variable.hard() for name, variable in whole.start(calibrated).items()}
    (_, targets), (_, *found) = whole.batch(index, draw), whole(values, index, draw)
    assert len(whole(values, index)) == 1
    assert len(found) == len(targets.blocks) == len(whole.blocks) > 0
    for name, of_float, ours in zip(whole.blocks, targets.blocks, found, strict=True):
        wanted = run(block(calibrated, ["x"], [name]), data.arrays, quantized=False)[name]
        np.testing.assert_array_equal(of_float, wanted.ravel())
        assert not np.array_equal(ours, of_float)
        rounded = run(block(tuned.with_facts(biases="float"), ["x"], [name]), data.arrays)[name]
        np.testing.assert_array_equal(ours, rounded.ravel())


@pytest.mark.parametrize("from_float", [True, False])
def test_without_an_iteration_the_model_is_what_it_was(tuned, calibrated, from_float):
    start = calibrated if from_float else tuned
    found = polish(start, samples(0, 60), calibrated, iterations=0)
    wanted = nearest(start)
    for name in wanted.params:
        np.testing.assert_array_equal(found.param(name), wanted.param(name))
    assert all(same_grid(found.encodings[name], encoding) for name, encoding in wanted.encodings.items())


def test_a_model_that_cannot_gain_stays_and_says_so(tuned, calibrated, notes):
    bad = polish(tuned, samples(0, 60), calibrated, iterations=10, lr=0.0, lr_scales=3.0, ctx=notes)
    assert bad.metadata["polish"]["kept"] == "before"
    assert any("do not gain" in sentence for sentence in notes.notes)
    for name in tuned.params:
        np.testing.assert_array_equal(bad.param(name), tuned.param(name))


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "kl"}, {"loss": "kl", "temperature": 3.0}, {"batch_size": 8}, {"lr": 0.0},
        {"lr_scales": 0.0}, {"lr_steps": 0.0}, {"lr_biases": 0.0}, {"hold_out": 0.4}, {"iterations": 9},
        {"limit": 100}, {"seed": 1}, {"early_stop": 1}, {"features": 1.0},
    ],
)  # fmt: skip
def test_every_option_acts(net, target, options):
    """From nearest rounding, where there is much to gain, so that what is kept differs."""
    data = samples(0, 120)
    scheme = replace(W2A8, weight=replace(W2A8.weight, bitwidth=4))
    start = nearest(calibrate(net, data, scheme=scheme, target=target))
    fast = {"iterations": 12, "batch_size": 16, "lr": 3e-2, "lr_scales": 1e-2, "lr_steps": 1e-2}
    plain, other = (polish(start, data, net, **{**fast, **each}) for each in ({}, options))
    reports = [each.metadata["polish"] for each in (plain, other)]
    assert reports[0]["kept"] == "after"
    if "early_stop" in options:
        other = polish(start, data, net, **{**fast, "lr": 10.0, **options})
        assert other.metadata["polish"]["iterations"] < 12
        return
    assert any(not np.array_equal(plain.param(name), other.param(name)) for name in plain.params)
    if "lr" in options:
        assert reports[1]["changed"] == 0.0 < reports[0]["changed"]
    if "lr_biases" in options:
        assert all(np.array_equal(other.param(name), start.param(name)) for name in ("b", "kb", "c"))
    if "lr_steps" in options:
        assert all(same_grid(other.encodings[name], start.encodings[name]) for name in ("x", "r", "q", "s"))
    if "lr_scales" in options:
        assert all(same_grid(other.encodings[name], start.encodings[name]) for name in ("w", "k", "v"))


def test_outputs_that_count_are_named(network, target):
    text = NET.replace("(float[N,5] y)", "(float[N,5] y, float[N,8] f)")
    model = network(text, PARAMS)
    start = nearest(calibrate(model, samples(0, 100), scheme=W2A8, target=target))
    both, one = (polish(start, samples(0, 100), model, **FAST, outputs=names) for names in ((), ("f",)))
    assert not np.array_equal(both.param("w"), one.param("w"))
    np.testing.assert_array_equal(one.param("c"), start.param("c"))  # nothing of f depends on it


def test_of_two_outputs_none_is_given_away(network, target):
    """One whose own weight is coarse, one whose is fine: shifting what both read gains more than it costs."""
    text = """n (float[N,6] x) => (float[N,4] y, float[N,4] z) {
        m = MatMul(x, w)  h = Add(m, b)  r = Relu(h)  y = MatMul(r, v)  z = MatMul(r, u) }"""
    model = network(text, {"w": (6, 8), "b": np.full(8, 1.0, np.float32), "v": (8, 4), "u": (8, 4)})
    data = Samples({"x": np.random.default_rng(3).normal(size=(120, 6)).astype(np.float32)})
    fine = calibrate(model, data, scheme=replace(W2A8, weight=replace(W2A8.weight, bitwidth=8)), target=target)
    start = nearest(fine.with_encodings({**fine.encodings, "v": weight_encoding(model.param("v"), W2A8.weight, 1)}))
    fast = {"iterations": 20, "lr": 0.0, "lr_scales": 0.0, "lr_steps": 0.0, "lr_biases": 1e-2}
    alone, both = (polish(start, data, model, **fast, outputs=names) for names in (("y",), ()))
    wanted = run(model, data.arrays, quantized=False)

    def db(found):
        outputs = run(found, data.arrays)
        return np.array([sqnr_db(outputs[name], wanted[name]) for name in "yz"])

    gained, lost = db(alone) - db(start)
    assert (gained > 0.5, lost < -6.0) == (True, True)
    assert (db(both) > db(start) - 0.1).all()
    report = both.metadata["polish"]
    assert sum(report["outputs_before"].values()) == pytest.approx(report["error_before"])


def test_a_model_without_blocks_inside_has_no_features(network, target):
    model = network("n (float[N,6] x) => (float[N,4] y) { y = MatMul(x, w) }", {"w": (6, 4)})
    data = Samples({"x": np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)})
    start = nearest(calibrate(model, data, scheme=W2A8, target=target))
    with pytest.raises(InputError, match=r"polish\.features: no block ends inside the model"):
        polish(start, data, model, features=1.0)


class Kept(Context):
    """A context that keeps sub-results, and may be killed after so many."""

    def __init__(self, most=10**9):
        self.store, self.most, self.made = {}, most, 0

    def memo(self, name, fn, *inputs):
        from qpipe.keys.hashing import digest

        key = digest("test", name, list(inputs))
        if key not in self.store:
            if self.made == self.most:
                raise KeyboardInterrupt
            self.store[key] = fn(*inputs)
            self.made += 1
        return self.store[key]


def test_killed_and_gone_on_it_ends_with_the_same_bits(tuned, calibrated):
    data = samples(0, 100)
    options = {**FAST, "iterations": 20}
    whole = polish(tuned, data, calibrated, **options)
    killed = Kept(most=6)
    with pytest.raises(KeyboardInterrupt):
        polish(tuned, data, calibrated, **options, ctx=killed)
    killed.most = 10**9
    again = polish(tuned, data, calibrated, **options, ctx=killed)
    assert killed.made == 10
    assert again.metadata["polish"] == whole.metadata["polish"]
    for name in whole.params:
        np.testing.assert_array_equal(again.param(name), whole.param(name))
    assert all(same_grid(again.encodings[name], e) for name, e in whole.encodings.items())


def test_tuned_weights_need_the_model_that_they_were_tuned_from(tuned, net, network):
    with pytest.raises(InputError, match=r"polish\.float_model: 'w' was tuned before, so its float values are gone"):
        polish(tuned, samples(0, 40))
    with pytest.raises(InputError, match="was tuned there too"):
        polish(tuned, samples(0, 40), tuned)
    other = network(NET, {**PARAMS, "k": (8, 8, 3, 3)})
    smaller = network("n (float[N,3,8,8] x) => (float[N,3,8,8] y) { y = Relu(x) }", {})
    with pytest.raises(InputError, match=r"polish\.float_model: 'w' is not there"):
        polish(tuned, samples(0, 40), smaller)
    assert polish(tuned, samples(0, 40), other, iterations=0)
    with pytest.raises(InputError, match="no grid that could be learned"):
        polish(net, samples(0, 40))


def test_a_float_model_from_before_cle_is_refused(network, target):
    """Its outputs are the same, its weights have the same names and shapes, and lie near enough."""
    text = "n (float[N,3,8,8] x) => (float[N,4,4,4] y) { t = Conv(x, w, b)  r = Relu(t)  y = Conv(r, k) }"
    model, data = network(text, {"w": (8, 3, 3, 3), "b": (8,), "k": (4, 8, 3, 3)}), samples(0, 40)
    plain, equalized = (calibrate(each, data, scheme=W2A8, target=target) for each in (model, cle(model)))
    for stage in (polish, qat):
        with pytest.raises(InputError, match=r"float_model: it did not go through the same 'cle'"):
            stage(nearest(equalized), data, plain)
    assert polish(nearest(equalized), data, equalized, iterations=0)


def test_scales_that_are_powers_of_two_stay(net, target):
    scheme = Scheme(replace(W2A8.weight, power_of_two=True), replace(W2A8.activation, power_of_two=True))
    start = nearest(calibrate(net, samples(0, 100), scheme=scheme, target=target))
    found = polish(start, samples(0, 100), net, **FAST)
    assert found.metadata["polish"]["kept"] == "after"
    assert all(same_grid(found.encodings[name], encoding) for name, encoding in start.encodings.items())


def test_a_model_of_fixed_batches_is_learned_batch_by_batch(network, target):
    found = []
    for size in ("4", "N"):
        model = network(NET.replace("N,", f"{size},"), PARAMS)
        start = nearest(calibrate(model, samples(0, 40), scheme=W2A8, target=target))
        found.append(polish(start, samples(0, 40), model, **{**FAST, "iterations": 10, "batch_size": 6}))
    assert found[0].metadata["polish"]["kept"] == "after"
    np.testing.assert_allclose(found[0].param("b"), found[1].param("b"), rtol=1e-3, atol=1e-4)
