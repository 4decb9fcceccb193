"""Channels: how the outputs of one layer lie in its weight, and by which way they reach the next layer.

A weight is (O, I/g, *kernel) or (I, O/g, *kernel), by its layer's `channel_axis`. `grouped` brings both to
one form, (g, O/g, I/g, K), in which channel o of group j is row [j, o] and channel i of its inputs is column
[j, :, i].

`follow` walks from a layer's output through nodes that keep channels apart to the one layer that reads it,
and says where the channels lie at each step: on one axis, in a run of `inner` neighbours each (Flatten makes
H * W of one channel).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qpipe.model.network.invariants import constant_of

if TYPE_CHECKING:
    from qpipe.model.network.network import Array, Editor
    from qpipe.model.structure.layers import Layer


def grouped(weight: Array, groups: int, channel_axis: int) -> NDArray[np.float64]:
    """`weight` as (g, O/g, I/g, K) in float64."""
    first, second, kernel = weight.shape[0], weight.shape[1], math.prod(weight.shape[2:])
    array = weight.astype(np.float64).reshape(groups, first // groups, second, kernel)
    return array if channel_axis == 0 else array.transpose(0, 2, 1, 3)


def ungrouped(array: NDArray[np.float64], shape: tuple[int, ...], channel_axis: int) -> NDArray[np.float32]:
    """The inverse of `grouped`: back to `shape`, in float32."""
    ordered = array if channel_axis == 0 else array.transpose(0, 2, 1, 3)
    return np.ascontiguousarray(ordered).reshape(shape).astype(np.float32)


def own(editor: Editor, layer: Layer) -> Layer:
    """The layer with a weight and a bias that no other node reads: a copy of each one that is shared."""
    return own_bias(editor, own_weight(editor, layer))


def own_weight(editor: Editor, layer: Layer) -> Layer:
    """The layer with a weight that no other node reads."""
    return replace(layer, weight=_private(editor, layer.weight, editor.node(layer.name)))


def own_bias(editor: Editor, layer: Layer) -> Layer:
    """The layer with a bias that no other node reads, if it has any."""
    if layer.bias is None:
        return layer
    return replace(layer, bias=_private(editor, layer.bias, editor.node(layer.add or layer.name)))


def _private(editor: Editor, name: str, reader: ir.Node) -> str:
    value = editor.graph.initializers[name]
    if len(value.uses()) == 1 and not value.is_graph_output():
        return name
    copy = editor.add_param(name, editor.param(name))
    copy.metadata_props.update(value.metadata_props)
    reader.replace_input_with(list(reader.inputs).index(value), copy)
    return str(copy.name)


def bias_vector(editor: Editor, layer: Layer) -> NDArray[np.float64]:
    """The bias as (O,) in float64, zeros where there is none."""
    if layer.bias is None:
        return np.zeros(layer.channels)
    return editor.param(layer.bias).astype(np.float64).reshape(-1)


def set_bias(editor: Editor, layer: Layer, bias: NDArray[np.float64]) -> Layer:
    """Give `layer` the bias (O,), in place of its own or as a new initializer beside the weight; the layer as
    it is then.

    Assumes that no other node reads the bias (`own`). A MatMul without one gets an Add behind it, whose
    output takes over the name of the layer's output.
    """
    if layer.bias is not None:
        editor.set_param(layer.bias, bias.reshape(editor.param(layer.bias).shape))
        return layer
    node = editor.node(layer.name)
    new = editor.add_param(f"{layer.weight.removesuffix('.weight')}.bias", bias.astype(np.float32))
    if layer.op_type != "MatMul":
        node.resize_inputs(3)
        node.replace_input_with(2, new)
        return replace(layer, bias=str(new.name))
    output = node.outputs[0]
    add = ir.node("Add", [output, new], name=f"{node.name}_bias")
    total = add.outputs[0]
    total.type, total.shape = output.type, output.shape
    ir.convenience.replace_all_uses_with(output, total, replace_graph_outputs=True)
    add.replace_input_with(0, output)
    output.name, total.name = f"{layer.output}_without_bias", layer.output
    editor.graph.insert_after(node, add)
    return replace(layer, bias=str(new.name), add=str(add.name))


@dataclass(frozen=True)
class Channels:
    """Where a layer's channels lie in a value: entry j of `axis` belongs to channel (j // inner) % C."""

    axis: int
    inner: int = 1

    def spread(self, vector: NDArray[np.float64]) -> NDArray[np.float64]:
        """(C,) -> (C * inner,): for each position on the axis the entry of its channel."""
        return np.repeat(vector, self.inner)

    def gathered(self, vector: NDArray[np.float64]) -> NDArray[np.float64]:
        """(C * inner,) -> (C,): the largest entry of each channel."""
        largest: NDArray[np.float64] = vector.reshape(-1, self.inner).max(axis=1)
        return largest


