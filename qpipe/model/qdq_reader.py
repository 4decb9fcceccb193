"""Reading the QDQ form: a float graph, and the grids that QuantizeLinear and DequantizeLinear say.

    v -> QuantizeLinear -> DequantizeLinear -> readers          v, with an encoding
    integer weight -> DequantizeLinear                          a float weight on its grid, frozen
    float weight -> QuantizeLinear -> DequantizeLinear          the float weight, its grid frozen
    int32 bias -> DequantizeLinear                              a float bias

An encoding is the same for all who read a value. Where a file rounds a value for some readers only, or puts it
on two grids, an Identity stands for the rounding and has the encoding.

A pair is read so where its grid is a constant, of integers, one for the whole activation, and where nothing but
DequantizeLinear of that grid reads the codes, behind nodes that only move them. Any other QuantizeLinear or
DequantizeLinear (dynamic scales, scales per channel of an activation, codes that the model takes, returns or
computes with) stays a node of the graph, and is computed as it is.

Source: ONNX operators QuantizeLinear and DequantizeLinear, opsets 10 to 25, and their forms in com.microsoft.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from qpipe.errors import InputError
from qpipe.model.invariants import PERMUTATION, SHAPE, fresh_initializer_name
from qpipe.model.naming import Names
from qpipe.model.operators.registry import MOVING
from qpipe.model.qdq_nodes import (
    BITWIDTH,
    Array,
    clip_of_codes,
    computes_codes,
    dequantizes,
    floats_of,
    grid,
    has_constant_grid,
    has_grid,
    narrowed,
    quantizes,
)
from qpipe.model.rewrites import constant
from qpipe.numerics.grid import Encoding, dequantize, same_grid

_SUFFIX = re.compile(r"(_DequantizeLinear_Output.*|__?quantized(_\d+)?|(_DQ)?_Q\d)$")
_UNROUNDED = re.compile(r"(__float|_QuantizeLinear_Input)$")
_MADE_UP = re.compile(r"__dequantized(_\d+)?$")


@dataclass
class Grids:
    """What a model's QDQ nodes said, filled by `read_weights` and `read_activations`.

    `encodings` by the value's name; `names` of the float initializers that took the place of integer ones;
    `int32_biases`: whether the file has biases as integers; `notes`: sentences about what was lost."""

    encodings: dict[str, Encoding] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    int32_biases: bool = False
    notes: list[str] = field(default_factory=list)
    _weights: dict[tuple[Any, ...], ir.Value] = field(default_factory=dict)

    def metadata(self) -> dict[str, Any]:
        """What a Model's metadata says about where its grids come from."""
        if not self.encodings:
            return {}
        return {"quantized_source": True, **({} if self.int32_biases else {"biases": "float"})}


def read_weights(graph: ir.Graph, grids: Grids) -> bool:
    """Put float initializers in the place of quantized constants, in place; True if there were any."""
    before = len(grids.names)
    names = Names(ir.convenience.create_value_mapping(graph))
    for node in list(graph):
        if not dequantizes(node) or not has_constant_grid(node):
            continue
        stored, above = _stored(node)
        if stored is not None:
            weight = _weight(node, stored, above, grids, names)
            if weight.graph is None:
                graph.register_initializer(weight)
            grids.names.add(str(weight.name))
            _take_over(graph, node, weight)
    return len(grids.names) > before


def skip_clips(graph: ir.Graph) -> None:
    """The Clip in front of codes that are narrower than their type (`qpipe.model.qdq` writes it) goes, in
    place: the encoding says as much."""
    for node in list(graph):
        known = quantizes(node) and BITWIDTH in node.metadata_props and has_grid(node)
        value = node.inputs[0] if known else None
        clip = None if value is None else value.producer()
        if clip is None or clip.op_type != "Clip" or len(clip.outputs[0].uses()) != 1:
            continue
        encoding, low, high = grid(node), constant(clip, 1), constant(clip, 2)
        codes = np.array([encoding.qmin, encoding.qmax], np.float64) - encoding.zero_point
        bounds = (codes * encoding.scale).astype(np.float32)
        if low is not None and high is not None and np.array_equal(bounds, [low, high]):
            node.replace_input_with(0, clip.inputs[0])


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
        value = _initializer(wanted, array if is_float else _floats(array.astype(np.int32), whole, node))
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
        if _SUFFIX.search(name):
            return _SUFFIX.sub("", name)
    return str(stored.name)


