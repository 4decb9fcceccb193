"""Reading the operator form: an operator on codes whose grids are constants, as what it is in the QDQ form.

    QLinearConv(x, …, w, …, y_scale, …, bias)    x, w, bias -> DequantizeLinear -> Conv -> QuantizeLinear
    QGemm, QLinearMatMul, QLinearAdd, …          likewise
    MatMulNBits, GatherBlockQuantized            see `qpipe.model.qdq.block_form`

`qpipe.model.qdq.reader` takes it from there. What ONNX itself defines and has grids that are computed
(MatMulInteger and ConvInteger behind a DynamicQuantizeLinear) stays as it is, and is computed on integers.

Source: the operators QLinear* and QGemm of ONNX and of onnxruntime's domain com.microsoft.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qpipe.model.network.invariants import constant
from qpipe.model.network.naming import Names, names_of
from qpipe.model.network.rewriting import replace
from qpipe.model.qdq.block_form import FORM, given, has_blocks, strange_blocks, write_blocks
from qpipe.model.qdq.nodes import dequantized, initializer, on_codes

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
    if has_blocks(node):
        return strange_blocks(node)
    if node.op_type in FORMS:
        strange = _strange(node)
        return None if strange is None else f"{strange}. {FORM}"
    return f"it computes on integer codes in a way that cannot be read. {FORM}"


def write_out(graph: ir.Graph) -> list[str]:
    """The QDQ form of all nodes that can be read, in place; sentences about what that leaves out.

    Constants must be initializers, and values have names."""
    names = names_of(graph)
    rounded = []
    for node in list(graph):
        if not on_codes(node) or unreadable(node) is not None:
            continue
        if has_blocks(node):
            if node.attributes.get_int("accuracy_level", 0) == 4:
                rounded.append(str(node.name))
            write_blocks(graph, node, names)
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
    from qpipe.model.operators.table import OPERATORS

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
    return all(given(node, i) is None or constant(node, i) is not None for i in grids)


def _triples(node: ir.Node, form: _Form) -> tuple[int, ...]:
    return tuple(range(form.operands[0], len(node.inputs), 3)) if form.several else form.operands


def _write_form(graph: ir.Graph, node: ir.Node, form: _Form, names: Names) -> None:
    places = _triples(node, form)
    axes = _axes(node, form)
    inputs = [node.inputs[i] for i in form.plain]
    inputs += [
        dequantized(graph, node, list(node.inputs[i : i + 3]), axis, names)
        for i, axis in zip(places, axes, strict=True)
    ]
    if form.bias is not None and given(node, form.bias) is not None:
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
    if given(node, form.result) is None:  # QGemm without a grid for its output returns floats
        replace(graph, node, ir.node(form.op, inputs, attributes, name=title))
        return
    floats = ir.Value(
        name=_float_name(str(output.name), names), type=ir.TensorType(ir.DataType.FLOAT), shape=output.shape
    )
    graph.insert_before(node, ir.node(form.op, inputs, attributes, outputs=[floats], name=title))
    grid = [value for value in (given(node, form.result), given(node, form.result + 1)) if value is not None]
    replace(graph, node, ir.node("QuantizeLinear", [floats, *grid], name=f"{title}_quantize"))


def _axes(node: ir.Node, form: _Form) -> tuple[int, ...]:
    """The axis along which each operand may have several scales."""
    if form.op == "Conv":
        return (1, 0)
    if form.op == "MatMul":
        return (-2, -1)
    if form.op == "Gemm":
        return (0, 0 if node.attributes.get_int("transB", 0) else 1)
    return (1,) * len(_triples(node, form))


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
    value = initializer(names.fresh(f"{codes.name}__scale"), scale if scale.size > 1 else scale.reshape(()))
    graph.register_initializer(value)
    return dequantized(graph, node, [codes, value, None], rank - 1, names)


def _float_name(codes: str, names: Names) -> str:
    """What the floats were called of which the codes were made; with a mark that the name is not theirs where
    another value has it, which then is their DequantizeLinear's output."""
    base = codes.removesuffix("_quantized")
    return base if base != codes and names.take(base) else names.fresh(f"{base}__float")
