"""Which operators onnxruntime runs on integers, read off the graph that it made of a file.

Codes are 8 or 16 bits wide, so the type of an output says most: a MaxPool or a Min on codes runs on integers, whatever
its name. What stays in float between a DequantizeLinear and a QuantizeLinear fell out: somebody gave it grids, and
onnxruntime has no kernel for it, or none for the form it stands in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
import onnx.shape_inference

INTEGER_LAYERS = frozenset(
    {"QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"}
    | {"QGemm", "QAttention", "QLinearConvTranspose"}
)
FLOAT_LAYERS = frozenset(
    {"Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "MatMul", "FusedMatMul", "Gemm", "FusedGemm"}
    | {"MatMulNBits", "Attention", "MultiHeadAttention"}
)
MOVERS = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Cast", "Identity", "Constant", "ConstantOfShape"}
    | {"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "Concat", "QLinearConcat", "Pad"}
    | {"Gather", "GatherND", "GatherElements", "Expand", "Tile", "DepthToSpace", "SpaceToDepth", "Where"}
    | {"QLinearWhere", "ReorderInput", "ReorderOutput", "If", "Loop", "Scan"}
)
"""They compute nothing; in float they count where they stand between two roundings alone."""
WITH_KERNEL = frozenset(
    {"Conv", "MatMul", "Gemm", "Add", "Mul", "Sigmoid", "LeakyRelu", "AveragePool", "GlobalAveragePool", "Softmax"}
    | {"MaxPool", "Min", "Max", "Clip", "Resize", "FusedConv", "NhwcFusedConv", "FusedMatMul", "FusedGemm", *MOVERS}
)
"""Operators that onnxruntime runs on 8-bit codes where their neighbours let it.

Source: onnxruntime's QDQ selectors and its kernels for the CPU, version 1.32."""
_TO_CODES = {"QuantizeLinear", "QGemm"}
_NARROW = {onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT4, onnx.TensorProto.UINT4}
_WIDE = {onnx.TensorProto.INT16, onnx.TensorProto.UINT16}
_FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}


def kernels(model: onnx.ModelProto, optimized: onnx.ModelProto) -> dict[str, Any]:
    """What `model` runs on integers, by the graph `optimized` that onnxruntime made of it: `layers` (Conv, MatMul,
    Gemm) and `others` (what else computes on data), each {integer, all}; and `in_float`, the operators in float, those
    of a form together: {op_type, count, form, example, why}, layers first, then what stands between two roundings, then
    the most frequent. Their tensors need not be loaded."""
    counts = {"layers": {"integer": 0, "all": 0}, "others": {"integer": 0, "all": 0}}
    groups: dict[tuple[str, str, str], list[str]] = {}
    types = _types(onnx.shape_inference.infer_shapes(model).graph)  # onnxruntime writes down no more than it was told
    for scope in _scopes(optimized.graph, types):
        for node in scope.nodes:
            integer = scope.on_codes(node)
            if integer is None:
                continue
            if node.op_type not in MOVERS:
                row = counts["layers" if node.op_type in INTEGER_LAYERS | FLOAT_LAYERS else "others"]
                row["all"] += 1
                row["integer"] += integer
            form = scope.form(node)
            if not integer and (node.op_type not in MOVERS or len(form) == 3):
                group = (node.op_type, " -> ".join(form), scope.why(node, form))
                groups.setdefault(group, []).append(node.name or node.output[0])
    ranked = sorted(groups.items(), key=lambda item: (*_order(item[0]), -len(item[1]), item[0]))
    rows = [
        {"op_type": op_type, "count": len(names), "form": form, "example": names[0], "why": why}
        for (op_type, form, why), names in ranked
    ]
    return {**counts, "in_float": rows}


def _order(group: tuple[str, str, str]) -> tuple[bool, int]:
    return group[0] not in FLOAT_LAYERS, -group[1].count(" -> ")


