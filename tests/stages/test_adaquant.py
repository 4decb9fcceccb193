"""adaquant: parts that err less in onnxruntime, options that act, the same bits from disk and after a kill."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest

from qpipe.errors import InputError
from qpipe.methods.learning.parts import find_parts
from qpipe.model import Model
from qpipe.numerics.grid import quantize_dequantize
from qpipe.numerics.scheme import Scheme
from qpipe.stage import Samples
from qpipe.stages.adaquant import adaquant
from qpipe.stages.adaround import adaround
from qpipe.stages.calibrate import calibrate
from qpipe.stages.nearest import nearest
from tests.stages.blockwise import (
    DATA,
    NET,
    PARAMS,
    QUICK,
    TEST,
    W3A8,
    Killed,
    Remembering,
    assert_on_grid,
    built,
    calibrated,
    correlated,
    error,
    name_of,
    net,
    placed,
    same_numbers,
)

BASE = {
    "begin": "model", "iterations": 12, "batch_size": 16, "hold_out": 0.0, "lr": 0.05,
    "selective_update": False,
}  # fmt: skip
"""From nearest codes, where everything gains."""


@functools.cache
def base():
    """What BASE gives."""
    return adaquant(calibrated(), DATA, **BASE)


def test_blocks_err_less_than_the_codes_that_they_began_with():
    tuned = adaquant(calibrated(), correlated(0, 128), begin="model", iterations=100)
    assert_on_grid(tuned)
    found = tuned.metadata["adaquant"]["parts"]
    assert [len(report["layers"]) for report in found.values()] == [1, 2, 1]
    assert error(tuned, net(), TEST) < 0.5 * error(nearest(calibrated()), net(), TEST)
    (block,) = (report for report in found.values() if len(report["layers"]) == 2)
    assert block["kept"] == "after"
    assert block["error_after"] < block["error_before"]
    assert 0 < block["changed"] < 0.5


def test_without_iterations_it_is_adaround_and_behind_that_it_is_what_it_got():
    solved = adaround(calibrated(), DATA)
    assert same_numbers(adaquant(calibrated(), DATA, iterations=0), solved)
    assert same_numbers(adaquant(solved, DATA, calibrated(), begin="model", iterations=0), solved)
    plain = adaquant(calibrated(), DATA, begin="model", iterations=0, hold_out=0.0)
    assert same_numbers(plain, nearest(calibrated()))


def test_inputs_that_never_vary_are_solved_too():
    flat = Samples({"x": np.ones((16, 3, 6, 6), np.float32)})
    assert_on_grid(adaquant(calibrated(), flat, iterations=0))


def test_the_same_bits_twice_from_files_and_after_a_kill():
    wanted = name_of(adaquant(calibrated(), DATA, **QUICK, ctx=Remembering()))
    assert name_of(adaquant(calibrated(), DATA, **QUICK, memory="disk")) == wanted
    count = len(find_parts(calibrated())[0])
    with pytest.raises(Killed):
        adaquant(calibrated(), DATA, **QUICK, ctx=(first := Remembering(killed_after=count - 1)))
    again = Remembering(first.remembered)
    assert name_of(adaquant(calibrated(), DATA, **QUICK, ctx=again)) == wanted
    assert (first.ran.count("part"), again.ran.count("part")) == (count - 1, 1)
    assert again.ran.count("gram") == 0


OPTIONS = {
    "blocks": "per_layer", "ops": ["Gemm"], "begin": "gram", "limit": 40, "seed": 1, "iterations": 13, "batch_size": 8,
    "lr": 0.02, "rates": "absolute", "lr_biases": 1e-2, "lr_scales": 1e-2, "lr_steps": 0.5,
    "schedule": "constant", "lr_adjust": (0.0, 0.2), "learn_scales": False, "learn_steps": False, "update_bias": False,
    "output_qdq": True, "drop_ratio": 0.5, "inputs": "parallel", "hold_out": 0.3,
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_acts(option):
    assert not same_numbers(adaquant(calibrated(), DATA, **{**BASE, option: OPTIONS[option]}), base())


def test_the_options_that_act_now_and_then():
    given = {**BASE, "lr": 3.0, "schedule": "constant", "hold_out": 0.3, "iterations": 40}  # it runs away
    ran, stopped = (
        [report["iterations"] for report in found.metadata["adaquant"]["parts"].values()]
        for found in (adaquant(calibrated(), DATA, **given, early_stop=looks) for looks in (0, 1))
    )
    assert set(ran) == {40}
    assert min(stopped) < 40
    watched = adaquant(calibrated(), DATA, **{**BASE, "selective_update": True}).metadata["adaquant"]["parts"]
    for report in watched.values():
        better = report["model_error_after"] < report["model_error_before"]
        assert report["kept"] == ("after" if better else "before")


def positive(outputs, labels):
    """A metric of a user's: the share of samples whose first output is above that of the label."""
    return float((outputs[:, 0] > labels).mean())


