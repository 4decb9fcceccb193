"""What a model must not contain: everything that cannot be taken in one list, each with a way out.

`refuse_unfit` looks at a model as it comes, before anything is rewritten; `check_supported` at its canonical
form, where control flow that is decided and operators that have a definition have been written out. What torch cannot
compute and onnxruntime can is no reason: it stays as it is (`structure.opaque`).
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from qpipe.errors import InputError
from qpipe.model.canon.definitions import has_definition, schema
from qpipe.model.network.invariants import OPSET, constant
from qpipe.model.structure.families import RANDOM
from qpipe.model.structure.opaque import FLOAT8, TYPES, is_opaque

_TEXT = "text is no number, so that nothing compares it. Leave it out of the model's outputs"
_RUNTIME_S_OWN = ("com.microsoft", "ai.onnx.ml")
_CONTAINER = "Sequences, maps and optionals are not supported there. Give tensors of their own to the model"


def refuse_unfit(model: ir.Model) -> None:
    """Raise one InputError that lists everything about the model as it comes that no import can mend."""
    version = model.opset_imports.get("", model.opset_imports.get("ai.onnx", OPSET))
    given = (value for value in model.graph.inputs if not value.is_initializer())
    found = [clause for value in given if (clause := _bad_value("input", value)) is not None]
    for node in _nodes(model):
        reason = _unfit(node, version)
        if reason is not None:
            found.append(_clause(node, reason))
    _raise(found)


def check_supported(model: ir.Model, complaint: str | None = None) -> None:
    """Raise one InputError that lists everything that `unsupported` finds."""
    _raise(unsupported(model, complaint))


def unsupported(model: ir.Model, complaint: str | None = None) -> list[str]:
    """What of a canonical model can be computed by nobody: `node 'x' (op Foo, domain bar): reason`. `complaint` is what
    onnxruntime says against it, which matters where torch cannot compute a part."""
    found = [clause for value in model.graph.inputs if (clause := _bad_value("input", value)) is not None]
    found += [clause for value in model.graph.outputs if (clause := _bad_value("output", value)) is not None]
    for node in model.graph:
        reason = _unfit(node, OPSET)
        if reason is None and complaint is not None and is_opaque(node):
            reason = f"torch cannot compute it, and onnxruntime does not open the model: {complaint.rstrip('.')}"
            if node.domain and not node.domain.startswith(_RUNTIME_S_OWN):
                reason += ". If it is in a library of custom operators, name that in model.custom_ops=[FILE]"
        if reason is not None:
            found.append(_clause(node, reason))
    return found


def _raise(clauses: list[str]) -> None:
    if clauses:
        count = "one part" if len(clauses) == 1 else f"{len(clauses)} parts"
        listed = "\n".join(f"  - {clause}." for clause in clauses)
        raise InputError(f"The model has {count} that cannot be taken:\n{listed}")


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    return (node for graph in model.graphs() for node in graph)


def _clause(node: ir.Node, reason: str) -> str:
    return f"node {_name(node)!r} (op {node.op_type}, domain {node.domain or 'ai.onnx'}): {reason}"


def _name(node: ir.Node) -> str:
    return node.name or next((output.name for output in node.outputs if output.name), "")


def _bad_value(kind: str, value: ir.Value) -> str | None:
    """Why a value cannot come into the model, or go out of it: it is no tensor of numbers that numpy has."""
    reason = None
    if value.type is not None and not isinstance(value.type, ir.TensorType):
        reason = f"it is no tensor. {_CONTAINER}"
    elif value.dtype == ir.DataType.STRING and kind == "output":
        reason = f"it holds strings; {_TEXT}"
    elif value.dtype is not None and value.dtype not in TYPES | FLOAT8 | {ir.DataType.STRING}:
        reason = f"it holds {value.dtype.name.lower()}, which torch cannot compute with. Give the model in float32"
    elif kind == "input" and (value.dtype is None or value.shape is None):
        reason = "its type or its number of dimensions is not said. Export the model again with them"
    return None if reason is None else f"{kind} {value.name!r}: {reason}"


def _unfit(node: ir.Node, version: int) -> str | None:
    """Why nobody can compute a node of an opset's `version`."""
    if node.domain == "ai.onnx.preview.training":
        return "it belongs to training. Export the model in eval mode"
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type in RANDOM:
        return "it draws random numbers. Export the model in eval mode"
    if node.op_type == "Scan" and version < 9:
        return "Scan had another form before opset 9. Export the model with opset 13 or newer"
    return _training(node) or _ambiguous_resize(node) or _unknown(node, version)


def _unknown(node: ir.Node, version: int) -> str | None:
    canonical = schema(node.op_type, OPSET)
    if has_definition(node.op_type, max(version, OPSET)) or canonical is not None:
        return None
    new = schema(node.op_type, version)
    if new is not None and not new.deprecated:
        return (
            f"the operator came with opset {new.since_version} and has no form in opset {OPSET}. "
            f"Export the model with opset {OPSET}"
        )
    replaced = version < OPSET and _was_replaced(node.op_type, version)
    return None if replaced else "there is no such operator. Export the model again"


def _was_replaced(op_type: str, version: int) -> bool:
    """Whether the operator existed at `version` and opset 21 has it no more: conversion replaces it."""
    found, newest = schema(op_type, version), schema(op_type, OPSET)
    return found is not None and (newest is None or newest.deprecated)


def _training(node: ir.Node) -> str | None:
    way_out = "it is in training mode. Export the model in eval mode"
    if node.op_type == "BatchNormalization" and "training_mode" in node.attributes:
        return way_out if node.attributes["training_mode"].as_int() else None
    if node.op_type == "Dropout" and len(node.inputs) > 2 and node.inputs[2] is not None:
        ratio, training = constant(node, 1), constant(node, 2)
        harmless = (training is not None and not training.any()) or (ratio is not None and not ratio.any())
        return None if harmless else way_out
    return None


def _ambiguous_resize(node: ir.Node) -> str | None:
    """With corners aligned and a length of 3.5, ONNX's reference divides by 2.5, its text, torch and
    onnxruntime by 2. Constant scales are read as the latter do; whoever gives them as data may mean either."""
    mode = node.attributes.get_string("coordinate_transformation_mode") if node.op_type == "Resize" else None
    if mode != "align_corners":
        return None
    scales = node.inputs[2] if len(node.inputs) > 2 else None
    if scales is None or not scales.is_graph_input() or scales.is_initializer():
        return None
    return (
        "its scales are an input of the model, and with align_corners ONNX's reference and onnxruntime differ "
        "where they give no whole length. Export it with sizes or with constant scales"
    )