@dataclass
class _Scope:
    """A graph with what surrounds it: the types of its values, who makes them and who reads them."""

    nodes: Sequence[onnx.NodeProto]
    types: dict[str, int]
    constants: set[str]
    makers: dict[str, onnx.NodeProto] = field(default_factory=dict)
    readers: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in self.nodes:
            self.makers |= dict.fromkeys(node.output, node)
            for name in node.output:
                self.types.setdefault(name, self._unsaid(node))
            for name in node.input:
                self.readers.setdefault(name, []).append(node.op_type)

    def _unsaid(self, node: onnx.NodeProto) -> int:
        """The type that a node gives, where the graph does not say: it was put in as others were fused, or moved."""
        if node.op_type == "QuantizeLinear" and len(node.input) == 3:
            return self.types.get(node.input[2], int(onnx.TensorProto.UINT8))
        if node.op_type in _TO_CODES or node.op_type.startswith("QLinear"):
            return int(onnx.TensorProto.UINT8)
        if node.op_type in INTEGER_LAYERS | FLOAT_LAYERS | {"DequantizeLinear"}:
            return int(onnx.TensorProto.FLOAT)
        return next((self.types[name] for name in node.input if name in self.types), 0)

    def on_codes(self, node: onnx.NodeProto) -> bool | None:
        """Whether it runs on integers; None where it works on no data: shapes, indices, conditions."""
        if node.op_type in INTEGER_LAYERS or node.op_type.startswith("QLinear"):
            return True
        made = self.types.get(node.output[0]) if node.output else None
        return True if made in _NARROW | _WIDE else False if made in _FLOATS else None

    def form(self, node: onnx.NodeProto) -> tuple[str, ...]:
        """The node with the roundings right in front of it and behind."""
        before = ("DequantizeLinear",) if any(map(self._is_read_back, node.input)) else ()
        rounded = any("QuantizeLinear" in self.readers.get(name, ()) for name in node.output)
        return (*before, node.op_type, *(("QuantizeLinear",) if rounded else ()))

    def why(self, node: onnx.NodeProto, form: tuple[str, ...]) -> str:
        """What keeps it in float, as far as the graph tells."""
        weights = [name for name in node.input if self._is_read_back(name, constant=True)]
        if node.op_type == "MatMulNBits" or (weights and form[0] == node.op_type):
            return "its weight alone is quantized"
        if form == (node.op_type,):
            return "float in, float out"
        if node.op_type not in WITH_KERNEL:
            return "onnxruntime has no integer kernel for it"
        if len(form) == 2:
            return "float in" if form[0] == node.op_type else "float out"
        if any(self.types.get(self.makers[name].input[0]) in _WIDE for name in node.input if self._is_read_back(name)):
            return "onnxruntime has no kernel of 16 bits for it"
        if any(name in self.constants and self.types.get(name) in _FLOATS for name in node.input):
            return "one operand is a constant in float"
        floats = [name for name in node.input if self.types.get(name) in _FLOATS]
        if any(self.makers.get(name) is None or self.makers[name].op_type != "DequantizeLinear" for name in floats):
            return "one operand is in float"
        return "onnxruntime has not fused it"

    def _is_read_back(self, name: str, constant: bool = False) -> bool:
        """Whether it is a DequantizeLinear of data, or of a constant."""
        maker = self.makers.get(name)
        if maker is None or maker.op_type != "DequantizeLinear":
            return False
        return (maker.input[0] in self.constants) is constant


def _scopes(graph: onnx.GraphProto, outer: dict[str, int]) -> Iterator[_Scope]:
    """The graph, then the graphs inside its nodes."""
    types = outer | _types(graph)
    yield _Scope(graph.node, types, {tensor.name for tensor in graph.initializer})
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _scopes(inner, types)


def _types(graph: onnx.GraphProto) -> dict[str, int]:
    values = [*graph.value_info, *graph.input, *graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}
