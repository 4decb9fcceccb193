"""High bias folding: hand what a channel is sure to exceed on to the next layer, so that activations need less range.

Equalization can leave a channel with a large bias: its activations lie far from zero in a narrow band, and
the whole tensor's grid has to reach there. Where x >= c for nearly all inputs, relu(x) = c + relu(x - c), so

    c = max(0, beta - 3 abs(gamma))
    b1 -= c        min(x, u) becomes min(x - c, u - c)        b2 += sum(W2) c

with beta and gamma, the mean and spread of the first layer's outputs, from the normalization folded into it.

Unlike equalization this moves the float outputs a little, where x < c (0.1 % of a normal distribution): the
error is measured and noted. A layer that pads with zeros is not given a constant, since what it pads is not
shifted: its outputs would be wrong along the border.

Assumes: bnf has kept the statistics, cle has rescaled them; Relu or Clip from 0 between the layers.
Source: Nagel, van Baalen, Blankevoort, Welling, Data-Free Quantization Through Weight Equalization and Bias
Correction, arXiv 1906.04721, section 4.1.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from qpipe.errors import InputError
from qpipe.stage import NULL, Context, Range, Samples, stage

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    from qpipe.methods.equalization.links import Link
    from qpipe.model.network.network import Editor, Network
    from qpipe.model.structure.layers import Layer

    Vector = NDArray[np.float64]

POOLS = frozenset(("MaxPool", "ReduceMean", "ReduceMax", "GlobalAveragePool", "GlobalMaxPool"))
"""Operators f with f(x + c) = f(x) + c for a constant c of each channel, beside those that only reshape; AveragePool
where it counts no padding."""


def absorbed(gamma: Vector, beta: Vector, deviations: float) -> Vector:
    """c (C,): what a channel with mean `beta` and spread `gamma` exceeds but for `deviations` of it."""
    import numpy as np

    return np.maximum(0.0, beta - deviations * np.abs(gamma))


def shifted_bias(weight: Vector, bias: Vector, constant: Vector) -> Vector:
    """Bias (O,) of the layer whose inputs have lost `constant` (I,): b + sum(W) c, with W as (g, O/g, I/g, K)."""
    groups, _, columns, _ = weight.shape
    moved: Vector = (weight * constant.reshape(groups, 1, columns, 1)).sum(axis=(2, 3)).reshape(-1)
    return bias + moved


def hindrance(link: Link) -> str | None:
    """Why the second layer of `link` cannot take a constant from the first, or None."""
    end = link.way.end
    pads: list[int] = list(end.attributes.get_ints("pads", []))
    if end.op_type == "ConvTranspose" or any(pads) or "SAME" in end.attributes.get_string("auto_pad", ""):
        return f"'{end.name}' ({end.op_type}) pads with zeros"
    rectifiers = 0
    for step in link.way.steps:
        found = rectifies(step.node)
        if found is None:
            return f"'{step.node.name}' ({step.node.op_type}) does not commute with a constant"
        rectifiers += found
    return None if rectifiers else "no Relu lies between the layers"


def rectifies(node: ir.Node) -> bool | None:
    """Whether `node` cuts off below 0; None where a constant cannot pass it."""
    from qpipe.methods.equalization.links import bounds
    from qpipe.model.structure.channels import RESHAPES

    if node.op_type == "Relu":
        return True
    if node.op_type == "Min":
        return False
    if node.op_type == "Clip":
        lower = bounds(node)[0]
        return None if lower is None or lower.any() else True
    if node.op_type in POOLS | RESHAPES:
        return False
    if node.op_type == "AveragePool":
        counts: int = node.attributes.get_int("count_include_pad", 0)
        return None if counts and any(node.attributes.get_ints("pads", [])) else False
    return None


def capped(link: Link, constant: Vector) -> Vector:
    """`constant` (C,), at most the upper bounds on the way: above them there is nothing to hand on."""
    import numpy as np

    from qpipe.methods.equalization.links import along, bounds

    for step in link.way.steps:
        upper = bounds(step.node)[1] if step.node.op_type in ("Clip", "Min") else None
        if upper is not None:
            everywhere = np.broadcast_to(upper, along(step, constant).shape).reshape(-1)
            constant = np.minimum(constant, step.channels.gathered(everywhere.astype(np.float64)))
    return constant


def hand_on(editor: Editor, layers: dict[str, Layer], link: Link, constant: Vector) -> None:
    """Take `constant` (C,) out of the first layer of `link` and the bounds on the way, and into the second layer."""
    from qpipe.methods.equalization.links import along, bounds, set_bounds
    from qpipe.model.structure.channels import bias_vector, grouped, own_bias, set_bias

    first, second = (own_bias(editor, layers[name]) for name in (link.first, link.second))
    weight = grouped(editor.param(second.weight), second.groups, second.channel_axis)
    moved = shifted_bias(weight, bias_vector(editor, second), link.way.channels.spread(constant))
    layers[link.first] = set_bias(editor, first, bias_vector(editor, first) - constant)
    layers[link.second] = set_bias(editor, second, moved)
    for step in link.way.steps:
        if step.node.op_type in ("Clip", "Min"):
            lower, upper = bounds(step.node)
            if upper is not None:
                set_bounds(editor, step.node, lower, upper - along(step, constant))


def hand_on_all(
    editor: Editor, layers: dict[str, Layer], links: Mapping[str, Link], deviations: float
) -> tuple[dict[str, float], dict[str, str]]:
    """Hand on what each link's first layer exceeds; the largest constant by layer, and why others hand nothing on."""
    from qpipe.model.network.facts import Spread

    statistics, handed, left = dict(editor.facts.statistics), dict[str, float](), dict[str, str]()
    for name, link in links.items():
        spread = statistics.get(layers[name].output)
        if spread is None:
            left[name] = "no normalization was folded into it"
            continue
        if reason := hindrance(link):
            left[name] = reason
            continue
        constant = capped(link, absorbed(spread.gamma, spread.beta, deviations))
        if constant.any():
            hand_on(editor, layers, link, constant)
            statistics[layers[name].output] = Spread(spread.gamma, spread.beta - constant)
            handed[name] = float(constant.max())
    editor.facts = replace(editor.facts, statistics=statistics)
    return handed, left


