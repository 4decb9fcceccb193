"""What a model must not contain: everything that cannot be taken in one list, each with a way out.

`refuse_unfit` looks at a model as it comes, before anything is rewritten; `check_supported` at its canonical
form, where control flow that is decided and operators that have a definition have been written out.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from qpipe.errors import InputError
from qpipe.model.canon.definitions import has_definition, schema
from qpipe.model.canon.sequences import SEQUENCES
from qpipe.model.network.invariants import OPSET
from qpipe.model.network.rewriting import constant
from qpipe.model.qdq.nodes import computes_codes, dequantizes, on_codes, quantizes
from qpipe.model.qdq.operator_form import not_constant, unreadable
from qpipe.model.structure.families import RANDOM, WIDE_UNSIGNED

TYPES = frozenset(
    {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE, ir.DataType.BOOL}
    | {ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64}
    | {ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64}
)
"""What a tensor may hold and nodes compute with."""
FLOAT8 = frozenset(
    {ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E4M3FNUZ}
    | {ir.DataType.FLOAT8E5M2, ir.DataType.FLOAT8E5M2FNUZ}
)
"""What a tensor may hold besides. torch has next to no arithmetic for them, and nothing narrower."""
_TAKING_FLOAT8 = frozenset(
    {"Cast", "CastLike", "QuantizeLinear", "DequantizeLinear", "Identity", "Shape", "Size", "Reshape"}
    | {"Flatten", "Squeeze", "Unsqueeze", "Transpose"}
)
_HELD = TYPES | FLOAT8
_CODES = frozenset({ir.DataType.INT2, ir.DataType.UINT2, ir.DataType.INT4, ir.DataType.UINT4})
"""What QDQ nodes may hold besides; reading a quantized model leaves none of them."""
_CONTROL = frozenset({"If", "Loop", "Scan"})
_TEXT = frozenset({"StringConcat", "StringNormalizer", "StringSplit", "RegexFullMatch", "TfIdfVectorizer"})
_CONTAINERS = frozenset({"Optional", "OptionalGetElement", "OptionalHasElement"})
_WAYS_OUT = {
    RANDOM: "it draws random numbers. Export the model in eval mode",
    _TEXT: "text is not supported. Process it before the model",
    SEQUENCES: "a sequence goes out of the model, or what it holds depends on the data. Give tensors of their own",
    _CONTAINERS: "sequences, maps and optionals are not supported. Give tensors of their own to the model",
    frozenset({"ImageDecoder"}): "image files are not supported. Decode them before the model",
}
_UNDECIDED = {
    "If": "which branch is taken depends on the data. Export the model with that decided",
    "Loop": "how often it runs depends on the data. Export the model with fixed sizes, or the loop unrolled",
    "Scan": "how often it runs depends on the data. Export the model with fixed sizes, or the loop unrolled",
}


def refuse_unfit(model: ir.Model) -> None:
    """Raise one InputError that lists everything about the model as it comes that no import can mend."""
    version = model.opset_imports.get("", model.opset_imports.get("ai.onnx", OPSET))
    types = _HELD | _CODES if any(map(computes_codes, _nodes(model))) else _HELD
    found = [*_values(model.graph, types), *_quantized(model)]
    for node in _nodes(model):
        mends = on_codes(node) or _qdq(node) or (node.op_type in SEQUENCES and not node.domain)
        reason = None if mends else _unfit(node, version, types)
        if reason is not None:
            found.append(_clause(node, reason))
    if found:
        found += [_clause(node, _UNDECIDED[node.op_type]) for node in _nodes(model) if _undecided(node)]
    _raise(found)


def check_supported(model: ir.Model) -> None:
    """Raise one InputError that lists everything that `unsupported` finds."""
    _raise(unsupported(model))


def unsupported(model: ir.Model) -> list[str]:
    """What of a canonical model cannot be computed: `node 'x' (op Foo, domain bar): reason`."""
    found = [clause for value in model.graph.inputs if (clause := _bad_input(value)) is not None]
    for node in model.graph:
        reason = _UNDECIDED[node.op_type] if _is_control(node) else _unfit(node, OPSET) or _untyped(node)
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


def _quantized(model: ir.Model) -> Iterator[str]:
    """One clause for each reason: the nodes are as many as the model has layers."""
    found: dict[str, list[ir.Node]] = {}
    for node in _nodes(model):
        reason = unreadable(node)
        if reason is not None:
            found.setdefault(reason, []).append(node)
    for reason, nodes in found.items():
        count = f"{len(nodes)} nodes such as " if len(nodes) > 1 else ""
        yield count + _clause(nodes[0], reason)


def _name(node: ir.Node) -> str:
    return node.name or next((output.name for output in node.outputs if output.name), "")


def _values(graph: ir.Graph, types: frozenset[ir.DataType]) -> Iterator[str]:
    for value in graph.inputs:
        clause = None if value.is_initializer() else _bad_input(value, types)
        if clause is not None:
            yield clause
    for name, value in graph.initializers.items():
        reason = _bad_type(value, types)
        if reason is not None:
            yield f"initializer {name!r}: {reason}"


def _bad_input(value: ir.Value, types: frozenset[ir.DataType] = _HELD) -> str | None:
    reason = _bad_type(value, types)
    if reason is None and (value.dtype is None or value.shape is None):
        reason = "its type or its number of dimensions is not said. Export the model again with them"
    return None if reason is None else f"input {value.name!r}: {reason}"


def _bad_type(value: ir.Value, types: frozenset[ir.DataType]) -> str | None:
    """Why a value of this type cannot be held; None where it can, or where the type is not known."""
    if value.type is not None and not isinstance(value.type, ir.TensorType):
        return "it is no tensor. " + _WAYS_OUT[_CONTAINERS][0].upper() + _WAYS_OUT[_CONTAINERS][1:]
    dtype = value.const_value.dtype if value.const_value is not None else value.dtype
    return None if dtype is None or dtype in types else _held(dtype)


def _held(dtype: ir.DataType) -> str:
    if dtype == ir.DataType.STRING:
        return f"it holds strings; {_WAYS_OUT[_TEXT]}"
    return f"it holds {dtype.name.lower()}, which torch cannot compute with. Give the model in float32"


def _unfit(node: ir.Node, version: int, types: frozenset[ir.DataType] = _HELD) -> str | None:
    """Why no rewriting makes a node of an opset's `version` computable."""
    if node.domain not in ("", "ai.onnx"):
        return _foreign(node)
    for operators, way_out in _WAYS_OUT.items():
        if node.op_type in operators:
            return way_out
    if node.op_type == "Scan" and version < 9:
        return "Scan had another form before opset 9. Export the model with opset 13 or newer"
    reason = (
        _training(node)
        or _ambiguous_resize(node)
        or next((r for value in node.outputs if (r := _bad_type(value, types))), None)
    )
    return reason or _type_attribute(node, types) or (None if _is_control(node) else _unknown(node, version))


