"""Rewrite rules for what exporters write around attention: masks that mask nothing, keys transposed by way of
a flattened batch, softmax guarded against rows that are masked whole.

Each is exact for finite numbers: a quantizer placed on such a detour would cost accuracy for nothing.
"""

from __future__ import annotations

import onnx_ir as ir

from qpipe.model.network.invariants import constant, constant_tensor, permutation
from qpipe.model.network.naming import fresh_name
from qpipe.model.network.rewriting import bypass

_BROADCASTING = frozenset(
    {"Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "And", "Or", "Xor", "Where", "Equal", "Greater", "Less"}
    | {"GreaterOrEqual", "LessOrEqual", "PRelu", "Mod"}
)


def expand_later(graph: ir.Graph, node: ir.Node) -> bool:
    """Where(Expand(c), 0, -inf) with scalars is Expand(Where(c, 0, -inf)), which folding can then compute."""
    if node.op_type not in _BROADCASTING or node.domain or node.outputs[0].is_graph_output():
        return False
    expands = [(index, value) for index, value in enumerate(node.inputs) if _expand(value) is not None]
    tensors = [constant_tensor(value) for value in node.inputs]
    scalars = sum(tensor is not None and tensor.size == 1 for tensor in tensors)
    if len(expands) != 1 or scalars != len(node.inputs) - 1 or len(node.inputs) < 2:
        return False
    index, value = expands[0]
    expand = _expand(value)
    assert expand is not None
    source, output = expand.inputs[0], node.outputs[0]
    if source is None or not source.is_initializer():
        return False
    node.replace_input_with(index, source)
    later = ir.node("Expand", [output, expand.inputs[1]])
    later.metadata_props.update(node.metadata_props)
    later.outputs[0].type, later.outputs[0].shape = output.type, output.shape
    output.replace_all_uses_with(later.outputs[0])
    later.replace_input_with(0, output)
    output.shape = source.shape
    later.outputs[0].name = fresh_name(graph, f"{output.name}_expanded")
    graph.insert_after(node, later)
    return True


def expand_never(graph: ir.Graph, node: ir.Node) -> bool:
    """What an operator broadcasts anyway need not be expanded before it."""
    if node.op_type not in _BROADCASTING or node.domain or node.outputs[0].shape is None:
        return False
    changed = False
    for index, value in enumerate(node.inputs):
        expand = _expand(value)
        source = None if expand is None else expand.inputs[0]
        if source is None or source.shape is None:
            continue
        others = [other for at, other in enumerate(node.inputs) if at != index]
        if _broadcasts_to([source, *others], node.outputs[0]):
            node.replace_input_with(index, source)
            changed = True
    return changed


def transpose_directly(graph: ir.Graph, node: ir.Node) -> bool:
    """Reshape to (b*h, m, n), swap the last two, reshape to (b, h, n, m): one Transpose of the last two."""
    swap = _before(node, "Reshape", "Transpose")
    flat = None if swap is None else _before(swap, "Transpose", "Reshape")
    if swap is None or flat is None or permutation(swap) != (0, 2, 1):
        return False
    source, output = flat.inputs[0], node.outputs[0]
    if source is None or source.shape is None or output.shape is None or output.is_graph_output():
        return False
    a, b = list(source.shape), list(output.shape)
    if len(a) != 4 or len(b) != 4 or a[:2] != b[:2] or a[2:] != b[:1:-1] or _has_unknown(a):
        return False
    new = ir.node("Transpose", [source], {"perm": [0, 1, 3, 2]}, name=node.name)
    new.metadata_props.update(node.metadata_props)
    new.outputs[0].type, new.outputs[0].shape = output.type, output.shape
    new.outputs[0].name, output.name = output.name, None
    graph.insert_before(node, new)
    output.replace_all_uses_with(new.outputs[0])
    graph.remove(node, safe=True)
    return True


def mask_of_zeros(graph: ir.Graph, node: ir.Node) -> bool:
    """A mask of zeros that is added to scores, on their way to a Softmax alone, masks nothing.

    One mask for all heads: a position bias, which may be zeros as well, has one for each."""
    if node.op_type != "Add" or node.domain:
        return False
    readers = node.outputs[0].consumers()
    if not readers or any(reader.op_type != "Softmax" or reader.domain for reader in readers):
        return False
    for index in (1, 0):
        scores, mask = node.inputs[1 - index], constant(node, index)
        if scores is None or mask is None or mask.any() or mask.ndim < 2 or mask.shape[-2] == 1:
            continue
        if mask.size == mask.shape[-2] * mask.shape[-1] and _broadcasts_to([scores], node.outputs[0]):
            return bypass(graph, node, scores)
    return False


def unguarded_softmax(graph: ir.Graph, node: ir.Node) -> bool:
    """Where(IsNaN(p), 0, p) is p where p is the softmax of a product: only a mask makes a row all -inf."""
    if node.op_type != "Where" or node.domain:
        return False
    guard = _before(node, "Where", "IsNaN")
    softmax = node.inputs[2]
    zero = constant(node, 1)
    if guard is None or softmax is None or guard.inputs[0] is not softmax or zero is None or zero.any():
        return False
    producer = softmax.producer()
    if producer is None or producer.op_type != "Softmax" or producer.domain or producer.inputs[0] is None:
        return False
    scores = producer.inputs[0].producer()
    if scores is None or scores.op_type not in ("MatMul", "Gemm", "Mul", "Div"):
        return False
    return bypass(graph, node, softmax)


def _expand(value: ir.Value | None) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == "Expand" and not node.domain else None


def _before(node: ir.Node, op_type: str, producer_type: str) -> ir.Node | None:
    if node.op_type != op_type or node.domain or node.inputs[0] is None:
        return None
    producer = node.inputs[0].producer()
    return (
        producer
        if producer is not None and producer.op_type == producer_type and not producer.domain
        else None
    )


def _has_unknown(dims: list[int | ir.SymbolicDim]) -> bool:
    return any(not isinstance(dim, int) and dim.value is None for dim in dims)


def _broadcasts_to(values: list[ir.Value | None], output: ir.Value) -> bool:
    """Whether the shapes, aligned at their ends, give the output's shape; False where one is not known."""
    shape = output.shape
    if shape is None or _has_unknown(list(shape)):
        return False
    result: list[int | ir.SymbolicDim] = [1] * len(shape)
    rank = 0
    for value in values:
        if (
            value is None
            or value.shape is None
            or len(value.shape) > len(shape)
            or _has_unknown(list(value.shape))
        ):
            return False
        rank = max(rank, len(value.shape))
        for axis, dim in enumerate(list(value.shape), start=len(shape) - len(value.shape)):
            if dim != 1:
                result[axis] = dim
    return rank == len(shape) and result == list(shape)
