"""Names: every node and every value has one, unique in the whole model, stable and readable.

Existing names stay. A node without one takes its module's name (torch) or its first output's; a value without
one takes its node's. A second use of a name gets `_1`, `_2`, … in the graph's order.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import onnx_ir as ir

SCOPE = "scope"
"""Key in a node's metadata: the dotted path of the torch module that made the node."""
MODULE_CLASS = "module_class"
"""Key in a node's metadata: the class of that module."""


class Names:
    """Hands out names that nobody holds yet."""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = set(taken)
        self._next: dict[str, int] = {}

    def take(self, name: str) -> bool:
        """Whether `name` was free; it is taken from now on."""
        free = name not in self._taken
        self._taken.add(name)
        return free

    def fresh(self, wanted: str) -> str:
        """`wanted` itself where it is free, else `wanted_1`, `wanted_2`, …; taken from now on."""
        name, number = wanted, self._next.get(wanted, 0)
        while not name or name in self._taken:
            number += 1
            name = f"{wanted}_{number}"
        self._next[wanted] = number
        self._taken.add(name)
        return name

    def release(self, name: str) -> None:
        """Nobody holds `name` any more: it is handed out again."""
        self._taken.discard(name)
        self._next.clear()  # where each counting stopped: the free name may be an earlier one


IN_USE = "qpipe_names"
"""Key under which a graph has the `Names` that `fresh_name` asks, in its own place for such things, which no file gets:
to collect them once for each new name would take quadratic time."""


def names_of(graph: ir.Graph) -> Names:
    """The names of all values of `graph`, those of subgraphs among them."""
    return Names(ir.convenience.create_value_mapping(graph))


def fresh_name(graph: ir.Graph, wanted: str) -> str:
    """A name for something new in a graph that has its names `IN_USE`."""
    names: Names = graph.meta[IN_USE]
    return names.fresh(wanted)


def assign_names(model: ir.Model) -> None:
    """Name every unnamed or doubly named node and value of `model`, in place.

    Inputs, outputs and initializers of the graphs keep their names whatever else uses them."""
    fixed: dict[ir.Value, None] = {}
    for graph in model.graphs():
        fixed |= dict.fromkeys([*graph.inputs, *graph.outputs, *graph.initializers.values()])
    nodes = [node for graph in model.graphs() for node in graph]
    outputs = [output for node in nodes for output in node.outputs if output not in fixed]
    values = Names(str(value.name) for value in fixed)
    for output in _repeated(outputs, values):
        output.name = values.fresh(str(output.name))
    names = Names()
    for node in _repeated(nodes, names):
        node.name = names.fresh(str(node.name))
    for node in nodes:
        if not node.name:
            node.name = names.fresh(next((str(out.name) for out in node.outputs if out.name), node.op_type))
        for index, output in enumerate(node.outputs):
            if not output.name and _needs_name(output, index):
                output.name = values.fresh(f"{node.name}_out" if index == 0 else f"{node.name}_out{index}")


Named = TypeVar("Named", ir.Node, ir.Value)


def _repeated(items: Iterable[Named], names: Names) -> list[Named]:
    """Take the names that the items have already; what comes back are those that share one with another."""
    named = [item for item in items if item.name]
    return [item for item in named if not names.take(str(item.name))]


def _needs_name(output: ir.Value, index: int) -> bool:
    """An optional output that nobody reads stays unnamed: that is how ONNX says that it is not computed."""
    return index == 0 or bool(output.uses()) or output.is_graph_output()