def _qdq(node: ir.Node) -> bool:
    return quantizes(node) or dequantizes(node)


def _foreign(node: ir.Node) -> str | None:
    if node.domain == "ai.onnx.preview" and has_definition(node.op_type, 1, node.domain):
        return None
    left = not_constant(node)
    if left is not None:
        return left
    if node.domain == "ai.onnx.preview.training":
        return "it belongs to training. Export the model in eval mode"
    if node.domain == "ai.onnx.ml":
        return "classical machine learning is not supported. Leave this part out of the exported model"
    return (
        f"operators of the domain {node.domain!r} are not known. Write it in standard operators, "
        "or add its definition to the model as a function"
    )


def _unknown(node: ir.Node, version: int) -> str | None:
    from qpipe.model.operators.table import supported_ops

    canonical = schema(node.op_type, OPSET)
    if has_definition(node.op_type, max(version, OPSET)):
        return None
    if canonical is None and (new := schema(node.op_type, version)) is not None and not new.deprecated:
        return (
            f"the operator came with opset {new.since_version} and has no form in opset {OPSET}. "
            f"Export the model with opset {OPSET}"
        )
    if ("", node.op_type) in supported_ops() or (version < OPSET and _was_replaced(node.op_type, version)):
        return None
    return "the operator is not supported. Write it in others, or leave this part out of the exported model"


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


def _type_attribute(node: ir.Node, types: frozenset[ir.DataType]) -> str | None:
    """Why the type that a Cast or a constant names cannot be held."""
    for name, attribute in node.attributes.items():
        if name in ("to", "dtype", "output_datatype") and attribute.type == ir.AttributeType.INT:
            dtype = ir.DataType(attribute.as_int())
        elif attribute.type == ir.AttributeType.TENSOR:
            dtype = attribute.as_tensor().dtype
        elif node.op_type == "Constant" and name in ("value_string", "value_strings"):
            dtype = ir.DataType.STRING
        else:
            continue
        if dtype not in types:
            return _held(dtype)
    return None


def _is_control(node: ir.Node) -> bool:
    return node.op_type in _CONTROL and node.domain in ("", "ai.onnx")


def _undecided(node: ir.Node) -> bool:
    """Whether control flow is evidently not decided: its condition or its count is no constant."""
    if not _is_control(node) or not node.inputs:
        return False
    if node.op_type == "Scan":
        value = node.inputs[-1]
        return value is not None and value.shape is not None and not isinstance(value.shape[0], int)
    return constant(node, 0) is None


def _untyped(node: ir.Node) -> str | None:
    """Why torch has no arithmetic for the types that a canonical node works on."""
    from qpipe.model.operators.registry import OPERATORS

    values = [value for value in (*node.inputs, *node.outputs) if value is not None]
    narrow = next((reason for value in values if (reason := _bad_type(value, _HELD)) is not None), None)
    if narrow is not None:
        return narrow
    small = [value.dtype for value in values if value.dtype in FLOAT8]
    if small and node.op_type not in _TAKING_FLOAT8:
        return f"torch cannot compute it with {small[0].name.lower()}. Use float32 there"
    wide = [value.dtype for value in values if value.dtype in WIDE_UNSIGNED]
    if wide and node.op_type in OPERATORS and OPERATORS[node.op_type].unsigned is None:
        return f"torch cannot compute it with {wide[0].name.lower()}. Use int32 or int64 there"
    return None
