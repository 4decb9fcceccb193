"""Reading the QDQ form, first half: constants that are stored as codes become float initializers on a grid.

    integer weight -> DequantizeLinear                          a float weight on its grid, frozen
    float weight -> QuantizeLinear -> DequantizeLinear          the float weight, its grid frozen
    int32 bias -> DequantizeLinear                              a float bias

Source: ONNX operators QuantizeLinear and DequantizeLinear, opsets 10 to 25, and their forms in com.microsoft.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from qpipe.errors import InputError
from qpipe.model.network.facts import Facts
from qpipe.model.network.invariants import PERMUTATION, SHAPE, constant
from qpipe.model.network.naming import Names, names_of
from qpipe.model.qdq.nodes import (
    Array,
    clip_of_codes,
    dequantizes,
    floats_of,
    grid,
    has_constant_grid,
    initializer,
    narrowed,
    quantizes,
)
from qpipe.numerics.grid import Encoding

SUFFIX = re.compile(r"(_DequantizeLinear_Output.*|__?quantized(_\d+)?|(_DQ)?_Q\d)$")
"""What quantizing adds to the name of a tensor, in the ways that are known."""
_UNROUNDED = re.compile(r"(__float|_QuantizeLinear_Input)$")
_MADE_UP = re.compile(r"__dequantized(_\d+)?$")


@dataclass
class Grids:
    """What a model's QDQ nodes said, filled by `read_weights` and `qpipe.model.qdq.reader.read_activations`.

    `encodings` by the value's name; `names` of the float initializers that took the place of integer ones;
    `int32_biases`: whether the file has biases as integers; `on_codes`: the bounds (Min, Max) that it has on codes;
    `notes`: sentences about what was lost."""

    encodings: dict[str, Encoding] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    int32_biases: bool = False
    on_codes: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    _weights: dict[tuple[Any, ...], ir.Value] = field(default_factory=dict)

    def facts(self) -> Facts:
        """What a network is to know about where its grids come from."""
        if not self.encodings:
            return Facts()
        biases: Literal["int32", "float"] = "int32" if self.int32_biases else "float"
        return Facts(biases, came_quantized=True, on_codes=tuple(sorted(self.on_codes)))


def read_weights(graph: ir.Graph, grids: Grids) -> bool:
    """Put float initializers in the place of quantized constants, in place; True if there were any."""
    before = len(grids.names)
    names = names_of(graph)
    for node in list(graph):
        if not dequantizes(node) or not has_constant_grid(node):
            continue
        stored, above = _stored(node)
        if stored is not None:
            weight = _weight(node, stored, above, grids, names)
            if weight.graph is None:
                graph.register_initializer(weight)
            grids.names.add(str(weight.name))
            take_over(graph, node, weight, names)
    return len(grids.names) > before


def _stored(node: ir.Node) -> tuple[ir.Value | None, list[ir.Node]]:
    """The initializer whose codes `node` dequantizes, and the nodes between them, the last one first."""
    value, above = node.inputs[0], []
    while value is not None and not value.is_initializer():
        producer = value.producer()
        if producer is None or not (_same_constants(node, producer) or clip_of_codes(producer)):
            return None, []
        above.append(producer)
        value = producer.inputs[0]
    return value, above


def _same_constants(node: ir.Node, producer: ir.Node) -> bool:
    """Whether `producer` makes codes of the grid that `node` undoes."""
    if not quantizes(producer) or not has_constant_grid(producer):
        return False
    axes = [n.attributes.get_int(name, 1) for n in (node, producer) for name in ("axis", "block_size")]
    pairs = [(constant(node, i), constant(producer, i)) for i in (1, 2)]
    return axes[:2] == axes[2:] and all(
        np.array_equal(0 if a is None else a, 0 if b is None else b) for a, b in pairs
    )


def _weight(node: ir.Node, stored: ir.Value, above: list[ir.Node], grids: Grids, names: Names) -> ir.Value:
    """The float initializer that `node` stands for, made once for all nodes that say the same of it."""
    assert stored.const_value is not None
    encoding = whole = grid(node, len(stored.const_value.shape))
    bounds = next((found for n in above if (found := clip_of_codes(n)) is not None), None)
    if bounds is not None:
        encoding = replace(encoding, bitwidth=narrowed(encoding, bounds) or encoding.bitwidth)
    key = (stored, json.dumps(encoding.to_json()))
    if key in grids._weights:
        return grids._weights[key]
    is_float = stored.const_value.dtype == ir.DataType.FLOAT
    if (
        is_float
        and all(quantizes(reader) for reader in stored.consumers())
        and stored.name not in grids.names
    ):
        value = stored
    else:
        array = stored.const_value.numpy()
        wanted = f"{stored.name}_rounded" if is_float else _weight_name(node, stored)
        if node.outputs[0].name == wanted and not node.outputs[0].is_graph_output():
            node.outputs[0].name = None  # the name goes over to the weight
        else:
            wanted = names.fresh(wanted)
        value = initializer(wanted, array if is_float else _floats(array.astype(np.int32), whole, node))
    if encoding.bitwidth == 32:
        grids.int32_biases = True
    else:
        grids.encodings[str(value.name)] = replace(encoding, frozen=True)
    grids._weights[key] = value
    return value


def _floats(codes: Array, encoding: Encoding, node: ir.Node) -> Array:
    try:
        return floats_of(codes, node, encoding)
    except ValueError as error:
        raise InputError(f"The grid of node {node.name!r} (DequantizeLinear): {error}") from error


def _weight_name(node: ir.Node, stored: ir.Value) -> str:
    """What the weight was called before someone quantized it."""
    for name in (str(stored.name), str(node.outputs[0].name)):
        if SUFFIX.search(name):
            return SUFFIX.sub("", name)
    return str(stored.name)


def take_over(graph: ir.Graph, node: ir.Node, value: ir.Value, names: Names) -> None:
    """All who read the output of `node` read `value`; the name of a model's output stays one."""
    old = node.outputs[0]
    name = old.name
    if (
        value.producer() is not None
        and _UNROUNDED.search(str(value.name))
        and name
        and (value.name == f"{name}__float" or not _MADE_UP.search(name))
    ):
        names.release(str(value.name))
        old.name, value.name = None, name
    if old.is_graph_output():
        old.name = None
        output = value
        if value.producer() is None or value.is_graph_output():
            output = ir.Value(type=old.type, shape=old.shape)
            graph.insert_before(node, ir.node("Identity", [value], outputs=[output], name=f"{name}_copy"))
        output.name = name
        for index, other in enumerate(graph.outputs):
            if other is old:
                graph.outputs[index] = output
    old.replace_all_uses_with(value)


