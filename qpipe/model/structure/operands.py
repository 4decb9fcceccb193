"""The constants that a network multiplies its data by: the weights of layers, and those of nodes that are no layer.

    MatMul(x, w)  MatMul(w, x)  Gemm(x, w, c)  Einsum(x, w)  MatMul(x, Transpose(w))

A layer is what methods can tune (`layers`). A grid for the weight needs less: which axis counts the output channels,
and along which the products are summed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from qpipe.model.network.invariants import permutation
from qpipe.model.structure.layers import find_layers, from_initializers

if TYPE_CHECKING:
    from qpipe.model.network.network import Network
    from qpipe.model.structure.layers import Layer

MULTIPLYING = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum"})


@dataclass(frozen=True)
class Operand:
    """The initializer `weight`, of `shape`, by which the node `name` multiplies its `input`.

    `channel_axis` is the axis along which scales per channel run, None where no axis is one of the output alone;
    `inner_axis` the axis along which products are summed, where there is exactly one; `inner` how many are summed.
    """

    name: str
    op_type: str
    input: str
    weight: str
    shape: tuple[int, ...]
    channel_axis: int | None
    inner_axis: int | None
    inner: int


def find_operands(model: Network) -> tuple[Operand, ...]:
    """The constant operands of all nodes that multiply, in topological order; those of layers are among them."""
    layers = {layer.name: layer for layer in find_layers(model)}
    found = []
    for node in model.graph:
        if node.op_type in MULTIPLYING and not node.domain:
            layer = layers.get(str(node.name))
            operand = _operand(node) if layer is None else _of_layer(layer)
            found += [operand] if operand is not None else []
    return tuple(found)


def _of_layer(layer: Layer) -> Operand:
    shape, channel = layer.weight_shape, layer.channel_axis
    pointwise = all(size == 1 for size in layer.kernel_shape)
    if layer.op_type == "ConvTranspose" and shape[1] == 1 and shape[0] == layer.groups:
        # A grouped transposed convolution has no axis for all output channels: axis 1 counts those of one group and
        # serves them all, unless each group has one channel, which axis 0 counts.
        channel = 0
    inner = 1 - layer.channel_axis if pointwise else None
    products = math.prod(shape) // layer.channels
    return Operand(layer.name, layer.op_type, layer.input, layer.weight, shape, channel, inner, products)


def _operand(node: ir.Node) -> Operand | None:
    """The constant operand of a node that is no layer; None where it has none, or nothing else."""
    factors = node.inputs if node.op_type == "Einsum" else node.inputs[:2]
    sources = [None if value is None else _source(value) for value in factors]
    constants = [i for i, source in enumerate(sources) if source is not None]
    if len(factors) != 2 or len(constants) != 1:
        return None
    place = constants[0]
    data, source = factors[1 - place], sources[place]
    if data is None or source is None or ("Conv" in node.op_type and place != 1):
        return None
    weight, order = source
    assert weight.const_value is not None
    shape = tuple(int(size) for size in weight.const_value.shape.numpy())
    outer, inner = _axes(node, place, len(shape))
    return Operand(
        name=str(node.name),
        op_type=node.op_type,
        input=str(data.name),
        weight=str(weight.name),
        shape=shape,
        channel_axis=order[outer[-1]] if outer else None,
        inner_axis=order[inner[0]] if len(inner) == 1 else None,
        inner=math.prod(shape[order[axis]] for axis in inner),
    )


def _source(value: ir.Value) -> tuple[ir.Value, tuple[int, ...]] | None:
    """The initializer of floats that `value` is, at once or transposed, and which of its axes each of `value` is."""
    order: tuple[int, ...] | None = None
    node = value.producer()
    while node is not None and node.op_type in ("Transpose", "Identity") and not node.domain:
        source = node.inputs[0]
        perm = permutation(node) if node.op_type == "Transpose" else None
        if source is None or (perm is None and node.op_type == "Transpose"):
            return None
        if perm is not None:
            order = perm if order is None else tuple(perm[axis] for axis in order)
        value, node = source, source.producer()
    if not value.is_initializer() or value.const_value is None or value.dtype != ir.DataType.FLOAT:
        return None
    return value, order or tuple(range(len(value.const_value.shape)))


def _axes(node: ir.Node, place: int, rank: int) -> tuple[list[int], list[int]]:
    """The axes of the operand at `place` that count outputs of its own, and those along which products are summed."""
    if node.op_type == "Einsum":
        return _labelled(node, place, rank)
    if node.op_type == "ConvTranspose":
        return [1], [0, *range(2, rank)]
    if node.op_type == "Conv":
        return [0], list(range(1, rank))
    if node.op_type == "Gemm":
        turned = bool(node.attributes.get_int("transA" if place == 0 else "transB", 0))
        inner = int(turned == (place == 1))
        return [1 - inner], [inner]
    if rank == 1:
        return [], [0]
    return ([rank - 1], [rank - 2]) if place == 1 else ([rank - 2], [rank - 1])


def _labelled(node: ir.Node, place: int, rank: int) -> tuple[list[int], list[int]]:
    equation = (node.attributes.get_string("equation", "") or "").replace(" ", "")
    terms, arrow, output = equation.partition("->")
    labels = terms.split(",")
    if not arrow or len(labels) != 2:
        return [], []
    before, _, after = labels[place].partition("...")
    axes = [*enumerate(before), *enumerate(after, rank - len(after))]
    outer = [axis for axis, label in axes if label in output and label not in labels[1 - place]]
    return outer, [axis for axis, label in axes if label not in output]


def computed_factors(model: Network) -> dict[str, str]:
    """The factors that nodes compute from initializers alone, otherwise than by moving one: value -> the node that
    multiplies by it."""
    found = {}
    for node in model.graph:
        if node.op_type in MULTIPLYING and not node.domain:
            for value in node.inputs if node.op_type == "Einsum" else node.inputs[:2]:
                if value is None or value.is_initializer() or _source(value) is not None:
                    continue
                if value.dtype == ir.DataType.FLOAT and from_initializers(value):
                    found[str(value.name)] = str(node.name)
    return found