@stage(version=1)
def hbf(
    model: Network,
    data: Samples | None = None,
    *,
    deviations: Annotated[float, Range(ge=0)] = 3.0,
    ctx: Context = NULL,
) -> Network:
    """The model whose layers hand the constant part of their activations on to the next layer, where that is right.

    `deviations` says how far below the mean the constant lies. The outputs move where an activation falls below it: by
    how much, on `data` or on random inputs, is noted and kept in `metadata["hbf"]`, with the layers that were left and
    the reason. Errors: InputError for a quantized model, and for one without folded statistics.
    """
    from qpipe.methods.comparison.compare import outputs_error
    from qpipe.methods.equalization.links import find_links
    from qpipe.methods.preconditions import float_weights
    from qpipe.model.structure.layers import find_layers

    if not float_weights(model, "hbf", ctx.note):
        return model
    if not model.facts.statistics:
        raise InputError(
            "hbf needs the statistics of folded normalizations, and the model has none. Put bnf before."
        )
    editor = model.edit()
    layers = {layer.name: layer for layer in find_layers(model)}
    links, unlinked = find_links(editor, layers)
    handed, left = hand_on_all(editor, layers, links, deviations)
    result = editor.model()
    error = outputs_error(model, result, data.arrays if data is not None else None)
    ctx.note(f"{len(handed)} layers handed a constant on; the outputs moved by {error:.1e} (relative).")
    reasons = {**unlinked, **left}
    report = {"handed_on": handed, "left": reasons, "largest_relative_error": float(f"{error:.1e}")}
    return result.with_metadata({"hbf": report})
