"""Reading the operator form: an operator on codes whose grids are constants, as what it is in the QDQ form.

    QLinearConv(x, …, w, …, y_scale, …, bias)    x, w, bias -> DequantizeLinear -> Conv -> QuantizeLinear
    QGemm, QLinearMatMul, QLinearAdd, …          likewise
    MatMulNBits(x, w, scales, …)                 x, w -> DequantizeLinear, one scale per block -> MatMul

`qpipe.model.qdq_reader` takes it from there. What ONNX itself defines and has grids that are computed
(MatMulInteger and ConvInteger behind a DynamicQuantizeLinear) stays as it is, and is computed on integers.

Source: the operators QLinear*, QGemm and MatMulNBits of ONNX and of onnxruntime's domain com.microsoft.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qpipe.model.naming import Names
from qpipe.model.qdq_nodes import BITWIDTH, on_codes
from qpipe.model.rewrites import constant

Array = npt.NDArray[Any]
_MICROSOFT = "com.microsoft"
_FORM = "Give the model in QDQ form (in onnxruntime quant_format=QuantFormat.QDQ), or the float model"
_LAST_OPSET = 21


@dataclass(frozen=True)
class _Form:
    """How a node on codes is to be read: `op` on the `operands`, each a triple (codes, scale, zero point) that
    begins at that input; `result` is where the pair (scale, zero point) of the output begins. `plain` inputs come
    first and are taken as they are. With `several`, triples follow one another to the end."""

    op: str
    operands: tuple[int, ...]
    result: int
    bias: int | None = None
    plain: tuple[int, ...] = ()
    several: bool = False


_BINARY, _UNARY = ((0, 3), 6), ((0,), 3)
FORMS = {
    "QLinearConv": _Form("Conv", *_BINARY, bias=8),
    "QLinearMatMul": _Form("MatMul", *_BINARY),
    "QGemm": _Form("Gemm", (0, 3), 7, bias=6),
    "QLinearAdd": _Form("Add", *_BINARY),
    "QLinearMul": _Form("Mul", *_BINARY),
    "QLinearWhere": _Form("Where", (1, 4), 7, plain=(0,)),
    "QLinearConcat": _Form("Concat", (2,), 0, several=True),
    **{f"QLinear{op}": _Form(op, *_UNARY) for op in ("LeakyRelu", "Sigmoid", "Softmax")},
    **{f"QLinear{op}": _Form(op, *_UNARY) for op in ("AveragePool", "GlobalAveragePool")},
}


def unreadable(node: ir.Node) -> str | None:
    """Why a node on codes can neither be read nor computed, and the way out; None where it can, and for others."""
    if not on_codes(node) or (_standard(node) and not _strange(node)):
        return None
    if node.op_type == "MatMulNBits":
        return _strange_blocks(node)
    if node.op_type in FORMS:
        strange = _strange(node)
        return None if strange is None else f"{strange}. {_FORM}"
    return f"it computes on integer codes in a way that cannot be read. {_FORM}"


def not_constant(node: ir.Node) -> str | None:
    """Why a node on codes of onnxruntime's that could be read was left, and the way out; None for others."""
    if not on_codes(node) or _standard(node):
        return None
    return (
        unreadable(node)
        or f"its scales, zero points or packed weight are computed while the model runs. {_FORM}"
    )


def write_out(graph: ir.Graph) -> list[str]:
    """The QDQ form of all nodes that can be read, in place; sentences about what that leaves out.

    Constants must be initializers, and values have names."""
    names = Names(ir.convenience.create_value_mapping(graph))
    rounded = []
    for node in list(graph):
        if not on_codes(node) or unreadable(node) is not None:
            continue
        if node.op_type == "MatMulNBits":
            if _blocks_known(node):
                if node.attributes.get_int("accuracy_level", 0) == 4:
                    rounded.append(str(node.name))
                _write_blocks(graph, node, names)
        elif node.op_type in FORMS and _grids_known(node):
            _write_form(graph, node, FORMS[node.op_type], names)
    if not rounded:
        return []
    which = _count(rounded, "MatMulNBits")
    return [f"In {which} accuracy_level=4 lets onnxruntime round activations to 8 bits; here they are float."]


