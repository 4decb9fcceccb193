"""autoround: signed steps that err less, by at most one code, with the rates of its paper; every option acts."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from qpipe.numerics.grid import quantize
from qpipe.stages.adaround import adaround
from qpipe.stages.autoround import autoround, rate_for
from qpipe.stages.nearest import nearest
from tests.stages.blockwise import (
    DATA,
    TEST,
    Remembering,
    assert_on_grid,
    calibrated,
    error,
    name_of,
    net,
    same_numbers,
)

BASE = {"begin": "model", "iterations": 16, "hold_out": 0.0, "selective_update": False}


@functools.cache
def base():
    return autoround(calibrated(), DATA, **BASE)


def test_codes_move_by_one_at_most_and_the_outputs_err_less():
    tuned = autoround(calibrated(), DATA, **BASE, learn_ranges=False)
    assert_on_grid(tuned)
    plain = nearest(calibrated())
    for name in ("w", "k", "m", "v"):
        codes = [quantize(model.param(name), model.encodings[name]) for model in (plain, tuned)]
        assert np.abs(codes[1] - codes[0]).max() == 1
        assert tuned.encodings[name].scale.tobytes() == plain.encodings[name].scale.tobytes()
    assert error(tuned, net(), TEST) < 0.95 * error(plain, net(), TEST)
    for name in ("b", "kb", "mb", "c"):
        assert tuned.param(name).tobytes() == calibrated().param(name).tobytes()


OPTIONS = {
    "blocks": "per_layer", "nblocks": 2, "begin": "gram", "limit": 40, "seed": 1, "iterations": 17, "batch_size": 9,
    "lr": 0.01, "lr_scales": 0.01, "learn_ranges": False, "quantized_input": False, "hold_out": 0.3,
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_acts(option):
    assert not same_numbers(autoround(calibrated(), DATA, **{**BASE, option: OPTIONS[option]}), base())


def test_rates_are_those_of_the_paper():
    assert (rate_for(200, 4), rate_for(1000, 4), rate_for(1000, 3)) == (1 / 200, 1 / 1000, 2 / 1000)


def test_the_same_bits_from_files_and_none_is_adaround():
    wanted = name_of(autoround(calibrated(), DATA, iterations=10, ctx=Remembering()))
    assert name_of(autoround(calibrated(), DATA, iterations=10, memory="disk")) == wanted
    none = autoround(calibrated(), DATA, iterations=0)
    assert same_numbers(none, adaround(calibrated(), DATA))


def test_selection_acts():
    watched = autoround(calibrated(), DATA, **{**BASE, "selective_update": True}).metadata["autoround"]["parts"]
    assert any("model_error_after" in report for report in watched.values())
