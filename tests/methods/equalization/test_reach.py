"""How far activations reach: on samples as onnxruntime computes them, by statistics as a normal distribution says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qpipe.methods.equalization.links import find_links
from qpipe.methods.equalization.reach import expected_reach, measured_reach, unreached
from qpipe.model import Model
from qpipe.model.network.facts import Spread
from qpipe.model.structure.layers import find_layers
from tests.model.nets import normal, parsed

W, B = normal(4, 3, 1, 1), np.array([5.0, -5.0, 0.5, 0.0], np.float32)
NORMS = np.sqrt((W.astype(np.float64) ** 2).sum((1, 2, 3)))


def scene(between: str = "t = Relu(s)", bound: float = 6.0) -> tuple[Model, Any, Any]:
    tensors = {"w": W, "b": B, "v": normal(2, 4, 1, 1), "zero": np.float32(0), "six": np.float32(bound)}
    used = {name: array for name, array in tensors.items() if name in "wbv" or name in between}
    text = f"m (float[N,3,5,5] x) => (float[N,2,5,5] y) {{ s = Conv(x, w, b)  {between}  y = Conv(t, v) }}"
    model = Model.from_proto(parsed(text, **used))
    layers = {layer.name: layer for layer in find_layers(model)}
    return model, layers, find_links(model.edit(), layers)[0]


ABOVE, BELOW = np.maximum(B + 3 * NORMS, 0), 3 * NORMS - B


@pytest.mark.parametrize(
    ("between", "wanted"),
    [
        ("t = Relu(s)", ABOVE),
        ("t = LeakyRelu(s)", np.maximum(ABOVE, BELOW)),
        ("t = Clip(s, zero, six)", np.minimum(ABOVE, 6)),
    ],
)
def test_without_samples_it_is_three_deviations_from_the_mean(between: str, wanted: Any) -> None:
    model, layers, links = scene(between)
    ((name, link),) = links.items()
    np.testing.assert_allclose(expected_reach(model, layers[name], link), wanted, rtol=1e-6)


def test_what_a_normalization_left_counts_before_the_weights() -> None:
    model, layers, links = scene()
    ((name, link),) = links.items()
    spread = Spread(gamma=np.array([1.0, -2, 0, 1]), beta=np.array([0.0, 1, 2, -9]))
    model = model.with_facts(statistics={layers[name].output: spread})
    np.testing.assert_allclose(expected_reach(model, layers[name], link), [3, 7, 2, 0])


@pytest.mark.parametrize(("between", "bound"), [("t = Relu(s)", 6.0), ("t = Clip(s, zero, six)", 2.0)])
def test_on_samples_it_is_the_largest_magnitude_of_any_batch(between: str, bound: float) -> None:
    model, layers, links = scene(between, bound)
    x = {"x": normal(70, 3, 5, 5)}
    ((name, _),) = links.items()
    (values,) = model.session(quantized=False, outputs=["t"]).run(None, x)
    found = measured_reach(model, x, layers, links)[name]
    np.testing.assert_allclose(found, np.abs(values).max((0, 2, 3)), rtol=1e-6)


def test_a_bound_is_free_where_no_sample_reaches_it() -> None:
    x = {"x": normal(70, 3, 5, 5)}
    for bound, free in ((1000.0, True), (1.0, False)):
        model, _, links = scene("t = Clip(s, zero, six)", bound)
        assert bool(unreached(model, x, links.values())) == free
    model, _, links = scene()
    assert unreached(model, x, links.values()) == set()
