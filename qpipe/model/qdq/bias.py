"""Biases of quantized layers: int32 codes with scale s_x * s_w and zero point 0, as integer kernels want.

    b' = clip(round(b / s), -2^31, 2^31 - 128) * s,    s = s_x * s_w per output channel

A channel whose weights are all zero has the smallest scale there is, and its bias would not fit into 32 bits:
it would vanish in the simulation and in the integer kernel alike. `effective_encodings` raises the scales of
such channels as far as the bias needs. Where the weights are zero that changes nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qpipe.model.structure.layers import Layer, find_layers
from qpipe.numerics.grid import SMALLEST_SCALE, Encoding

if TYPE_CHECKING:
    from qpipe.model.network.network import Network

BIAS_MIN, BIAS_MAX = -(2**31), 2**31 - 128
"""Bounds of a bias code; the upper one is the largest below 2^31 that float32 can hold."""


@dataclass(frozen=True)
class QuantizedBias:
    """The bias `name` of one layer, on the grid s_x * s_w of its `input` and `weight`.

    `node` and `position` say which input of which node it is; `repeats` is how often the scales of the weight
    follow one another along the output channels (groups of a transposed convolution).
    """

    name: str
    node: str
    position: int
    input: str
    weight: str
    repeats: int


def quantized_biases(model: Network) -> dict[tuple[str, int], QuantizedBias]:
    """The biases that get an int32 grid, by (node name, input position).

    Those of layers whose input and weight have encodings, the weight's per tensor or per output channel. None
    where the bias, or the product that it is added to, has a grid of its own; none at all where the model's
    facts say that biases are float.
    """
    if model.facts.biases == "float":
        return {}
    found = {}
    for layer in find_layers(model):
        weight = model.encodings.get(layer.weight)
        if layer.bias is None or weight is None or layer.input not in model.encodings:
            continue
        if layer.bias in model.encodings or (layer.add and _product(model, layer.name) in model.encodings):
            continue  # an Add of its own, as other tools quantize it
        repeats = _repeats(layer, weight)
        if repeats is None:
            continue
        node = layer.add or layer.name
        position = 2 if layer.add is None else _position(model, layer.add, layer.bias)
        bias = QuantizedBias(layer.bias, node, position, layer.input, layer.weight, repeats)
        found[node, position] = bias
    return found


def bias_scale(x: Encoding, weight: Encoding, repeats: int) -> npt.NDArray[np.float32]:
    """s_x * s_w in float32, of shape () or (channels,)."""
    product = np.asarray(x.scale * weight.scale, np.float32)
    return np.tile(product, repeats) if product.ndim else product


def bias_codes(bias: npt.NDArray[np.float32], scale: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
    """The int32 codes of `bias`, whose last dimension counts the channels of `scale`."""
    steps = np.rint(np.asarray(bias, np.float32) / scale)
    clipped = np.clip(steps, np.float32(BIAS_MIN), np.float32(BIAS_MAX))
    return np.asarray(clipped, np.int32)


def effective_encodings(model: Network) -> dict[str, Encoding]:
    """The model's encodings, the weights' scales raised where a bias would not fit into 32 bits otherwise."""
    encodings = dict(model.encodings)
    for bias in quantized_biases(model).values():
        weight = encodings[bias.weight]
        step = float(encodings[bias.input].scale)
        largest = np.abs(model.param(bias.name).astype(np.float64)).reshape(-1)
        # A product below the normal numbers loses digits, and may be 0.
        needed = np.maximum(largest / BIAS_MAX, SMALLEST_SCALE) / step * (1 + 1e-6)
        needed = needed.reshape(bias.repeats, -1).max(0) if weight.scale.ndim else needed.max()
        scale = np.maximum(weight.scale, needed.astype(np.float32))
        if not np.array_equal(scale, weight.scale):
            encodings[bias.weight] = replace(weight, scale=scale)
    return encodings


def _repeats(layer: Layer, weight: Encoding) -> int | None:
    """How the weight's scales map onto output channels; None where one scale is not enough for a channel."""
    if weight.axis is None:
        return 1
    if weight.block_size is not None:
        return None
    if weight.axis == layer.channel_axis:
        return layer.groups if layer.op_type == "ConvTranspose" else 1
    # A depthwise transposed convolution has its output channels along axis 0 too.
    depthwise = layer.op_type == "ConvTranspose" and layer.weight_shape[1] == 1
    return 1 if weight.axis == 0 and depthwise and layer.weight_shape[0] == layer.groups else None


def _product(model: Network, node: str) -> str:
    return str(model.graph.node(node).outputs[0].name)


def _position(model: Network, node: str, value: str) -> int:
    names = [None if v is None else v.name for v in model.graph.node(node).inputs]
    return names.index(value)
