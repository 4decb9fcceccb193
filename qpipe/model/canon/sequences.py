"""Rewrite rules for sequences of known length: what is taken out of one is the tensor itself.

    SplitToSequence(x)               Split(x), its outputs in a SequenceConstruct
    SequenceEmpty, Insert, Erase     a SequenceConstruct of what the sequence holds then
    SequenceAt(sequence, i)          its element i
    ConcatFromSequence(sequence)     Concat of its elements
    SequenceLength(sequence)         a number
    SequenceMap(sequence)            its body once for each element

torch's exporter writes `split`, `chunk` and `hstack` so. A sequence whose length depends on the data stays, and is
refused.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qpipe.model.canon.unrolling import inserted
from qpipe.model.network.invariants import constant
from qpipe.model.network.naming import fresh_name
from qpipe.model.network.rewriting import add_constant, bypass, replace

SEQUENCES = frozenset(
    {"SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength"}
    | {"SplitToSequence", "ConcatFromSequence", "SequenceMap"}
)
"""The operators that these rules take out."""


def elements(value: ir.Value | None) -> list[ir.Value] | None:
    """What the sequence `value` holds, in order; None where that is not known."""
    node = None if value is None else value.producer()
    if node is None or node.domain or node.op_type != "SequenceConstruct":
        return None
    found = [each for each in node.inputs if each is not None]
    return found if len(found) == len(node.inputs) else None


def split_to_sequence(graph: ir.Graph, node: ir.Node) -> bool:
    """SplitToSequence into a known number of parts."""
    source = node.inputs[0] if node.op_type == "SplitToSequence" and not node.domain else None
    if source is None or source.shape is None:
        return False
    axis = node.attributes.get_int("axis", 0) % len(source.shape)
    sizes = _sizes(node, source.shape[axis])
    if sizes is None:
        return False
    drops = len(node.inputs) < 2 and not node.attributes.get_int("keepdims", 1)
    parts = _split(graph, node, source, axis, sizes)
    if drops:
        parts = [_reshaped(graph, node, part, "Squeeze", axis) for part in parts]
    return _construct(graph, node, parts)


def _sizes(node: ir.Node, length: int | ir.SymbolicDim) -> list[int] | None:
    """How long the parts are; None where that depends on the data."""
    given = len(node.inputs) > 1 and node.inputs[1] is not None
    split = constant(node, 1) if given else np.array(1)
    if split is None:
        return None
    if split.ndim:
        return [int(size) for size in split]
    if not isinstance(length, int) or split < 1:
        return None
    size = int(split)
    return [min(size, length - start) for start in range(0, length, size)]


def _split(graph: ir.Graph, node: ir.Node, source: ir.Value, axis: int, sizes: list[int]) -> list[ir.Value]:
    if len(sizes) < 2:
        return [source] * len(sizes)
    lengths = add_constant(graph, f"{node.name}_sizes", np.array(sizes, np.int64))
    split = ir.node(
        "Split", [source, lengths], {"axis": axis}, num_outputs=len(sizes), name=f"{node.name}_parts"
    )
    split.metadata_props.update(node.metadata_props)
    assert source.shape is not None
    for output, size in zip(split.outputs, sizes, strict=True):
        dims = list(source.shape)
        dims[axis] = size
        output.name = fresh_name(graph, f"{node.name}_part")
        output.type, output.shape = source.type, ir.Shape(dims)
    graph.insert_before(node, split)
    return list(split.outputs)


def _reshaped(graph: ir.Graph, node: ir.Node, value: ir.Value, op_type: str, axis: int) -> ir.Value:
    """`value` without its dimension `axis` (Squeeze), or with a new one there (Unsqueeze)."""
    axes = add_constant(graph, f"{node.name}_axes", np.array([axis], np.int64))
    made = ir.node(op_type, [value, axes], name=fresh_name(graph, f"{node.name}_{op_type.lower()}"))
    made.metadata_props.update(node.metadata_props)
    made.outputs[0].name, made.outputs[0].type = fresh_name(graph, f"{node.name}_element"), value.type
    graph.insert_before(node, made)
    return made.outputs[0]


def changed_sequence(graph: ir.Graph, node: ir.Node) -> bool:
    """SequenceEmpty, SequenceInsert and SequenceErase at a known place of a known sequence."""
    if node.domain or node.op_type not in ("SequenceEmpty", "SequenceInsert", "SequenceErase"):
        return False
    if node.op_type == "SequenceEmpty":
        return _construct(graph, node, [])
    held = elements(node.inputs[0])
    inserts = node.op_type == "SequenceInsert"
    at = 2 if inserts else 1
    given = len(node.inputs) > at and node.inputs[at] is not None
    place = constant(node, at)
    if held is None or (given and place is None):
        return False
    default = len(held) if inserts else len(held) - 1
    index = int(place) if place is not None else default
    index += len(held) if index < 0 else 0
    if not 0 <= index < len(held) + inserts:
        return False
    if inserts:
        assert node.inputs[1] is not None
        return _construct(graph, node, [*held[:index], node.inputs[1], *held[index:]])
    return _construct(graph, node, [*held[:index], *held[index + 1 :]])


def element(graph: ir.Graph, node: ir.Node) -> bool:
    """SequenceAt with a known index into a known sequence."""
    if node.op_type != "SequenceAt" or node.domain:
        return False
    held, index = elements(node.inputs[0]), constant(node, 1)
    if held is None or index is None or not -len(held) <= int(index) < len(held):
        return False
    value = held[int(index)]
    if bypass(graph, node, value):
        return True
    return replace(graph, node, ir.node("Identity", [value], name=node.name))


def concatenated(graph: ir.Graph, node: ir.Node) -> bool:
    """ConcatFromSequence of a known sequence."""
    held = elements(node.inputs[0]) if node.op_type == "ConcatFromSequence" and not node.domain else None
    if not held:
        return False
    axis = node.attributes.get_int("axis", 0)
    if node.attributes.get_int("new_axis", 0):
        held = [_reshaped(graph, node, value, "Unsqueeze", axis) for value in held]
    return replace(graph, node, ir.node("Concat", held, {"axis": axis}, name=node.name))


def known_length(graph: ir.Graph, node: ir.Node) -> bool:
    """SequenceLength of a known sequence."""
    held = elements(node.inputs[0]) if node.op_type == "SequenceLength" and not node.domain else None
    if held is None:
        return False
    length = add_constant(graph, f"{node.name}_length", np.array(len(held), np.int64))
    return replace(graph, node, ir.node("Identity", [length], name=node.name))


def mapped(graph: ir.Graph, node: ir.Node) -> bool:
    """SequenceMap over a known sequence; its other inputs are such sequences too, or tensors that every pass reads."""
    held = elements(node.inputs[0]) if node.op_type == "SequenceMap" and not node.domain else None
    if not held:
        return False
    others = [elements(value) for value in node.inputs[1:]]
    if any(
        others[i] is None and (value is None or isinstance(value.type, ir.SequenceType))
        for i, value in enumerate(node.inputs[1:])
    ):
        return False
    passes = []
    for i, each in enumerate(held):
        more = [value if known is None else known[i] for known, value in zip(others, node.inputs[1:], strict=True)]
        passes.append(inserted(graph, node, node.attributes["body"].as_graph(), [each, *more]))
    for output, made in zip(node.outputs, zip(*passes, strict=True), strict=True):
        sequence = ir.node("SequenceConstruct", made, name=fresh_name(graph, f"{node.name}_sequence"))
        sequence.outputs[0].name, sequence.outputs[0].type = fresh_name(graph, f"{node.name}_held"), output.type
        graph.insert_before(node, sequence)
        output.replace_all_uses_with(sequence.outputs[0])
    if any(output.is_graph_output() for output in node.outputs):
        return False  # a sequence goes out of the model, and is refused
    graph.remove(node, safe=True)
    return True


def _construct(graph: ir.Graph, node: ir.Node, held: list[ir.Value]) -> bool:
    made = ir.node("SequenceConstruct", held, name=node.name)
    return replace(graph, node, made)


RULES = (split_to_sequence, changed_sequence, mapped, element, concatenated, known_length)
