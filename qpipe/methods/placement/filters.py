"""The part of a graph that a target's node filters leave to be quantized.

    exclude: [type:Softmax, scope:head, between:x..a, 'conv[12]']        these stay in float
    only:    [scope:encoder]                                             all others do

A filter that matches nothing is a slip of the pen: it is refused, with the nearest name.

A scheme's overrides name parts by the same filters, which get other grids:

    overrides: [{nodes: [type:Gemm, 'scope:head'], weight: {bitwidth: 8}, activation: {bitwidth: 16}}]

A node that is matched stands for its weight and for the values that it reads, a weight or an activation that is
matched by its name for itself. Values that must share one grid change together. The last override that matches
wins, field by field.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import onnx_ir as ir

from qpipe.errors import InputError
from qpipe.methods.placement.target import KINDS, Nodes, split
from qpipe.model.network.naming import SCOPE
from qpipe.model.structure.operands import find_operands

if TYPE_CHECKING:
    from qpipe.model.network.network import Network
    from qpipe.numerics.scheme import Scheme, TensorScheme


@dataclass(frozen=True)
class Left:
    """What stays in float: nodes, and values by name."""

    nodes: frozenset[ir.Node] = frozenset()
    values: frozenset[str] = field(default_factory=frozenset)

    def has(self, node: ir.Node | None) -> bool:
        """Whether `node` stays in float."""
        return node in self.nodes


def left_in_float(graph: ir.Graph, nodes: Nodes) -> Left:
    """The nodes and values of `graph` that `nodes` leaves in float; InputError for a filter that matches nothing."""
    if not nodes.exclude and not nodes.only:
        return Left()
    names = {
        str(v.name): v for v in ir.convenience.create_value_mapping(graph, include_subgraphs=False).values()
    }
    left, out = matched(graph, nodes.exclude, "target.nodes.exclude")
    if nodes.only:
        chosen, by_name = matched(graph, nodes.only, "target.nodes.only")
        wanted = chosen | {
            reader for name in by_name for reader in names[name].consumers() if names[name].is_initializer()
        }
        left = left | {node for node in graph if node not in wanted}
    return Left(frozenset(left), frozenset(out))


def matched(graph: ir.Graph, filters: Iterable[str], address: str) -> tuple[set[ir.Node], set[str]]:
    """The nodes that `filters` match, and the names of the values that are matched by theirs.

    Raises InputError, with the filter's `address`, for one that matches nothing.
    """
    names = {
        str(v.name): v for v in ir.convenience.create_value_mapping(graph, include_subgraphs=False).values()
    }
    nodes: set[ir.Node] = set()
    values: set[str] = set()
    for text in filters:
        found, by_name = _matched(graph, names, text, address)
        nodes.update(found)
        values.update(by_name)
    return nodes, values


def _matched(
    graph: ir.Graph, names: dict[str, ir.Value], text: str, address: str
) -> tuple[list[ir.Node], list[str]]:
    kind, pattern = split(text)
    values: list[str] = []
    if kind == "between":
        first, last = pattern.split("..")
        nodes = _between(names, first, last, f"{address}: {text!r}")
        known: Iterable[str] = names
    elif kind == "type":
        nodes = [node for node in graph if node.op_type == pattern]
        known = {node.op_type for node in graph}
    elif kind == "scope":
        scopes = {node: node.metadata_props.get(SCOPE, "") for node in graph}
        nodes = [node for node, scope in scopes.items() if f"{scope}.".startswith(f"{pattern}.")]
        known = {
            ".".join(parts[:n])
            for s in scopes.values()
            for parts in [s.split(".")]
            for n in range(1, len(parts) + 1)
        }
    else:
        nodes = [node for node in graph if kind == "name" and re.fullmatch(pattern, str(node.name))]
        values = [name for name in names if re.fullmatch(pattern, name)]
        known = {*names, *(str(node.name) for node in graph)}
    if not nodes and not values:
        raise InputError(
            f"{address}: {text!r} matches nothing in the model{_nearest(pattern, known)}{_kinds(text)}"
        )
    return nodes, values


def _between(names: dict[str, ir.Value], first: str, last: str, said: str) -> list[ir.Node]:
    """The nodes that follow from the value `first` and lead to the value `last`."""
    for name in filter(None, (first, last)):
        if name not in names:
            raise InputError(f"{said} names no value of the model: '{name}'{_nearest(name, names)}")
    after = _reached([names[first]], forward=True) if first else None
    before = _reached([names[last]], forward=False) if last else None
    if after is None or before is None:
        return [*(after or before or {})]
    return [node for node in after if node in before]


def _reached(values: list[ir.Value], forward: bool) -> dict[ir.Node, None]:
    """The nodes that follow from `values`, or that they need."""
    found: dict[ir.Node, None] = {}
    while values:
        value = values.pop()
        producer = value.producer()
        for node in value.consumers() if forward else ([producer] if producer is not None else []):
            if node not in found:
                found[node] = None
                values += [v for v in (node.outputs if forward else node.inputs) if v is not None]
    return found


def _nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence that says that `name` is not known."""
    if not set(known) - {""}:
        return " (its nodes say no modules)."
    close = difflib.get_close_matches(name, sorted(set(known) - {""}), 1, 0.5)
    return f". Did you mean '{close[0]}'?" if close else "."


def _kinds(text: str) -> str:
    """What filters there are, for one that begins with a kind that is none."""
    kind, colon, _ = text.partition(":")
    if not colon or kind in KINDS or not kind.isidentifier():
        return ""
    return f" A filter is a regular expression of names, or one of {', '.join(f'{known}:' for known in KINDS)}."


class Overridden:
    """The scheme of each tensor of a model."""

    def __init__(self, model: Network, scheme: Scheme) -> None:
        """Raises InputError for a filter that matches nothing, or nothing that could change."""
        self._scheme = scheme
        initializers = set(model.graph.initializers)
        self._weights: list[set[str]] = []
        self._activations: list[set[str]] = []
        for index, override in enumerate(scheme.overrides):
            address = f"scheme.overrides[{index}].nodes"
            nodes, values = matched(model.graph, override.nodes, address)
            read = {str(value.name) for node in nodes for value in _data(node)}
            weights = {each.weight for each in find_operands(model) if model.graph.node(each.name) in nodes}
            self._weights.append(weights | (values & initializers))
            self._activations.append(read | (values - initializers))
            if override.activation is None and not self._weights[-1]:
                raise InputError(f"{address}: {', '.join(override.nodes)} matches no layer with a weight.")

    def weight(self, name: str) -> TensorScheme:
        """The scheme of the weight `name`."""
        scheme = self._scheme
        for override, names in zip(scheme.overrides, self._weights, strict=True):
            if name in names:
                scheme = replace(scheme, weight=scheme.overridden(override).weight)
        return scheme.weight

    def activation(self, group: Iterable[str]) -> TensorScheme | None:
        """The scheme of the values in `group`, which share one grid."""
        scheme, names = self._scheme, set(group)
        for override, changed in zip(scheme.overrides, self._activations, strict=True):
            if names & changed:
                scheme = replace(scheme, activation=scheme.overridden(override).activation)
        return scheme.activation


def _data(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs if value is not None and not value.is_initializer()]
