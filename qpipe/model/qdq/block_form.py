"""Reading onnxruntime's operators on packed weights that have a scale for each block of rows.

    MatMulNBits(x, w, scales, …)                 w -> DequantizeLinear -> MatMul
    GatherBlockQuantized(w, indices, …)          w -> DequantizeLinear -> Gather

Source: operators MatMulNBits and GatherBlockQuantized of onnxruntime's domain com.microsoft.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qpipe.model.network.invariants import constant
from qpipe.model.network.naming import Names
from qpipe.model.network.rewriting import replace
from qpipe.model.qdq.nodes import BITWIDTH, Array, dequantized, initializer

FORM = "Give the model in QDQ form (in onnxruntime quant_format=QuantFormat.QDQ), or the float model"
"""What to do about a model whose codes cannot be read."""


def has_blocks(node: ir.Node) -> bool:
    """Whether `node` is one of the two."""
    return node.op_type in ("MatMulNBits", "GatherBlockQuantized")


def strange_blocks(node: ir.Node) -> str | None:
    """Why the weight of one of them is no grid per block, and the way out; None where it is."""
    return _strange_weight(node) if node.op_type == "MatMulNBits" else _strange_table(node)


def write_blocks(graph: ir.Graph, node: ir.Node, names: Names) -> None:
    """The QDQ form of one of them, in place, where its weight is a constant."""
    places = (1, 2, 3) if node.op_type == "MatMulNBits" else (0, 2, 3)
    if all(given(node, i) is None or constant(node, i) is not None for i in places):
        (_write_product if node.op_type == "MatMulNBits" else _write_gather)(graph, node, names)


def given(node: ir.Node, index: int) -> ir.Value | None:
    """The input at `index`, None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def _strange_weight(node: ir.Node) -> str | None:
    """Why the weight of a MatMulNBits is no grid per block."""
    zero_points = given(node, 3)
    if zero_points is not None and zero_points.dtype is not None and zero_points.dtype.is_floating_point():
        return f"its zero points are no integers. Quantize it with another algorithm. {FORM}"
    if node.attributes.get_int("bits", 4) not in (2, 4, 8):
        return f"its codes have {node.attributes.get_int('bits', 4)} bits. {FORM}"
    group, block = constant(node, 4), node.attributes.get_int("block_size", 0) or 1
    if group is not None and not np.array_equal(group, np.arange(group.size) // block):
        return f"the rows of its weight are grouped out of order. {FORM}"
    return None


def _write_product(graph: ir.Graph, node: ir.Node, names: Names) -> None:
    """A MatMul of a weight (K, N) with a scale for each block of `block_size` rows and each column."""
    bits, size = (_integer(node, name) for name in ("bits", "block_size"))
    triple = _codes_and_grid(node, names)
    for value in triple:
        graph.register_initializer(value)
    weight = dequantized(graph, node, triple, 0, names, block_size=size)
    producer = weight.producer()
    assert producer is not None
    if bits != 8:
        producer.metadata_props[BITWIDTH] = str(bits)
    title, bias = str(node.name).removesuffix(f"_Q{bits}"), given(node, 5)
    product = ir.node("MatMul", [node.inputs[0], weight], name=title)
    if bias is None:
        replace(graph, node, product)
        return
    product.outputs[0].name = names.fresh(f"{title}_product")
    product.outputs[0].type = node.outputs[0].type
    graph.insert_before(node, product)
    replace(graph, node, ir.node("Add", [product.outputs[0], bias], name=f"{title}_bias"))


def _codes_and_grid(node: ir.Node, names: Names) -> list[ir.Value]:
    """The codes (K, N) of a MatMulNBits, one a byte, with their scales and zero points (blocks, N), as initializers."""
    rows, columns, bits, size = (_integer(node, name) for name in ("K", "N", "bits", "block_size"))
    blocks = -(-rows // size)
    packed, scales, zeros = (constant(node, i) for i in (1, 2, 3))
    assert packed is not None
    assert scales is not None
    codes = unpacked(packed.reshape(columns, -1), bits, blocks * size)[:, :rows]
    if zeros is None:
        points = np.full((columns, blocks), 1 << (bits - 1), np.uint8)
    else:
        points = unpacked(zeros.reshape(columns, -1), bits, blocks)
    stored = node.inputs[1]
    assert stored is not None
    name = names.fresh(str(stored.name).removesuffix(f"_Q{bits}") + "__quantized")
    return [
        initializer(label, array.T)
        for label, array in (
            (name, codes),
            (names.fresh(f"{name}__scale"), scales.reshape(columns, blocks).astype(np.float32)),
            (names.fresh(f"{name}__zero_point"), points),
        )
    ]


def _integer(node: ir.Node, name: str) -> int:
    """An attribute of a MatMulNBits; `bits`, which alone may be left out, are 4 then."""
    return int(node.attributes[name].as_int()) if name in node.attributes else 4


def _strange_table(node: ir.Node) -> str | None:
    """Why the table of a GatherBlockQuantized is no grid per block."""
    table = node.inputs[0]
    dtype = (
        None if table is None else table.const_value.dtype if table.const_value is not None else table.dtype
    )
    if dtype not in (ir.DataType.INT4, ir.DataType.UINT4):
        return f"its codes are not stored as int4 or uint4. {FORM}"
    if dtype == ir.DataType.UINT4 and given(node, 3) is None:
        return f"its zero points are left out. {FORM}"
    return None


def _write_gather(graph: ir.Graph, node: ir.Node, names: Names) -> None:
    """A Gather from a table with a scale for each block along an axis."""
    axis, size = node.attributes.get_int("quantize_axis", 1), node.attributes.get_int("block_size", 128)
    table, indices, scales, *zeros = node.inputs
    triple = [table, scales, *zeros[:1]]
    rank = 1 if table is None or table.shape is None else len(table.shape)
    weight = dequantized(graph, node, triple, (axis or 0) % rank, names, block_size=size or 0)
    along = ir.AttrInt64("axis", node.attributes.get_int("gather_axis", 0) or 0)
    title = str(node.name).removesuffix("_Q4")
    replace(graph, node, ir.node("Gather", [weight, indices], {"axis": along}, name=title))


def unpacked(packed: Array, bits: int, count: int) -> npt.NDArray[np.uint8]:
    """The first `count` codes of each row of bytes, the lowest bits first; `bits` divides 8."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (packed[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)
    return np.asarray(codes.reshape(len(packed), -1)[:, :count], np.uint8)
