"""To the canonical opset, from below and from above.

Below 21 the version converters of onnxscript and onnx lift the model. Above, no converter leads down; but up
to opset 26 the operators changed in the types that they admit and not in what they compute, so a node whose
name, attributes and inputs opset 21 knows stays as it is, and what is new (Attention, RMSNormalization,
RotaryEmbedding, Swish) is replaced by its definition in terms of older operators.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import onnx
import onnx.inliner
import onnx_ir as ir

from qpipe.errors import InputError
from qpipe.model.invariants import OPSET
from qpipe.model.packing import graph_proto

OLDEST, NEWEST = 7, 26
_NEUTRAL = {
    "Cast": {"round_mode": "up"},
    "CastLike": {"round_mode": "up"},
}
"""Attributes newer than opset 21 with the value that leaves the result as it was."""


def to_canonical_opset(model: ir.Model) -> ir.Model:
    """`model` at opset 21, its default domain written `''`. Raises InputError for opsets outside 7..26 and
    for a model that no converter can take."""
    _one_default_domain(model)
    version = model.opset_imports.get("")
    if version is None:
        raise InputError("The model imports no ONNX opset. Export it again with opset 13 to 21.")
    if not OLDEST <= version <= NEWEST:
        raise InputError(
            f"The model uses opset {version}; {OLDEST} to {NEWEST} can be read. Export it with opset 21."
        )
    if version < OPSET:
        return _lifted(model, version)
    return _lowered(model, version) if version > OPSET else model


def _one_default_domain(model: ir.Model) -> None:
    """`ai.onnx` is another spelling of ''; domains that no node uses are forgotten."""
    for graph in model.graphs():
        for node in graph:
            if node.domain == "ai.onnx":
                node.domain = ""
    used = {node.domain for graph in model.graphs() for node in graph} | {""}
    imports = dict(model.opset_imports)
    if "ai.onnx" in imports:
        imports.setdefault("", imports["ai.onnx"])
    model.opset_imports.clear()
    model.opset_imports.update({domain: version for domain, version in imports.items() if domain in used})


def _lifted(model: ir.Model, version: int) -> ir.Model:
    from onnxscript import version_converter

    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # its warnings say which of its two ways it takes
    try:
        version_converter.convert_version(model, OPSET, fallback=True)
    except Exception as error:
        raise InputError(_no_way(version, str(error).splitlines()[0] if str(error) else "")) from error
    finally:
        logger.setLevel(level)
    if model.opset_imports.get("") != OPSET:
        raise InputError(_no_way(version, ""))
    return model


def _no_way(version: int, reason: str) -> str:
    because = f" ({reason})" if reason else ""
    return (
        f"The model could not be converted from opset {version} to {OPSET}{because}. "
        f"Export it with opset {OPSET}."
    )


def _lowered(model: ir.Model, version: int) -> ir.Model:
    new = {node.op_type for node in _nodes(model) if _schema(node.op_type, OPSET) is None}
    defined = sorted(op for op in new if _has_definition(op, version))
    if defined:
        _write_defaults(model, defined, version)
        model = _inlined(model, [("", op) for op in defined])
    problems = [problem for node in _nodes(model) if (problem := _too_new(node)) is not None]
    if problems:
        raise InputError(
            f"The model uses opset {version}, and these nodes have no form at opset {OPSET}: "
            f"{'; '.join(problems)}. Export it with opset {OPSET}."
        )
    model.opset_imports[""] = OPSET
    return model


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    return (node for graph in model.graphs() for node in graph if not node.domain)


def _schema(op_type: str, version: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, version, "")
    except onnx.defs.SchemaError:
        return None


def _has_definition(op_type: str, version: int) -> bool:
    schema = _schema(op_type, version)
    return schema is not None and (schema.has_function or schema.has_context_dependent_function)


def _write_defaults(model: ir.Model, op_types: list[str], version: int) -> None:
    """Attributes left out are written: definitions refer to them, and inlining knows no defaults."""
    for node in _nodes(model):
        schema = _schema(node.op_type, version) if node.op_type in op_types else None
        for name, attribute in schema.attributes.items() if schema is not None else ():
            if name not in node.attributes and attribute.default_value.type:
                node.attributes[name] = ir.from_proto(attribute.default_value)


def _inlined(model: ir.Model, functions: list[tuple[str, str]]) -> ir.Model:
    """`model` with calls of these standard operators replaced by their definitions; tensors are shared."""
    proto, outside = graph_proto(model)
    done: ir.Model = ir.from_proto(
        onnx.inliner.inline_selected_functions(proto, functions, inline_schema_functions=True)
    )
    for name, tensor in outside.items():
        done.graph.initializers[name].const_value = tensor
    return done


def _too_new(node: ir.Node) -> str | None:
    schema = _schema(node.op_type, OPSET)
    if schema is None:
        return f"{node.name!r} ({node.op_type})"
    for name, attribute in list(node.attributes.items()):
        if name in schema.attributes:
            continue
        if attribute.value != _NEUTRAL.get(node.op_type, {}).get(name):
            return f"{node.name!r} ({node.op_type} with {name})"
        del node.attributes[name]
    return None
