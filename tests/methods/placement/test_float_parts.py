"""Sums that normalizations read and spectra stay in float, on graphs of their own; what that is worth in a file."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qpipe.methods.placement.placement import Placement, place
from qpipe.methods.placement.target import Target
from qpipe.model import Model
from qpipe.numerics.metrics import sqnr_db
from qpipe.stage import Samples
from qpipe.stages.calibrate import calibrate
from tests.model.nets import normal, parsed
from tests.model.quantized import ONNXRUNTIME, SHIPPED, scheme

STREAM = """n (float[N,3,8,8] x) => (float[N,16,4] y) {
    c = Conv<kernel_shape=[2,2], strides=[2,2]>(x, w)  f = Reshape(c, flat)  t = Transpose<perm=[0,2,1]>(f)
    e = Add(t, place)  n1 = LayerNormalization(e, one)  m = MatMul(n1, v)  s = Add(e, m)
    n2 = LayerNormalization(s, one)  k = MatMul(n2, v)  r = Add(s, k)  y = LayerNormalization(r, one) }"""
SPECTRUM = """n (float[N,1,64] x) => (float[N,4,p] y) {
    r = Conv(x, cosine)  i = Conv(x, sine)  rr = Mul(r, r)  ii = Pow(i, two)  p2 = Add(rr, ii)  e = Add(p2, small)
    l = Log(e)  y = Conv(l, v) }"""
WAVES = 2 * np.pi * np.outer(np.arange(4), np.arange(16)).reshape(4, 1, 16) / 16


def stream() -> Model:
    given: dict[str, Any] = {
        "w": normal(4, 3, 2, 2), "v": normal(4, 4), "one": np.ones(4, np.float32), "place": normal(16, 4),
        "flat": np.array([0, 4, -1]),
    }  # fmt: skip
    return Model.from_proto(parsed(STREAM, **given))


def spectrum(text: str = SPECTRUM) -> Model:
    return Model.from_proto(
        parsed(
            text, cosine=np.cos(WAVES).astype(np.float32), sine=np.sin(WAVES).astype(np.float32), v=normal(4, 4, 1),
            two=np.float32(2), small=np.float32(1e-6),
        )
    )  # fmt: skip


def placed(model: Model, target: Target = SHIPPED) -> Placement:
    return place(model, target, scheme())


def test_the_stream_of_a_transformer_stays_in_float_behind_a_convolution_too() -> None:
    assert list(placed(stream()).activations) == ["x", "c", "f", "t", "n1", "n2"]


@pytest.mark.parametrize("target", [ONNXRUNTIME, replace(SHIPPED, float_sums=())], ids=["no floats", "not asked"])
def test_it_has_grids_where_no_layer_gives_floats_or_the_target_does_not_ask(target: Target) -> None:
    assert {"e", "s", "r"} <= set(placed(stream(), target).activations)


def test_a_sum_that_a_layer_reads_has_its_grid() -> None:
    model = Model.from_proto(
        parsed(
            """n (float[N,4,8,8] x) => (float[N,4,8,8] y, float[N,4,8,8] z) {
            c = Conv(x, w)  s = Add(c, x)  z = LayerNormalization(s, one)  y = Conv(s, w) }""",
            w=normal(4, 4, 1, 1), one=np.ones(8, np.float32),
        )
    )  # fmt: skip
    assert "s" in placed(model).activations


def test_a_spectrum_stays_in_float_up_to_its_logarithm_with_the_weights_that_make_it() -> None:
    found = placed(spectrum())
    assert list(found.activations) == ["l", "y"]
    assert list(found.weights) == ["v"]
    assert found.in_float == dict.fromkeys(["cosine", "sine"], "it makes a spectrum, of which a logarithm is taken")
    assert {"x", "r", "rr"} <= set(placed(spectrum(), replace(SHIPPED, float_spectra=())).activations)


@pytest.mark.parametrize("activation", ["Relu(r)", "Clip(r, small, two)"])
def test_a_logarithm_of_what_was_learned_is_no_spectrum(activation: str) -> None:
    found = placed(spectrum(SPECTRUM.replace("rr = Mul(r, r)", f"h = {activation}  rr = Mul(h, h)")))
    assert {"x", "h"} <= set(found.activations)
    assert {"cosine", "sine", "v"} == set(found.weights)


def test_a_spectrum_that_is_bounded_from_below_is_one() -> None:
    assert "x" not in placed(spectrum(SPECTRUM.replace("Add(p2, small)", "Clip(p2, small)"))).activations


def test_quiet_tones_beside_loud_ones_come_through_the_logarithm() -> None:
    rng = np.random.default_rng(0)
    sound = rng.standard_normal((32, 1, 64)) * 10 ** rng.uniform(-3, 0, (32, 1, 1))
    data = Samples({"x": sound.astype(np.float32)})
    model = spectrum()
    found = []
    for target in (SHIPPED, replace(SHIPPED, float_spectra=())):
        made = calibrate(model, data, scheme=scheme(), target=target)
        feed = {"x": data.arrays["x"]}
        (now,), (was,) = (each.session("deploy").run(None, feed) for each in (made, model))
        found.append(sqnr_db(now, was))
    assert found[0] > 30
    assert found[0] > found[1] + 10