def _count(names: list[str], op_type: str) -> str:
    return (
        f"{op_type} {names[0]!r}" if len(names) == 1 else f"{len(names)} nodes such as {op_type} {names[0]!r}"
    )


def _standard(node: ir.Node) -> bool:
    """Whether ONNX defines the operator, so that `qpipe.model.operators` computes it on integers."""
    from qpipe.model.operators import OPERATORS

    return node.domain in ("", "ai.onnx") and node.op_type in OPERATORS


def _strange(node: ir.Node) -> str | None:
    """What of a node of a known form has no counterpart in the float operator."""
    if node.attributes.get_int("channels_last", 0):
        return "its channels come last, as onnxruntime's own optimization leaves them"
    if node.op_type == "QLinearSoftmax":
        flat = node.attributes.get_int("opset", _LAST_OPSET) or 0
        if flat < 13 and node.attributes.get_int("axis", 1) != -1:
            return "its Softmax is that of an opset before 13, over several axes"
    return None


def _grids_known(node: ir.Node) -> bool:
    """Whether all scales and zero points are constants, and the bias too."""
    form = FORMS[node.op_type]
    grids = [place + i for place in _triples(node, form) for i in (1, 2)] + [form.result, form.result + 1]
    if form.bias is not None:
        grids.append(form.bias)
    return all(_input(node, i) is None or constant(node, i) is not None for i in grids)


def _triples(node: ir.Node, form: _Form) -> tuple[int, ...]:
    return tuple(range(form.operands[0], len(node.inputs), 3)) if form.several else form.operands


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _write_form(graph: ir.Graph, node: ir.Node, form: _Form, names: Names) -> None:
    places = _triples(node, form)
    axes = _axes(node, form)
    inputs = [node.inputs[i] for i in form.plain]
    inputs += [
        _dequantized(graph, node, list(node.inputs[i : i + 3]), axis, names)
        for i, axis in zip(places, axes, strict=True)
    ]
    if form.bias is not None and _input(node, form.bias) is not None:
        inputs.append(_bias(graph, node, form, names))
    attributes = {
        name: attribute
        for name, attribute in node.attributes.items()
        if name not in ("channels_last", "opset")
    }
    if form.op == "Softmax":
        attributes.setdefault("axis", ir.AttrInt64("axis", -1))
    title = str(node.name).removesuffix("_quant")
    output = node.outputs[0]
    if _input(node, form.result) is None:  # QGemm without a grid for its output returns floats
        _hand_over(graph, node, ir.node(form.op, inputs, attributes, name=title))
        return
    floats = ir.Value(
        name=_float_name(str(output.name), names), type=ir.TensorType(ir.DataType.FLOAT), shape=output.shape
    )
    graph.insert_before(node, ir.node(form.op, inputs, attributes, outputs=[floats], name=title))
    grid = [
        value for value in (_input(node, form.result), _input(node, form.result + 1)) if value is not None
    ]
    _hand_over(graph, node, ir.node("QuantizeLinear", [floats, *grid], name=f"{title}_quantize"))


def _hand_over(graph: ir.Graph, node: ir.Node, new: ir.Node) -> None:
    from qpipe.model.rewrites import replace

    replace(graph, node, new)


def _axes(node: ir.Node, form: _Form) -> tuple[int, ...]:
    """The axis along which each operand may have several scales."""
    if form.op == "Conv":
        return (1, 0)
    if form.op == "MatMul":
        return (-2, -1)
    if form.op == "Gemm":
        return (0, 0 if node.attributes.get_int("transB", 0) else 1)
    return (1,) * len(_triples(node, form))


def _dequantized(
    graph: ir.Graph,
    node: ir.Node,
    triple: list[ir.Value | None],
    axis: int,
    names: Names,
    block_size: int = 0,
) -> ir.Value:
    """The floats that a triple of inputs stands for, by a DequantizeLinear in front of `node`."""
    codes = triple[0]
    assert codes is not None
    name = names.fresh(f"{codes.name}__dequantized")
    floats = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=codes.shape)
    attributes = {"axis": axis, **({"block_size": block_size} if block_size else {})}
    given = [value for value in triple if value is not None]
    made = ir.node("DequantizeLinear", given, attributes, outputs=[floats], name=f"{name}_node")
    graph.insert_before(node, made)
    return floats


