"""verify_import: three runs of the same model, and the first node that differs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from qpipe.errors import InputError
from qpipe.methods.comparison.check import TOLERANCE, first_difference, verify_import
from qpipe.methods.comparison.compare import random_inputs, relative_error
from qpipe.model import Model
from tests.model.nets import normal, parsed

TEXT = """net (float[N,3,8,8] x, int64[N] i) => (float[N,4] y) {
    c = Conv<pads=[1,1,1,1]>(x, w)  r = Relu(c)  g = GlobalAveragePool(r)  f = Flatten(g)
    e = Gather(t, i)  y = Add(f, e) }"""


@pytest.fixture
def proto() -> onnx.ModelProto:
    return parsed(TEXT, w=normal(4, 3, 3, 3), t=normal(2, 4))


def test_a_good_import_agrees_in_all_three(proto: onnx.ModelProto, tmp_path: Path) -> None:
    onnx.save_model(proto, tmp_path / "net.onnx")
    for source in (proto.SerializeToString(), tmp_path / "net.onnx"):
        report = verify_import(Model.from_proto(proto), source)
        assert report["equal"]
        assert report["onnxruntime"] < 1e-6
        assert report["torch"] < 1e-6
        assert report["first_difference"] is None


def test_a_changed_model_is_noticed(proto: onnx.ModelProto) -> None:
    changed = Model.from_proto(proto).with_params({"w": normal(4, 3, 3, 3, seed=5)})
    report = verify_import(changed, proto.SerializeToString())
    assert not report["equal"]
    assert report["onnxruntime"] > TOLERANCE
    assert report["torch"] > TOLERANCE


def test_the_first_node_that_torch_computes_otherwise_is_named(
    proto: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    import torch

    from qpipe.model.operators.registry import OPERATORS

    model = Model.from_proto(proto)
    assert first_difference(model, random_inputs(model)) is None
    wrong = dataclasses.replace(OPERATORS["Relu"], function=lambda x: torch.nn.functional.leaky_relu(x, 0.3))
    monkeypatch.setitem(OPERATORS, "Relu", wrong)
    report = verify_import(model, proto.SerializeToString())
    assert not report["equal"]
    assert report["first_difference"]["node"] == "r"
    assert report["first_difference"]["op_type"] == "Relu"
    assert report["onnxruntime"] < TOLERANCE < report["torch"]


def test_a_source_that_does_not_run_is_the_user_s(proto: onnx.ModelProto) -> None:
    with pytest.raises(InputError, match="onnxruntime cannot run the model as it is"):
        verify_import(Model.from_proto(proto), b"nonsense")


def test_a_converted_model_is_compared_with_its_half_precision_source() -> None:
    proto = parsed("net (float16[N,4] x) => (float16[N,4] y) { y = Relu(x) }")
    report = verify_import(Model.from_proto(proto), proto.SerializeToString())
    assert report["onnxruntime"] < 1e-3


def test_relative_error_sees_shapes_and_infinities() -> None:
    a = np.array([1.0, -4.0, np.inf])
    assert relative_error(a, a) == 0
    assert relative_error(a, np.array([1.0, -3.0, np.inf])) == 0.25
    assert relative_error(a, np.array([1.0, -4.0, 9.0])) == float("inf")
    assert relative_error(a, a[:2]) == float("inf")
