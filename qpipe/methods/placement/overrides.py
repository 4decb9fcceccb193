"""A scheme's overrides applied to one graph: which weight and which activation gets which grid.

    overrides: [{nodes: [type:Gemm, 'scope:head'], weight: {bitwidth: 8}, activation: {bitwidth: 16}}]

A node that is matched stands for its weight and for the values that it reads, a weight or an activation that is
matched by its name for itself. Values that must share one grid change together. The last override that matches
wins, field by field.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from qpipe.errors import InputError
from qpipe.methods.placement.filters import matched
from qpipe.model.structure.operands import find_operands

if TYPE_CHECKING:
    import onnx_ir as ir

    from qpipe.model.network.network import Network
    from qpipe.numerics.scheme import Scheme, TensorScheme


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
