"""brecq: every rounding learns, weighed errors and what is dropped act, the same bits from files and after a kill."""

from __future__ import annotations

import functools

import pytest

from qpipe.errors import InputError
from qpipe.stages.adaround import adaround
from qpipe.stages.brecq import brecq
from qpipe.stages.nearest import nearest
from tests.stages.blockwise import (
    DATA,
    QUICK,
    TEST,
    Killed,
    Remembering,
    assert_on_grid,
    calibrated,
    error,
    name_of,
    net,
    same_numbers,
)

BASE = {
    "begin": "model", "iterations": 8, "batch_size": 16, "hold_out": 0.0, "selective_update": False, "loss": "mse",
    "rounding": "rectified_sigmoid", "lr": 1e-2,
}  # fmt: skip
RATES = {"rectified_sigmoid": 0.1, "ste_weight": 0.03, "flexround": 0.01, "signed_step": 0.03}


@functools.cache
def base():
    return brecq(calibrated(), DATA, **BASE)


@pytest.mark.parametrize("rounding", RATES)
def test_every_rounding_errs_less_than_nearest(rounding):
    given = {**BASE, "iterations": 60, "rounding": rounding, "lr": RATES[rounding]}
    tuned = brecq(calibrated(), DATA, **given)
    assert_on_grid(tuned)
    assert any(report["kept"] == "after" for report in tuned.metadata["brecq"]["parts"].values())
    assert error(tuned, net(), TEST) < 0.95 * error(nearest(calibrated()), net(), TEST)


OPTIONS = {
    "blocks": "per_layer", "begin": "gram", "limit": 40, "seed": 1, "rounding": "ste_weight", "loss": "fisher_diag",
    "iterations": 9, "batch_size": 8, "lr": 0.05, "lr_biases": 1e-2, "lr_scales": 1e-2, "lr_steps": 0.5,
    "reg_param": 1.0, "beta_range": (9.0, 1.0), "warm_start": 0.7, "drop": 0.5, "input_drop": 0.5, "hold_out": 0.3,
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_acts(option):
    assert not same_numbers(brecq(calibrated(), DATA, **{**BASE, option: OPTIONS[option]}), base())


def test_early_stop_and_selection_act():
    given = {**BASE, "rounding": "ste_weight", "lr": 5.0, "hold_out": 0.3, "iterations": 40}  # it runs away
    stopped = brecq(calibrated(), DATA, **given, early_stop=1).metadata["brecq"]["parts"].values()
    assert min(report["iterations"] for report in stopped) < 40
    watched = brecq(calibrated(), DATA, **{**BASE, "selective_update": True}).metadata["brecq"]["parts"]
    assert any("model_error_after" in report for report in watched.values())


def test_without_iterations_it_is_adaround():
    assert same_numbers(brecq(calibrated(), DATA, iterations=0), adaround(calibrated(), DATA))


def test_the_same_bits_twice_from_files_and_after_a_kill():
    given = {**QUICK, "loss": "fisher_diag", "drop": 0.5}
    wanted = name_of(brecq(calibrated(), DATA, **given, ctx=Remembering()))
    assert name_of(brecq(calibrated(), DATA, **given, memory="disk")) == wanted
    with pytest.raises(Killed):
        brecq(calibrated(), DATA, **given, ctx=(first := Remembering(killed_after=1)))
    assert name_of(brecq(calibrated(), DATA, **given, ctx=Remembering(first.remembered))) == wanted


def test_what_the_rounding_does_not_read_is_refused():
    with pytest.raises(InputError, match=r"brecq.warm_start: the rounding 'flexround' does not read it, got 0.5"):
        brecq(calibrated(), DATA, rounding="flexround", warm_start=0.5)
