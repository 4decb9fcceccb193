"""A PRelu between roundings runs on integers, as the sum of its two parts, with the same bits, and is read back."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from qpipe.methods.comparison.parity import parity
from qpipe.model.model import Model
from qpipe.stage import Samples
from qpipe.stages.calibrate import calibrate
from tests.model.nets import normal, parsed
from tests.model.quantized import SHIPPED, scheme

X = {"x": 2 * normal(6, 3, 9, 9)}
SLOPES = np.array([0.25, -0.1, 1.5, 0.02], np.float32).reshape(4, 1, 1)
PLAIN = tuple(op for op in SHIPPED.on_codes if op != "PRelu")


def made(slopes: np.ndarray = SLOPES, body: str = "p = PRelu(a, k)  y = Conv(p, u)") -> Model:
    text = f"m (float[n,3,9,9] x) => (float[n,4,9,9] y) {{ a = Conv<pads=[1,1,1,1]>(x, w)  {body} }}"
    proto = parsed(text, w=normal(4, 3, 3, 3), u=normal(4, 4, 1, 1), k=slopes)
    return calibrate(Model.from_proto(proto), Samples(X), scheme=scheme(), target=SHIPPED)


CASES = {
    "channels": made(),
    "read by two": made(body="p = PRelu(a, k)  s = Add(a, p)  y = Conv(s, u)"),
    "pooled": made(body="p = PRelu(a, k)  q = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(p)  y = Conv(q, u)"),
    "one slope": made(np.array([[[0.3]]], np.float32)),
    "one slope below zero": made(np.array([[[-1.7]]], np.float32)),
}


@pytest.mark.parametrize("name", CASES)
def test_it_runs_on_integers_with_the_same_bits(tmp_path: Path, name: str) -> None:
    model = CASES[name]
    found = [each.session("reference").run(None, X)[0] for each in (model, model.with_facts(on_codes=PLAIN))]
    np.testing.assert_array_equal(*found)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(model.to_qdq().SerializeToString(), options)
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
    single = name.startswith("one slope")
    assert (kinds["QLinearMul"], kinds["Max"], kinds["Min"], kinds["QLinearLeakyRelu"]) == (*[not single] * 3, single)
    assert (kinds["PRelu"], kinds["QuantizeLinear"], kinds["DequantizeLinear"]) == (0, 1, 1)
    (deployed,) = session.run(None, X)
    assert (np.abs(deployed - found[0]) <= 1.01 * float(model.encodings["y"].scale)).all()
    assert (deployed == found[0]).mean() > 0.99


@pytest.mark.parametrize("name", CASES)
def test_it_reads_back(name: str) -> None:
    model = CASES[name]
    again = Model.from_proto(model.to_qdq())
    kinds, before = ([node.op_type for node in each.graph] for each in (again, model))
    assert kinds == [op if "one slope" not in name or op != "PRelu" else "LeakyRelu" for op in before]
    assert set(model.encodings) == set(again.encodings)
    assert ("k" in model.encodings) == ("one slope" not in name)
    assert "one slope" in name or "PRelu" in again.facts.on_codes
    np.testing.assert_array_equal(*(each.session("deploy").run(None, X)[0] for each in (again, model)))


@pytest.mark.parametrize("name", CASES)
def test_the_simulation_agrees_and_every_value_can_be_asked_for(name: str) -> None:
    report = parity(CASES[name], X)
    assert report.agree
    assert {"a", "p", "y"} <= {unit.value for unit in report.units}


def test_where_it_is_not_asked_for_it_stays_in_float() -> None:
    kinds = [node.op_type for node in CASES["channels"].with_facts(on_codes=PLAIN).to_qdq().graph.node]
    assert "PRelu" in kinds
    assert not {"Max", "Min", "Add"} & set(kinds)
