"""Rewrite rules for the layers with weights: one way to write each.

- Transpose(W) goes: W is stored transposed under its own name, with the permutation in its metadata;
- Conv, ConvTranspose and pools say their pads, group and kernel_shape themselves, where the shapes allow;
- a Pad with zeros before a Conv is pads of the Conv; a Gemm does not transpose its input;
- a mean over height and width is a GlobalAveragePool.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from qpipe.model.network.invariants import PERMUTATION, SHAPE, constant, permutation
from qpipe.model.network.rewriting import replace

_WINDOWS = frozenset({"Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool"})


def transpose_parameter(graph: ir.Graph, node: ir.Node) -> bool:
    """Store a parameter the way that everyone who reads it wants it. Refused where one reads it another way:
    that would take a copy, which is a stage's to make."""
    value = node.inputs[0] if node.op_type == "Transpose" and not node.domain else None
    if value is None or not value.is_initializer() or value.const_value is None or value.is_graph_output():
        return False
    perm = permutation(node)
    users = value.consumers()
    if (
        perm is None
        or SHAPE in value.metadata_props
        or any(user.op_type != "Transpose" or permutation(user) != perm for user in users)
    ):
        return False
    if any(user.outputs[0].is_graph_output() for user in users):
        return False
    tensor = ir.Tensor(np.ascontiguousarray(value.const_value.numpy().transpose(perm)), name=value.name)
    value.const_value, value.shape = tensor, ir.Shape(tensor.shape)
    done = json.loads(value.metadata_props.get(PERMUTATION, json.dumps(list(range(len(perm))))))
    value.metadata_props[PERMUTATION] = json.dumps([done[axis] for axis in perm])
    for user in users:
        user.outputs[0].replace_all_uses_with(value)
        graph.remove(user, safe=True)
    return True


def reshape_parameter(graph: ir.Graph, node: ir.Node) -> bool:
    """Store a parameter in the shape in which its only reader wants it (the slope of a PRelu, a bias of an
    Add): the numbers stay, the shape that torch knows goes into the metadata."""
    value = node.inputs[0] if node.op_type in ("Reshape", "Unsqueeze") and not node.domain else None
    output = node.outputs[0]
    if value is None or not value.is_initializer() or value.const_value is None or len(value.uses()) != 1:
        return False
    if output.is_graph_output() or output.shape is None or not output.shape.is_static():
        return False
    if PERMUTATION in value.metadata_props:
        return False
    array = value.const_value.numpy()
    value.metadata_props.setdefault(SHAPE, json.dumps(list(array.shape)))
    tensor = ir.Tensor(array.reshape(output.shape.numpy()), name=value.name)
    value.const_value, value.shape = tensor, ir.Shape(tensor.shape)
    output.replace_all_uses_with(value)
    graph.remove(node, safe=True)
    return True


def explicit_attributes(graph: ir.Graph, node: ir.Node) -> bool:
    """group, kernel_shape and pads written out; auto_pad replaced by the pads that it stands for."""
    if node.domain or node.op_type not in _WINDOWS:
        return False
    before = dict(node.attributes)
    weight = node.inputs[1] if "Conv" in node.op_type else None
    if weight is not None and "group" not in node.attributes:
        node.attributes["group"] = ir.AttrInt64("group", 1)
    if weight is not None and "kernel_shape" not in node.attributes and _static(weight):
        node.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", _dims(weight)[2:])
    if "kernel_shape" in node.attributes:
        _explicit_pads(node, tuple(node.attributes["kernel_shape"].as_ints()))
    return dict(node.attributes) != before


_NEWLY_DILATED = frozenset({"AveragePool", "LpPool"})
"""What onnxruntime makes of a quantized AveragePool, QLinearAveragePool, does not know the attribute."""


def _explicit_pads(node: ir.Node, kernel: tuple[int, ...]) -> None:
    mode = node.attributes.get_string("auto_pad", "NOTSET")
    rank = len(kernel)
    strides, dilations = _ints(node, "strides", rank), _ints(node, "dilations", rank)
    if mode == "NOTSET":
        pads: list[int] | None = _ints(node, "pads", 2 * rank, 0)
        if node.op_type == "ConvTranspose" and "output_shape" in node.attributes:
            return
    elif mode == "VALID":
        pads = [0] * 2 * rank
    else:
        pads = _same_pads(node, mode, kernel, strides, dilations)
    if pads is None:
        return
    node.attributes.pop("auto_pad", None)
    node.attributes["pads"] = ir.AttrInt64s("pads", pads)
    node.attributes["strides"] = ir.AttrInt64s("strides", strides)
    node.attributes["dilations"] = ir.AttrInt64s("dilations", dilations)
    if node.op_type in _NEWLY_DILATED and all(gap == 1 for gap in dilations):
        del node.attributes["dilations"]