@pytest.mark.parametrize("metric", ["top1", "sqnr_db", f"{__name__}:positive"])
def test_a_score_may_decide_what_is_kept(metric):
    """Each part as the score of the whole model says, where it says the same of both as the error says."""
    labels = np.asarray(net().session(quantized=False).run(None, DATA.arrays)[0]).argmax(1)
    given = {**BASE, "lr": 0.2, "selective_update": metric}  # too fast: some parts get worse
    tuned = adaquant(calibrated(), Samples(DATA.arrays, labels), **given)
    reports = [r for r in tuned.metadata["adaquant"]["parts"].values() if "model_score_before" in r]
    assert reports
    for report in reports:
        ends = ("before", "after")
        before, after = ([report[f"model_{what}_{end}"] for what in ("score", "error")] for end in ends)
        better = after[0] > before[0] or (after[0] == before[0] and after[1] < before[1])
        assert report["kept"] == ("after" if better else "before")
    final = tuned.metadata["adaquant"]["parts"]
    if metric == "top1":  # the last part's score is that of the whole model in onnxruntime
        last = list(final.values())[-1]
        y = np.asarray(Model.of(tuned).session(mode="reference").run(None, DATA.arrays)[0])
        said = last["model_score_after" if last["kept"] == "after" else "model_score_before"]
        assert said == pytest.approx((y.argmax(1) == labels).mean(), abs=0.04)


def test_a_score_that_needs_labels_is_refused_without():
    with pytest.raises(InputError, match=r"adaquant.selective_update: 'top1' needs labels, and the data have none"):
        adaquant(calibrated(), DATA, selective_update="top1")


def test_update_bias_off_leaves_biases_and_a_named_block_leaves_the_rest():
    tuned = adaquant(calibrated(), DATA, **BASE, update_bias=False)
    assert all(tuned.param(name).tobytes() == calibrated().param(name).tobytes() for name in ("b", "kb", "mb", "c"))
    block = next(part for part in find_parts(calibrated())[0] if len(part.layers) == 2)
    one = adaquant(calibrated(), DATA, **BASE, blocks=[block.name])
    assert list(one.metadata["adaquant"]["parts"]) == [block.name]
    assert len(one.metadata["adaquant"]["not_tuned"]) == 2
    assert {name for name, e in one.encodings.items() if e.frozen} == {"k", "m"}


def test_a_weight_beyond_its_range_comes_back():
    """Its gradient counts where it points inwards: the target is of weights half as large."""
    reference = calibrated().with_params({"v": 0.5 * calibrated().param("v")})
    small = calibrated().encodings["v"]
    narrow = replace(small, scale=small.scale / 4)
    model = calibrated().with_encodings({**calibrated().encodings, "v": narrow})
    at_the_end = np.abs(quantize_dequantize(model.param("v"), narrow)) >= 3 * narrow.scale[:, None] * (1 - 1e-6)
    tuned = adaquant(
        model, DATA, reference, begin="model", iterations=60, lr=0.1, learn_scales=False, hold_out=0.0
    )
    steps = np.abs(tuned.param("v")) / narrow.scale[:, None]
    assert at_the_end.mean() > 0.5
    assert (steps[at_the_end] < 2.5).any()


def test_what_cannot_be_is_refused_in_one_line():
    solved = adaround(calibrated(), DATA)
    with pytest.raises(InputError, match=r"adaquant.float_model: 'w' was tuned before, .*float_model: start"):
        adaquant(solved, DATA)
    with pytest.raises(InputError, match="was tuned there too"):
        adaquant(solved, DATA, solved)
    with pytest.raises(InputError, match="lies further from the tuned one than 0 does"):
        adaquant(solved, DATA, built(NET, PARAMS, seed=5))
    with pytest.raises(InputError, match="did not go through the same 'cle'"):
        adaquant(solved, DATA, calibrated().with_metadata({"cle": {"pairs": 1}}))
    with pytest.raises(InputError, match=r"blocks: the model has no block or layer 'nothing'"):
        adaquant(calibrated(), DATA, blocks=["nothing"])
    with pytest.raises(InputError, match="Put the stage 'calibrate' before 'adaquant'"):
        adaquant(net(), DATA)
    with pytest.raises(InputError, match="drop_ratio 0"):
        adaquant(calibrated(), DATA, drop_ratio=0.0, inputs="parallel")
    with pytest.raises(InputError, match=r"adaquant.lr_scales: learn_scales is true, got 0"):
        adaquant(calibrated(), DATA, learn_scales=True, lr_scales=0.0)


def test_powers_of_two_stay_and_asking_for_more_is_refused():
    two = [replace(part, power_of_two=True) for part in (W3A8.weight, W3A8.activation)]
    model = calibrate(net(), DATA, scheme=Scheme(*two), target=placed())
    tuned = adaquant(model, DATA, **BASE)
    assert all(np.array_equal(tuned.encodings[name].scale, e.scale) for name, e in model.encodings.items())
    with pytest.raises(InputError, match=r"adaquant.learn_scales: the scales of .* are powers of two"):
        adaquant(model, DATA, learn_scales=True)
    with pytest.raises(InputError, match=r"adaquant.learn_steps: the scales of .* are powers of two"):
        adaquant(model, DATA, learn_steps=True)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_block"])
def test_other_grids_and_a_tied_weight(granularity):
    text = """n (float[N,6,8] x) => (float[N,6,8] y) {
        a = MatMul(x, w)  h = Add(a, b)  s = Sigmoid(h)  g = Mul(h, s)
        c = MatMul(g, w)  d = Add(c, x)  y = MatMul(d, v) }"""
    model = built(text, {"w": (8, 8), "b": (8,), "v": (8, 8)})
    data = Samples({"x": np.random.default_rng(0).normal(size=(64, 6, 8)).astype(np.float32)})
    weight = replace(W3A8.weight, granularity=granularity, block_size=4 if granularity == "per_block" else 0)
    open_ = calibrate(model, data, scheme=Scheme(weight, W3A8.activation), target=placed())
    tuned = Model.of(adaquant(open_, data, **BASE))
    assert_on_grid(tuned)
    assert error(tuned, model, data) < error(nearest(open_), model, data)
