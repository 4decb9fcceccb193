"""Linked layers read and rewritten: how large the weights of each channel are, and channels rescaled between layers.

    W1 /= s, b1 /= s (rows)        W2 *= s (columns)        min(x, u) becomes min(x, u / s)

s is (C,), one scale for each link; float64 in between, rounded once to float32.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qpipe.methods.equalization.links import Link, rescale_bounds
from qpipe.model.network.facts import Spread
from qpipe.model.structure.channels import bias_vector, grouped, own, set_bias, ungrouped

if TYPE_CHECKING:
    from qpipe.model.network.network import Editor
    from qpipe.model.structure.layers import Layer

Vector = NDArray[np.float64]


def peaks(
    editor: Editor, layers: Mapping[str, Layer], links: Mapping[str, Link]
) -> dict[str, NDArray[np.float32]]:
    """max abs over the kernel of every linked layer's weight, (g, O/g, I/g), by the layer's name."""
    found = {}
    for name in sorted(set(links) | {link.second for link in links.values()}):
        layer = layers[name]
        weight = grouped(editor.param(layer.weight), layer.groups, layer.channel_axis)
        # float32 holds them exactly: of linear layers they are the whole weight.
        found[name] = np.abs(weight).max(axis=3).astype(np.float32)
    return found


def rescale(
    editor: Editor,
    layers: Mapping[str, Layer],
    links: Mapping[str, Link],
    scales: Mapping[str, Vector],
    unused: Collection[str],
) -> None:
    """Divide each layer's rows, bias and folded statistics by its own scale (C,), multiply its columns by the scale of
    the layer before, and divide the bounds between them; of a Clip that is `unused` the upper bound goes."""
    into = {link.second: link for link in links.values()}
    statistics = dict(editor.facts.statistics)
    for name in sorted(set(links) | set(into)):
        layer = own(editor, layers[name])
        weight = grouped(editor.param(layer.weight), layer.groups, layer.channel_axis)
        groups, per_group, columns, _ = weight.shape
        if name in into:
            scale = into[name].way.channels.spread(scales[into[name].first])
            weight = weight * scale.reshape(groups, 1, columns, 1)
        if name in scales:
            weight = weight / scales[name].reshape(groups, per_group, 1, 1)
            if layer.bias is not None:
                set_bias(editor, layer, bias_vector(editor, layer) / scales[name])
            if layer.output in statistics:
                spread = statistics[layer.output]
                statistics[layer.output] = Spread(spread.gamma / scales[name], spread.beta / scales[name])
        editor.set_param(layer.weight, ungrouped(weight, layer.weight_shape, layer.channel_axis))
    editor.facts = replace(editor.facts, statistics=statistics)
    for link in links.values():
        for step in link.way.steps:
            if step.node.op_type in ("Clip", "Min", "Max"):
                rescale_bounds(editor, step, scales[link.first], str(step.node.name) in unused)
