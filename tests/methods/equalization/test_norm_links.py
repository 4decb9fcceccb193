"""Normalizations and the linear layers behind them: who is linked, and the scales between them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qpipe.methods.equalization.norm_links import equalize_norms, find_norm_links, measured
from qpipe.model import Model
from qpipe.model.structure.layers import find_layers
from tests.model.nets import normal, parsed

TENSORS = {"g": normal(8), "b": normal(8, seed=1), "w": normal(8, 6, seed=2), "v": normal(8, 6, seed=3)}
TENSORS |= {"t": normal(6, 8, seed=4), "s": normal(1)}
NORM = "l = LayerNormalization<axis=-1>(x, g, b)"


def links(body: str, outputs: str = "float[N,6] y") -> tuple[Model, Any, list[Any], dict[str, str]]:
    used = {name: array for name, array in TENSORS.items() if f", {name})" in body or f", {name}," in body}
    used |= {"g": TENSORS["g"]} if "(g," in body else {}
    model = Model.from_proto(parsed(f"m (float[N,8] x) => ({outputs}) {{ {body} }}", **used))
    editor = model.edit()
    return model, editor, *find_norm_links(editor, {layer.name: layer for layer in find_layers(model)})


def test_a_normalization_is_linked_to_all_the_layers_that_read_it() -> None:
    _, _, found, refused = links(f"{NORM}  p = MatMul(l, w)  q = MatMul(l, v)  y = Add(p, q)")
    (link,) = found
    assert (link.output, link.scale, link.bias, len(link.layers)) == ("l", "g", "b", 2)
    assert refused == {}


def test_a_product_by_a_vector_is_the_end_of_a_norm_and_one_by_a_number_is_none() -> None:
    _, _, found, _ = links("n = Tanh(x)  l = Mul(g, n)  y = MatMul(l, w)")
    assert [(link.scale, link.bias) for link in found] == [("g", None)]
    assert links("n = Tanh(x)  l = Mul(n, s)  y = MatMul(l, w)")[2] == []


@pytest.mark.parametrize(
    ("body", "outputs", "reason"),
    [
        (f"{NORM}  y = MatMul(l, w)", "float[N,6] y, float[N,8] l", "'l' is an output of the model"),
        (f"{NORM}  r = Relu(l)  y = MatMul(r, w)", "float[N,6] y", "which is no linear layer"),
        (f"{NORM}  p = MatMul(l, w)  q = MatMul(x, w)  y = Add(p, q)", "float[N,6] y", "the weight 'w' is shared"),
        (f"{NORM}  m = Add(x, g)  y = MatMul(l, w)", "float[N,6] y, float[N,8] m", "'g' is shared"),
    ],
)
def test_channels_that_others_see_stay_and_the_reason_is_told(body: str, outputs: str, reason: str) -> None:
    _, _, found, refused = links(body, outputs)
    assert found == []
    assert reason in " ".join(refused.values())


def test_another_axis_than_the_last_is_no_channel() -> None:
    text = "m (float[N,8,3] x) => (float[N,8,6] y) { l = LayerNormalization<axis=1>(x, g)  y = MatMul(l, w) }"
    model = Model.from_proto(parsed(text, g=normal(8, 3), w=normal(3, 6)))
    assert find_norm_links(model.edit(), {layer.name: layer for layer in find_layers(model)})[0] == []


def test_afterwards_activations_and_weights_have_one_ratio_and_the_outputs_are_the_same() -> None:
    model, editor, found, _ = links(f"{NORM}  p = MatMul(l, w)  q = Gemm<transB=1>(l, t)  y = Add(p, q)")
    x = {"x": normal(64, 8, seed=9)}
    reach = measured(model, found, x)
    (values,) = model.session(quantized=False, outputs=["l"]).run(None, x)
    np.testing.assert_allclose(reach[found[0].node], np.abs(values).max(0), rtol=1e-6)
    layers = {layer.name: layer for layer in find_layers(model)}
    (scale,) = equalize_norms(editor, found, layers, reach, 1000.0).values()
    equalized = editor.model()
    weights = np.maximum(np.abs(TENSORS["w"]).max(1), np.abs(TENSORS["t"]).max(0))
    ratio = np.sqrt(np.abs(values).max(0) / weights)
    np.testing.assert_allclose(scale, ratio / np.exp(np.log(ratio).mean()), rtol=1e-5)
    before, after = (each.session(quantized=False).run(None, x)[0] for each in (model, equalized))
    np.testing.assert_allclose(before, after, rtol=1e-4, atol=1e-4)


def test_scales_stay_within_what_is_allowed_and_dead_channels_stay() -> None:
    model, editor, found, _ = links(f"{NORM}  y = MatMul(l, w)")
    layers = {layer.name: layer for layer in find_layers(model)}
    reach = {found[0].node: np.array([0, 1e-6, 1, 1, 1, 1, 1, 1e6])}
    (scale,) = equalize_norms(editor, found, layers, reach, 10.0).values()
    assert scale[0] == 1.0
    assert (scale.min(), scale.max()) == pytest.approx((0.1, 10.0))


def test_without_samples_an_activation_reaches_its_shift_and_three_deviations() -> None:
    model, _, found, _ = links(f"{NORM}  y = MatMul(l, w)")
    wanted = np.abs(TENSORS["b"]) + 3 * np.abs(TENSORS["g"])
    np.testing.assert_allclose(measured(model, found, None)[found[0].node], wanted, rtol=1e-6)
    assert measured(model, [], None) == {}