def _initializer(name: str, array: Array) -> ir.Value:
    tensor = ir.Tensor(np.ascontiguousarray(array), name=name)
    return ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
    )


def read_activations(graph: ir.Graph, grids: Grids) -> None:
    """Remove the QDQ pairs of activations, in place; weights' grids follow the transposes of their tensors.

    Raises InputError for a grid that cannot be."""
    _follow_weights(graph, grids)
    found: dict[ir.Value, Encoding] = {}
    for node in list(graph):
        if quantizes(node) and node.graph is graph and _rounds(node):
            _absorb(graph, node, found, grids)
    _same_behind_moves(graph, found)
    grids.encodings.update({str(value.name): encoding for value, encoding in found.items()})


def left_on_codes(graph: ir.Graph) -> list[str]:
    """A sentence about the nodes that still work on codes, if there are any."""
    left = [node for node in graph if computes_codes(node)]
    if not left:
        return []
    count = "1 node" if len(left) == 1 else f"{len(left)} nodes"
    return [
        (
            f"{count} such as {left[0].name!r} ({left[0].op_type}) compute with codes, and not as a rounding "
            "onto one constant grid. They stay as they are: no encoding says what they do, and nothing tunes it."
        )
    ]


def _rounds(node: ir.Node) -> bool:
    """Whether a QuantizeLinear begins a rounding: on one constant grid, which all who read its codes undo."""
    if not has_grid(node):
        return False
    encoding, stack = grid(node), [node.outputs[0]]
    while stack:
        codes = stack.pop()
        if codes.is_graph_output():
            return False
        for use in codes.uses():
            reader = use.node
            if dequantizes(reader):
                same = has_grid(reader) and same_grid(
                    replace(grid(reader), bitwidth=encoding.bitwidth), encoding
                )
                if use.idx or not same:
                    return False
            elif use.idx or reader.graph is not node.graph:
                return False
            elif clip_of_codes(reader) is not None or _moves(reader):
                stack += reader.outputs
            elif reader.domain or reader.op_type not in _COMPARING:
                return False
    return True


def _moves(node: ir.Node) -> bool:
    """Whether a node of integers puts out some of what its first input holds, and constants."""
    if node.domain:
        return False
    mode = node.attributes.get("mode")
    if node.op_type == "Resize":
        return mode is None or mode.as_string() == "nearest"
    if node.op_type == "Pad":
        constant_mode = mode is None or mode.as_string() == "constant"
        given = len(node.inputs) > 2 and node.inputs[2] is not None
        return not (constant_mode and given and constant(node, 2) is None)
    return node.op_type in MOVING


_COMPARING = frozenset({"ArgMax", "ArgMin"})
"""Operators that find the same in the codes as in the floats that these stand for."""


def _absorb(graph: ir.Graph, node: ir.Node, found: dict[ir.Value, Encoding], grids: Grids) -> None:
    """Let all that reads the codes of one QuantizeLinear read floats; what is left of it is dead."""
    value = node.inputs[0]
    assert value is not None
    encoding = _with_clipped_codes(node, grid(node), grids)
    known = found.get(value)
    if (known is None and _free(value, encoding)) or (known and same_grid(known, encoding)):
        rounded = value
    else:
        rounded = _identity(graph, node, value)
    found[rounded] = encoding
    stack = [(node.outputs[0], rounded)]
    while stack:
        codes, floats = stack.pop()
        for use in list(codes.uses()):
            reader = use.node
            if dequantizes(reader):
                _take_over(graph, reader, floats)
                continue
            if clip_of_codes(reader) is not None:
                stack.append((reader.outputs[0], floats))
                continue
            reader.replace_input_with(0, floats)
            if _moves(reader):
                if reader.op_type == "Pad":
                    _pad_with_floats(graph, reader, encoding)
                for output in reader.outputs:
                    output.type = ir.TensorType(ir.DataType.FLOAT)
                    _name_floats(graph, output)
                    found[output] = encoding
                    stack.append((output, output))


