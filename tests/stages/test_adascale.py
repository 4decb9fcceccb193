"""adascale: weights stretched before they are rounded err less, what is folded is on its grid; every option acts."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest

from qpipe.numerics.scheme import Scheme
from qpipe.stage import Samples
from qpipe.stages.adascale import adascale
from qpipe.stages.calibrate import calibrate
from qpipe.stages.nearest import nearest
from tests.stages.blockwise import (
    DATA,
    TEST,
    W3A8,
    Remembering,
    assert_on_grid,
    built,
    calibrated,
    error,
    name_of,
    net,
    placed,
    same_numbers,
)

BASE = {
    "begin": "model", "iterations": 40, "batch_size": 16, "hold_out": 0.0, "lr_factors": 0.01,
    "selective_update": False,
}  # fmt: skip


@functools.cache
def base():
    return adascale(calibrated(), DATA, **BASE)


def test_what_is_folded_lies_on_its_grid_and_errs_less_than_nearest():
    assert_on_grid(base())
    assert error(base(), net(), TEST) < 0.9 * error(nearest(calibrated()), net(), TEST)


def test_nothing_learned_is_nearest():
    assert same_numbers(adascale(calibrated(), DATA, **{**BASE, "iterations": 0}), nearest(calibrated()))


OPTIONS = {
    "blocks": "per_layer", "begin": "gram", "limit": 40, "seed": 1, "iterations": 41, "batch_size": 9,
    "lr_ranges": 0.01, "lr_factors": 0.02, "drop_ratio": 1.0, "activations": False, "hold_out": 0.3,
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_acts(option):
    assert not same_numbers(adascale(calibrated(), DATA, **{**BASE, option: OPTIONS[option]}), base())


def test_blocks_of_scales_each_have_their_own_range():
    text = "n (float[N,3,16] x) => (float[N,3,6] y) { h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v) }"
    model = built(text, {"w": (16, 12), "v": (12, 6)})
    data = Samples({"x": np.random.default_rng(0).normal(size=(64, 3, 16)).astype(np.float32)})
    weight = replace(W3A8.weight, granularity="per_block", block_size=4)
    blocked = calibrate(model, data, scheme=Scheme(weight, W3A8.activation), target=placed())
    tuned = adascale(blocked, data, **BASE)
    assert_on_grid(tuned)
    assert tuned.encodings["v"].scale.shape == (3, 6)
    moved = np.log(tuned.encodings["v"].scale / blocked.encodings["v"].scale)
    assert len(np.unique(moved.round(6))) > 10
    assert error(tuned, model, data) < error(nearest(blocked), model, data)


def test_the_same_bits_twice_from_files_and_selection_acts():
    given = {"iterations": 10, "batch_size": 16}
    wanted = name_of(adascale(calibrated(), DATA, **given, ctx=Remembering()))
    assert name_of(adascale(calibrated(), DATA, **given, memory="disk")) == wanted
    watched = adascale(calibrated(), DATA, **{**BASE, "selective_update": True}).metadata["adascale"]["parts"]
    assert any("model_error_after" in report for report in watched.values())
