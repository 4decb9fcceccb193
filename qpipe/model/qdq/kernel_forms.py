"""What onnxruntime (1.32) has no integer kernel for, as what it has one for: the same bits.

    DQ(a, s, z) - DQ(b, t, y) -> Q       DQ(a, s, z) + DQ(b, -t, y) -> Q
    DQ(a, s, z) -> PRelu(k) -> Q         DQ(Max(a, z), s, z) + DQ(Q(k DQ(Min(a, z), s, z))) -> Q

**Differences.** There is a kernel for the sum of two activations on codes, and none for their difference, which runs in
float between two conversions. Both are the same floats, bit for bit. Read back, the sum is the difference again; with a
constant it is the sum with its negative.

**PRelu.** What is positive and k times what is not, each on codes, the product on the grid of what comes out: one of
the two is 0, which is on both grids, so that their sum is the other, and rounded as that was. With one slope for all it
is a LeakyRelu, which has a kernel.
"""

from __future__ import annotations

from collections.abc import Collection

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
            _write_parts(graph, node, readers[0], keep)


def read_kernels(graph: ir.Graph) -> set[str]:
    """Make again what `take_kernels` wrote otherwise, in place; the operators that there were."""
    found = set[str]()
    for node in list(graph):
        if node.op_type != "Add" or node.domain or not _decoded(node.inputs[1]):
            continue
        if _read_parts(graph, node):
            found.add("PRelu")
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


def _write_parts(graph: ir.Graph, node: ir.Node, last: ir.Node, keep: Collection[str]) -> None:
    """A PRelu whose output `last` alone rounds, where it can be, as the sum of its two parts."""
    x, slope = node.inputs
    slopes = None if slope is None else _floats(slope)
    first = None if x is None else x.producer()
    if x is None or slope is None or slopes is None or first is None:
        return
    if slopes.size == 1:
        node.op_type = "LeakyRelu"
        node.attributes["alpha"] = ir.AttrFloat32("alpha", float(slopes.reshape(-1)[0]))
        node.resize_inputs(1)
        return
    codes, title = first.inputs[0], str(node.name)
    assert codes is not None
    parts = []
    for op_type, side in (("Max", _POSITIVE), ("Min", "__negative")):
        (part,) = _put(graph, node, op_type, [codes, first.inputs[2]], codes, f"{x.name}{side}__quantized")
        parts += _put(graph, node, "DequantizeLinear", [part, *first.inputs[1:]], x, f"{x.name}{side}")
    (product,) = _put(graph, node, "Mul", [parts[1], slope], node.outputs[0], f"{title}__product__float")
    grid_behind, name = last.inputs[1:], f"{title}__product"
    (rounded,) = _put(graph, node, "QuantizeLinear", [product, *grid_behind], last.outputs[0], f"{name}__quantized")
    parts[1:] = _put(graph, node, "DequantizeLinear", [rounded, *grid_behind], product, name)
    node.op_type = "Add"
    for index, value in enumerate(parts):
        node.replace_input_with(index, value)
    if x.name not in keep:
        _remove_unread(graph, first)


_POSITIVE = "__positive"


def _put(
    graph: ir.Graph, before: ir.Node, op_type: str, inputs: list[ir.Value | None], like: ir.Value, name: str
) -> list[ir.Value]:
    """The output of a new node, of the type and shape of `like`, under a free name; the node has none."""
    output = ir.Value(name=fresh_name(graph, name), type=like.type, shape=like.shape)
    graph.insert_before(before, ir.node(op_type, inputs, outputs=[output]))
    return [output]


def _read_parts(graph: ir.Graph, node: ir.Node) -> bool:
    """A PRelu again, of the sum of its parts; whether it was one."""
    positive, product = (_chain(value, *op_types) for value, op_types in zip(node.inputs, _PARTS, strict=True))
    if positive is None or product is None:
        return False
    (decoded, above), (rounded, rounding, scaled, below, bound) = positive, product
    codes, slope = above.inputs[0], scaled.inputs[1]
    whole = bound.inputs[0] is codes and _splits(above, decoded) and _splits(bound, below)
    same = same_grid(grid(decoded), grid(below)) and same_grid(grid(rounded), grid(rounding))
    if codes is None or slope is None or constant_tensor(slope) is None or not (whole and same):
        return False
    known = [reader for reader in codes.consumers() if dequantizes(reader) and same_grid(grid(reader), grid(decoded))]
    if known:
        (x,) = known[0].outputs
    else:
        name = str(decoded.outputs[0].name).removesuffix(_POSITIVE)
        (x,) = _put(graph, node, "DequantizeLinear", [codes, *decoded.inputs[1:]], decoded.outputs[0], name)
    node.op_type = "PRelu"
    for index, value in enumerate((x, slope)):
        node.replace_input_with(index, value)
    for part in (*product, *positive):
        _remove_unread(graph, part)
    return True


_PARTS = (("DequantizeLinear", "Max"), ("DequantizeLinear", "QuantizeLinear", "Mul", "DequantizeLinear", "Min"))
"""What a PRelu's parts come from, backwards by first inputs."""


def _chain(value: ir.Value | None, *op_types: str) -> list[ir.Node] | None:
    """The nodes that `value` comes from, each by the first input of the one behind, where they are `op_types`."""
    found = list[ir.Node]()
    for op_type in op_types:
        node = None if value is None else value.producer()
        if node is None or node.op_type != op_type or node.domain:
            return None
        if op_type.endswith("Linear") and not _is_8_bit(node):
            return None
        found.append(node)
        value = node.inputs[0]
    return found


def _splits(bound: ir.Node, decoded: ir.Node) -> bool:
    """Whether a Max or Min compares codes with that of 0."""
    codes = constant(bound, 1)
    return codes is not None and codes.size == 1 and int(codes.reshape(-1)[0]) == int(grid(decoded).zero_point)


def _remove_unread(graph: ir.Graph, node: ir.Node | None) -> None:
    if node is not None and not any(value.uses() or value.is_graph_output() for value in node.outputs):
        graph.remove(node, safe=True)


def _floats(value: ir.Value) -> npt.NDArray[np.float32] | None:
    """The numbers that a constant on a grid of 8 bits holds, or the one that it is; None for any other value."""
    source = value.producer()
    if source is None and (tensor := constant_tensor(value)) is not None and tensor.size == 1:
        return np.asarray(tensor.numpy(), np.float32)
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
