"""Rules for layers: pads as numbers against onnxruntime's own modes, parameters stored as they are read."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from qpipe.model.canon import layer_forms
from qpipe.model.network.invariants import PERMUTATION, SHAPE, lift_constants
from qpipe.model.network.rewriting import Rule, apply
from qpipe.model.network.shapes import infer_shapes
from tests.model.nets import normal, parsed


def changed(rule: Rule, text: str, **tensors: Any) -> tuple[ir.Model, bool]:
    model = ir.from_proto(parsed(text, **tensors))
    lift_constants(model.graph)
    infer_shapes(model)
    return model, apply(model.graph, (rule,))


def outputs(model: Any, x: np.ndarray) -> np.ndarray:
    proto = model if not isinstance(model, ir.Model) else ir.to_proto(model)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {"x": x})[0]
    return found


WINDOWS = {"Conv": "Conv<{}>(x, w)", "MaxPool": "MaxPool<{}, kernel_shape=[3]>(x)"}
MODES = list(itertools.product(WINDOWS, ["SAME_UPPER", "SAME_LOWER", "VALID"], [1, 2, 3], [5, 8]))


@pytest.mark.parametrize(("op", "mode", "stride", "size"), MODES)
def test_modes_of_padding_are_the_numbers_that_onnxruntime_takes(op: str, mode: str, stride: int, size: int) -> None:
    call = WINDOWS[op].format(f'auto_pad="{mode}", strides=[{stride}]')
    text = f"m (float[1,2,{size}] x) => (float[a,b,c] y) {{ y = {call} }}"
    weights = {"w": normal(3, 2, 3)} if op == "Conv" else {}
    model, _ = changed(layer_forms.explicit_attributes, text, **weights)
    assert "auto_pad" not in model.graph[0].attributes
    assert len(model.graph[0].attributes["pads"].as_ints()) == 2
    x = normal(1, 2, size, seed=3)
    np.testing.assert_array_equal(outputs(model, x), outputs(parsed(text, **weights), x))


@pytest.mark.parametrize(("op", "stride", "size"), list(itertools.product(WINDOWS, [1, 2, 3], [5, 8])))
def test_with_dilations_the_same_size_is_that_of_onnx(op: str, stride: int, size: int) -> None:
    """onnxruntime leaves the dilations out of it, or refuses them there."""
    call = WINDOWS[op].format(f'auto_pad="SAME_UPPER", strides=[{stride}], dilations=[2]')
    text = f"m (float[1,2,{size}] x) => (float[a,b,c] y) {{ y = {call} }}"
    model, _ = changed(layer_forms.explicit_attributes, text, **({"w": normal(3, 2, 3)} if op == "Conv" else {}))
    assert outputs(model, normal(1, 2, size)).shape[-1] == -(-size // stride)


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize(("stride", "kernel"), [(1, 3), (2, 3), (2, 4), (3, 4)])
def test_a_transposed_convolution_of_the_same_size_times_its_stride(mode: str, stride: int, kernel: int) -> None:
    call = f'ConvTranspose<auto_pad="{mode}", strides=[{stride}]>(x, w)'
    text = f"m (float[1,2,5] x) => (float[a,b,c] y) {{ y = {call} }}"
    weights = {"w": normal(2, 3, kernel)}
    model, _ = changed(layer_forms.explicit_attributes, text, **weights)
    x = normal(1, 2, 5, seed=3)
    found = outputs(model, x)
    assert found.shape[-1] == 5 * stride
    np.testing.assert_array_equal(found, outputs(parsed(text, **weights), x))


def test_a_size_that_is_not_known_and_decides_leaves_the_mode() -> None:
    text = 'm (float[1,2,L] x) => (float[a,b,c] y) {{ y = Conv<auto_pad="SAME_UPPER", strides=[{}]>(x, w) }}'
    model, _ = changed(layer_forms.explicit_attributes, text.format(2), w=normal(3, 2, 3))
    assert model.graph[0].attributes["auto_pad"].as_string() == "SAME_UPPER"
    model, _ = changed(layer_forms.explicit_attributes, text.format(1), w=normal(3, 2, 3))
    assert model.graph[0].attributes["pads"].as_ints() == (1, 1)


def test_an_average_pool_says_dilations_only_where_it_has_some() -> None:
    text = "m (float[1,2,9] x) => (float[a,b,c] y) {{ y = AveragePool<kernel_shape=[2], dilations=[{}]>(x) }}"
    for dilation, said in ((1, False), (2, True)):
        model, _ = changed(layer_forms.explicit_attributes, text.format(dilation))
        assert ("dilations" in model.graph[0].attributes) == said


PAD = "m (float[1,2,5,5] x) => (float[a,b,c,d] y) {{ p = Pad{}(x, n{})  y = Conv<pads=[1,0,0,2]>(p, w) }}"


@pytest.mark.parametrize(
    ("mode", "amounts", "fill", "taken"),
    [
        ("", [0, 0, 1, 2, 0, 0, 3, 0], None, True),
        ("", [0, 0, 1, 2, 0, 0, 3, 0], 0.0, True),
        ("", [0, 0, 1, 2, 0, 0, 3, 0], 1.0, False),
        ("", [0, 0, -1, 2, 0, 0, 3, 0], None, False),
        ("", [0, 1, 0, 0, 0, 0, 0, 0], None, False),
        ('<mode="reflect">', [0, 0, 1, 2, 0, 0, 3, 0], None, False),
    ],
)
def test_zeros_around_the_input_are_the_convolutions_own_pads(
    mode: str, amounts: list[int], fill: float | None, taken: bool
) -> None:
    tensors = {"n": np.array(amounts), "w": normal(3, 3 if amounts[1] else 2, 2, 2)}
    tensors |= {} if fill is None else {"f": np.float32(fill)}
    text = PAD.format(mode, "" if fill is None else ", f")
    model, done = changed(layer_forms.pad_into_conv, text, **tensors)
    assert done == taken
    assert (model.graph[-1].inputs[0] is model.graph.inputs[0]) == taken
    x = normal(1, 2, 5, 5)
    np.testing.assert_allclose(outputs(model, x), outputs(parsed(text, **tensors), x), rtol=1e-6)


@pytest.mark.parametrize(
    ("body", "stored"),
    [
        ("t = Transpose(w)  y = MatMul(x, t)", (4, 5)),
        ("t = Transpose(w)  u = Transpose(w)  a = MatMul(x, t)  b = MatMul(x, u)  y = Add(a, b)", (4, 5)),
        ("t = Transpose(w)  a = MatMul(x, t)  y = MatMul(a, w)", (5, 4)),  # somebody reads it as it is
    ],
)
def test_a_parameter_is_stored_the_way_that_all_read_it(body: str, stored: tuple[int, ...]) -> None:
    text = f"m (float[3,4] x) => (float[a,b] y) {{ {body} }}"
    model, done = changed(layer_forms.transpose_parameter, text, w=normal(5, 4))
    value = model.graph.initializers["w"]
    assert tuple(value.const_value.shape) == stored
    assert done == (stored == (4, 5))
    assert value.metadata_props.get(PERMUTATION) == ("[1, 0]" if done else None)
    x = normal(3, 4)
    np.testing.assert_allclose(outputs(model, x), outputs(parsed(text, w=normal(5, 4)), x), rtol=1e-6)


def test_two_permutations_are_kept_as_one() -> None:
    text = """m (float[2,3,4] x) => (float[2,3,4] y) {
        t = Transpose<perm=[1,2,0]>(w)  u = Transpose<perm=[0,2,1]>(t)  y = Add(x, u) }"""
    w = normal(3, 2, 4)
    model, _ = changed(layer_forms.transpose_parameter, text, w=w)
    apply(model.graph, (layer_forms.transpose_parameter,))
    value = model.graph.initializers["w"]
    permutation = json.loads(value.metadata_props[PERMUTATION])
    np.testing.assert_array_equal(value.const_value.numpy(), w.transpose(permutation))
    assert value.const_value.numpy().shape == (2, 3, 4)


def test_a_parameter_of_one_reader_is_stored_in_its_shape_and_one_of_two_is_not() -> None:
    one = "m (float[N,4] x) => (float[a,b] y) { r = Reshape(w, s)  y = Add(x, r) }"
    model, done = changed(layer_forms.reshape_parameter, one, w=normal(4), s=[1, 4])
    assert done
    assert model.graph.initializers["w"].metadata_props[SHAPE] == "[4]"
    two = "m (float[N,4] x) => (float[a,b] y) { r = Reshape(w, s)  a = Add(x, r)  y = Mul(a, w) }"
    assert not changed(layer_forms.reshape_parameter, two, w=normal(4), s=[1, 4])[1]


@pytest.mark.parametrize(("trans", "ops"), [(1, ["Transpose", "Gemm"]), (0, ["Gemm"])])
def test_a_gemm_leaves_the_transposing_of_its_input_to_a_transpose(trans: int, ops: list[str]) -> None:
    text = f"m (float[4,3] x) => (float[a,b] y) {{ y = Gemm<transA={trans}>(x, w) }}"
    w = normal(4 if trans else 3, 5)
    model, _ = changed(layer_forms.gemm_input_first, text, w=w)
    assert [node.op_type for node in model.graph] == ops
    assert "transA" not in model.graph[-1].attributes
    x = normal(4, 3)
    np.testing.assert_allclose(outputs(model, x), (x.T if trans else x) @ w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("bias", "parameters", "kept"), [(0.0, (), False), (1.0, (), True), (0.0, ("b",), True)])
def test_a_bias_of_zeros_that_is_no_parameter_goes(bias: float, parameters: tuple[str, ...], kept: bool) -> None:
    text = "m (float[N,3] x) => (float[a,b] y) { y = Gemm(x, w, b) }"
    graph = ir.from_proto(parsed(text, w=normal(3, 5), b=np.full(5, bias, np.float32))).graph
    layer_forms.drop_made_up_biases(graph, parameters)
    assert len(graph[0].inputs) == (3 if kept else 2)


@pytest.mark.parametrize(
    ("axes", "shape", "pools"),
    [((2, 3), (2, 3, 5, 4), True), ((-1, -2), (2, 3, 5, 4), True), ((-3, 4, 3), (2, 3, 2, 5, 4), True),
     ((3,), (2, 3, 5, 4), False), ((1, 2), (2, 3, 5, 4), False), ((-1,), (2, 3, 5), False)],
)  # fmt: skip
@pytest.mark.parametrize("keepdims", [0, 1])
def test_a_mean_over_height_and_width_is_a_pool(
    axes: tuple[int, ...], shape: tuple[int, ...], pools: bool, keepdims: int
) -> None:
    dims = ",".join(map(str, shape[1:]))
    text = f"m (float[N,{dims}] x) => (float y) {{ y = ReduceMean<keepdims={keepdims}>(x, axes) }}"
    model, found = changed(layer_forms.mean_as_pool, text, axes=np.array(axes))
    assert found == pools
    wanted = ["GlobalAveragePool"] + ["Flatten"] * (not keepdims) if pools else ["ReduceMean"]
    assert [node.op_type for node in model.graph] == wanted
    x = normal(*shape)
    np.testing.assert_allclose(outputs(model, x), x.mean(axes, keepdims=keepdims == 1), rtol=1e-5, atol=1e-6)
