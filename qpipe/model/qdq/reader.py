"""Reading the QDQ form: a float graph, and the grids that QuantizeLinear and DequantizeLinear say.

    v -> QuantizeLinear -> DequantizeLinear -> readers          v, with an encoding
    weights and biases                                          see `qpipe.model.qdq.weights`

An encoding is the same for all who read a value. Where a file rounds a value for some readers only, or puts it
on two grids, an Identity stands for the rounding and has the encoding.

A pair is read so where its grid is a constant, of integers, one for the whole activation, and where nothing but
DequantizeLinear of that grid reads the codes, behind nodes that only move them. Any other QuantizeLinear or
DequantizeLinear (dynamic scales, scales per channel of an activation, codes that the model takes, returns or
computes with) stays a node of the graph, and is computed as it is.

Source: ONNX operators QuantizeLinear and DequantizeLinear, opsets 10 to 25, and their forms in com.microsoft.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qpipe.model.network.invariants import constant
from qpipe.model.network.naming import Names, names_of
from qpipe.model.qdq.kernel_forms import read_kernels
from qpipe.model.qdq.nodes import (
    BITWIDTH,
    bound_of_codes,
    clip_of_codes,
    clips_to_grid,
    computes_codes,
    dequantizes,
    grid,
    has_grid,
    initializer,
    narrowed,
    quantizes,
)
from qpipe.model.qdq.weights import SUFFIX, Grids, follow_weights, take_over
from qpipe.model.structure.families import MOVING, ON_CODES
from qpipe.numerics.grid import Encoding, dequantize, same_grid

Array = npt.NDArray[Any]


def skip_clips(graph: ir.Graph) -> None:
    """The Clip in front of codes that are narrower than their type (`qpipe.model.qdq.writer` writes it) goes, in
    place: the encoding says as much."""
    for node in list(graph):
        known = quantizes(node) and BITWIDTH in node.metadata_props and has_grid(node)
        value = node.inputs[0] if known else None
        clip = None if value is None else value.producer()
        if clip is None or clip.op_type != "Clip" or len(clip.outputs[0].uses()) != 1:
            continue
        if clips_to_grid(clip, node):
            node.replace_input_with(0, clip.inputs[0])


def read_activations(graph: ir.Graph, grids: Grids) -> None:
    """Remove the QDQ pairs of activations, in place; weights' grids follow the transposes of their tensors.

    Raises InputError for a grid that cannot be."""
    follow_weights(graph, grids)
    grids.on_codes |= read_kernels(graph)
    for name in grids.names & graph.initializers.keys():
        if not graph.initializers[name].uses() and not graph.initializers[name].is_graph_output():
            grids.encodings.pop(name, None)  # of what was written otherwise
    found: dict[ir.Value, Encoding] = {}
    names = names_of(graph)
    for node in list(graph):
        if quantizes(node) and node.graph is graph and _rounds(node):
            _absorb(graph, node, found, grids, names)
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
            "onto one constant grid. They stay as they are, without encodings, and nothing tunes them: to quantize "
            "anew, give the float model."
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
            elif clip_of_codes(reader) is not None or bound_of_codes(reader) is not None or _moves(reader):
                stack += reader.outputs
            elif reader.domain or reader.op_type not in _COMPARING:
                return False
    return True


def _moves(node: ir.Node) -> bool:
    """Whether a node of integers puts out some of what its first input holds, and constants."""
    if node.domain:
        return False
    if node.op_type == "Resize":
        return node.attributes.get_string("mode", "nearest") == "nearest"
    if node.op_type == "Pad":
        given = len(node.inputs) > 2 and node.inputs[2] is not None
        return not (_pads_with_constant(node) and given and constant(node, 2) is None)
    return node.op_type in MOVING


def _pads_with_constant(node: ir.Node) -> bool:
    return node.attributes.get_string("mode", "constant") == "constant"


_COMPARING = frozenset({"ArgMax", "ArgMin"})
"""Operators that find the same in the codes as in the floats that these stand for."""


def _absorb(
    graph: ir.Graph, node: ir.Node, found: dict[ir.Value, Encoding], grids: Grids, names: Names
) -> None:
    """Let all that reads the codes of one QuantizeLinear read floats; what is left of it is dead."""
    value = node.inputs[0]
    assert value is not None
    encoding = _with_clipped_codes(node, grid(node), grids)
    known = found.get(value)
    if (known is None and _free(value, encoding)) or (known and same_grid(known, encoding)):
        rounded = value
    else:
        rounded = _identity(graph, node, value, names)
    found[rounded] = encoding
    stack = [(node.outputs[0], rounded)]
    while stack:
        codes, floats = stack.pop()
        for use in list(codes.uses()):
            reader = use.node
            if dequantizes(reader):
                take_over(graph, reader, floats, names)
                continue
            if clip_of_codes(reader) is not None:
                stack.append((reader.outputs[0], floats))
                continue
            reader.replace_input_with(0, floats)
            bound = bound_of_codes(reader)
            if bound is not None or reader.op_type in ON_CODES:
                grids.on_codes.add(reader.op_type)
            if bound is not None:
                _bound_floats(graph, reader, bound, encoding, names)
            if bound is not None or _moves(reader):
                if reader.op_type == "Pad":
                    _pad_with_floats(graph, reader, encoding, names)
                for output in reader.outputs:
                    output.type = ir.TensorType(ir.DataType.FLOAT)
                    _name_floats(output, names)
                    found[output] = encoding
                    stack.append((output, output))


def _name_floats(value: ir.Value, names: Names) -> None:
    """What were codes is called as their floats were, unless these go on to be made of them."""
    name = str(value.name)
    base = SUFFIX.sub("", name)
    readers = [use.node.outputs[0] for use in value.uses() if dequantizes(use.node)]
    if base != name and not value.is_graph_output():
        value.name = names.fresh(base)
        names.release(name)
        for floats in readers:
            if floats.name == base and not floats.is_graph_output():
                names.release(str(value.name))
                floats.name, value.name = None, base


def _pad_with_floats(graph: ir.Graph, node: ir.Node, encoding: Encoding, names: Names) -> None:
    """The code that a Pad puts around codes, 0 unless it is given, as what it stands for."""
    if not _pads_with_constant(node):
        return
    code = constant(node, 2)
    array = dequantize(np.asarray(0 if code is None else code).reshape(()), encoding)
    value = initializer(names.fresh(f"{node.name}_value"), array)
    graph.register_initializer(value)
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, value)


def _bound_floats(graph: ir.Graph, node: ir.Node, codes: Array, encoding: Encoding, names: Names) -> None:
    """The codes with which a Min or Max compares, as what they stand for, once along each axis where they repeat."""
    for axis in range(codes.ndim):
        first = codes.take([0], axis)
        codes = first if np.array_equal(np.broadcast_to(first, codes.shape), codes) else codes
    bound = node.inputs[1]
    assert bound is not None
    name = SUFFIX.sub("", str(bound.name).removesuffix("_spread"))
    value = initializer(names.fresh(name), dequantize(codes, encoding))
    graph.register_initializer(value)
    node.replace_input_with(1, value)


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


def _identity(graph: ir.Graph, node: ir.Node, source: ir.Value, names: Names) -> ir.Value:
    """A value of its own for one rounding of `source`, made in front of `node`."""
    name = f"{source.name}_rounded"
    for reader in node.outputs[0].consumers():
        if reader.outputs[0].name == name and not reader.outputs[0].is_graph_output():
            reader.outputs[0].name = None  # read back: the name that it had
            names.release(name)
    name = names.fresh(name)
    output = ir.Value(name=name, type=source.type, shape=source.shape)
    made = ir.node("Identity", [source], outputs=[output], name=name)
    graph.insert_before(node, made)
    return output


def _same_behind_moves(graph: ir.Graph, found: dict[ir.Value, Encoding]) -> None:
    """What moves values that are on a grid of more than 8 bits is on it too: `qdq` leaves that pair out."""
    for node in graph:
        encoding = found.get(node.inputs[0]) if node.op_type in MOVING and node.inputs[0] else None
        if encoding is not None and encoding.bitwidth > 8 and not node.domain:
            for output in node.outputs:
                found.setdefault(output, encoding)
