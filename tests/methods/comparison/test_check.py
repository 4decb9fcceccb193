"""verify_import: three runs of the same model, and the first node that differs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest

from qpipe.errors import InputError
from qpipe.methods.comparison.check import TOLERANCE, first_difference, verify_import
from qpipe.methods.comparison.compare import relative_error
from qpipe.methods.comparison.inputs import random_inputs
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
        assert report.equal
        assert report.onnxruntime < 1e-6
        assert report.torch < 1e-6
        assert report.first_difference is None


def test_a_changed_model_is_noticed(proto: onnx.ModelProto) -> None:
    changed = Model.from_proto(proto).with_params({"w": normal(4, 3, 3, 3, seed=5)})
    report = verify_import(changed, proto.SerializeToString())
    assert not report.equal
    assert report.onnxruntime > TOLERANCE
    assert report.torch > TOLERANCE


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
    assert not report.equal
    assert report.first_difference["node"] == "r"
    assert report.first_difference["op_type"] == "Relu"
    assert report.onnxruntime < TOLERANCE < report.torch


def test_a_source_that_does_not_run_is_the_user_s(proto: onnx.ModelProto) -> None:
    with pytest.raises(InputError, match="onnxruntime cannot run the model as it is"):
        verify_import(Model.from_proto(proto), b"nonsense")


def test_a_converted_model_is_compared_with_its_half_precision_source() -> None:
    proto = parsed("net (float16[N,4] x) => (float16[N,4] y) { y = Relu(x) }")
    report = verify_import(Model.from_proto(proto), proto.SerializeToString())
    assert report.onnxruntime < 1e-3


PYRAMID = """net (float[N,3,H,W] x) => (float[N,4,p,q] y) {
    a = Conv<strides=[4,4], kernel_shape=[4,4]>(x, w)
    b = Conv<strides=[4,4], kernel_shape=[4,4]>(a, v)
    up = Resize<mode="nearest">(b, , s)
    y = Add(a, up) }"""


def pyramid() -> onnx.ModelProto:
    scales = np.array([1, 1, 4, 4], np.float32)
    return parsed(PYRAMID, w=normal(4, 3, 4, 4), v=normal(4, 4, 4, 4), s=scales)


def test_sides_that_have_to_be_multiples_are_found() -> None:
    proto = pyramid()
    report = verify_import(Model.from_proto(proto), proto.SerializeToString())
    assert report.equal
    assert report.inputs is not None
    assert report.inputs["x"].shape == (2, 3, 32, 32)


LENGTHS = """net (float[N,T] x, int64[N] n) => (float[T] y) {
    m = ReduceMin<keepdims=0>(n)  a = Unsqueeze(m, o)  b = Slice(z, o, a)  s = ReduceSum<keepdims=0>(x, o)
    y = Mul(s, b) }"""


@pytest.mark.parametrize(
    ("text", "name", "shape"),
    [
        ("net (float[N,T] x) => (float[N,U] y) { y = Pad<mode=\"reflect\">(x, p) }", "x", (2, 320)),
        ("net (float[N,4] x, float[1,4] s) => (float[N,4] y) { t = Concat<axis=0>(s, s)  y = Mul(x, t) }", "x", (2, 4)),
        ("net (float[N,4] x) => (float[1,4] y) { y = Reshape(x, q) }", "x", (1, 4)),
        (LENGTHS, "n", (2,)),
    ],
    ids=["a signal longer than its window", "a batch of two", "a batch of one", "lengths"],
)  # fmt: skip
def test_sizes_are_tried_until_the_source_runs(text: str, name: str, shape: tuple[int, ...]) -> None:
    constants = {"p": np.array([0, 200, 0, 200]), "q": np.array([1, 4]), "o": np.array([0]), "z": normal(640)}
    proto = parsed(text, **{name: array for name, array in constants.items() if re.search(rf"\b{name}\b", text)})
    report = verify_import(Model.from_proto(proto), proto.SerializeToString())
    assert report.equal
    assert report.inputs is not None
    assert report.inputs[name].shape == shape


def test_a_source_that_runs_on_nothing_made_up_is_no_reason_to_refuse() -> None:
    text = "net (float[N,3] x, int64[M] i) => (float[M,3] y) { near = Sub(i, far)  y = Gather(x, near) }"
    proto = parsed(text, far=np.array([50000]))
    model = Model.from_proto(proto)
    report = verify_import(model, proto.SerializeToString())
    assert report.inputs is None
    assert "indices element out of data bounds" in report.reason
    given = {"x": normal(2, 3), "i": np.array([50000, 50001])}
    assert verify_import(model, proto.SerializeToString(), arrays=given).equal


def test_samples_are_what_the_import_is_checked_on(proto: onnx.ModelProto) -> None:
    given = {"x": normal(5, 3, 8, 8), "i": np.arange(5) % 2}
    report = verify_import(Model.from_proto(proto), proto.SerializeToString(), arrays=given)
    assert report.equal
    assert report.inputs is not None
    assert np.array_equal(report.inputs["x"], given["x"][:2])
    with pytest.raises(InputError, match="One sample of 'x' has shape"):
        verify_import(Model.from_proto(proto), proto.SerializeToString(), arrays={**given, "x": normal(5, 3, 9, 8)})


def test_the_bar_is_what_the_source_differs_from_itself() -> None:
    """The variance of features that are nearly constant, as E[x^2] - E[x]^2: any order of summing gives another one."""
    proto = parsed(
        "net (float[N,64] x) => (float[N,64] y) { near = Mul(x, c)  f = Add(near, one)  sq = Mul(f, f) "
        "m = ReduceMean<axes=[1]>(sq)  e = ReduceMean<axes=[1]>(f)  ee = Mul(e, e)  v = Sub(m, ee)  w = Abs(v) "
        "s = Sqrt(w)  y = Mul(x, s) }",
        opset=13,
        c=np.float32(3e-4),
        one=np.float32(1),
    )
    report = verify_import(Model.from_proto(proto), proto.SerializeToString())
    assert report.error > TOLERANCE
    assert report.error <= report.bar
    assert report.first_difference is not None


def test_relative_error_sees_shapes_and_infinities() -> None:
    a = np.array([1.0, -4.0, np.inf])
    assert relative_error(a, a) == 0
    assert relative_error(a, np.array([1.0, -3.0, np.inf])) == 0.25
    assert relative_error(a, np.array([1.0, -4.0, 9.0])) == float("inf")
    assert relative_error(a, a[:2]) == float("inf")
