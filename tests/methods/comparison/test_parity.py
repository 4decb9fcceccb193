"""Parity: agreement where there is one, and a disagreement found where it is."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from qpipe.errors import InputError
from qpipe.methods.comparison.parity import (
    ParityReport,
    Steps,
    _Count,
    parity,
    quantized_values,
    unit_op_types,
)
from qpipe.model import Model
from qpipe.model.network.network import Network
from qpipe.model.simulation.module import to_torch
from qpipe.model.structure.families import MOVING
from tests.model.nets import Mobile, UNet, exported, normal, parsed
from tests.model.qdq.test_writer import X, cnn
from tests.model.quantized import quantized, scheme
from tests.model.simulation.test_module import attention


@pytest.mark.parametrize("bits", [8, 16])
def test_every_unit_of_a_cnn_agrees(bits: int) -> None:
    report = parity(quantized(cnn(), X, scheme(activation=bits)), X, batch_size=5)
    assert report.agree
    assert report.within_one == 1.0
    assert report.samples == 16
    assert [unit.value for unit in report.units] == ["r", "c", "p", "s", "m", "g", "f", "y"]
    assert report.units[0].op_types == ("Conv", "Relu")
    assert report.units[0].elements == 16 * 8 * 16 * 16
    assert all(unit.counts[0] == unit.elements for unit in report.units if set(unit.op_types) <= MOVING)
    (output,) = report.outputs
    assert output.cosine > 0.9999


@pytest.mark.parametrize("net", [Mobile, UNet])
def test_every_unit_of_networks_from_torch_agrees(net: type[torch.nn.Module]) -> None:
    x = {"x": normal(8, 3, 32, 32)}
    report = parity(quantized(exported(net)[1], x), x)
    assert report.agree, report.to_json()


def test_every_unit_of_an_attention_agrees() -> None:
    x = {"x": normal(8, 5, 8)}
    report = parity(quantized(attention(), x), x)
    assert report.agree, report.to_json()
    units = {unit.value: unit.op_types for unit in report.units}
    assert units["p"][-2:] == ("Add", "Softmax")  # the masked scores have no grid


def test_weights_alone_have_no_units_but_outputs() -> None:
    report = parity(quantized(cnn(), X, scheme(activation=None)), X)
    assert report.units == ()
    assert report.first is None
    assert report.outputs[0].max_difference < 1e-4


def test_the_first_difference_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized(cnn(), X)

    def broken(network: Network, **_: object) -> object:
        module = to_torch(network)
        with torch.no_grad():
            module.w3.mul_(1.2)  # from here on the simulation is another model
        return module

    monkeypatch.setattr("qpipe.methods.comparison.parity.to_torch", broken)
    report = parity(model, X)
    assert report.first == "p"
    assert report.worst == "p"
    assert [unit.value for unit in report.units if not unit.agree] == ["p"]
    assert {tensor.value for tensor in report.end_to_end if tensor.largest} >= {"p", "s", "m"}


def test_a_report_is_json() -> None:
    document = json.loads(json.dumps(parity(quantized(cnn(), X), X).to_json()))
    assert document["agree"] is True
    assert set(document["units"][0]) >= {"value", "op_types", "counts", "largest", "within_0", "within_1"}


def test_shares_and_agreement_of_counts() -> None:
    close = Steps("v", ("Conv",), 8, (9990, 10, 0, 0), 1)
    assert close.within(0) == 0.999
    assert close.within(1) == 1.0
    assert close.agree
    assert not Steps("v", ("Conv",), 8, (9980, 20, 0, 0), 1).agree
    assert not Steps("v", ("Conv",), 8, (9999, 0, 1, 0), 2).agree
    assert Steps("v", ("Conv",), 16, (9980, 20, 0, 0), 1).agree


def test_units_lie_between_quantizers() -> None:
    model = quantized(cnn(), X)
    names = quantized_values(model)
    assert unit_op_types(model, names)["s"] == ("Add",)
    fewer = model.with_encodings({n: e for n, e in model.encodings.items() if n != "p"})
    assert unit_op_types(fewer, quantized_values(fewer))["s"] == ("Conv", "Add")


def test_a_model_without_encodings_is_refused() -> None:
    with pytest.raises(InputError, match="no encodings"):
        parity(cnn(), X)


def test_a_fixed_batch_size_is_kept() -> None:
    proto = to_fixed()
    x = {"x": normal(7, 3, 16, 16)}
    model = quantized(Model.from_proto(proto), {"x": x["x"][:4]})
    report = parity(model, x)
    assert report.agree
    assert report.samples == 7


def to_fixed() -> object:
    """The CNN for batches of 4."""
    import onnx_ir as ir

    clone = cnn().ir.clone()
    for value in [*clone.graph.inputs, *clone.graph.outputs]:
        assert value.shape is not None
        value.shape = ir.Shape([4, *list(value.shape)[1:]])
    return ir.to_proto(clone)


def test_arrays_may_be_of_any_float_type() -> None:
    assert parity(quantized(cnn(), X), {"x": X["x"].astype(np.float64)}).agree


def test_a_value_that_differs_says_how_far_from_a_tie_it_was() -> None:
    tied = Steps("v", ("Add",), 8, (998, 2, 0, 0), 1, 1e-5)
    assert tied.agree  # 0.2 % differ, and no arithmetic of float32 decides them
    assert not Steps("v", ("Add",), 8, (998, 2, 0, 0), 1, 0.2).agree
    assert not Steps("v", ("Add",), 8, (998, 2, 0, 0), 2, 1e-5).agree


def test_the_distance_is_that_of_the_unrounded_value() -> None:
    model = quantized(cnn(), X)
    count = _Count("r", ("Conv", "Relu"), model)
    scale = float(model.encodings["r"].scale)
    codes = np.array([3.0, 4.0, 8.0])
    count.add(codes * scale, np.array([3.0, 5.0, 7.0]) * scale, np.array([3.1, 4.497, 7.51]) * scale)
    steps = count.steps()
    assert steps.counts == (1, 2, 0, 0)
    assert steps.tie_distance == pytest.approx(0.01, rel=1e-4)


def test_the_report_has_the_largest_distance() -> None:
    units = (Steps("a", (), 8, (9, 1, 0, 0), 1, 1e-6), Steps("b", (), 8, (9, 1, 0, 0), 1, 1e-5))
    report = ParityReport((*units, Steps("c", (), 8, (10, 0, 0, 0), 0)), (), (), 1)
    assert report.to_json()["tie_distance"] == 1e-5
    assert ParityReport((), (), (), 1).tie_distance is None


@pytest.mark.parametrize("bits", [8, 16])
def test_the_lowest_number_on_a_grid_stays_one_in_both(bits: int) -> None:
    """On a scale that is rounded up, the first of 65536 codes would be minus infinity."""
    text = "m (float[N,4] x) => (float[N,4] y) { a = Relu(x)  b = Add(x, a)  y = Mul(b, half) }"
    model = Model.from_proto(parsed(text, half=np.float32(0.5)))
    x = normal(16, 4)
    x[3] = np.finfo(np.float32).min
    calibrated = quantized(model, {"x": x}, scheme(activation=bits))
    (y,) = calibrated.session().run(None, {"x": x})
    assert np.isfinite(y).all()
    report = parity(calibrated, {"x": x})
    assert report.agree
    assert max(tensor.largest for tensor in report.end_to_end) <= 1
