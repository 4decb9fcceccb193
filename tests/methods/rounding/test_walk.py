"""Both models walked side by side: who is tuned, what goes into a layer, what later layers see."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from qpipe.methods.rounding.walk import Walk, tunable_layers
from qpipe.model import Model
from qpipe.model.structure.layers import find_layers
from qpipe.numerics.grid import quantize_dequantize
from tests.model.nets import normal, parsed
from tests.model.quantized import quantized, scheme

X = {"x": normal(40, 6)}


def model(bits: int = 8) -> Model:
    text = "m (float[N,6] x) => (float[N,3] y) { a = Gemm(x, w, b)  r = Relu(a)  c = Gemm(r, v)  y = MatMul(c, u) }"
    tensors = {"w": normal(6, 5), "b": normal(5, seed=1), "v": normal(5, 4, seed=2), "u": normal(4, 3, seed=3)}
    return quantized(Model.from_proto(parsed(text, **tensors)), X, scheme(weight=bits))


def test_layers_are_tuned_in_order_and_each_other_one_has_its_reason() -> None:
    text = """m (float[N,4] x) => (float[N,4] y) { a = MatMul(x, w)  b = MatMul(a, w)  c = MatMul(b, v)
        d = MatMul(c, u)  y = MatMul(d, t) }"""
    x, tensors = {"x": normal(8, 4)}, {name: normal(4, 4, seed=i) for i, name in enumerate("wvut")}
    net = quantized(Model.from_proto(parsed(text, **tensors)), x)
    encodings = {name: e for name, e in net.encodings.items() if name != "v"}
    net = net.with_encodings({**encodings, "u": replace(encodings["u"], frozen=True)})
    chosen, refused = tunable_layers(net)
    first, shared, without, frozen, last = [str(node.name) for node in net.graph]
    assert [layer.name for layer in chosen] == [first, last]
    assert refused == {
        shared: f"it shares the weight of '{first}' and is tuned there",
        without: "its weight has no encoding",
        frozen: "its weight was tuned before",
    }


def test_what_goes_into_a_layer_is_what_onnxruntime_computes_in_each_model() -> None:
    net = model()
    walk = Walk(net, X)
    for layer in find_layers(net):
        x_hat, x = walk.inputs(layer)
        assert [len(batch) for batch in x] == [32, 8]
        if layer.input == "x":
            continue
        wanted = net.session(quantized=False, outputs=[layer.input]).run(None, X)[0]
        np.testing.assert_allclose(torch.cat(x).numpy(), wanted, rtol=1e-5, atol=1e-5)
        (rounded,) = net.session(outputs=[layer.input]).run(None, X)
        steps = np.abs(torch.cat(x_hat).numpy() - rounded) / net.encodings[layer.input].scale
        assert steps.max() < 1.01


def test_a_symmetric_walk_serves_the_float_inputs_twice() -> None:
    net = model()
    walk = Walk(net, X, asymmetric=False)
    layer = find_layers(net)[1]
    x_hat, x = walk.inputs(layer)
    assert x_hat is x
    walk.replace(layer, np.zeros((5, 4), np.float32), None, net.encodings["v"])  # nobody sees it


@pytest.mark.parametrize("with_bias", [True, False])
def test_later_layers_see_what_the_tuned_ones_make_of_the_data(with_bias: bool) -> None:
    net = model(4)
    first, second, _ = find_layers(net)
    grid = replace(net.encodings["w"], scale=2 * net.encodings["w"].scale, frozen=True)
    weight = quantize_dequantize(net.param("w") + 0.3, grid)
    bias = net.param("b") + 1 if with_bias else None
    walk = Walk(net, X)
    walk.inputs(first)
    walk.replace(first, weight, bias, grid)
    x_hat, x = walk.inputs(second)
    changed = net.with_params({"w": weight, **({} if bias is None else {"b": bias})})
    wanted = Walk(changed.with_encodings({**net.encodings, "w": grid}), X).inputs(second)[0]
    assert all(torch.equal(a, b) for a, b in zip(x_hat, wanted, strict=True))
    untouched = Walk(net, X).inputs(second)
    assert not torch.equal(x_hat[0], untouched[0][0])
    assert torch.equal(x[0], untouched[1][0])
