"""What torch cannot compute: nodes that stay in the graph as they are, in float, and run through onnxruntime.

Control flow that the data decide, sequences, texts, operators of onnxruntime's and of others. Such nodes form parts
between which only tensors pass that torch can hold; a simulation runs each part in a session of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from qpipe.model.structure.families import WIDE_UNSIGNED

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


@dataclass(frozen=True, eq=False)
class Part:
    """Opaque nodes that run together: what they read of the rest (no constants), and what the rest reads of them."""

    nodes: tuple[ir.Node, ...]
    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]


def is_opaque(node: ir.Node) -> bool:
    """Whether torch cannot compute a node of a canonical graph."""
    from qpipe.model.operators.table import OPERATORS

    if node.domain or (node.op_type not in OPERATORS and node.op_type != "Constant"):
        return True
    values = [value for value in (*node.inputs, *node.outputs) if value is not None]
    if not all(map(passes, values)):
        return True
    if node.op_type not in _TAKING_FLOAT8 and any(value.dtype in FLOAT8 for value in values):
        return True
    wide = any(value.dtype in WIDE_UNSIGNED for value in values)
    return wide and node.op_type in OPERATORS and OPERATORS[node.op_type].unsigned is None


def passes(value: ir.Value) -> bool:
    """Whether torch can hold a value: a tensor of numbers. What has no type yet is taken for one."""
    dtype = value.const_value.dtype if value.const_value is not None else value.dtype
    return (value.type is None or isinstance(value.type, ir.TensorType)) and (dtype is None or dtype in TYPES | FLOAT8)


def opaque_nodes(graph: ir.Graph) -> list[ir.Node]:
    """The nodes that torch cannot compute, in order."""
    return [node for node in graph if is_opaque(node)]


def units(graph: ir.Graph) -> list[ir.Node | Part]:
    """The graph in an order in which it can run: nodes, and in the place of opaque ones the parts that they form."""
    opaque = set(opaque_nodes(graph))
    if not opaque:
        return list(graph)
    import networkx as nx  # half a second, for models that have such nodes

    place = {node: index for index, node in enumerate(graph)}
    joined: nx.Graph[ir.Node] = nx.Graph()
    joined.add_nodes_from(opaque)
    joined.add_edges_from(
        (producer, node)
        for node in opaque
        for value in read_values(node)
        if (producer := value.producer()) in opaque and not passes(value)
    )
    # Two joined nodes may have others between them, which read from one and feed the other: these belong to them.
    flow: nx.DiGraph[frozenset[ir.Node]] = nx.DiGraph()
    group = {node: frozenset(nodes) for nodes in nx.connected_components(joined) for node in nodes}
    group |= {node: frozenset([node]) for node in place if node not in opaque}
    flow.add_nodes_from(group.values())
    for node in place:
        producers = (value.producer() for value in read_values(node))
        flow.add_edges_from((group[each], group[node]) for each in producers if each in group)
    flow.remove_edges_from(list(nx.selfloop_edges(flow)))
    whole = nx.condensation(flow)
    members = {
        number: sorted((node for nodes in data["members"] for node in nodes), key=place.__getitem__)
        for number, data in whole.nodes(data=True)
    }
    order = nx.lexicographical_topological_sort(whole, key=lambda number: place[members[number][-1]])
    owner = {inner: node for node in graph for inner in _within(node)}
    return [
        nodes[0] if len(nodes) == 1 and nodes[0] not in opaque else _part(nodes, owner)
        for nodes in (members[number] for number in order)
    ]


def _part(nodes: list[ir.Node], owner: Mapping[ir.Node, ir.Node]) -> Part:
    inside = set(nodes)
    read = dict.fromkeys(value for node in nodes for value in read_values(node))
    inputs = [value for value in read if value.producer() not in inside and value.const_value is None]
    outputs = [
        output
        for node in nodes
        for output in node.outputs
        if output.is_graph_output() or any(owner.get(use.node, use.node) not in inside for use in output.uses())
    ]
    return Part(tuple(nodes), tuple(inputs), tuple(outputs))


def read_values(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads of its graph, by its inputs and from within the graphs in its attributes."""
    yield from (value for value in node.inputs if value is not None)
    for each in _within(node):
        yield from (value for value in each.inputs if value is not None and value.graph is node.graph)
    for inner in _graphs(node):
        yield from (value for value in inner.outputs if value.graph is node.graph)


def _within(node: ir.Node) -> Iterator[ir.Node]:
    """The nodes of the graphs in a node's attributes, at any depth."""
    for inner in _graphs(node):
        yield from inner.all_nodes()


def _graphs(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()
