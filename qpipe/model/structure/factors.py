"""Factors and shifts by constants, written into the layers beside them: the same function with fewer nodes.

    before   f * (x W + b) + s  ->  x (W f) + (b f + s)        f and s one number, or one for each output channel
    behind   (f * x + s) W + b  ->  x (f W) + (b + s sum W)    f and s one number; s where nothing pads with zeros
             (f * x + s) W      ->  (x + s / f) (f W)          where something does

So `Conv -> Mul -> Add`, `Div 6 -> Conv` behind a HardSwish written out, and the 1 / sqrt(d) behind a projection go. One
number alone goes behind: factors for each channel would change how far apart the channels of an activation are. It goes
into all layers that it comes to, past the product with a gate too; where one way ends elsewhere, it stays, and so does
what goes before a layer that a second node reads, or that shares its weight. A HardSigmoid behind a layer is a Clip
behind one with its slope and shift. Arithmetic in float64, rounded once to float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qpipe.model.network.invariants import constant_tensor
from qpipe.model.network.rewriting import replace
from qpipe.model.structure.channels import RESHAPES, bias_vector, dims, grouped, set_bias, ungrouped
from qpipe.model.structure.layers import Layer, find_layers

if TYPE_CHECKING:
    from qpipe.model.network.network import Editor

Vector = NDArray[np.float64]
_MEANS = frozenset({"GlobalAveragePool", "ReduceMean"})
_HOMOGENEOUS = frozenset({"Relu", "LeakyRelu", "MaxPool"})
"""What a positive factor passes, beside what moves values or takes their mean."""


class Line(NamedTuple):
    """y = factor * x + shift, of a `node` whose other input is the constant at `position`."""

    data: ir.Value
    factor: NDArray[Any]
    shift: NDArray[Any]
    position: int


def read_line(node: ir.Node) -> Line | None:
    """What a Mul, Div, Add or Sub by a float constant computes; None for any other node."""
    if node.domain or node.op_type not in ("Mul", "Div", "Add", "Sub"):
        return None
    for position in (1,) if node.op_type in ("Div", "Sub") else (1, 0):
        data, tensor = node.inputs[1 - position], constant_tensor(node.inputs[position])
        if data is None or tensor is None or data.is_initializer() or tensor.dtype != ir.DataType.FLOAT:
            continue
        number, one, zero = tensor.numpy().astype(np.float64), np.ones(()), np.zeros(())
        if len(number.shape) > len(dims(data)):
            return None  # it gives the output dimensions that the input has not
        if node.op_type in ("Add", "Sub"):
            return Line(data, one, number if node.op_type == "Add" else -number, position)
        if node.op_type == "Div" and not number.all():
            return None
        return Line(data, number if node.op_type == "Mul" else 1 / number, zero, position)
    return None


def fold_factors(editor: Editor) -> list[str]:
    """Write what can be into the layers, until nothing changes; the names of the nodes that went."""
    gone: list[str] = []
    while found := _sweep(editor):
        gone += found
    _open_gates(editor)
    return gone


def _open_gates(editor: Editor) -> None:
    """HardSigmoid(x) behind a layer that it alone reads becomes Clip(alpha x + beta, 0, 1), whose factor and shift go
    into the layer: engines have the Clip in the layer's kernel."""
    layers = {layer.add or layer.name: layer for layer in find_layers(editor)}
    for node in list(editor.graph):
        value = node.inputs[0] if node.op_type == "HardSigmoid" and not node.domain else None
        producer = None if value is None or not _read_once(value) else value.producer()
        layer = None if producer is None else layers.get(str(producer.name))
        if value is None or layer is None or not _alone(editor, layer):
            continue
        if layer.op_type == "MatMul" and layer.bias is None:
            continue  # its bias would be an Add
        alpha, beta = node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5)
        layers[layer.add or layer.name] = _rewritten(
            editor, layer, np.full(layer.channels, alpha), bias_vector(editor, layer) * alpha + beta
        )
        ends = [editor.add_param(f"{node.name}.{side}", np.float32(end)) for side, end in (("min", 0), ("max", 1))]
        replace(editor.graph, node, ir.node("Clip", [value, *ends], name=node.name))


def _sweep(editor: Editor) -> list[str]:
    """One pass from the outputs back."""
    layers = {layer.add or layer.name: layer for layer in find_layers(editor)}
    heads = {layer.name: key for key, layer in layers.items()}
    gone = []
    for node in reversed(list(editor.graph)):
        line = None if str(node.name) in layers or node.outputs[0].is_graph_output() else read_line(node)
        if line is not None and (_before(editor, node, line, layers) or _behind(editor, node, line, layers, heads)):
            gone.append(str(node.name))
    return gone


