"""Parts of a model: the block between two sets of values, and the nodes as a graph of networkx."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import onnx_ir as ir

from qpipe.model.network.invariants import restore
from qpipe.model.network.network import Network, value_names

if TYPE_CHECKING:
    import networkx as nx

N = TypeVar("N", bound=Network)


def block(model: N, inputs: Sequence[str], outputs: Sequence[str]) -> N:
    """The nodes between the values `inputs` and the values `outputs` as a model; tensors are shared and the
    encodings of its values are kept. Raises ValueError for a name that is no value, or where the outputs
    need something that the inputs do not give (the message names it)."""
    graph = model.graph
    known = set(value_names(graph))
    missing = [name for name in [*inputs, *outputs] if name not in known]
    if missing:
        raise ValueError(f"the model has no value named {', '.join(map(repr, missing))}.")
    # Taken from a copy: extracting registers the values with a second graph for a while.
    part = ir.convenience.extract(model.ir.clone().graph, list(inputs), list(outputs))
    part.opset_imports.update(model.ir.opset_imports)
    extracted = ir.Model(part, ir_version=model.ir.ir_version)
    restore(extracted)
    names = set(value_names(extracted.graph))
    encodings = {name: encoding for name, encoding in model.encodings.items() if name in names}
    return type(model)(extracted, encodings, model.metadata, model.facts)


def digraph(model: Network) -> nx.DiGraph[str]:
    """The nodes of `model` by name, in its order, with `op_type`; an edge carries the tuple `values` that its
    head reads from its tail. Inputs and initializers are no nodes of it."""
    import networkx as nx

    graph: nx.DiGraph[str] = nx.DiGraph()
    for node in model.graph:
        graph.add_node(str(node.name), op_type=node.op_type)
    for node in model.graph:
        read: dict[str, list[str]] = {}
        for value in dict.fromkeys(node.inputs):
            producer = None if value is None else value.producer()
            if value is not None and producer is not None:
                read.setdefault(str(producer.name), []).append(str(value.name))
        for tail, values in read.items():
            graph.add_edge(tail, str(node.name), values=tuple(values))
    return graph
