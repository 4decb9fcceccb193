"""Fold BatchNormalization into the layer before it, or behind it: the same function with fewer nodes.

    factor = gamma / sqrt(var + epsilon)    shift = beta - mean * factor            y = factor * x + shift
    before:  W' = W * factor (rows)         b' = b * factor + shift
    behind:  W' = W * factor (columns)      b' = b + sum(W * shift)

The layer before takes precedence. The layer behind can take it where nothing pads with zeros in between,
since a zero that was padded was never shifted. What neither can take becomes Mul and Add, and is listed.
After folding into the layer before, its outputs are distributed around beta with the spread gamma:
`facts.statistics` keep both, per channel.

Assumes: BatchNormalization in inference mode with constant parameters. Arithmetic in float64, rounded once to float32.
Source: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
section 3.2, arXiv 1712.05877; the statistics: Nagel et al., Data-Free Quantization, arXiv 1906.04721.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from qpipe.stage import NULL, Context, stage

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    from qpipe.model.network.network import Editor, Network
    from qpipe.model.structure.channels import Way
    from qpipe.model.structure.layers import Layer

    Vector = NDArray[np.float64]
    Fold = Callable[[Vector, Vector, Vector, Vector], tuple[Vector, Vector]]

MEANS = frozenset(("GlobalAveragePool", "ReduceMean"))
"""Operators that commute with factor * x + shift, beside those that only reshape; AveragePool does where it counts no
padding."""


class Affine(NamedTuple):
    """y = factor * x + shift, of a normalization whose outputs have mean `beta` and spread `gamma`; all (C,)."""

    factor: Vector
    shift: Vector
    gamma: Vector
    beta: Vector


def affine(gamma: Vector, beta: Vector, mean: Vector, var: Vector, epsilon: float) -> tuple[Vector, Vector]:
    """BatchNormalization as y = factor * x + shift; all (C,)."""
    import numpy as np

    factor = gamma / np.sqrt(var + epsilon)
    return factor, beta - mean * factor


def fold_before(weight: Vector, bias: Vector, factor: Vector, shift: Vector) -> tuple[Vector, Vector]:
    """Weight (g, O/g, I/g, K) and bias (O,) of factor * (W x + b) + shift; factor and shift are (O,)."""
    rows = weight.shape[:2]
    return weight * factor.reshape(*rows, 1, 1), bias * factor + shift


def fold_behind(weight: Vector, bias: Vector, factor: Vector, shift: Vector) -> tuple[Vector, Vector]:
    """Weight (g, O/g, I/g, K) and bias (O,) of W (factor * x + shift) + b; factor and shift are (I,)."""
    groups, _, columns, _ = weight.shape
    moved = (weight * shift.reshape(groups, 1, columns, 1)).sum(axis=(2, 3)).reshape(-1)
    return weight * factor.reshape(groups, 1, columns, 1), bias + moved


def read_affine(node: ir.Node) -> Affine | None:
    """What a BatchNormalization node computes; None where it trains or computes its parameters."""
    import numpy as np

    from qpipe.model.network.invariants import constant_of

    arrays = [constant_of(value) for value in node.inputs[1:5]]
    trains: int = node.attributes.get_int("training_mode", 0)
    if trains or any(array is None for array in arrays):
        return None
    gamma, beta, mean, var = (np.asarray(array, np.float64) for array in arrays)
    epsilon: float = node.attributes.get_float("epsilon", 1e-5)
    return Affine(*affine(gamma, beta, mean, var, epsilon), gamma, beta)


def commutes(node: ir.Node) -> str | None:
    """Why factor * x + shift cannot be moved behind `node`, or None."""
    from qpipe.model.structure.channels import RESHAPES

    pads = any(node.attributes.get_ints("pads", [])) or node.attributes.get_string("auto_pad", "").startswith(
        "SAME"
    )
    counts: int = node.attributes.get_int("count_include_pad", 0)
    if node.op_type in MEANS | RESHAPES or (node.op_type == "AveragePool" and not (pads and counts)):
        return None
    return f"'{node.name}' ({node.op_type}) does not commute with it"


def pads_with_zeros(node: ir.Node) -> bool:
    """Whether some outputs of the layer `node` see fewer than all of its kernel's inputs."""
    if node.op_type == "ConvTranspose":
        return True
    automatic = node.attributes.get_string("auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER")
    return automatic or any(node.attributes.get_ints("pads", []))


