"""Biases as int32: their scale, their layers, and channels whose weights are all zero."""

from __future__ import annotations

import numpy as np
import torch

from qpipe.model import Model
from qpipe.model.qdq.bias import BIAS_MAX, bias_codes, bias_scale, effective_encodings, quantized_biases
from tests.model.nets import normal, parsed
from tests.model.quantized import quantized, scheme

CONV = "n (float[N,3,6,6] x) => (float[N,4,6,6] y) { t = Conv<pads=[1,1,1,1]>(x, w, b)  y = Relu(t) }"


def test_a_bias_has_the_scale_of_input_times_weight_per_channel() -> None:
    model = quantized(
        Model.from_proto(parsed(CONV, w=normal(4, 3, 3, 3), b=normal(4))), {"x": normal(8, 3, 6, 6)}
    )
    (bias,) = quantized_biases(model).values()
    assert (bias.name, bias.input, bias.weight, bias.repeats) == ("b", "x", "w", 1)
    scale = bias_scale(model.encodings["x"], model.encodings["w"], 1)
    np.testing.assert_array_equal(scale, model.encodings["x"].scale * model.encodings["w"].scale)
    codes = bias_codes(model.param("b"), scale)
    assert np.abs(codes * scale.astype(np.float64) - model.param("b")).max() <= 0.5001 * scale.max()


def test_grouped_transposed_convolutions_repeat_the_scales_of_a_group() -> None:
    proto = parsed(
        "n (float[N,4,5,5] x) => (float[N,6,H,W] y) { y = ConvTranspose<group=2, strides=[2,2]>(x, w, b) }",
        w=normal(4, 3, 2, 2),
        b=normal(6),
    )
    model = quantized(Model.from_proto(proto), {"x": normal(8, 4, 5, 5)})
    (bias,) = quantized_biases(model).values()
    assert bias.repeats == 2
    scale = bias_scale(model.encodings["x"], model.encodings["w"], bias.repeats)
    assert scale.shape == (6,)
    np.testing.assert_array_equal(scale[:3], scale[3:])


def test_biases_stay_float_where_there_is_no_grid_for_them() -> None:
    proto = parsed(CONV, w=normal(4, 3, 1, 1), b=normal(4))
    proto.graph.node[0].ClearField("attribute")
    model = Model.from_proto(proto)
    assert quantized_biases(quantized(model, {"x": normal(4, 3, 6, 6)}, scheme(activation=None))) == {}
    blocks = scheme(granularity="per_block", block_size=3)
    assert quantized_biases(quantized(model, {"x": normal(4, 3, 6, 6)}, blocks)) == {}


def test_the_bias_of_a_channel_without_weights_survives() -> None:
    w, b = normal(4, 3, 3, 3), np.array([0.5, 3.0, -1.0, 2.0], np.float32)
    w[1] = 0
    x = {"x": normal(8, 3, 6, 6)}
    model = quantized(Model.from_proto(parsed(CONV, w=w, b=b)), x)
    raised = effective_encodings(model)["w"].scale
    assert raised[1] > model.encodings["w"].scale[1]
    np.testing.assert_array_equal(raised[[0, 2, 3]], model.encodings["w"].scale[[0, 2, 3]])
    simulated = model.to_torch()(torch.tensor(x["x"])).numpy()
    deployed = model.session("deploy").run(None, x)[0]
    step = float(model.encodings["y"].scale)
    for found in (simulated, deployed):
        assert np.abs(found[:, 1] - 3.0).max() <= 0.51 * step


def test_codes_end_where_float32_reaches_the_int32_range() -> None:
    codes = bias_codes(np.array([1e30, -1e30, 0], np.float32), np.float32(1.0))
    assert codes.tolist() == [BIAS_MAX, -(2**31), 0]