def _bias(graph: ir.Graph, node: ir.Node, form: _Form, names: Names) -> ir.Value:
    """The int32 bias, whose scale is that of the sums."""
    assert form.bias is not None
    left, right = (constant(node, place + 1) for place in form.operands)
    codes = node.inputs[form.bias]
    assert left is not None
    assert right is not None
    assert codes is not None
    alpha = np.float32(node.attributes.get_float("alpha", 1.0) or 0.0)
    scale = np.float32(alpha * left.astype(np.float32).reshape(-1)[0]) * right.astype(np.float32)
    rank = len(codes.shape) if codes.shape is not None else 1
    value = _initializer(
        graph, names.fresh(f"{codes.name}__scale"), scale if scale.size > 1 else scale.reshape(())
    )
    return _dequantized(graph, node, [codes, value, None], rank - 1, names)


def _float_name(codes: str, names: Names) -> str:
    """What the floats were called of which the codes were made; with a mark that the name is not theirs where
    another value has it, which then is their DequantizeLinear's output."""
    base = codes.removesuffix("_quantized")
    return base if base != codes and names.take(base) else names.fresh(f"{base}__float")


def _strange_blocks(node: ir.Node) -> str | None:
    """Why the weight of a MatMulNBits is no grid per block."""
    zero_points = _input(node, 3)
    if zero_points is not None and zero_points.dtype is not None and zero_points.dtype.is_floating_point():
        return f"its zero points are no integers. Quantize it with another algorithm. {_FORM}"
    if node.attributes.get_int("bits", 4) not in (2, 4, 8):
        return f"its codes have {node.attributes.get_int('bits', 4)} bits. {_FORM}"
    group, block = constant(node, 4), node.attributes.get_int("block_size", 0) or 1
    if group is not None and not np.array_equal(group, np.arange(group.size) // block):
        return f"the rows of its weight are grouped out of order. {_FORM}"
    return None


def _blocks_known(node: ir.Node) -> bool:
    return all(_input(node, i) is None or constant(node, i) is not None for i in (1, 2, 3))


def _write_blocks(graph: ir.Graph, node: ir.Node, names: Names) -> None:
    """A MatMul of a weight (K, N) with a scale for each block of `block_size` rows and each column."""
    rows, columns, bits, size = (
        int(node.attributes[name].as_int()) if name in node.attributes else 4
        for name in ("K", "N", "bits", "block_size")
    )
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
    triple: list[ir.Value | None] = [
        _initializer(graph, label, np.ascontiguousarray(array.T))
        for label, array in (
            (name, codes),
            (names.fresh(f"{name}__scale"), scales.reshape(columns, blocks).astype(np.float32)),
            (names.fresh(f"{name}__zero_point"), points),
        )
    ]
    weight = _dequantized(graph, node, triple, 0, names, block_size=size)
    producer = weight.producer()
    assert producer is not None
    if bits != 8:
        producer.metadata_props[BITWIDTH] = str(bits)
    title, bias = str(node.name).removesuffix(f"_Q{bits}"), _input(node, 5)
    product = ir.node("MatMul", [node.inputs[0], weight], name=title)
    if bias is None:
        _hand_over(graph, node, product)
        return
    product.outputs[0].name = names.fresh(f"{title}_product")
    product.outputs[0].type = node.outputs[0].type
    graph.insert_before(node, product)
    _hand_over(graph, node, ir.node("Add", [product.outputs[0], bias], name=f"{title}_bias"))


def unpacked(packed: Array, bits: int, count: int) -> npt.NDArray[np.uint8]:
    """The first `count` codes of each row of bytes, the lowest bits first; `bits` divides 8."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (packed[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)
    return np.asarray(codes.reshape(len(packed), -1)[:, :count], np.uint8)


def _initializer(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    tensor = ir.Tensor(array, name=name)
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
    )
    graph.register_initializer(value)
    return value