def layer_before(value: ir.Value, layers: Mapping[str, Layer]) -> Layer | None:
    """The layer whose output feeds `value` alone, directly or through what only reshapes, its channels on axis
    1 of `value`; None where there is none.
    """
    from qpipe.model.structure.channels import RESHAPES, Blocked, Channels, dims, passed

    steps: list[ir.Node] = []
    while True:
        producer = value.producer()
        if producer is None or len(value.uses()) != 1 or value.is_graph_output():
            return None
        if layer := layers.get(str(producer.name)):
            break
        if producer.op_type not in RESHAPES or producer.inputs[0] is None:
            return None
        steps.append(producer)
        value = producer.inputs[0]
    channels = Channels(len(dims(value)) - 1 if layer.op_type == "MatMul" else 1)
    try:
        for node in reversed(steps):
            channels = passed(node, channels)
    except Blocked:
        return None
    return layer if channels == Channels(1) else None


def way_behind(norm: ir.Node, ends: Collection[ir.Node], shift: Vector) -> Way:
    """The way from `norm` to the layer that can take it. Raises Blocked with the reason why there is none."""
    from qpipe.model.structure.channels import Blocked, follow

    way = follow(norm.outputs[0], 1, ends, commutes)
    if shift.any() and pads_with_zeros(way.end):
        raise Blocked(f"'{way.end.name}' ({way.end.op_type}) pads with zeros")
    return way


def rewrite(editor: Editor, layer: Layer, fold: Fold, factor: Vector, shift: Vector) -> Layer:
    """Set the layer's weight and bias to what `fold` makes of them; the layer as it is then."""
    from qpipe.model.structure.channels import bias_vector, grouped, own, set_bias, ungrouped

    layer = own(editor, layer)
    shape, axis = layer.weight_shape, layer.channel_axis
    weight, bias = fold(
        grouped(editor.param(layer.weight), layer.groups, axis), bias_vector(editor, layer), factor, shift
    )
    editor.set_param(layer.weight, ungrouped(weight, shape, axis))
    return set_bias(editor, layer, bias) if layer.bias or bias.any() else layer


def write_out(editor: Editor, norm: ir.Node, factor: Vector, shift: Vector) -> ir.Value:
    """The value of Mul and Add, put in front of `norm`, that is to replace its output."""
    import numpy as np
    import onnx_ir

    from qpipe.model.structure.channels import dims

    output = norm.outputs[0]
    shape = (-1, *(1,) * (len(dims(norm.inputs[0])) - 2))
    scale = editor.add_param(f"{norm.name}.factor", factor.astype(np.float32).reshape(shape))
    offset = editor.add_param(f"{norm.name}.shift", shift.astype(np.float32).reshape(shape))
    mul = onnx_ir.node("Mul", [norm.inputs[0], scale], name=f"{norm.name}_mul")
    add = onnx_ir.node("Add", [mul.outputs[0], offset], name=f"{norm.name}_add")
    for value in (mul.outputs[0], add.outputs[0]):
        value.type, value.shape = output.type, output.shape
    mul.outputs[0].name = f"{output.name}_scaled"
    editor.graph.insert_before(norm, [mul, add])
    return add.outputs[0]


def remove(editor: Editor, norm: ir.Node, value: ir.Value, name: str | None) -> None:
    """Remove `norm`; `value` takes the place of its output and is called `name` from now on."""
    norm.outputs[0].replace_all_uses_with(value, replace_graph_outputs=True)
    editor.graph.remove(norm, safe=True)
    norm.outputs[0].name, value.name = None, name


