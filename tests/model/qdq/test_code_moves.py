"""What moves values between two roundings on one grid moves codes: the same bits, fewer nodes, and read back."""

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
from tests.model.quantized import SHIPPED

Array = np.ndarray[Any, Any]
X = 2 * normal(3, 3, 8, 8)


def grid(scale: float = 0.02, zero_point: int = 90, signed: bool = False) -> Encoding:
    return Encoding(8, signed, False, np.float32(scale), np.int32(zero_point))


def moved(body: str, values: str = "m", encoding: Encoding | None = None, behind: Encoding | None = None) -> Model:
    """Conv -> `body`, from `a` to the last of `values`, which are on the grid of `a` -> Relu, quantized."""
    last = values[-1]
    constants = {"pads": np.array([0, 0, 1, 1, 0, 0, 2, 1]), "one": np.float32(1.01), "far": np.float32(-1e9)}
    constants |= {"begin": np.array([1]), "end": np.array([5]), "axis": np.array([2]), "shape": np.array([0, -1])}
    constants |= {"two": np.array([1, 1, 1, 2]), "wide": np.array([1, 4, 8, 8]), "some": np.array([3, 0, 2])}
    text = f"m (float[n,3,8,8] x) => (float y) {{ a = Conv<pads=[1,1,1,1]>(x, w)  {body}  y = Relu({last}) }}"
    used = {name: array for name, array in constants.items() if name in body}
    encoding = encoding or grid()
    grids = {"x": grid(0.03, 128), "a": encoding, **dict.fromkeys(values, encoding), "y": grid(0.01, 0)}
    grids[last] = behind or encoding
    weight = Encoding(8, True, True, np.float32(0.03), np.int32(0))
    model = Model.from_proto(parsed(text, w=normal(4, 3, 3, 3), **used)).with_encodings({**grids, "w": weight})
    return model.with_facts(on_codes=SHIPPED.on_codes)


CASES = {
    "Pad": moved("m = Pad(a, pads)"),
    "Pad of one": moved("m = Pad(a, pads, one)"),
    "Pad beyond the grid": moved("m = Pad(a, pads, far)"),
    "Pad by reflection": moved('m = Pad<mode="reflect">(a, pads)'),
    "SpaceToDepth": moved("m = SpaceToDepth<blocksize=2>(a)"),
    "DepthToSpace": moved("m = DepthToSpace<blocksize=2>(a)"),
    "Transpose": moved("m = Transpose<perm=[0,2,3,1]>(a)"),
    "Slice": moved("m = Slice(a, begin, end, axis)"),
    "Split": moved("m, s = Split<axis=1, num_outputs=2>(a)  t = Concat<axis=1>(m, s)", "mst"),
    "Tile": moved("m = Tile(a, two)"),
    "Gather": moved("m = Gather<axis=3>(a, some)"),
    "several": moved("m = Pad(a, pads)  t = Transpose<perm=[0,2,3,1]>(m)  r = Reshape(t, shape)", "mtr"),
}


def kinds(proto: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in proto.graph.node)


def runs(proto: onnx.ModelProto, folder: Path | None = None) -> Array:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if folder is not None:
        options.optimized_model_filepath = str(folder / "optimized.onnx")
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: Array = session.run(None, {"x": X})[0]
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_bits_are_those_of_the_floats_and_two_nodes_go_for_each(name: str) -> None:
    model = CASES[name]
    proto, plain = model.to_qdq(), model.with_facts(on_codes=()).to_qdq()
    nodes = 3 if name == "several" else 1
    assert kinds(plain)["QuantizeLinear"] - kinds(proto)["QuantizeLinear"] == (2 if name == "Split" else nodes)
    assert kinds(plain)["DequantizeLinear"] - kinds(proto)["DequantizeLinear"] == nodes
    np.testing.assert_array_equal(runs(proto), runs(plain))


@pytest.mark.parametrize("name", ["Pad", "SpaceToDepth"])
def test_what_onnxruntime_leaves_in_float_by_itself_runs_on_integers(name: str, tmp_path: Path) -> None:
    model = CASES[name]
    runs(model.to_qdq(), tmp_path)
    found = kinds(onnx.load(tmp_path / "optimized.onnx"))
    runs(model.with_facts(on_codes=()).to_qdq(), tmp_path)
    before = kinds(onnx.load(tmp_path / "optimized.onnx"))
    assert found["QLinearConv"] == before["QLinearConv"] == 1
    assert before["DequantizeLinear"] > found["DequantizeLinear"]


@pytest.mark.parametrize(
    "model",
    [
        moved("m = Pad(a, pads)", encoding=grid(zero_point=-20, signed=True)),
        moved("m = Pad(a, pads)", behind=grid(0.04)),
        moved("m = Pad(a, pads)").with_facts(on_codes=("Min",)),
        moved("p = Relu(x)  q = ReduceMax<keepdims=0>(p)  m = Pad(a, pads, q)"),
    ],
    ids=["signed codes", "another grid", "not asked for", "a value that is computed"],
)
def test_it_stays_in_float_where_it_has_to(model: Model) -> None:
    assert model.to_qdq() == model.with_facts(on_codes=()).to_qdq()


@pytest.mark.parametrize("name", CASES)
def test_it_reads_back(name: str, tmp_path: Path) -> None:
    model = CASES[name]
    again = Model.load(model.save(tmp_path))
    assert {node.op_type for node in again.graph} == {node.op_type for node in model.graph}
    assert set(again.encodings) == set(model.encodings)
    np.testing.assert_array_equal(runs(again.to_qdq()), runs(model.to_qdq()))


@pytest.mark.parametrize("name", ["Pad of one", "Pad beyond the grid", "Split", "several"])
def test_the_simulation_agrees_and_every_value_can_be_asked_for(name: str) -> None:
    report = parity(CASES[name], {"x": X})
    assert report.agree
    assert {"a", "y"} <= {unit.value for unit in report.units}
