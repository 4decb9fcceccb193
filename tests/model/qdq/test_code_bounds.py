"""A bound between two roundings on one grid is taken on codes: the same bits, on integer kernels, and read back."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from qpipe.methods.comparison.parity import parity
from qpipe.model.model import Model
from qpipe.numerics.grid import Encoding
from tests.model.nets import normal, parsed

Array = np.ndarray[Any, Any]
BOUND = np.array([0.5, 1.0, 6.0, 0.013], np.float32).reshape(4, 1, 1)


def grid(scale: float = 0.02, zero_point: int = 0, bitwidth: int = 8, signed: bool = False) -> Encoding:
    return Encoding(bitwidth, signed, False, np.float32(scale), np.int32(zero_point))


def bounded(
    op: str = "Min", encoding: Encoding | None = None, behind: Encoding | None = None, more: str = "", **constants: Any
) -> Model:
    """Conv -> Relu -> Min -> Conv, quantized; the Relu and the bound are on one grid unless `behind` is another."""
    text = f"""m (float[n,3,8,8] x) => (float[n,2,8,8] y{", float[n,4,8,8] z" if more else ""}) {{
        a = Conv<pads=[1,1,1,1]>(x, w)  r = Relu(a)  c = {op}(r, b)  y = Conv(c, v)  {more} }}"""
    given = {"w": normal(4, 3, 3, 3), "b": BOUND, "v": normal(2, 4, 1, 1), **constants}
    encoding = encoding or grid()
    weight = Encoding(8, True, True, np.float32(0.03), np.int32(0))
    encodings = {"x": grid(0.03, 128), "r": encoding, "c": behind or encoding, "y": grid(0.1, 128)}
    model = Model.from_proto(parsed(text, **given)).with_encodings({**encodings, "w": weight, "v": weight})
    return model.with_facts(on_codes=("Max", "Min"))


def kinds(proto: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in proto.graph.node)


def runs(proto: onnx.ModelProto, x: Array, folder: Path | None = None) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if folder is not None:
        options.optimized_model_filepath = str(folder / "optimized.onnx")
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: list[Array] = session.run(None, {"x": x})
    return found


X = 2 * normal(3, 3, 8, 8)
CASES = {
    "channels": bounded(),
    "a lower bound": bounded("Max"),
    "signed codes": bounded(encoding=grid(0.02, -128, signed=True)),
    "a zero point inside": bounded(encoding=grid(0.05, 37)),
    "6 bits": bounded(encoding=grid(0.1, bitwidth=6)),
    "between two codes": bounded(b=np.float32(0.03) * np.array([0.5, 1.5, 2.5, 3.5], np.float32).reshape(4, 1, 1)),
    "an unknown size": Model.from_proto(
        parsed("m (float[n,4,h,w] x) => (float[n,4,h,w] y) { r = Relu(x)  c = Min(r, b)  y = Neg(c) }", b=BOUND)
    )
    .with_encodings({"r": grid(), "c": grid()})
    .with_facts(on_codes=("Min",)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_bits_are_those_of_the_float_bound(name: str) -> None:
    model, x = CASES[name], X if name != "an unknown size" else 2 * normal(2, 4, 5, 7)
    proto, plain = model.to_qdq(), model.with_facts(on_codes=()).to_qdq()
    assert kinds(proto)["DequantizeLinear"] == kinds(plain)["DequantizeLinear"] - 1
    bound = next(node for node in proto.graph.node if node.op_type in ("Min", "Max"))
    types = {info.name: info.type.tensor_type.elem_type for info in proto.graph.value_info}
    assert types[bound.output[0]] in (onnx.TensorProto.UINT8, onnx.TensorProto.INT8)
    np.testing.assert_array_equal(runs(proto, x)[0], runs(plain, x)[0])


def test_the_layers_around_it_run_on_integers(tmp_path: Path) -> None:
    runs(CASES["channels"].to_qdq(), X, tmp_path)
    found = kinds(onnx.load(tmp_path / "optimized.onnx"))
    assert (found["QLinearConv"], found["Min"], found["Conv"], found["Expand"]) == (2, 1, 0, 0)
    runs(CASES["channels"].with_facts(on_codes=()).to_qdq(), X, tmp_path)
    assert kinds(onnx.load(tmp_path / "optimized.onnx"))["DequantizeLinear"] > found["DequantizeLinear"]


def test_a_constant_is_small_in_the_file_and_whole_in_the_session() -> None:
    proto = CASES["channels"].to_qdq()
    sizes = {tensor.name: list(tensor.dims) for tensor in proto.graph.initializer}
    node = next(node for node in proto.graph.node if node.op_type == "Expand")
    assert sizes[node.input[0]] == [4, 1, 1]
    shape = next(tensor for tensor in proto.graph.initializer if tensor.name == node.input[1])
    assert onnx.numpy_helper.to_array(shape).tolist() == [1, 4, 8, 8]
    assert "Expand" not in kinds(CASES["an unknown size"].to_qdq())


def test_a_bound_that_no_code_exceeds_goes() -> None:
    model = bounded(b=np.full((4, 1, 1), 5.2, np.float32))
    assert kinds(model.to_qdq())["Min"] == 0
    np.testing.assert_array_equal(runs(model.to_qdq(), X)[0], runs(model.with_facts(on_codes=()).to_qdq(), X)[0])


@pytest.mark.parametrize(
    "model",
    [
        bounded(behind=grid(0.01)),
        bounded(encoding=grid(0.0001, bitwidth=16)),
        bounded(more="z = Neg(c)", behind=grid(0.015)),
        bounded().with_facts(on_codes=("Max",)),
    ],
    ids=["other grids", "16 bits", "other grids and readers", "not asked for"],
)
def test_it_stays_in_float_where_it_has_to(model: Model) -> None:
    proto, plain = model.to_qdq(), model.with_facts(on_codes=()).to_qdq()
    assert proto == plain


def test_who_else_reads_the_value_in_front_keeps_it() -> None:
    model = bounded(more="z = Neg(r)")
    found = runs(model.to_qdq(), X)
    for ours, theirs in zip(found, runs(model.with_facts(on_codes=()).to_qdq(), X), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert found[1].min() < -1  # of the value before its bound


@pytest.mark.parametrize("name", CASES)
def test_it_reads_back(name: str, tmp_path: Path) -> None:
    model = CASES[name]
    again = Model.load(model.save(tmp_path))
    assert set(again.facts.on_codes) == {node.op_type for node in model.graph if node.op_type in ("Min", "Max")}
    assert {"r", "c"} <= set(again.encodings)
    (found,) = [again.param(str(node.inputs[1].name)) for node in again.graph if node.op_type in ("Min", "Max")]
    assert found.size == BOUND.size
    x = X if name != "an unknown size" else 2 * normal(2, 4, 5, 7)
    np.testing.assert_array_equal(runs(again.to_qdq(), x)[0], runs(model.to_qdq(), x)[0])


@pytest.mark.parametrize("name", [name for name in CASES if name != "an unknown size"])
def test_the_simulation_agrees_and_every_value_can_be_asked_for(name: str) -> None:
    report = parity(CASES[name], {"x": X})
    assert report.agree
    assert {"r", "c", "y"} == {unit.value for unit in report.units}
