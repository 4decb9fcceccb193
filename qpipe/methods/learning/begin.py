"""Where learning begins: codes in closed form, layer by layer, on what the parts before make of the data by now.

The closed form makes up for the errors in front of a layer. Learning moves those, so that what was solved before it
fits no longer; therefore the layers of a part are solved when its turn has come, and not all at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from qpipe.methods.learning.carry import TOGETHER, Carry, Held, feed
from qpipe.methods.rounding.by_gram import round_by_gram
from qpipe.numerics.fake_quantize import FakeQuantize
from qpipe.numerics.rounding.gram import GramOptions

if TYPE_CHECKING:
    from qpipe.methods.learning.parts import Part
    from qpipe.model.network.network import Network
    from qpipe.model.structure.layers import Layer

POSITIONS = 25
"""Places of a sample that count, as in the stage `adaround`."""


def begun(
    model: Network,
    reference: Network,
    part: Part,
    carry: Carry,
    *,
    update_bias: bool,
    seed: Callable[[str], int],
    memo: Callable[..., Any],
) -> Network:
    """`model` with the layers of `part` solved in order, each on what the ones before give."""
    for layer in part.layers:
        x_hat, x = carry.inside(layer.input, model)
        device = carry.device
        quantizer = FakeQuantize(model.encodings[layer.input]).to(device) if layer.input in model.encodings else None
        inputs = _batches(x_hat, device, quantizer), _batches(x, device, None)
        solved = round_by_gram(
            _as_float(model, reference, layer), layer, *inputs, options=GramOptions(update_bias=update_bias),
            positions=POSITIONS, seed=seed(layer.name), memo=memo,
        )  # fmt: skip
        editor = model.edit()
        editor.set_param(layer.weight, solved.weight)
        if solved.bias is not None and layer.bias is not None:
            editor.set_param(layer.bias, solved.bias.reshape(model.param(layer.bias).shape))
        editor.encodings[layer.weight] = solved.encoding
        model = editor.model()
    return model


def _as_float(model: Network, reference: Network, layer: Layer) -> Network:
    """`model` with the layer's weight and bias as they were before any tuning."""
    params = {layer.weight: reference.param(layer.weight)}
    if layer.bias is not None:
        known = layer.bias in reference.graph.initializers
        params[layer.bias] = reference.param(layer.bias) if known else np.zeros_like(model.param(layer.bias))
    encodings = {**model.encodings, layer.weight: replace(model.encodings[layer.weight], frozen=False)}
    return model.with_params(params).with_encodings(encodings)


def _batches(held: Held, device: str, quantizer: FakeQuantize | None) -> list[Tensor]:
    units = len(held.rows)
    found: list[Tensor] = []
    for first in range(0, units, TOGETHER):
        for (value,) in feed([held], np.arange(first, min(first + TOGETHER, units)), device):
            found.append(value if quantizer is None else quantizer(value))
    return found