@dataclass(frozen=True)
class Step:
    """A node on the way, and where the channels lie in what it gives."""

    node: ir.Node
    channels: Channels


@dataclass(frozen=True)
class Way:
    """From one layer's output to the node of the next; `channels` is where they lie at that node's input."""

    steps: tuple[Step, ...]
    end: ir.Node
    channels: Channels


class Blocked(Exception):
    """The way ends early; the message says at what, in words about this graph."""


def follow(
    value: ir.Value, axis: int, ends: Collection[ir.Node], admits: Callable[[ir.Node], str | None]
) -> Way:
    """The way from `value`, whose channels lie on `axis`, to the one node of `ends` that reads it.

    `admits` says why a node on the way may not be passed, or None. Raises Blocked where the value is used
    twice, is an output of the model, meets a node that may not be passed, or one that mixes the channels.
    """
    steps: list[Step] = []
    channels = Channels(axis)
    while True:
        if value.is_graph_output():
            raise Blocked(f"'{value.name}' is an output of the model")
        readers = sorted({str(use.node.name) for use in value.uses()})
        if len(value.uses()) != 1:
            raise Blocked(
                f"'{value.name}' is read {len(value.uses())} times, by {', '.join(map(repr, readers))}"
            )
        use = next(iter(value.uses()))
        if use.idx != 0:
            raise Blocked(f"'{value.name}' is not the data input of '{use.node.name}' ({use.node.op_type})")
        if use.node in ends:
            _check_axis(use.node, channels)
            return Way(tuple(steps), use.node, channels)
        if reason := admits(use.node):
            raise Blocked(reason)
        channels = passed(use.node, channels)
        steps.append(Step(use.node, channels))
        value = use.node.outputs[0]


def _check_axis(node: ir.Node, channels: Channels) -> None:
    last = len(dims(node.inputs[0])) - 1
    expected = last if node.op_type == "MatMul" else 1
    if channels.axis != expected or (channels.inner > 1 and "Conv" in node.op_type):
        raise Blocked(f"'{node.name}' ({node.op_type}) does not take the channels for its inputs")


def passed(node: ir.Node, channels: Channels) -> Channels:
    """Where the channels lie behind `node`. Raises Blocked for a node that mixes them, or is not known."""
    if node.op_type in POINTWISE:
        return channels
    move = MOVES.get(node.op_type)
    if move is None or node.domain not in ("", "ai.onnx"):
        raise Blocked(f"'{node.name}' ({node.op_type}) is not known to keep channels apart")
    moved = move(node, channels)
    if moved is None:
        raise Blocked(f"'{node.name}' ({node.op_type}) mixes channels, or its shapes are not known")
    return moved


def dims(value: ir.Value | None) -> tuple[int | str | None, ...]:
    """The shape, a dynamic dimension as its name; () where it is not known."""
    if value is None or value.shape is None:
        return ()
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)


def _pooled(node: ir.Node, channels: Channels) -> Channels | None:
    return channels if channels.axis == 1 and channels.inner == 1 else None


def _axes(node: ir.Node, rank: int) -> list[int] | None:
    """The axes a node names by attribute or by its second input, none negative; None where they are not constant."""
    if "axes" in node.attributes:
        given = list(node.attributes["axes"].as_ints())
    elif len(node.inputs) > 1 and node.inputs[1] is not None:
        array = constant_of(node.inputs[1])
        if array is None:
            return None
        given = [int(axis) for axis in array.reshape(-1)]
    else:
        return None
    return sorted(axis % rank for axis in given)


