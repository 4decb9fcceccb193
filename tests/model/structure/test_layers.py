"""layers(): every layer with a weight, its bias, and the activation that follows it alone."""

from __future__ import annotations

from typing import Any

import pytest

from qpipe.model import Layer, Model
from qpipe.model.structure.layers import refused_layers
from qpipe.stages.prepare import prepare
from tests.model.nets import normal, parsed


def one_layer(text: str, **tensors: Any) -> Layer:
    layers = Model.from_proto(parsed(text, **tensors)).layers()
    assert len(layers) == 1
    return layers[0]


def after_conv(activation: str) -> Layer:
    """The layer of a Conv whose output `c` goes into `activation`, which gives `y`."""
    text = f"""net (float[N,3,8,8] x) => (float[N,4,6,6] y) {{
        half = Constant<value_float=0.5>()  one = Constant<value_float=1.0>()  three = Constant<value_float=3.0>()
        six = Constant<value_float=6.0>()  zero = Constant<value_float=0.0>()  root = Constant<value_float=1.414>()
        c = Conv(x, w)  {activation} }}"""
    return one_layer(text, w=normal(4, 3, 3, 3), slope=normal(4, 1, 1))


def test_a_convolution_with_everything() -> None:
    layer = one_layer(
        """net (float[N,4,9,9] x) => (float[N,6,5,5] y) {
        [conv] y = Conv<group=2, strides=[2,2], pads=[1,0,2,1], dilations=[1,2]>(x, w, b) }""",
        w=normal(6, 2, 3, 3),
        b=normal(6),
    )
    assert (layer.name, layer.op_type, layer.input, layer.output) == ("conv", "Conv", "x", "y")
    assert (layer.weight, layer.bias, layer.groups, layer.channel_axis) == ("w", "b", 2, 0)
    assert (layer.kernel_shape, layer.strides, layer.dilations) == ((3, 3), (2, 2), (1, 2))
    assert (layer.pads, layer.channels, layer.depthwise) == ((1, 0, 2, 1), 6, False)
    assert layer.activation == ()
    assert layer.activation_output == "y"


def test_transposed_and_depthwise_convolutions() -> None:
    layer = one_layer(
        """net (float[N,4,5,5] x) => (float[N,4,11,11] y) {
        y = ConvTranspose<group=4, strides=[2,2], output_padding=[1,1]>(x, w) }""",
        w=normal(4, 1, 2, 2),
    )
    assert (layer.op_type, layer.channel_axis, layer.channels, layer.depthwise) == (
        "ConvTranspose",
        1,
        4,
        True,
    )
    assert layer.output_padding == (1, 1)


@pytest.mark.parametrize(("trans", "shape", "axis"), [(0, (4, 5), 1), (1, (5, 4), 0)])
def test_gemm(trans: int, shape: tuple[int, int], axis: int) -> None:
    layer = one_layer(
        f"net (float[N,4] x) => (float[N,5] y) {{ g = Gemm<transB={trans}>(x, w, b)  y = Tanh(g) }}",
        w=normal(*shape),
        b=normal(5),
    )
    assert (layer.op_type, layer.channel_axis, layer.channels, layer.transposed) == (
        "Gemm",
        axis,
        5,
        bool(trans),
    )
    assert (layer.bias, layer.activation, layer.activation_output) == ("b", ("y",), "y")


@pytest.mark.parametrize("order", ["m, b", "b, m"])
def test_matmul_takes_the_bias_that_is_added(order: str) -> None:
    layer = one_layer(
        f"net (float[N,3,4] x) => (float[N,3,5] y) {{ m = MatMul(x, w)  [add] a = Add({order})  y = Relu(a) }}",
        w=normal(4, 5),
        b=normal(5),
    )
    assert (layer.op_type, layer.bias, layer.add, layer.output) == ("MatMul", "b", "add", "a")
    assert (layer.activation, layer.activation_output) == (("y",), "y")


def test_a_sum_with_something_else_is_no_bias() -> None:
    layer = one_layer(
        "net (float[N,5] x) => (float[N,5] y) { m = MatMul(x, w)  y = Add(m, x) }", w=normal(5, 5)
    )
    assert (layer.bias, layer.add, layer.output) == (None, None, "m")


