"""Rules on a graph: how they are offered its nodes, and the moves that they are made of.

A rule gets one node and says whether it changed the graph around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from qpipe.model.network.naming import IN_USE, fresh_name, names_of

Rule = Callable[[ir.Graph, ir.Node], bool]


def apply(graph: ir.Graph, rules: Sequence[Rule]) -> bool:
    """Offer every node of `graph` to the rules, in order, once; True if any changed something. They take new names from
    `fresh_name`."""
    changed = False
    graph.meta[IN_USE] = names_of(graph)
    for node in list(graph):
        for rule in rules:
            if node.graph is not graph:  # an earlier rule removed it
                break
            changed |= rule(graph, node)
    return changed


def bypass(graph: ir.Graph, node: ir.Node, value: ir.Value) -> bool:
    """Let those who read the first output of `node` read `value`, and remove `node`; False where `value` may
    not take over the name of a model's output."""
    output = node.outputs[0]
    if output.is_graph_output():
        if value.is_graph_output() or value.is_initializer() or value.producer() is None:
            return False
        name, output.name = output.name, None
        value.name = name
        for index, other in enumerate(graph.outputs):
            if other is output:
                graph.outputs[index] = value
    if value.shape is None:
        value.shape = output.shape
    output.replace_all_uses_with(value)
    graph.remove(node, safe=True)
    return True


def add_constant(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """A new initializer under a free name that begins with `name`."""
    tensor = ir.Tensor(array, name=fresh_name(graph, name))
    value = ir.val(tensor.name, const_value=tensor)
    graph.register_initializer(value)
    return value


def replace(graph: ir.Graph, node: ir.Node, new: ir.Node) -> bool:
    """Put `new`, which has one output, where `node` stands; names, types and metadata pass on."""
    old, output = node.outputs[0], new.outputs[0]
    output.type, output.shape = old.type, old.shape
    new.metadata_props.update(node.metadata_props)
    graph.insert_before(node, new)
    name, old.name = old.name, None
    output.name = name
    for index, value in enumerate(graph.outputs):
        if value is old:
            graph.outputs[index] = output
    old.replace_all_uses_with(output)
    graph.remove(node, safe=True)
    return True
