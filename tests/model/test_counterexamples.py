"""What random graphs (`test_random_graphs`) have found, each as small as it got."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from qpipe.methods.comparison.parity import parity
from qpipe.methods.placement.target import Nodes, OpRule
from qpipe.model import Model
from qpipe.stages.bnf import bnf
from tests.model.nets import error_of_import, normal, op_types, parsed
from tests.model.quantized import ONNXRUNTIME, quantized


def in_torch(model: Model, x: np.ndarray) -> np.ndarray:
    """The float output for one input."""
    with torch.no_grad():
        found: np.ndarray = model.to_torch(quantized=False)(torch.from_numpy(x)).numpy()
    return found


@pytest.mark.parametrize("norm", ["InstanceNormalization", "GroupNormalization<num_groups=4>"])
def test_a_norm_over_one_element_gives_its_bias(norm: str) -> None:
    text = f"m (float[N,4,1] x) => (float[N,4,1] y) {{ y = {norm}(x, b, b) }}"
    b = normal(4)
    found = in_torch(Model.from_proto(parsed(text, b=b)), normal(1, 4, 1))
    assert np.allclose(found[0, :, 0], b)


def test_what_follows_a_group_normalization_has_a_type_and_a_grid() -> None:
    text = """m (float[N,4,5,5] x) => (float[N,4,5,5] z) {
        y = GroupNormalization<num_groups=2>(x, b, b) r = Sigmoid(y) z = Conv(r, w) }"""
    model = Model.from_proto(parsed(text, b=normal(4), w=normal(4, 4, 1, 1)))
    assert [str(value.shape) for node in model.graph for value in node.outputs] == ["[N,4,5,5]"] * 3
    assert {"x", "y", "r", "z"} <= set(quantized(model, {"x": normal(8, 4, 5, 5)}).encodings)


def test_a_constant_that_is_an_output_is_a_parameter_too() -> None:
    text = """m (float[N,4,3,3] x) => (float[N,4,3,3] z, float[4] g) {
        g = Constant<value = float[4] {1., 2., 3., 4.}>() y = Conv(x, w) z = BatchNormalization(y, g, b, b, v) }"""
    proto = parsed(text, b=normal(4), v=np.ones(4, np.float32), w=normal(4, 4, 1, 1))
    model = Model.from_proto(proto)
    assert error_of_import(proto, model) < 1e-6
    folded = bnf(model)
    assert op_types(folded) == ["Conv"]
    assert error_of_import(proto, folded) < 1e-6


@pytest.mark.parametrize("attributes", ["", ", dilations=[1,1]", ", dilations=[2,2]", ', auto_pad="SAME_UPPER"'])
def test_an_average_pool_is_deployed(attributes: str) -> None:
    """onnxruntime's integer AveragePool has no dilations: not even those of 1 may be said, others run in float."""
    text = f"""m (float[N,4,8,8] x) => (float[N,4,a,b] z) {{
        y = AveragePool<kernel_shape=[2,2]{attributes}>(x) z = Add(y, y) }}"""
    x = {"x": normal(4, 4, 8, 8)}
    proto = parsed(text)
    model = Model.from_proto(proto)
    assert error_of_import(proto, model) < 1e-6
    rounded = quantized(model, x)
    assert parity(rounded, x).agree


@pytest.mark.parametrize("layer", ["Gemm(a, w)", "Gemm(a, w, one)", "Gemm<alpha=0.3>(a, w, b)"])
def test_a_layer_that_stays_float_does_so_in_onnxruntime(layer: str) -> None:
    """It rounds the weight of a Gemm or a Conv between quantized values by itself, unless something keeps it from."""
    text = f"m (float[N,4] x) => (float[N,4] z) {{ a = MatMul(x, v) y = {layer} z = MatMul(y, v) }}"
    tensors = {"one": normal(1), "b": normal(4), "w": normal(4, 4), "v": normal(4, 4, seed=1)}
    proto = parsed(text, **{name: array for name, array in tensors.items() if name in text})
    target = replace(ONNXRUNTIME, nodes=Nodes(exclude=("type:Gemm",)))
    x = {"x": normal(300, 4)}
    rounded = quantized(Model.from_proto(proto), x, target=target)
    assert {"a", "y", "v"} <= set(rounded.encodings)
    assert "w" not in rounded.encodings
    assert parity(rounded, x).agree
    again = Model.from_proto(rounded.to_qdq())
    assert op_types(again) == op_types(rounded)
    assert set(again.encodings) == set(rounded.encodings)


@pytest.mark.parametrize("between", ["a = Add(m, nought) z = Gemm(a, w)", "a = Gemm(m, w) z = Mul(a, one)"])
def test_it_does_so_too_behind_and_before_what_onnxruntime_takes_out(between: str) -> None:
    text = f"""m (float[N,4] x) => (float[N,4] y) {{
        m = MatMul(x, v) {between} y = MatMul(z, v) }}"""
    tensors = {"w": normal(4, 4), "v": normal(4, 4, seed=1)}
    tensors |= {"one": np.ones((1, 1), np.float32)} if "one" in between else {"nought": np.zeros((1, 1), np.float32)}
    target = replace(ONNXRUNTIME, nodes=Nodes(exclude=("type:Gemm", "a")))
    x = {"x": normal(300, 4)}
    model = Model.from_proto(parsed(text, **tensors))
    assert len(op_types(model)) == 4
    rounded = quantized(model, x, target=target)
    assert {"m", "z"} <= set(rounded.encodings)
    assert not {"a", "w"} & set(rounded.encodings)
    assert parity(rounded, x).agree