def _reduced(node: ir.Node, channels: Channels) -> Channels | None:
    axes = _axes(node, len(dims(node.inputs[0])) or 1)
    if axes is None or channels.axis in axes:
        return None
    if node.attributes.get_int("keepdims", 1):
        return channels
    return replace(channels, axis=channels.axis - sum(axis < channels.axis for axis in axes))


def _squeezed(node: ir.Node, channels: Channels) -> Channels | None:
    axes = _axes(node, len(dims(node.inputs[0])) or 1)
    if axes is None or channels.axis in axes:
        return None
    return replace(channels, axis=channels.axis - sum(axis < channels.axis for axis in axes))


def _unsqueezed(node: ir.Node, channels: Channels) -> Channels | None:
    array = constant_of(node.inputs[1]) if len(node.inputs) > 1 else None
    if array is None:
        return None
    rank = len(dims(node.inputs[0])) + array.size
    added = {int(axis) % rank for axis in array.reshape(-1)}
    kept = [axis for axis in range(rank) if axis not in added]
    return replace(channels, axis=kept[channels.axis])


def _transposed(node: ir.Node, channels: Channels) -> Channels | None:
    rank = len(dims(node.inputs[0]))
    order = list(node.attributes.get_ints("perm", list(reversed(range(rank)))))
    return replace(channels, axis=order.index(channels.axis)) if order else None


def _flattened(node: ir.Node, channels: Channels) -> Channels | None:
    before = dims(node.inputs[0])
    axis = node.attributes.get_int("axis", 1) % max(len(before), 1)
    rest = before[channels.axis + 1 :]
    if channels.axis != axis or not all(isinstance(dim, int) for dim in rest):
        return None  # channels that are not the outermost flattened axis come out interleaved: not followed
    return Channels(1, channels.inner * math.prod(dim for dim in rest if isinstance(dim, int)))


def _reshaped(node: ir.Node, channels: Channels) -> Channels | None:
    before, after = dims(node.inputs[0]), dims(node.outputs[0])
    axis = channels.axis
    if not before or len(after) <= axis or before[:axis] != after[:axis] or not isinstance(before[axis], int):
        return None
    if before[axis] == after[axis]:
        return channels
    rest = before[axis + 1 :]
    flat = len(after) == axis + 1 and all(isinstance(dim, int) for dim in rest)
    return replace(channels, inner=channels.inner * math.prod(map(int, rest))) if flat else None  # type: ignore[arg-type]


def _padded(node: ir.Node, channels: Channels) -> Channels | None:
    pads = constant_of(node.inputs[1]) if len(node.inputs) > 1 else None
    if pads is None:
        return None
    axes = constant_of(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else None
    rank = len(dims(node.inputs[0]))
    touched = list(range(rank)) if axes is None else [int(axis) % rank for axis in axes]
    both = pads.reshape(2, -1)
    return (
        channels if all(a != channels.axis or not both[:, i].any() for i, a in enumerate(touched)) else None
    )


def _resized(node: ir.Node, channels: Channels) -> Channels | None:
    before, after = dims(node.inputs[0]), dims(node.outputs[0])
    same = len(before) == len(after) > channels.axis and before[channels.axis] == after[channels.axis]
    return channels if same and isinstance(before[channels.axis], int) else None


RESHAPES = frozenset({"Identity", "Dropout", "Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze"})
"""Operators that move all entries and change none. Not in `families`: the key of bnf holds this file anyway."""
POINTWISE = frozenset({"Identity", "Dropout", "Relu", "LeakyRelu", "PRelu", "Clip", "Min", "Max"})
"""Operators that treat each entry by itself; whether they may be passed is for `admits` to say."""

MOVES: dict[str, Callable[[ir.Node, Channels], Channels | None]] = {
    "AveragePool": _pooled, "MaxPool": _pooled, "GlobalAveragePool": _pooled, "GlobalMaxPool": _pooled,
    "ReduceMean": _reduced, "ReduceMax": _reduced, "ReduceSum": _reduced, "Squeeze": _squeezed,
    "Unsqueeze": _unsqueezed, "Transpose": _transposed, "Flatten": _flattened, "Reshape": _reshaped,
    "Pad": _padded, "Resize": _resized,
}  # fmt: skip
