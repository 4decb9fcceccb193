"""What onnxruntime (1.32) has no integer kernel for, as what it has one for: the same bits.

    DQ(a, s, z) - DQ(b, t, y) -> Q(r, w)         DQ(a, s, z) + DQ(b, -t, y) -> Q(r, w)
    DQ(a, s, z) -> PRelu(k) -> Q(r, w) -> DQ     Max(Q(1 DQ(a, s, z); r, w), Q(k DQ(a, s, z); r, w)) -> DQ

**Differences.** There is a kernel for the sum of two activations on codes, and none for their difference, which runs in
float between two conversions. Both are the same floats, bit for bit. Read back, the sum is the difference again; with a
constant it is the sum with its negative.

**PRelu.** x where it is positive, k x elsewhere, is max(x, k x) for slopes up to 1, and rounding keeps the order. The
product with 1, exact, brings x onto the grid of what comes out; where it is on that already, its codes are taken as
they are. With one slope for all it is a LeakyRelu, which has a kernel.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qpipe.model.network.invariants import constant, constant_tensor
from qpipe.model.network.naming import fresh_name
from qpipe.model.qdq.nodes import (
    dequantizes,
    floats_of,
    grid,
    has_constant_grid,
    has_grid,
    initializer,
    quantizes,
)
from qpipe.numerics.grid import same_grid

_8_BITS = {ir.DataType.INT8, ir.DataType.UINT8}


def take_kernels(graph: ir.Graph, op_types: Collection[str], keep: Collection[str] = ()) -> None:
    """Write the nodes of `op_types` that stand between roundings onto 8 bits as what has a kernel, in place. The values
    named in `keep` stay in the graph."""
    for node in list(graph):
        if node.op_type not in op_types or node.domain:
            continue
        readers = list(node.outputs[0].consumers())
        if len(readers) != 1 or node.outputs[0].is_graph_output() or not _rounds_to_8_bits(readers[0]):
            continue
        if node.op_type == "Sub" and all(_decoded(value) for value in node.inputs):
            _turn(graph, node, "Add", keep)
        elif node.op_type == "PRelu" and _decoded(node.inputs[0]):
            _write_maximum(graph, node, readers[0])


def read_kernels(graph: ir.Graph) -> set[str]:
    """Make again what `take_kernels` wrote otherwise, in place; the operators that there were."""
    found = set[str]()
    for node in list(graph):
        if node.op_type == "Max" and not node.domain and _read_maximum(graph, node):
            found.add("PRelu")
        if node.op_type != "Add" or node.domain or not _decoded(node.inputs[1]):
            continue
        source = node.inputs[1].producer()  # type: ignore[union-attr]
        scale = None if source is None else constant(source, 1)
        if scale is not None and scale < 0:
            _turn(graph, node, "Sub")
            found.add("Sub")
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


def _write_maximum(graph: ir.Graph, node: ir.Node, last: ir.Node) -> None:
    """A PRelu, where it can be, whose output `last` alone rounds."""
    x, slope = node.inputs
    slopes = None if slope is None else _floats(slope)
    if x is None or slope is None or slopes is None:
        return
    if slopes.size == 1:
        node.op_type = "LeakyRelu"
        node.attributes["alpha"] = ir.AttrFloat32("alpha", float(slopes.reshape(-1)[0]))
        node.resize_inputs(1)
        if not slope.uses() and not slope.is_graph_output():
            graph.remove(slope.producer(), safe=True)  # type: ignore[arg-type]
        return
    first = x.producer()
    if slopes.max() > 1 or first is None:
        return
    result, title = last.outputs[0], str(node.name)
    sides = [_product(graph, node, slope, last, f"{title}__negative")]
    if same_grid(grid(first), grid(last)):
        sides.insert(0, first.inputs[0])
    else:
        sides.insert(0, _product(graph, node, _one(graph, last), last, f"{title}__positive"))
    name, result.name = result.name, None
    output = ir.Value(name=name, type=result.type, shape=result.shape)
    made = ir.node("Max", sides, outputs=[output], name=title)
    made.metadata_props.update(node.metadata_props)
    graph.insert_before(last, made)
    result.replace_all_uses_with(output)
    graph.remove([last, node], safe=True)


def _product(graph: ir.Graph, node: ir.Node, factor: ir.Value, last: ir.Node, title: str) -> ir.Value:
    """The codes of what `node` reads times `factor`, on the grid of `last`."""
    like, codes = node.outputs[0], last.outputs[0]
    floats = ir.Value(name=fresh_name(graph, title), type=like.type, shape=like.shape)
    rounded = ir.Value(name=fresh_name(graph, f"{title}__quantized"), type=codes.type, shape=codes.shape)
    graph.insert_before(
        last,
        [
            ir.node("Mul", [node.inputs[0], factor], outputs=[floats], name=floats.name),
            ir.node("QuantizeLinear", [floats, *last.inputs[1:]], outputs=[rounded], name=f"{title}__quantize"),
        ],
    )
    return rounded


def _one(graph: ir.Graph, last: ir.Node) -> ir.Value:
    """1, as a code of the type that `last` gives: one for the graph."""
    known: dict[Any, ir.Value] = graph.meta.setdefault(_ONES, {})
    point = last.inputs[2]
    assert point is not None
    assert point.dtype is not None
    if point.dtype not in known:
        kind = point.dtype.numpy()
        given = [("one__quantized", kind.type(1)), ("one__scale", np.float32(1)), ("one__zero_point", kind.type(0))]
        inputs = [initializer(fresh_name(graph, name), np.asarray(number)) for name, number in given]
        for value in inputs:
            graph.register_initializer(value)
        output = ir.Value(name=fresh_name(graph, "one"), type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([]))
        made = ir.node("DequantizeLinear", inputs, outputs=[output], name=fresh_name(graph, "one__dequantize"))
        graph.insert_before(graph[0], made)
        known[point.dtype] = output
    return known[point.dtype]


_ONES = "qpipe.ones"


def _read_maximum(graph: ir.Graph, node: ir.Node) -> bool:
    """A PRelu again, of the larger of two products; whether it was one."""
    products = [_read_product(value) for value in node.inputs]
    if len(products) != 2 or products[1] is None:
        return False
    x, slope, last = products[1]
    first, codes = x.producer(), node.inputs[0]
    if products[0] is not None:
        same = products[0][0] is x and _is_one(products[0][1]) and same_grid(grid(products[0][2]), grid(last))
    else:
        same = first is not None and codes is first.inputs[0] and same_grid(grid(first), grid(last))
    if not same:
        return False
    output = node.outputs[0]
    floats = ir.Value(type=x.type, shape=output.shape)
    made = ir.node("PRelu", [x, slope], outputs=[floats], name=node.name)
    made.metadata_props.update(node.metadata_props)
    rounding = ir.node("QuantizeLinear", [floats, *last.inputs[1:]], name=f"{node.name}__quantize")
    rounding.outputs[0].type, rounding.outputs[0].shape = output.type, output.shape
    name, output.name = output.name, None
    rounding.outputs[0].name = name
    base = str(name).removesuffix("__quantized")
    floats.name = fresh_name(graph, f"{base}__float")
    graph.insert_before(node, [made, rounding])
    output.replace_all_uses_with(rounding.outputs[0])
    graph.remove(node, safe=True)
    for _, _, rounds in filter(None, products):
        product = rounds.inputs[0]
        if not rounds.outputs[0].uses() and product is not None and len(product.uses()) == 1:
            graph.remove([rounds, product.producer()], safe=True)  # type: ignore[list-item]
    return True


def _read_product(codes: ir.Value | None) -> tuple[ir.Value, ir.Value, ir.Node] | None:
    """What is multiplied, by what constant, and what rounds it, where `codes` are made so."""
    last = None if codes is None else codes.producer()
    product = None if last is None or not quantizes(last) or not has_grid(last) else last.inputs[0]
    node = None if product is None else product.producer()
    if last is None or node is None or node.op_type != "Mul" or node.domain:
        return None
    x, factor = node.inputs
    if x is None or factor is None or not _decoded(x) or constant_tensor(factor) is None:
        return None
    return x, factor, last


def _is_one(value: ir.Value) -> bool:
    tensor = constant_tensor(value)
    return tensor is not None and tensor.size == 1 and float(tensor.numpy().reshape(-1)[0]) == 1.0


def _floats(value: ir.Value) -> npt.NDArray[np.float32] | None:
    """The numbers that a constant on a grid of 8 bits holds; None for any other value."""
    source = value.producer()
    stored = None if source is None or not dequantizes(source) or not has_constant_grid(source) else source.inputs[0]
    codes = None if stored is None or not stored.is_initializer() else constant_tensor(stored)
    if source is None or codes is None or not _is_8_bit(source):
        return None
    return floats_of(codes.numpy(), source, grid(source, len(codes.shape)))


def _decoded(value: ir.Value | None) -> bool:
    """Whether `value` is what codes of 8 bits under one scale stand for."""
    source = None if value is None else value.producer()
    return source is not None and dequantizes(source) and _is_8_bit(source)


def _rounds_to_8_bits(node: ir.Node) -> bool:
    return quantizes(node) and _is_8_bit(node)


def _is_8_bit(node: ir.Node) -> bool:
    point = node.inputs[2] if len(node.inputs) > 2 else None
    return point is not None and has_grid(node) and point.dtype in _8_BITS
