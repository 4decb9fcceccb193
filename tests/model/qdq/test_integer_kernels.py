"""What runs on integer kernels in the file that is exported, by onnxruntime's optimized graph; the numbers agree."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from qpipe.methods.comparison.parity import parity
from qpipe.model import Model
from qpipe.model.qdq.writer import to_qdq
from tests.model.nets import normal, parsed
from tests.model.quantized import SHIPPED, deployed_db, quantized

X = normal(8, 4, 12, 12)
W = {"w": normal(6, 4, 3, 3), "v": normal(5, 6, 1, 1)}
CHANNELS = {"c": normal(6, 1, 1), "k": np.abs(normal(6, 1, 1)) + np.float32(0.5)}
HARD = {"three": np.float32(3), "zero": np.float32(0), "six": np.float32(6)}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    "constants for each channel": ("f = Mul(a, k)  s = Add(c, f)", CHANNELS, {"QLinearMul": 1, "QLinearAdd": 1}),
    "one number": ("f = Mul(a, k)  s = Add(f, c)", {"k": np.float32(-2), "c": np.float32(0.3)}, {"QLinearMul": 1}),
    "SiLU": ("g = Sigmoid(a)  s = Mul(a, g)", {}, {"QLinearSigmoid": 1, "QLinearMul": 1}),
    "a HardSwish": (
        "p = Add(a, three)  q = Clip(p, zero, six)  s = Mul(a, q)", HARD, {"QLinearAdd": 1, "QLinearMul": 1},
    ),
}  # fmt: skip


def built(body: str, given: dict[str, Any]) -> tuple[onnx.ModelProto, Model]:
    """The float file, and the model with grids."""
    text = f"""m (float[n,4,12,12] x) => (float[n,5,12,12] y) {{
        a = Conv<pads=[1,1,1,1]>(x, w)  {body}  y = Conv(s, v) }}"""
    proto = parsed(text, **W, **given)
    return proto, quantized(Model.from_proto(proto), {"x": X})


def optimized(model: Model, folder: Path) -> Counter[str]:
    """The operators of the graph that onnxruntime runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(to_qdq(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


@pytest.mark.parametrize("name", CASES)
def test_elementwise_steps_between_layers_run_on_integers(name: str, tmp_path: Path) -> None:
    body, given, expected = CASES[name]
    proto, model = built(body, given)
    kinds = optimized(model, tmp_path)
    assert expected.items() <= kinds.items()
    assert (kinds["QLinearConv"], kinds["QuantizeLinear"], kinds["DequantizeLinear"]) == (2, 1, 1)
    assert not kinds.keys() & {"Add", "Mul", "Clip", "Sigmoid", "Conv"}
    report = parity(model, {"x": X})
    assert all(unit.largest <= 1 and unit.within(0) >= 0.999 for unit in report.units)
    assert deployed_db(model, proto, {"x": X}) > 28


def test_a_constant_on_a_grid_reads_back(tmp_path: Path) -> None:
    body, given, _ = CASES["constants for each channel"]
    _, model = built(body, given)
    again = Model.from_proto(to_qdq(model))
    assert again.encodings.keys() == model.encodings.keys()
    expected, found = (each.session().run(None, {"x": X})[0] for each in (model, again))
    np.testing.assert_array_equal(found, expected)


def test_one_number_is_held_exactly_by_its_grid() -> None:
    from qpipe.numerics.grid import quantize_dequantize

    body, given, _ = CASES["one number"]
    _, model = built(body, given)
    for name in ("k", "c"):
        rounded = quantize_dequantize(model.param(name), model.encodings[name])
        np.testing.assert_allclose(rounded, given[name], rtol=1e-6)


NORM = """m (float[n,6,16] x) => (float[n,6,16] y) {
    a = MatMul(x, w)  b = Add(a, c)  r = Add(b, x)  l = LayerNormalization<axis=-1>(r, g, s)  p = MatMul(l, v)
    q = Add(p, d)  y = Gelu(q) }"""


def test_sums_and_norms_between_products_are_in_float_and_apart(tmp_path: Path) -> None:
    vectors = {name: normal(16, seed=i) for i, name in enumerate("cdgs")}
    given = {"w": normal(16, 16), "v": normal(16, 16, seed=9), **vectors}
    proto, x = parsed(NORM, **given), normal(8, 6, 16)
    model = quantized(Model.from_proto(proto), {"x": x}, target=SHIPPED)
    kinds = optimized(model, tmp_path)
    assert (kinds["MatMulIntegerToFloat"], kinds["QuantizeLinear"], kinds["LayerNormalization"]) == (2, 2, 1)
    assert not kinds.keys() & {"MatMul", "SkipLayerNormalization"}, "the one kernel for Add and norm is slower than two"
    assert [n.op_type for n in Model.from_proto(to_qdq(model)).graph] == [n.op_type for n in model.graph]
    assert deployed_db(model, proto, {"x": x}) > 34
    all_of_it = quantized(Model.from_proto(proto), {"x": x})
    assert deployed_db(model, proto, {"x": x}) > 2 + deployed_db(all_of_it, proto, {"x": x})


def test_an_embedding_is_looked_up_among_codes(tmp_path: Path) -> None:
    text = """m (int64[n,6] i) => (float[n,6,5] y) { e = Gather(table, i)  y = MatMul(e, w) }"""
    proto = parsed(text, table=normal(2000, 16), w=normal(16, 5))
    feeds = {"i": np.random.default_rng(0).integers(0, 2000, (8, 6))}
    model = quantized(Model.from_proto(proto), feeds, target=SHIPPED)
    kinds = optimized(model, tmp_path)
    assert (kinds["Gather"], kinds["QuantizeLinear"], kinds["MatMulIntegerToFloat"]) == (1, 0, 1)
    assert len(to_qdq(model).SerializeToString()) < 0.3 * len(proto.SerializeToString())
    assert deployed_db(model, proto, feeds) > 35
    simulated = model.to_torch()(torch.from_numpy(feeds["i"])).numpy()
    found = model.session("deploy").run(None, feeds)[0]
    np.testing.assert_allclose(found, simulated, atol=1e-5)
    assert Model.from_proto(to_qdq(model)).encodings.keys() == model.encodings.keys()