ACTIVATIONS = {
    "relu": ("y = Relu(c)", 1),
    "relu6": ("y = Clip(c, zero, six)", 1),
    "prelu": ("y = PRelu(c, slope)", 1),
    "gelu": ("y = Gelu(c)", 1),
    "silu": ("s = Sigmoid(c)  y = Mul(c, s)", 2),
    "mish": ("p = Softplus(c)  t = Tanh(p)  y = Mul(t, c)", 3),
    "hardswish": ("a = Add(c, three)  k = Clip(a, zero, six)  m = Mul(c, k)  y = Div(m, six)", 4),
    "gelu by erf": ("d = Div(c, root)  e = Erf(d)  a = Add(e, one)  m = Mul(c, a)  y = Mul(m, half)", 5),
    "gelu, factor first": (
        "h = Mul(c, half)  d = Div(c, root)  e = Erf(d)  a = Add(e, one)  y = Mul(h, a)",
        5,
    ),
}


@pytest.mark.parametrize(("nodes", "count"), ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
def test_the_activation_that_follows_is_found_whole(nodes: str, count: int) -> None:
    layer = after_conv(nodes)
    assert len(layer.activation) == count
    assert layer.activation_output == "y"
    assert layer.activation[-1] == "y"


NO_ACTIVATION = {
    "nothing nonlinear": "y = Mul(c, three)",
    "pool": "y = MaxPool<kernel_shape=[1,1]>(c)",
    "linear first": "a = Add(c, three)  y = Relu(a)",
    "softmax": "y = Softmax(c)",
}


@pytest.mark.parametrize("nodes", NO_ACTIVATION.values(), ids=NO_ACTIVATION.keys())
def test_what_is_no_activation(nodes: str) -> None:
    layer = after_conv(nodes)
    assert layer.activation == ()
    assert layer.activation_output == "c"


def test_an_activation_must_read_the_output_alone() -> None:
    text = """net (float[N,3,8,8] x) => (float[N,4,6,6] y) { c = Conv(x, w)  r = Relu(c)  y = Add(r, c) }"""
    layer = one_layer(text, w=normal(4, 3, 3, 3))
    # c + relu(c) reads c alone as a whole: that is the activation.
    assert layer.activation == ("r", "y")
    text = "net (float[N,3,8,8] x) => (float[N,4,6,6] c, float[N,4,6,6] y) { c = Conv(x, w)  y = Relu(c) }"
    assert one_layer(text, w=normal(4, 3, 3, 3)).activation == ()


def test_layers_come_in_topological_order_and_refused_ones_with_a_reason() -> None:
    model = Model.from_proto(
        parsed(
            """net (float[N,4] x, float[N,4] z) => (float[N,4] y) {
            [second] b = MatMul(a, w2)  [first] a = MatMul(x, w1)  [scaled] c = Gemm<alpha=2.0>(b, w1)
            [left] d = MatMul(w2, c)  [data] y = Mul(d, z) }""",
            w1=normal(4, 4),
            w2=normal(4, 4, seed=1),
        )
    )
    assert [layer.name for layer in model.layers()] == ["first", "second"]
    refused = refused_layers(model)
    assert set(refused) == {"scaled", "left"}
    assert "alpha" in refused["scaled"]
    assert "left of the input" in refused["left"]


def test_a_tied_head_is_refused_with_the_way_out() -> None:
    text = """net (int64[N,6] x) => (float[N,6,9] y) {
        e = Gather(w, x)  h = MatMul(e, v)  t = Transpose<perm=[1,0]>(w)  [head] y = MatMul(h, t) }"""
    model = Model.from_proto(parsed(text, w=normal(9, 4), v=normal(4, 4)))
    assert "tied_weights: copy in 'prepare' gives it one of its own" in refused_layers(model)["head"]
    assert len(prepare(model, tied_weights="copy").layers()) == 2


def test_a_bound_per_channel_behind_a_relu_belongs_to_the_activation() -> None:
    layer = one_layer(
        """net (float[N,3,8,8] x) => (float[N,4,6,6] y) {
        c = Conv(x, w)  [relu] r = Relu(c)  [bound] y = Min(r, top) }""",
        w=normal(4, 3, 3, 3),
        top=abs(normal(4, 1, 1)),
    )
    assert (layer.activation, layer.activation_output) == (("relu", "bound"), "y")