def into_before(
    editor: Editor, norm: ir.Node, layers: dict[str, Layer], layer: Layer, found: Affine
) -> Layer:
    """Fold `norm` into the `layer` that feeds it and take down how that is distributed; the layer as it is then."""
    from qpipe.model.network.facts import Spread

    name, data = str(norm.outputs[0].name), norm.inputs[0]
    producer = None if data is None else data.producer()
    output = name if producer is not None and str(producer.name) in layers else layer.output
    statistics = dict(editor.facts.statistics)
    statistics.pop(layer.output, None)  # of an earlier normalization, one of two in a row
    statistics[output] = Spread(found.gamma, found.beta)
    editor.facts = replace(editor.facts, statistics=statistics)
    del layers[layer.add or layer.name]
    layer = replace(rewrite(editor, layer, fold_before, found.factor, found.shift), output=output)
    layers[layer.add or layer.name] = layer
    data = norm.inputs[0]  # read again: a MatMul may have got its Add
    assert data is not None
    remove(editor, norm, data, name)
    return layer


def into_behind(
    editor: Editor, norm: ir.Node, layers: dict[str, Layer], key: str, way: Way, found: Affine
) -> Layer:
    """Fold `norm` into the layer at the end of `way`, which `layers` have under `key`; the layer as it is then."""
    data = norm.inputs[0]
    assert data is not None
    factor, shift = way.channels.spread(found.factor), way.channels.spread(found.shift)
    layer = rewrite(editor, layers.pop(key), fold_behind, factor, shift)
    layers[layer.add or layer.name] = layer
    remove(editor, norm, data, data.name)
    return layer


def fold(editor: Editor, norm: ir.Node, layers: dict[str, Layer]) -> tuple[str, str]:
    """Take `norm` out of the graph; where it went (before, behind, written out, left), and the layer or reason.

    `layers` are keyed by the name of the node that gives their output, and follow what changes.
    """
    from qpipe.model.structure.channels import Blocked, dims

    found, data, name = read_affine(norm), norm.inputs[0], norm.outputs[0].name
    if found is None:
        return "left", "it trains, or its parameters are computed in the graph"
    assert data is not None
    if layer := layer_before(data, layers):
        return "before", into_before(editor, norm, layers, layer, found).name
    heads = {editor.node(layer.name): key for key, layer in layers.items()}
    try:
        way = way_behind(norm, heads, found.shift)
    except Blocked as reason:
        if len(dims(data)) < 2:
            return "left", f"the rank of its input is not known, and behind it {reason}"
        remove(editor, norm, write_out(editor, norm, found.factor, found.shift), name)
        return "written out", f"no layer alone feeds it, and behind it {reason}"
    return "behind", into_behind(editor, norm, layers, heads[way.end], way, found).name


@stage(
    version=1,
    not_after={
        "adaround": "folding scales weights whose rounding is already tuned",
        "nearest": "folding scales weights that are already rounded",
        "calibrate": "the ranges were observed on a model that folding changes",
        "amp": "the mix was chosen for a model that folding changes",
        "cle": "equalization looks for the batch norms' scales inside the weights",
    },
)
def bnf(model: Network, *, ctx: Context = NULL) -> Network:
    """The model without BatchNormalization: each one folded into a layer, or written out as Mul and Add.

    A folded layer's output takes the name of the BatchNormalization's, since it holds the same numbers;
    `facts.statistics` give gamma and beta by that name. Errors: InputError for a quantized model.
    """
    from qpipe.methods.preconditions import float_weights
    from qpipe.model.structure.layers import find_layers

    if not float_weights(model, "bnf", ctx.note):
        return model
    editor = model.edit()
    layers = {layer.add or layer.name: layer for layer in find_layers(model)}
    went: dict[str, list[str]] = {}
    for norm in [node for node in editor.graph if node.op_type == "BatchNormalization"]:
        place, reason = fold(editor, norm, layers)
        went.setdefault(place, []).append(str(norm.name))
        if place in ("left", "written out"):
            ctx.note(f"BatchNormalization '{norm.name}' was {place}: {reason}.")
    ctx.note(
        f"folded {len(went.get('before', []))} BatchNormalizations into the layer before, "
        f"{len(went.get('behind', []))} into the layer behind."
        if went
        else "There is no BatchNormalization to fold; torch's exporter folds them itself, unless told not to."
    )
    editor.metadata["bnf"] = went
    return editor.model()
