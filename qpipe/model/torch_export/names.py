"""Names for a graph that came out of torch, after the modules that its author named.

node        the module's path where the module is one node, or where the node has the module's weight;
            else path and operator: `layer1.0.conv1`, `layer1.0.Add`, `encoder.0.attention.MatMul_1`
value       its node's name: `layer1.0.conv1.output`; a model's outputs are `output`, or `output_0`, …
constant    its first reader's name and what it is there: `act.min`, `encoder.0.attention.Reshape.shape`
parameter   as torch has it
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import onnx
import onnx_ir as ir

from qpipe.errors import InputError
from qpipe.model.network.invariants import OPSET
from qpipe.model.network.naming import SCOPE, Names

_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_NORMS = frozenset(
    {"BatchNormalization", "LayerNormalization", "InstanceNormalization", "GroupNormalization"}
)


def rename(graph: ir.Graph, parameters: Collection[str], input_names: Sequence[str] | None) -> None:
    """Rename all but the parameters, in place. Raises InputError where `input_names` do not fit."""
    if input_names is not None:
        if len(input_names) != len(graph.inputs) or len(set(input_names)) != len(input_names):
            raise InputError(
                f"The model's inputs need {len(graph.inputs)} different names, got {list(input_names)}."
            )
        for value, name in zip(graph.inputs, input_names, strict=True):
            value.name = name
    _rename_nodes(graph)
    kept = [*graph.inputs, *(v for name, v in graph.initializers.items() if name in parameters)]
    names = Names(str(value.name) for value in kept)
    outputs = list(dict.fromkeys(graph.outputs))
    for index, value in enumerate(outputs):
        if value.producer() is not None:
            value.name = names.fresh("output" if len(outputs) == 1 else f"output_{index}")
    for node in graph:
        for index, value in enumerate(node.outputs):
            if value.name and not value.is_graph_output():
                value.name = names.fresh(f"{node.name}.output{index or ''}")
    _rename_constants(graph, set(kept), names)


def _rename_nodes(graph: ir.Graph) -> None:
    scopes: dict[str, Counter[str]] = {}
    for node in graph:
        scopes.setdefault(_scope(node), Counter())[node.op_type] += 1
    parents = {scope[:at] for scope in scopes for at, mark in enumerate(scope) if mark == "."}
    names = Names()
    for node in graph:
        scope = _scope(node)
        alone = scope not in parents and len(scopes[scope]) == 1
        if scope and (alone or _has_weight_of(node, scope)):
            node.name = names.fresh(scope)
        else:
            node.name = names.fresh(f"{scope}.{node.op_type}" if scope else node.op_type)


def _scope(node: ir.Node) -> str:
    return node.metadata_props.get(SCOPE, "")


def _has_weight_of(node: ir.Node, scope: str) -> bool:
    weight = node.inputs[1] if node.op_type in _WEIGHTED else None
    return weight is not None and weight.name == f"{scope}.weight"


def _rename_constants(graph: ir.Graph, kept: Collection[ir.Value], names: Names) -> None:
    wanted: dict[ir.Value, str] = {}
    for node in graph:
        for index, value in enumerate(node.inputs):
            if value is not None and value.is_initializer() and value not in kept:
                wanted.setdefault(value, f"{node.name}.{_slot(node, index)}")
    for number, value in enumerate(wanted):  # first out of each other's way
        value.name = f"\0{number}"
    for value, name in wanted.items():
        value.name = names.fresh(name)


def _slot(node: ir.Node, index: int) -> str:
    """What torch calls a layer's input, or ONNX an operator's; `constant` where that is but a letter."""
    if node.op_type in _WEIGHTED:
        return ("input", "weight", "bias")[index]
    if node.op_type in _NORMS:
        return ("input", "weight", "bias", "running_mean", "running_var")[index]
    inputs = onnx.defs.get_schema(node.op_type, OPSET, node.domain).inputs
    name = str(inputs[min(index, len(inputs) - 1)].name)
    return name if len(name) > 1 and name not in ("inputs", "data_0") else "constant"
