"""parity: the counts are those of the model's own comparison, and a unit that differs is noted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qpipe.errors import InputError
from qpipe.methods.comparison.parity import Output, ParityReport, Steps
from qpipe.numerics.scheme import Scheme, TensorScheme
from qpipe.stage import Samples
from qpipe.stages.calibrate import calibrate
from qpipe.stages.parity import difference, origin, parity

SCHEME = Scheme(TensorScheme(8, True, True), TensorScheme(8, False, False))


@pytest.fixture
def model(network):
    return network(
        """n (float[N,3,6,6] x) => (float[N,5] y) {
            t = Conv<pads=[1,1,1,1]>(x, w, b)  r = Relu(t)  g = GlobalAveragePool(r)  f = Flatten(g)
            y = Gemm<transB=1>(f, v, c) }""",
        {"w": (4, 3, 3, 3), "b": (4,), "v": (5, 4), "c": (5,)},
    )


@pytest.fixture
def data():
    return Samples({"x": np.random.default_rng(2).normal(size=(20, 3, 6, 6)).astype(np.float32)})


def test_a_quantized_network_agrees_with_its_deployment(model, data, target, notes):
    calibrated = calibrate(model, data, scheme=SCHEME, target=target)
    values = parity(calibrated, data, limit=10, ctx=notes).values
    assert values["score"] == pytest.approx(1.0)
    assert values["agree"] is True
    assert values["samples"] == 10
    units = {unit["value"]: unit for unit in values["units"]}
    assert {"r", "y"} <= set(units)
    assert units["r"]["op_types"] == ["Conv", "Relu"]
    assert sum(units["r"]["counts"]) == 10 * 4 * 6 * 6
    assert notes.notes == []


def test_the_worst_unit_is_named():
    good = Steps("r", ("Conv", "Relu"), 8, (100, 0, 0, 0), 0)
    bad = Steps("y", ("Gemm",), 8, (50, 40, 9, 1), 4)
    report = ParityReport((good, bad), (good, bad), (), 10)
    sentence = "1 of 2 quantized values differ from the deployed ones, 'y' (Gemm) by 4 steps of its grid."
    assert difference(report) == sentence
    assert difference(ParityReport((good,), (good, bad), (), 10)) is None


def test_it_says_where_differences_come_from():
    units = (
        Steps("r", ("Conv", "Relu"), 8, (100, 0, 0, 0), 0),
        Steps("y", ("Add",), 8, (98, 2, 0, 0), 1, 4e-6),
    )
    whole = (Steps("r", ("Conv", "Relu"), 8, (100, 0, 0, 0), 0), Steps("y", ("Add",), 8, (95, 5, 0, 0), 1))
    assert origin(ParityReport(units, whole, (), 10)) == (
        "From equal inputs 2 of 200 values differ, none further than 4e-06 steps from the middle between two "
        "codes. End to end they begin at 'y' (Add) and travel on: 97.50% of the values are equal."
    )
    assert origin(ParityReport(units[:1], whole, (), 10)) is None
    assert origin(ParityReport(units, whole[:1], (), 10)).endswith("End to end none does.")


def test_a_model_without_encodings_is_refused(model, data):
    with pytest.raises(InputError, match="nothing to compare"):
        parity(model, data)


@pytest.mark.parametrize("bias", ["float", "int32"])
def test_float_biases_that_onnxruntime_rounds_are_told(network, data, target, notes, bias):
    flat = network(
        """m (float[N,3,6,6] x) => (float[N,2,6,6] y) { t = Conv(x, w, b)  y = Conv(t, v) }""",
        {"w": np.ones((1, 3, 1, 1), np.float32), "b": np.float32([0.3]), "v": (2, 1, 1, 1)},
    )
    calibrated = calibrate(flat, data, scheme=SCHEME, target=replace(target, bias=bias))
    assert parity(calibrated, data, ctx=notes).values["agree"] is (bias == "int32")
    assert any("keeps biases in float" in note for note in notes.notes) is (bias == "float")


def test_of_weights_alone_the_outputs_are_compared(model, data, target, notes):
    calibrated = calibrate(model, data, scheme=Scheme(SCHEME.weight, None), target=target)
    values = parity(calibrated, data, ctx=notes).values
    (output,) = values["outputs"]
    assert values["units"] == notes.notes == []
    assert values["agree"] is True
    assert 0 <= output["max_difference"] <= 1e-5 * output["largest"]
    report = ParityReport((), (), (Output("y", 0.5, 1.0, 2.0),), 10)
    assert not report.agree
    assert difference(report) == "Outputs differ from the deployed ones: 'y' by 0.5 of 2."
