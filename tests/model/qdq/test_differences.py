"""A difference of activations runs on integers, as the sum with codes under a negative scale, and is read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from qpipe.methods.comparison.parity import parity
from qpipe.methods.placement.placement import place
from qpipe.model.model import Model
from qpipe.numerics.grid import same_grid
from qpipe.stage import Samples
from qpipe.stages.calibrate import calibrate
from tests.model.nets import normal, parsed
from tests.model.quantized import SHIPPED, scheme

TEXT = """m (float[n,3,9,9] x) => (float[n,4,9,9] y) {{
    a = Conv<pads=[1,1,1,1]>(x, w)  b = Conv<pads=[1,1,1,1]>(x, v)  d = {}  y = Conv(d, u) }}"""
CASES = {
    "two": "Sub(a, b)", "twice": "Sub(a, b)  e = Sub(b, d)  d2 = Add(e, d)", "itself": "Sub(a, a)",
    "a number": "Sub(a, half)", "from a number": "Sub(half, a)",
}  # fmt: skip
X = {"x": 2 * normal(6, 3, 9, 9)}


def made(body: str) -> Model:
    text = TEXT.format(body)
    if "d2" in body:
        text = text.replace("Conv(d, u)", "Conv(d2, u)")
    weights = {"w": normal(4, 3, 3, 3), "v": normal(4, 3, 3, 3, seed=1), "u": normal(4, 4, 1, 1)}
    more = {"half": np.float32(0.5)} if "half" in body else {}
    return calibrate(Model.from_proto(parsed(text, **weights, **more)), Samples(X), scheme=scheme(), target=SHIPPED)


@pytest.mark.parametrize("body", CASES.values(), ids=list(CASES))
def test_it_runs_on_integers_with_the_same_bits(tmp_path: Path, body: str) -> None:
    model = made(body)
    plain = model.with_facts(on_codes=tuple(op for op in SHIPPED.on_codes if op != "Sub"))
    found = [each.session("reference").run(None, X)[0] for each in (model, plain)]
    np.testing.assert_array_equal(*found)
    path = tmp_path / "model.onnx"
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path)
    session = onnxruntime.InferenceSession(model.to_qdq().SerializeToString(), options)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert "QLinearAdd" in kinds
    assert "Sub" not in kinds
    (deployed,) = session.run(None, X)
    step = float(model.encodings["y"].scale)
    assert (np.abs(deployed - found[1]) <= 1.01 * step).all()
    assert (deployed == found[1]).mean() > 0.99


@pytest.mark.parametrize("body", CASES.values(), ids=list(CASES))
def test_it_reads_back(body: str) -> None:
    model = made(body)
    again = Model.from_proto(model.to_qdq())
    kinds, before = ([node.op_type for node in each.graph] for each in (again, model))
    assert kinds == (before if body != "Sub(a, half)" else ["Conv", "Add", "Conv"])
    activations = [name for name in model.encodings if name not in model.params]
    assert all(same_grid(again.encodings[name], model.encodings[name]) for name in activations)
    np.testing.assert_array_equal(*(each.session("deploy").run(None, X)[0] for each in (again, model)))


@pytest.mark.parametrize("body", CASES.values(), ids=list(CASES))
def test_the_simulation_agrees_and_every_value_can_be_asked_for(body: str) -> None:
    report = parity(made(body), X)
    assert report.agree
    assert {"a", "d", "y"} <= {unit.value for unit in report.units}


def test_a_difference_that_stays_in_float_is_left() -> None:
    model = Model.from_proto(parsed("m (float[n,4] x) => (float[n,4] y) { y = Sub(x, c) }", c=normal(4)))
    kinds = [node.op_type for node in made("Sub(a, b)").with_encodings({}).to_qdq().graph.node]
    assert "Sub" in kinds
    assert place(model, SHIPPED, scheme()).constants == {}
