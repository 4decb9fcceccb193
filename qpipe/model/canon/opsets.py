"""To the canonical opset, from below and from above.

Below 21 the version converters of onnxscript and onnx lift the model. Above, no converter leads down; but up to opset
28, the newest of onnx 1.23, the operators of opset 21 changed in the types and attributes that they admit and not in
what they compute, so a node whose name and attributes opset 21 knows stays as it is. What is new, an operator or what
an attribute says, is replaced by its definition in terms of older operators (`qpipe.model.definitions`), or refused.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import onnx
import onnx_ir as ir

from qpipe.errors import InputError
from qpipe.model.canon.definitions import expand, schema
from qpipe.model.network.invariants import OPSET
from qpipe.model.network.shapes import infer_shapes

OLDEST, NEWEST = 1, onnx.defs.onnx_opset_version()
_FLOATS = (1, 10, 11, 16)
"""As TensorProto numbers them; all become float32."""
_NEUTRAL: dict[str, dict[str, tuple[object, ...]]] = {
    "Cast": {"round_mode": ("up",)},
    "CastLike": {"round_mode": ("up",)},
    "SpaceToDepth": {"mode": ("DCR",)},
    "Range": {"stash_type": _FLOATS},
    "QuantizeLinear": {"precision": (0, *_FLOATS)},
    "DequantizeLinear": {"output_dtype": (0, *_FLOATS)},
}
"""Attributes newer than opset 21 with the values that leave the result as it was."""
_NEVER_EXPANDED = frozenset({"Bernoulli", "DynamicQuantizeLinear", "SequenceMap"})
"""Their definitions hold what cannot be taken either: the refusal names the operator itself."""


def to_canonical_opset(model: ir.Model) -> ir.Model:
    """`model` at opset 21, its default domain written `''`.

    Raises InputError for a model without an opset or with one outside 1 to the newest of the installed onnx, and for
    one that no converter can take.
    """
    _one_default_domain(model)
    version = model.opset_imports.get("")
    if version is None and not any(True for _ in _nodes(model)):
        version = model.opset_imports[""] = OPSET  # of other domains' operators alone
    if version is None:
        raise InputError(f"The model imports no ONNX opset. Export it again, with opset {OPSET}.")
    if not OLDEST <= version <= NEWEST:
        raise InputError(
            f"The model uses opset {version}; {OLDEST} to {NEWEST} can be read. Export it with opset {OPSET}."
        )
    if version < OPSET:
        model, version = _lifted(model, version), OPSET
    model = expand(model, version, _stays)
    return _lowered(model, version) if version > OPSET else model


def _stays(node: ir.Node) -> bool:
    """Whether opset 21 has the node as it is, and so has our table; or it is to be refused under its name."""
    from qpipe.model.operators.table import supported_ops

    if node.op_type in _NEVER_EXPANDED:
        return True
    found = schema(node.op_type, OPSET)
    return (
        found is not None and ("", node.op_type) in supported_ops() and not _strange_attributes(node, found)
    )


def _strange_attributes(node: ir.Node, found: onnx.defs.OpSchema) -> list[str]:
    """The attributes that opset 21 does not know and that make a difference."""
    neutral = _NEUTRAL.get(node.op_type, {})
    return [
        name
        for name, attribute in node.attributes.items()
        if name not in found.attributes and not (name in neutral and attribute.value in neutral[name])
    ]


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

    if version < 7:
        _align_explicitly(model)
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


def _align_explicitly(model: ir.Model) -> None:
    """Before opset 7 a vector was aligned with the axis that an attribute named, or with the channels in
    PRelu, and not with the last dimension. onnx's converter leaves or refuses what an Unsqueeze says."""
    infer_shapes(model)
    for node in list(_nodes(model)):
        if len(node.inputs) != 2 or (node.op_type != "PRelu" and "broadcast" not in node.attributes):
            continue
        x, other = node.inputs
        axis = node.attributes.pop("axis", None)
        node.attributes.pop("broadcast", None)
        if x is None or other is None or x.shape is None or other.shape is None or node.graph is None:
            continue
        start = 1 if node.op_type == "PRelu" else None if axis is None else axis.as_int() % len(x.shape)
        behind = 0 if start is None else len(x.shape) - start - len(other.shape)
        if behind > 0 and any(size != 1 for size in other.shape):
            axes = list(range(len(other.shape), len(other.shape) + behind))
            spread = ir.node("Unsqueeze", [other], {"axes": axes})
            spread.outputs[0].name = f"{other.name}_for_{node.name or node.outputs[0].name}"
            node.graph.insert_before(node, spread)
            node.replace_input_with(1, spread.outputs[0])


def _no_way(version: int, reason: str) -> str:
    because = f" ({reason})" if reason else ""
    return (
        f"The model could not be converted from opset {version} to {OPSET}{because}. "
        f"Export it with opset {OPSET}."
    )


def _lowered(model: ir.Model, version: int) -> ir.Model:
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


def _too_new(node: ir.Node) -> str | None:
    found = schema(node.op_type, OPSET)
    if found is None:
        return f"{node.name!r} ({node.op_type})"
    strange = _strange_attributes(node, found)
    if strange:
        return f"{node.name!r} ({node.op_type} with {' and '.join(strange)})"
    for name in [name for name in node.attributes if name not in found.attributes]:
        del node.attributes[name]
    return None
