"""A difference on integers: the sum with the same codes under the negative scale.

    DQ(a, s, z) - DQ(b, t, y) -> Q      DQ(a, s, z) + DQ(b, -t, y) -> Q

onnxruntime (1.32) has a kernel for the sum of two activations on codes, and none for their difference, which runs in
float between two conversions. Both are the same floats, bit for bit. Read back, the sum is the difference again; with a
constant it is the sum with its negative.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from qpipe.model.network.invariants import constant
from qpipe.model.network.naming import fresh_name
from qpipe.model.qdq.nodes import dequantizes, has_grid, initializer, quantizes


def write_sums(graph: ir.Graph, keep: Collection[str] = ()) -> None:
    """Make a sum of each Sub between roundings onto 8 bits, in place. The values named in `keep` stay in the graph."""
    for node in list(graph):
        if node.op_type != "Sub" or node.domain or not all(_decoded(value) for value in node.inputs):
            continue
        readers = list(node.outputs[0].consumers())
        if len(readers) == 1 and quantizes(readers[0]) and _is_8_bit(readers[0]):
            _turn(graph, node, "Add", keep)


def read_sums(graph: ir.Graph) -> bool:
    """Make the difference again of each sum with codes under a negative scale, in place; whether there was one."""
    found = False
    for node in list(graph):
        if node.op_type != "Add" or node.domain or not _decoded(node.inputs[1]):
            continue
        source = node.inputs[1].producer()  # type: ignore[union-attr]
        scale = None if source is None else constant(source, 1)
        if scale is not None and scale < 0:
            _turn(graph, node, "Sub")
            found = True
    return found


def _turn(graph: ir.Graph, node: ir.Node, op_type: str, keep: Collection[str] = ()) -> None:
    """Let `node` read its second input under the scale times -1, as another operator."""
    value = node.inputs[1]
    source = None if value is None else value.producer()
    assert value is not None
    assert source is not None
    scale = constant(source, 1)
    assert scale is not None
    turned = initializer(fresh_name(graph, f"{value.name}__negative_scale"), -scale)
    graph.register_initializer(turned)
    output = ir.Value(name=fresh_name(graph, f"{value.name}__negative"), type=value.type, shape=value.shape)
    made = ir.node("DequantizeLinear", [source.inputs[0], turned, source.inputs[2]], outputs=[output], name=output.name)
    made.metadata_props.update(source.metadata_props)
    graph.insert_before(node, made)
    node.replace_input_with(1, output)
    node.op_type = op_type
    if not value.uses() and not value.is_graph_output() and value.name not in keep:
        graph.remove(source, safe=True)
        if op_type == "Sub":  # read back: the name that it had
            name, value.name = value.name, None
            output.name = str(name).removesuffix("__negative")


def _decoded(value: ir.Value | None) -> bool:
    """Whether `value` is what codes of 8 bits under one scale stand for."""
    source = None if value is None else value.producer()
    return source is not None and dequantizes(source) and _is_8_bit(source)


def _is_8_bit(node: ir.Node) -> bool:
    point = node.inputs[2] if len(node.inputs) > 2 else None
    return point is not None and has_grid(node) and point.dtype in _8_BITS


_8_BITS = {ir.DataType.INT8, ir.DataType.UINT8}
