"""Channels rescaled between layers: what each layer is divided and multiplied by, and that nothing else moves."""

from __future__ import annotations

import numpy as np

from qpipe.methods.equalization.links import find_links
from qpipe.methods.equalization.rescaling import peaks, rescale
from qpipe.model import Model
from qpipe.model.network.facts import Spread
from qpipe.model.structure.layers import find_layers
from tests.model.nets import normal, parsed

TENSORS = {"w": normal(4, 3, 3, 3), "b": normal(4), "v": normal(6, 2, 1, 1, seed=1)}
TEXT = """m (float[N,3,5,5] x) => (float[N,6,3,3] y) {
    s = Conv(x, w, b)  t = Clip(s, zero, one)  y = Conv<group=2>(t, v) }"""
SCALE = np.array([0.5, 2.0, 1.0, 4.0])


def test_rows_bias_statistics_and_bounds_are_divided_and_columns_multiplied() -> None:
    model = Model.from_proto(parsed(TEXT, **TENSORS, zero=np.float32(0), one=np.float32(1)))
    model = model.with_facts(statistics={"s": Spread(np.ones(4), np.full(4, 2.0))})
    editor, layers = model.edit(), {layer.name: layer for layer in find_layers(model)}
    links, _ = find_links(editor, layers)
    rescale(editor, layers, links, dict.fromkeys(links, SCALE), ())
    rescaled = editor.model()
    np.testing.assert_allclose(rescaled.param("w"), TENSORS["w"] / SCALE.reshape(4, 1, 1, 1), rtol=1e-6)
    np.testing.assert_allclose(rescaled.param("b"), TENSORS["b"] / SCALE, rtol=1e-6)
    columns = np.stack([SCALE[:2]] * 3 + [SCALE[2:]] * 3).reshape(6, 2, 1, 1)
    np.testing.assert_allclose(rescaled.param("v"), TENSORS["v"] * columns, rtol=1e-6)
    np.testing.assert_allclose(rescaled.facts.statistics["s"].gamma, 1 / SCALE)
    np.testing.assert_allclose(rescaled.facts.statistics["s"].beta, 2 / SCALE)
    x = {"x": normal(2, 3, 5, 5)}
    before, after = (each.session(quantized=False).run(None, x)[0] for each in (model, rescaled))
    np.testing.assert_allclose(before, after, rtol=1e-5, atol=1e-5)


def test_peaks_are_the_largest_weights_of_each_pair_of_channels() -> None:
    model = Model.from_proto(parsed(TEXT, **TENSORS, zero=np.float32(0), one=np.float32(1)))
    editor, layers = model.edit(), {layer.name: layer for layer in find_layers(model)}
    first, second = peaks(editor, layers, find_links(editor, layers)[0]).values()
    np.testing.assert_array_equal(first[0], np.abs(TENSORS["w"]).max((2, 3)))
    np.testing.assert_array_equal(second, np.abs(TENSORS["v"]).reshape(2, 3, 2))