def follow_weights(graph: ir.Graph, grids: Grids) -> None:
    """The grids of weights after the transposes and reshapes that their tensors have gone through."""
    for name, encoding in list(grids.encodings.items()):
        value = graph.initializers.get(name)
        moved = None if value is None else _moved(encoding, value)
        if moved is None:
            del grids.encodings[name]
            if value is not None:
                grids.notes.append(
                    f"The grid of {name!r} was lost: it was reshaped. Its values are the same."
                )
        else:
            grids.encodings[name] = moved


def _moved(encoding: Encoding, value: ir.Value) -> Encoding | None:
    """`encoding` for the tensor of `value` as it lies now; None where no grid says the same."""
    if encoding.axis is None:
        return encoding
    props: Mapping[str, str] = value.metadata_props
    if PERMUTATION in props:
        perm = json.loads(props[PERMUTATION])
        axis = perm.index(encoding.axis)
        if encoding.block_size is None:
            return replace(encoding, axis=axis)
        scale, zero_point = encoding.scale.transpose(perm), encoding.zero_point.transpose(perm)
        return replace(encoding, axis=axis, scale=scale, zero_point=zero_point)
    if SHAPE not in props or value.shape is None:
        return encoding
    before, after = json.loads(props[SHAPE]), [int(dim) for dim in value.shape.numpy()]
    count = int(np.prod(before[: encoding.axis]))
    for axis, size in enumerate(after):
        if encoding.block_size is None and (size, int(np.prod(after[:axis]))) == (
            before[encoding.axis],
            count,
        ):
            return replace(encoding, axis=axis)
    return None
