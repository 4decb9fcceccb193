"""bn_reestimate: moments of all samples, folded and unfolded alike, codes that stay, and a judge."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from qpipe.errors import InputError
from qpipe.numerics.grid import quantize, quantize_dequantize
from qpipe.numerics.scheme import Scheme, TensorScheme
from qpipe.stage import Samples
from qpipe.stages.bn_reestimate import bn_reestimate, pooled
from qpipe.stages.bnf import bnf
from qpipe.stages.calibrate import calibrate
from qpipe.stages.nearest import nearest

W3A8 = Scheme(TensorScheme(3, True, True, "per_channel", observer="mse"), TensorScheme(8, False, False))
NET = """n (float[N,3,8,8] x) => (float[N,5] y) {
    t = Conv<pads=[1,1,1,1]>(x, w)  u = BatchNormalization<epsilon=1e-12>(t, g, b, m, bnvar)  r = Relu(u)
    t2 = Conv<group=2, pads=[1,1,1,1]>(r, k)  u2 = BatchNormalization<epsilon=1e-12>(t2, g2, b2, m2, bn2var)
    r2 = Relu(u2)  p = GlobalAveragePool(r2)  f = Flatten(p)  y = Gemm<transB=1>(f, v, c) }"""
PARAMS = {
    "w": (8, 3, 3, 3), "g": (8,), "b": (8,), "m": (8,), "bnvar": (8,), "k": (8, 4, 3, 3),
    "g2": (8,), "b2": (8,), "m2": (8,), "bn2var": (8,), "v": (5, 8), "c": (5,),
}  # fmt: skip


def samples(seed, count):
    return Samples({"x": np.random.default_rng(seed).normal(size=(count, 3, 8, 8)).astype(np.float32)})


def value_of(model, name, data):
    """A value of the float graph with the model's parameters, by onnxruntime."""
    return np.asarray(model.session(quantized=False, outputs=[name]).run(None, dict(data.arrays))[0], np.float64)


@pytest.fixture
def trained(network):
    """A net whose statistics are those of its inputs."""
    return bn_reestimate(network(NET, PARAMS), samples(0, 400))


def test_moments_are_those_of_all_values_in_batches_of_any_size():
    rng = np.random.default_rng(0)
    x = 1e4 + rng.normal(size=(50, 4, 3)) * [[[1e-1], [1], [10], [100]]]
    for cuts in ([50], [1, 49], [7, 3, 40], [10] * 5):
        found = pooled(torch.tensor(x).split(cuts), 1)
        rows = np.moveaxis(x, 1, 0).reshape(4, -1)
        np.testing.assert_allclose(found.mean, rows.mean(1), rtol=1e-12)
        np.testing.assert_allclose(found.var, rows.var(1), rtol=1e-9)
        assert found.samples == 150


def test_statistics_become_those_of_what_comes_in_behind_those_before(trained):
    data = samples(0, 400)
    for name, mean, var in (("t", "m", "bnvar"), ("t2", "m2", "bn2var")):
        rows = np.moveaxis(value_of(trained, name, data), 1, 0).reshape(8, -1)
        np.testing.assert_allclose(trained.param(mean), rows.mean(1), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(trained.param(var), rows.var(1), rtol=1e-4)


def weights_only(model, target):
    return nearest(calibrate(model, samples(1, 64), scheme=replace(W3A8, activation=None), target=target))


def test_what_was_folded_is_re_estimated_as_what_was_not(trained, target):
    """Weights rounded per channel: a fold changes scales, not codes, so both nets are one function, and stay one."""
    data, test = samples(2, 200), samples(3, 50)
    apart, folded = weights_only(trained, target), weights_only(bnf(trained), target)
    before = value_of(apart, "y", test)
    np.testing.assert_allclose(value_of(folded, "y", test), before, rtol=1e-3, atol=1e-3)
    found, wanted = (value_of(bn_reestimate(each, data), "y", test) for each in (folded, apart))
    assert np.abs(wanted - before).max() > 0.05
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=2e-3)


def test_codes_stay_and_weights_lie_on_the_wider_grids(trained, target):
    before = nearest(calibrate(bnf(trained), samples(1, 64), scheme=W3A8, target=target))
    after = bn_reestimate(before, samples(2, 200))
    for name in ("w", "k"):
        old, new = before.encodings[name], after.encodings[name]
        np.testing.assert_array_equal(quantize(before.param(name), old), quantize(after.param(name), new))
        np.testing.assert_array_equal(quantize_dequantize(after.param(name), new), after.param(name))
        assert new.frozen
        assert not np.array_equal(old.scale, new.scale)
    assert after.encodings["v"] is before.encodings["v"]


@pytest.mark.parametrize("granularity", ["per_tensor", "per_block"])
def test_means_are_right_whatever_the_scales(trained, target, granularity):
    weight = replace(W3A8.weight, granularity=granularity, block_size=2 if granularity == "per_block" else 0)
    scheme = Scheme(weight, None)
    before = nearest(calibrate(bnf(trained), samples(1, 64), scheme=scheme, target=target))
    data = samples(2, 200)
    after = bn_reestimate(before, data)
    rows = np.moveaxis(value_of(after, "u", data), 1, 0).reshape(8, -1)
    np.testing.assert_allclose(rows.mean(1), trained.param("b"), atol=1e-4)
    left = after.metadata["bn_reestimate"]["left"]
    if granularity == "per_tensor":
        assert all("one for each channel" in reason for reason in left.values())
        np.testing.assert_array_equal(after.param("w"), before.param("w"))
    else:
        assert left == {}
        np.testing.assert_allclose(rows.std(1), np.abs(trained.param("g")), rtol=1e-4)


def test_float_judges(trained, target, notes):
    data, test = samples(2, 300), samples(3, 200)
    before = nearest(calibrate(bnf(trained), samples(1, 64), scheme=W3A8, target=target))
    wanted = value_of(trained, "y", test)

    def error(model):
        y = np.asarray(model.session(mode="reference").run(None, dict(test.arrays))[0])
        return float(np.square(y - wanted).sum() / np.square(wanted).sum())

    after = bn_reestimate(before, data, trained, ctx=notes)
    report = after.metadata["bn_reestimate"]
    assert report["kept"] == "reestimated"
    assert report["error_after"] < report["error_before"]
    assert error(after) < error(before)


def test_what_brings_the_outputs_no_nearer_to_float_is_left(trained, target, notes):
    before = weights_only(bnf(trained), target)
    after = bn_reestimate(before, samples(2, 200), before, ctx=notes)  # float's outputs are its own
    assert after.metadata["bn_reestimate"]["kept"] == "before"
    assert any("statistics stay" in sentence for sentence in notes.notes)
    for name in before.params:
        np.testing.assert_array_equal(after.param(name), before.param(name))


def test_a_model_without_normalizations_is_refused(network):
    model = network("n (float[N,4] x) => (float[N,3] y) { y = Gemm(x, w) }", {"w": (4, 3)})
    with pytest.raises(InputError, match="no BatchNormalization, and 'bnf' folded none"):
        bn_reestimate(model, Samples({"x": np.zeros((4, 4), np.float32)}))