def _before(editor: Editor, node: ir.Node, line: Line, layers: dict[str, Layer]) -> bool:
    """Into the layer that alone feeds `node`, at once, or by way of what moves values where all have one number."""
    value, steps = line.data, 0
    while _read_once(value) and (producer := value.producer()) is not None and str(producer.name) not in layers:
        if producer.op_type not in RESHAPES or producer.inputs[0] is None:
            return False
        value, steps = producer.inputs[0], steps + 1
    producer = value.producer()
    layer = None if producer is None or not _read_once(value) else layers.get(str(producer.name))
    if layer is None or not _alone(editor, layer):
        return False
    if layer.op_type == "MatMul" and layer.bias is None and line.shift.any():
        return False  # its bias would be an Add again
    rank = len(dims(value))
    axis = rank - 1 if layer.op_type == "MatMul" else 1
    factor, shift = (_along(array, rank, axis, layer.channels) for array in (line.factor, line.shift))
    if factor is None or shift is None or (steps and line.factor.size * line.shift.size > 1):
        return False
    layers[layer.add or layer.name] = _rewritten(editor, layer, factor, bias_vector(editor, layer) * factor + shift)
    name = value.name if steps else node.outputs[0].name
    _remove(editor, node, line.data)
    value.name = name
    return True


def _behind(
    editor: Editor, node: ir.Node, line: Line, layers: dict[str, Layer], heads: dict[str, str]
) -> bool:
    """Into the layers that read what `node` gives, past what a factor or a shift passes."""
    if line.factor.size != 1 or line.shift.size != 1 or not line.factor.all():
        return False
    factor, shift = float(line.factor.reshape(())), float(line.shift.reshape(()))
    found = _reached(node.outputs[0], factor, bool(shift), heads)
    if found is None:
        return False
    ends, adds = found
    for layer in (layers[key] for key in ends):
        if not _alone(editor, layer) or (shift and (layer.bias is None or _pads(layer))):
            return False
    for key in ends:
        layer = layers[key]
        weight = grouped(editor.param(layer.weight), layer.groups, layer.channel_axis)
        bias = bias_vector(editor, layer) + shift * weight.sum(axis=(2, 3)).reshape(-1)
        layers[key] = _rewritten(editor, layer, np.full(layer.channels, factor), bias)
    for reader, other in adds:
        moved = (other.shift / factor if reader.op_type == "Add" else -other.shift / factor).astype(np.float32)
        name = str(reader.inputs[other.position].name)  # type: ignore[union-attr]  # a constant
        reader.replace_input_with(other.position, editor.add_param(name, moved))
    _remove(editor, node, line.data)
    return True


def _reached(
    value: ir.Value, factor: float, shifted: bool, heads: dict[str, str]
) -> tuple[list[str], list[tuple[ir.Node, Line]]] | None:
    """The layers that a factor of `value`, and a shift, come to on all ways, and the constants that are added on them;
    None where one ends elsewhere, or two meet."""
    passed = RESHAPES | _MEANS | (_HOMOGENEOUS if factor > 0 and not shifted else frozenset())
    pending, seen, ends, adds = [value], set[ir.Node](), list[str](), list[tuple[ir.Node, Line]]()
    while pending:
        value = pending.pop()
        if value.is_graph_output() or not value.uses():
            return None
        for use in value.uses():
            reader, first = use.node, use.idx == 0
            if reader in seen:
                return None
            seen.add(reader)
            if first and str(reader.name) in heads:
                ends.append(heads[str(reader.name)])
                continue
            if not (first and reader.op_type in passed):
                other = None if shifted else read_line(reader)
                if other is not None and reader.op_type in ("Add", "Sub"):
                    adds.append((reader, other))
                elif shifted or not (other is not None or _multiplies(reader)):
                    return None
            pending.append(reader.outputs[0])
    return ends, adds


def _multiplies(node: ir.Node) -> bool:
    """Whether it is the product of two activations."""
    return node.op_type == "Mul" and not any(constant_tensor(value) is not None for value in node.inputs)


def _pads(layer: Layer) -> bool:
    """Whether some outputs see zeros that were no inputs."""
    return any(layer.pads) or layer.op_type == "ConvTranspose" or layer.auto_pad not in ("NOTSET", "VALID")


def _rewritten(editor: Editor, layer: Layer, factor: Vector, bias: Vector) -> Layer:
    """The layer with the rows of its weight times `factor` (O,), and with `bias` (O,)."""
    shape, axis = layer.weight_shape, layer.channel_axis
    weight = grouped(editor.param(layer.weight), layer.groups, axis)
    scaled = weight * factor.reshape(*weight.shape[:2], 1, 1)
    editor.set_param(layer.weight, ungrouped(scaled, shape, axis))
    return set_bias(editor, layer, bias) if layer.bias or bias.any() else layer


def _along(array: NDArray[Any], rank: int, axis: int, channels: int) -> Vector | None:
    """One number, or one for each channel on `axis` of what has `rank` dimensions, as (channels,); None for others."""
    if array.size == 1:
        return np.full(channels, float(array.reshape(())))
    shape = (1,) * (rank - array.ndim) + array.shape
    return array.reshape(-1) if shape[axis] == array.size == channels else None


def _alone(editor: Editor, layer: Layer) -> bool:
    """Whether nothing else reads the layer's weight and bias."""
    values = [editor.graph.initializers[name] for name in (layer.weight, layer.bias) if name is not None]
    return all(len(value.uses()) == 1 and not value.is_graph_output() for value in values)


def _read_once(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def _remove(editor: Editor, node: ir.Node, data: ir.Value) -> None:
    """Remove `node`; its readers read `data`."""
    node.outputs[0].replace_all_uses_with(data)
    editor.graph.remove(node, safe=True)
    node.outputs[0].name = None
