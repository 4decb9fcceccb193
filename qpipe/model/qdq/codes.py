"""What a QDQ graph has between two roundings on one grid, taken on the codes: the same bits, on integer kernels.

    v -> Q -> DQ -> Min(b) -> Q -> DQ        v -> Q -> Min(codes of b) -> DQ
    v -> Q -> DQ -> Pad(0) -> Q -> DQ        v -> Q -> Pad(code of 0) -> DQ

**Bounds.** Rounding keeps the order, so that both give the same bits. The left form is what a bounded activation
becomes once its channels were equalized, a bound for each: onnxruntime runs it in float between two conversions, and
the operators around it lose their integer kernels. Its Min and Max of codes exist for 8 bits. A bound that no code
exceeds goes. They are fastest where the constant need not be spread over the inner dimensions: where these are known,
an Expand writes it out. onnxruntime computes that when it loads the file, which stays small.

**Moves.** What moves values moves their codes as well. onnxruntime itself takes most of these on codes when it loads
the file, but neither a Pad nor a SpaceToDepth; and the file has two nodes less for each. For unsigned codes alone: it
makes unsigned ones of signed ones itself, where it finds the roundings around each layer.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qpipe.model.network.invariants import constant, constant_tensor
from qpipe.model.network.naming import fresh_name
from qpipe.model.qdq.nodes import clips_to_grid, dequantizes, grid, has_grid, initializer, quantizes
from qpipe.model.structure.families import ON_CODES
from qpipe.numerics.grid import quantize, same_grid

Array = npt.NDArray[Any]
BOUNDS = frozenset({"Min", "Max"})
SPREAD = 1 << 16
"""Elements up to which a bound is written out whole; beyond, along the last dimension alone."""


def take_on_codes(graph: ir.Graph, op_types: Collection[str], keep: Collection[str] = ()) -> None:
    """Take the nodes of `op_types` on codes where both roundings are on one grid of 8-bit codes, in place. The
    dequantized values named in `keep` stay in the graph."""
    for node in list(graph):
        if node.op_type in op_types and not node.domain:
            if node.op_type in BOUNDS:
                _bound(graph, node, keep)
            elif node.op_type in ON_CODES:
                _move(graph, node, keep)


def _bound(graph: ir.Graph, node: ir.Node, keep: Collection[str]) -> None:
    """A Min or Max, where it can be."""
    found = _between(node)
    if found is None:
        return
    first, bound, last = found
    codes, result = first.inputs[0], last.outputs[0]
    assert codes is not None
    cut = _codes(bound, last)
    name, result.name = str(result.name), None
    if not np.all(cut == (grid(last).qmax if node.op_type == "Min" else grid(last).qmin)):
        output = ir.Value(name=name, type=result.type, shape=result.shape)
        inputs = [codes, _spread(graph, node, cut, f"{bound.name}__quantized", result.shape)]
        made = ir.node(node.op_type, inputs, outputs=[output], name=node.name)
        made.metadata_props.update(node.metadata_props)
        graph.insert_before(last, made)
        codes = output
    clips = [reader for reader in node.outputs[0].consumers() if reader is not last]  # to the grid
    for use in tuple(result.uses()):
        use.node.replace_input_with(use.idx, codes)
    graph.remove([last, *clips, node], safe=True)
    _drop(graph, first, keep)


def _move(graph: ir.Graph, node: ir.Node, keep: Collection[str]) -> None:
    """What moves values, where it can be."""
    value = node.inputs[0]
    first = None if value is None else value.producer()
    if first is None or not dequantizes(first) or not has_grid(first) or not _is_uint8(first):
        return
    codes, quantizers = first.inputs[0], [_alone(output) for output in node.outputs if output.uses()]
    if codes is None or codes.is_initializer() or any(output.is_graph_output() for output in node.outputs):
        return
    for quantizer in quantizers:
        if quantizer is None or not quantizes(quantizer) or not has_grid(quantizer) or not _is_uint8(quantizer):
            return
        if not same_grid(grid(quantizer), grid(first)):
            return
    if node.op_type == "Pad" and not _pad_with_codes(graph, node, first):
        return
    node.replace_input_with(0, codes)
    for output in node.outputs:
        output.type = ir.TensorType(ir.DataType.UINT8)
    for quantizer in filter(None, quantizers):
        floats, result = quantizer.inputs[0], quantizer.outputs[0]
        assert floats is not None
        name, result.name = result.name, None
        result.replace_all_uses_with(floats)
        graph.remove(quantizer, safe=True)
        floats.name = name
    _drop(graph, first, keep)


def _pad_with_codes(graph: ir.Graph, node: ir.Node, first: ir.Node) -> bool:
    """Let a Pad of floats, which come from `first`, put codes around codes; whether it can."""
    if node.attributes.get_string("mode", "constant") != "constant":
        return True
    given = len(node.inputs) > 2 and node.inputs[2] is not None
    number = constant(node, 2) if given else np.float32(0)
    if number is None or not np.isfinite(number).all():
        return False
    code = quantize(np.asarray(number, np.float32).reshape(()), grid(first), str(node.name)).astype(np.uint8)
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, _constant(graph, code, f"{node.name}__quantized"))
    return True


def _is_uint8(node: ir.Node) -> bool:
    """Whether the codes of a Q or DQ are unsigned ones of 8 bits."""
    point = constant_tensor(node.inputs[2]) if len(node.inputs) > 2 else None
    return point is not None and point.dtype == ir.DataType.UINT8


def _drop(graph: ir.Graph, first: ir.Node, keep: Collection[str]) -> None:
    """Remove a DequantizeLinear that nobody reads any more; the value that was rounded has its name back."""
    codes, floats = first.inputs[0], first.outputs[0]
    assert codes is not None
    if floats.uses() or floats.is_graph_output() or floats.name in keep:
        return
    source = _rounded(codes)
    graph.remove(first, safe=True)
    if source is not None and str(source.name).startswith(f"{floats.name}__float"):
        source.name, floats.name = floats.name, None  # nobody else has it any more


def _between(node: ir.Node) -> tuple[ir.Node, ir.Value, ir.Node] | None:
    """The DequantizeLinear in front of a bound, the bound and the QuantizeLinear behind, where both say one grid of
    codes of 8 bits and nothing else reads what is between."""
    last = clip = _alone(node.outputs[0])
    if clip is not None and clip.op_type == "Clip":
        last = _alone(clip.outputs[0])
    if len(node.inputs) != 2 or last is None or not quantizes(last) or not has_grid(last) or _bits(last) != 8:
        return None
    if clip is None or (clip is not last and not clips_to_grid(clip, last)):
        return None
    for position, value in enumerate(node.inputs):
        first, bound = None if value is None else value.producer(), node.inputs[1 - position]
        if first is None or bound is None or bound.const_value is None:
            continue
        same = dequantizes(first) and has_grid(first) and same_grid(grid(first), grid(last))
        if same and len(bound.const_value.shape) <= len(value.shape or ()):  # type: ignore[union-attr]
            return first, bound, last
    return None


def _rounded(codes: ir.Value) -> ir.Value | None:
    """What `codes` are made of by a QuantizeLinear, behind a Clip to its grid."""
    node = codes.producer()
    value = node.inputs[0] if node is not None and quantizes(node) else None
    clip = None if value is None else value.producer()
    if node is not None and clip is not None and clip.op_type == "Clip" and clips_to_grid(clip, node):
        return clip.inputs[0]
    return value


def _alone(output: ir.Value) -> ir.Node | None:
    """The only one that reads a value, as its first input."""
    uses = tuple(output.uses())
    return uses[0].node if len(uses) == 1 and uses[0].idx == 0 and not output.is_graph_output() else None


def _bits(quantizer: ir.Node) -> int:
    tensor = constant_tensor(quantizer.inputs[2])
    return 0 if tensor is None else tensor.dtype.bitwidth


def _codes(bound: ir.Value, quantizer: ir.Node) -> Array:
    """The codes of a constant, in their type; a Clip to the grid, behind the bound, is in them."""
    array, point = constant_tensor(bound), constant_tensor(quantizer.inputs[2])
    assert array is not None
    assert point is not None
    return quantize(array.numpy(), grid(quantizer), str(bound.name)).astype(point.dtype.numpy())


def _spread(graph: ir.Graph, node: ir.Node, codes: Array, name: str, shape: ir.Shape | None) -> ir.Value:
    """`codes` as a constant, written out over the dimensions behind the channels as far as they are known."""
    value = _constant(graph, codes, name)
    known = [dim if isinstance(dim, int) else 1 for dim in shape or ()]
    rank = len(known)
    full = [1, *known[1:]]
    if np.prod(full) > SPREAD:
        full = [1] * (rank - 1) + known[-1:]
    aligned = [1] * (rank - codes.ndim) + list(codes.shape)
    wanted = [max(pair) for pair in zip(aligned, full, strict=True)]
    if codes.size == 1 or wanted == aligned:
        return value
    name = fresh_name(graph, f"{name}_spread")
    output = ir.Value(name=name, type=value.type, shape=ir.Shape(wanted))
    sizes = _constant(graph, np.array(wanted, np.int64), f"{name}_shape")
    made = ir.node("Expand", [value, sizes], outputs=[output], name=name)
    graph.insert_before(node, made)
    return output


def _constant(graph: ir.Graph, array: Array, name: str) -> ir.Value:
    value = initializer(fresh_name(graph, name), array)
    graph.register_initializer(value)
    return value
