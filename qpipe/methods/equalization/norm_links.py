"""From a normalization to the linear layers that read it: channels may be rescaled between them, exactly.

    (n * g + b) W = (n * g/s + b/s) (s W)        g, b and s are (C,); s W scales the rows of W's inputs

The node is a LayerNormalization over the last axis, or a Mul by a vector (the end of an RMS norm). All who read it
have to be MatMul or Gemm with a weight of their own. s brings a channel's activations and its weights to the same
range, s_c = sqrt(r_c / w_c), r_c = max |x_c|, w_c the largest weight of any reader on channel c: what `cle` does
between two layers (DFQ, arXiv 1906.04721), and smoothquant with its strength at one half (arXiv 2211.10438).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qpipe.model.network.invariants import constant_of
from qpipe.model.runtime.session import make_session
from qpipe.model.simulation.samples import batches
from qpipe.model.structure.channels import dims

if TYPE_CHECKING:
    from qpipe.model.network.network import Array, Editor, Network
    from qpipe.model.structure.layers import Layer

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class NormLink:
    """A node that scales channels by the parameter `scale` and moves them by `bias`; the layers that read it."""

    node: str
    output: str
    scale: str
    bias: str | None
    layers: tuple[str, ...]


def find_norm_links(editor: Editor, layers: Mapping[str, Layer]) -> tuple[list[NormLink], dict[str, str]]:
    """The links, and for each other LayerNormalization the reason why it must stay as it is."""
    found, refused = [], {}
    for node in editor.graph:
        parameters = _parameters(node)
        if parameters is None:
            continue
        reason = _reason(editor, node, parameters, layers)
        if reason is None:
            scale, bias = (None if value is None else str(value.name) for value in parameters)
            readers = tuple(dict.fromkeys(str(use.node.name) for use in node.outputs[0].uses()))
            found.append(NormLink(str(node.name), str(node.outputs[0].name), str(scale), bias, readers))
        elif node.op_type == "LayerNormalization":
            refused[str(node.name)] = reason
    return found, refused


def _parameters(node: ir.Node) -> tuple[ir.Value, ir.Value | None] | None:
    """The scale (C,) and the bias of a node that scales the last axis by a parameter; None for any other."""
    if node.domain or node.op_type not in ("LayerNormalization", "Mul"):
        return None
    first = 1 if node.op_type == "LayerNormalization" or constant_of(node.inputs[0]) is None else 0
    rank = len(dims(node.inputs[1 - first]))
    if node.op_type == "LayerNormalization" and node.attributes.get_int("axis", -1) not in (-1, rank - 1):
        return None
    scale, bias = node.inputs[first], node.inputs[2] if len(node.inputs) > 2 else None
    array = constant_of(scale)
    if scale is None or array is None or array.ndim != 1 or array.size < 2 or not rank:
        return None
    return scale, bias


def _reason(
    editor: Editor, node: ir.Node, parameters: tuple[ir.Value, ir.Value | None], layers: Mapping[str, Layer]
) -> str | None:
    """Why the channels behind `node` must stay as they are, or None."""
    output = node.outputs[0]
    if output.is_graph_output():
        return f"'{output.name}' is an output of the model"
    for value in parameters:
        if value is not None and (constant_of(value) is None or len(value.uses()) > 1):
            return f"its parameter '{value.name}' is shared, or computed in the graph"
    for use in output.uses():
        layer = layers.get(str(use.node.name))
        if layer is None or layer.op_type not in ("MatMul", "Gemm") or use.idx != 0:
            return (
                f"'{output.name}' is read by '{use.node.name}' ({use.node.op_type}), which is no linear layer"
            )
        if len(editor.graph.initializers[layer.weight].uses()) > 1:
            return f"the weight '{layer.weight}' is shared"
    return None


def equalize_norms(
    editor: Editor,
    links: Sequence[NormLink],
    layers: Mapping[str, Layer],
    reach: Mapping[str, Vector],
    max_scale: float,
) -> dict[str, Vector]:
    """Rescale the channels of every link, in place; the scales (C,) by the normalization's name."""
    scales = {}
    for link in links:
        weights = np.max([_rows(editor, layers[name]) for name in link.layers], axis=0)
        scales[link.node] = s = _scales(reach[link.node], weights, max_scale)
        for name in filter(None, (link.scale, link.bias)):
            editor.set_param(name, editor.param(name) / s)
        for name in link.layers:
            layer = layers[name]
            shape = (-1, 1) if layer.channel_axis == 1 else (1, -1)
            editor.set_param(layer.weight, editor.param(layer.weight) * s.reshape(shape))
    return scales


def _rows(editor: Editor, layer: Layer) -> Vector:
    """max |W| of each input channel."""
    found: Vector = np.abs(editor.param(layer.weight).astype(np.float64)).max(axis=layer.channel_axis)
    return found


def _scales(reach: Vector, weights: Vector, max_scale: float) -> Vector:
    """sqrt(reach / weights), their geometric mean 1; 1 for a channel that is dead on either side."""
    alive = (reach > 0) & (weights > 0)
    if not alive.any():
        return np.ones_like(reach)
    logarithms = 0.5 * np.log(np.where(alive, reach / np.where(alive, weights, 1.0), 1.0))
    logarithms = np.where(alive, logarithms - logarithms[alive].mean(), 0.0)
    return np.asarray(np.exp(np.clip(logarithms, -np.log(max_scale), np.log(max_scale))))


def measured(
    model: Network, links: Sequence[NormLink], arrays: Mapping[str, Array] | None
) -> dict[str, Vector]:
    """max |x| of each channel behind every link, over the samples; without samples |b| + 3 |g|, what normal
    activations reach. Raises InputError for samples that do not fit."""
    if not links:
        return {}
    if arrays is None:
        return {
            link.node: 3 * np.abs(model.param(link.scale).astype(np.float64))
            + (0.0 if link.bias is None else np.abs(model.param(link.bias).astype(np.float64)))
            for link in links
        }
    session = make_session(model, quantized=False, outputs=[link.output for link in links])
    found: dict[str, Vector] = {}
    for batch in batches(model, arrays, 32):
        fed = dict(zip([spec.name for spec in model.inputs], batch.arrays, strict=True))
        for link, values in zip(links, session.run(None, fed), strict=True):
            largest = np.abs(values).reshape(-1, values.shape[-1]).max(axis=0).astype(np.float64)
            found[link.node] = np.maximum(found.get(link.node, largest), largest)
    return found