def _name_floats(graph: ir.Graph, value: ir.Value) -> None:
    """What were codes is called as their floats were, unless these go on to be made of them."""
    name = str(value.name)
    base = _SUFFIX.sub("", name)
    readers = [use.node.outputs[0] for use in value.uses() if dequantizes(use.node)]
    if base != name and not value.is_graph_output():
        value.name = fresh_initializer_name(graph, base)
        for floats in readers:
            if floats.name == base and not floats.is_graph_output():
                floats.name, value.name = None, base


def _pad_with_floats(graph: ir.Graph, node: ir.Node, encoding: Encoding) -> None:
    """The code that a Pad puts around codes, 0 unless it is given, as what it stands for."""
    mode = node.attributes.get("mode")
    if mode is not None and mode.as_string() != "constant":
        return
    code = constant(node, 2)
    array = dequantize(np.asarray(0 if code is None else code).reshape(()), encoding)
    value = _initializer(fresh_initializer_name(graph, f"{node.name}_value"), array)
    graph.register_initializer(value)
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, value)


def _free(value: ir.Value, encoding: Encoding) -> bool:
    """Whether everyone who reads `value` rounds it onto the one grid."""
    return not value.is_graph_output() and all(
        quantizes(use.node) and use.idx == 0 and has_grid(use.node) and same_grid(grid(use.node), encoding)
        for use in value.uses()
    )


def _with_clipped_codes(node: ir.Node, encoding: Encoding, grids: Grids) -> Encoding:
    """The encoding with the bitwidth that a Clip of its codes leaves (how torch writes 7 bits)."""
    bounds = [found for reader in node.outputs[0].consumers() if (found := clip_of_codes(reader)) is not None]
    if not bounds:
        return encoding
    bitwidth = narrowed(encoding, bounds[0])
    if bitwidth is None and bounds[0] != (encoding.qmin, encoding.qmax):
        low, high = bounds[0]
        grids.notes.append(
            f"The codes of {node.inputs[0].name!r} were clipped to {low}..{high}; here they have all "  # type: ignore[union-attr]
            f"{encoding.bitwidth} bits."
        )
    return replace(encoding, bitwidth=bitwidth or encoding.bitwidth)


def _identity(graph: ir.Graph, node: ir.Node, source: ir.Value) -> ir.Value:
    """A value of its own for one rounding of `source`, made in front of `node`."""
    name = f"{source.name}_rounded"
    for reader in node.outputs[0].consumers():
        if reader.outputs[0].name == name and not reader.outputs[0].is_graph_output():
            reader.outputs[0].name = None  # read back: the name that it had
    name = fresh_initializer_name(graph, name)
    output = ir.Value(name=name, type=source.type, shape=source.shape)
    made = ir.node("Identity", [source], outputs=[output], name=name)
    graph.insert_before(node, made)
    return output


def _take_over(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """All who read the output of `node` read `value`; the name of a model's output stays one."""
    old = node.outputs[0]
    name = old.name
    if (
        value.producer() is not None
        and _UNROUNDED.search(str(value.name))
        and name
        and not _MADE_UP.search(name)
    ):
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


def _same_behind_moves(graph: ir.Graph, found: dict[ir.Value, Encoding]) -> None:
    """What moves values that are on a grid of more than 8 bits is on it too: `qdq` leaves that pair out."""
    for node in graph:
        encoding = found.get(node.inputs[0]) if node.op_type in MOVING and node.inputs[0] else None
        if encoding is not None and encoding.bitwidth > 8 and not node.domain:
            for output in node.outputs:
                found.setdefault(output, encoding)


def _follow_weights(graph: ir.Graph, grids: Grids) -> None:
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