def test_an_input_that_is_an_output_leaves_as_it_came() -> None:
    model = Model.from_proto(parsed("m (float[N,4] x) => (float[N,4] y, float[N,4] x) { y = Relu(x) }"))
    x = normal(8, 4)
    with torch.no_grad():
        y, same = quantized(model, {"x": x}).to_torch()(torch.from_numpy(x))
    assert np.array_equal(same.numpy(), x)
    assert not np.array_equal(y.numpy(), np.maximum(x, 0))


@pytest.mark.parametrize("other", ["x__dequantized", "y__float", "x__scale", "y__quantized", "w__quantized"])
def test_names_that_the_export_would_make_up_may_be_taken(other: str) -> None:
    text = f"m (float[N,4] x) => (float[N,4] z) {{ {other} = MatMul(x, w) y = Add(x, {other}) z = Relu(y) }}"
    x = {"x": normal(16, 4)}
    rounded = quantized(Model.from_proto(parsed(text, w=normal(4, 4))), x)
    assert parity(rounded, x).agree
    again = Model.from_proto(rounded.to_qdq())
    assert set(again.encodings) == set(rounded.encodings)
    assert np.array_equal(again.session().run(None, x)[0], rounded.session().run(None, x)[0])


@pytest.mark.parametrize("last", ["Add(y, a)", "Clip(y, nought)"])
@pytest.mark.parametrize("scores", ["Identity(a)", "Add(a, mask)"])
def test_a_softmax_over_one_element_is_one(scores: str, last: str) -> None:
    """onnxruntime's integer one makes 0 of it: 1 is code 256, which wraps."""
    text = f"""m (float[N,4,1] x) => (float[N,4,1] z) {{
        nought = Constant<value_float = 0.0>() a = Mul(x, x) s = {scores} y = Softmax(s) z = {last} }}"""
    x = {"x": normal(16, 4, 1)}
    tensors = {"mask": np.zeros((1, 1), np.float32)} if "mask" in scores else {}
    rounded = quantized(Model.from_proto(parsed(text, **tensors)), x)
    assert parity(rounded, x).agree


def test_a_softmax_that_was_never_near_one_ends_where_its_grid_does() -> None:
    """onnxruntime's integer one wraps around instead."""
    x = {"x": normal(16, 8)}
    rounded = quantized(
        Model.from_proto(parsed("m (float[N,8] x) => (float[N,8] y) { y = Softmax(x) }")),
        {"x": x["x"] / 100},
        target=replace(ONNXRUNTIME, softmax="free", quantize={"Softmax": OpRule(inputs=None, outputs=True)}),
    )
    wide = rounded.with_encodings({**rounded.encodings, "x": replace(rounded.encodings["x"], scale=np.float32(0.1))})
    assert float(rounded.encodings["y"].scale) < 2**-9
    assert parity(wide, {"x": 5 * x["x"]}).agree


def test_a_pool_nothing_of_which_passes_a_relu_is_deployed() -> None:
    """onnxruntime's integer GlobalAveragePool does not take grids so far apart."""
    text = "m (float[N,4,3,3] x) => (float[N,4,1,1] y) { a = Neg(x) p = GlobalAveragePool(a) y = Relu(p) }"
    x = {"x": abs(normal(8, 4, 3, 3))}
    rounded = quantized(Model.from_proto(parsed(text)), x)
    assert "y" in rounded.encodings
    assert not rounded.session().run(None, x)[0].any()
    assert parity(rounded, x).agree


def test_a_weight_that_is_an_output_can_be_quantized() -> None:
    text = "m (float[N,4] x) => (float[N,4] z, float[4,4] w) { z = Gemm(x, w) }"
    x, w = {"x": normal(16, 4)}, normal(4, 4)
    rounded = quantized(Model.from_proto(parsed(text, w=w)), x)
    assert {"w", "x", "z"} <= set(rounded.encodings)
    assert parity(rounded, x).agree
    z, same = rounded.session().run(None, x)
    assert np.array_equal(same, w)
    with torch.no_grad():
        simulated, leaves = rounded.to_torch()(torch.from_numpy(x["x"]))
    assert np.array_equal(leaves.numpy(), w)
    assert np.array_equal(simulated.numpy(), z)


def test_parity_passes_over_what_nobody_reads() -> None:
    text = "m (float[N,4] x) => (float[N,2] z) { a, b = Split<num_outputs=2, axis=1>(x) z = Add(a, a) }"
    x = {"x": normal(16, 4)}
    report = parity(quantized(Model.from_proto(parsed(text)), x), x)
    assert report.agree
    assert "b" not in {unit.value for unit in report.units}


def test_an_output_that_a_node_passes_on_reads_back_without_a_grid_of_its_own() -> None:
    text = """m (float[3,4] x) => (float[3,4] y, float[3,4] z) {
        start = Constant<value_ints = [0]>() end = Constant<value_ints = [4]>() axis = Constant<value_ints = [1]>()
        z = Slice(x, start, end, axis) y = Sigmoid(z) }"""
    x = normal(3, 4)
    rounded = quantized(Model.from_proto(parsed(text)), {"x": x})
    again = Model.from_proto(rounded.to_qdq())
    assert op_types(again) == ["Identity", "Sigmoid"]
    assert {"x", "y"} == set(again.encodings)
    with torch.no_grad():
        ours, theirs = (model.to_torch()(torch.from_numpy(x)) for model in (rounded, again))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