def _same_pads(
    node: ir.Node, mode: str, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[int] | None:
    """SAME_UPPER or SAME_LOWER as numbers: output = ceil(input / stride), or input * stride where transposed;
    None where the size of the input decides and is not known."""
    source = node.inputs[0]
    sizes = None if source is None or source.shape is None else list(source.shape)[2:]
    if node.op_type == "ConvTranspose" and "output_shape" in node.attributes:
        return None
    begin, end = [], []
    for axis, (k, stride, dilation) in enumerate(zip(kernel, strides, dilations, strict=True)):
        reach = (k - 1) * dilation + 1
        size = sizes[axis] if sizes is not None else None
        if node.op_type == "ConvTranspose":
            extra = _ints(node, "output_padding", len(kernel), 0)[axis]
            total = max(reach - stride + extra, 0)
            if reach + extra < stride:
                return None
        elif stride == 1:
            total = reach - 1
        elif isinstance(size, int):
            total = max((-(-size // stride) - 1) * stride + reach - size, 0)
        else:
            return None
        small, large = total // 2, total - total // 2
        begin.append(small if mode == "SAME_UPPER" else large)
        end.append(large if mode == "SAME_UPPER" else small)
    return begin + end


def pad_into_conv(graph: ir.Graph, node: ir.Node) -> bool:
    """Zeros that a Pad puts around a Conv's input are the Conv's own pads."""
    if node.domain or node.op_type != "Conv" or "pads" not in node.attributes:
        return False
    value = node.inputs[0]
    pad = None if value is None else value.producer()
    if pad is None or pad.op_type != "Pad" or pad.domain or pad.inputs[0] is None:
        return False
    mode = pad.attributes.get_string("mode", "constant")
    amounts, fill = constant(pad, 1), constant(pad, 2)
    given = len(pad.inputs) > 2 and pad.inputs[2] is not None
    if mode != "constant" or amounts is None or (given and (fill is None or fill.any())):
        return False
    own = list(node.attributes["pads"].as_ints())
    rank = len(own) // 2 + 2
    if len(pad.inputs) > 3 or amounts.size != 2 * rank or (amounts < 0).any():
        return False
    both = amounts.reshape(2, rank)
    if both[:, :2].any():
        return False
    total = [mine + int(more) for mine, more in zip(own, both[:, 2:].reshape(-1), strict=True)]
    node.attributes["pads"] = ir.AttrInt64s("pads", total)
    node.replace_input_with(0, pad.inputs[0])
    return True


def gemm_input_first(graph: ir.Graph, node: ir.Node) -> bool:
    """A Gemm that transposes its input leaves that to a Transpose."""
    if node.op_type != "Gemm" or node.domain or "transA" not in node.attributes:
        return False
    if not node.attributes.pop("transA").as_int():
        return True
    transpose = ir.node("Transpose", [node.inputs[0]], {"perm": [1, 0]})
    transpose.metadata_props.update(node.metadata_props)
    graph.insert_before(node, transpose)
    node.replace_input_with(0, transpose.outputs[0])
    return True


def mean_as_pool(graph: ir.Graph, node: ir.Node) -> bool:
    """A mean over all of height and width is a GlobalAveragePool, which engines run on integers. Not over one dimension
    alone: that is a norm's."""
    value = node.inputs[0] if node.op_type == "ReduceMean" and not node.domain else None
    axes = constant(node, 1)
    if value is None or value.shape is None or axes is None or value.dtype != ir.DataType.FLOAT:
        return False
    rank = len(value.shape)
    if rank < 4 or sorted(int(axis) % rank for axis in axes.reshape(-1)) != list(range(2, rank)):
        return False
    pool = ir.node("GlobalAveragePool", [value], name=node.name)
    if node.attributes.get_int("keepdims", 1):
        return replace(graph, node, pool)
    pool.metadata_props.update(node.metadata_props)
    graph.insert_before(node, pool)
    return replace(graph, node, ir.node("Flatten", [pool.outputs[0]], {"axis": 1}))


def drop_made_up_biases(graph: ir.Graph, parameters: Collection[str]) -> None:
    """Remove biases of zeros that are no parameter: exporters write one where a layer has none."""
    for node in graph:
        bias = (
            node.inputs[2] if node.op_type in _BIASED and not node.domain and len(node.inputs) > 2 else None
        )
        values = constant(node, 2)
        if bias is not None and values is not None and not values.any() and bias.name not in parameters:
            node.resize_inputs(2)


_BIASED = frozenset({"Conv", "ConvTranspose", "Gemm"})


def _ints(node: ir.Node, key: str, rank: int, default: int = 1) -> list[int]:
    return list(node.attributes.get_ints(key, [default] * rank))


def _static(value: ir.Value) -> bool:
    return value.shape is not None and value.shape.is_static()


def _dims(value: ir.Value) -> list[int]:
    assert value.shape is not None
    return [int(dim) for dim in value.shape.numpy()]
