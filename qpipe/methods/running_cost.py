"""What running a model would take on a processor of reference, by its graph: a function of the model, not of a machine.

    time = sum over the nodes of onnxruntime's graph of   START + multiplications * rate + elements * rate

A node's start counts, since small models wait for little else; so do conversions between floats and codes, and what
fell out of the integers. The rates are those of one core of an x64 server with 8-bit dot products (AVX-512 VNNI),
rounded; what two models cost is to be compared, not held against a clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import onnx

from qpipe.model.runtime.kernels import FLOAT_LAYERS, INTEGER_LAYERS

Shapes = Mapping[str, tuple[int, ...]]

START_NS = 1500.0
PER_PRODUCT_NS = {"float": 0.018, "integer": 0.0055, "few": 0.05}
"""A multiplication in a layer in float, on codes of 8 bits, and where an output sums up few of them, as in a depthwise
convolution, which has no faster kernel on codes."""
PER_ELEMENT_NS = {"float": 0.06, "integer": 0.03, "conversion": 0.03, "function": 0.4}
"""An element of an output: of an operator in float, on codes, of a conversion, of one that is no plain arithmetic."""
FEW = 16

FUNCTIONS = frozenset(
    {"Sigmoid", "QLinearSigmoid", "Tanh", "Erf", "Exp", "Log", "Gelu", "FastGelu", "BiasGelu", "QuickGelu", "HardSwish"}
    | {"Softmax", "QLinearSoftmax", "LogSoftmax", "LayerNormalization", "SkipLayerNormalization", "Mish", "Elu", "Pow"}
    | {"SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "InstanceNormalization", "Softplus"}
    | {"GroupNormalization", "GroupNorm", "HardSigmoid", "Sin", "Cos", "LSTM", "GRU"}
    | {"AveragePool", "QLinearAveragePool"}
)
CONVERSIONS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
_WEIGHT = {"QLinearConv": 3, "QLinearConvTranspose": 3}
"""Where a convolution has its weight; 1 elsewhere."""


@dataclass(frozen=True)
class Running:
    """`time_us` by the rates above, for one sample; the `products` (multiplications) of all layers, and of those those
    that are `on_integers`; `conversions` between floats and codes."""

    time_us: float
    products: int
    on_integers: int
    conversions: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def running(graph: onnx.ModelProto, shapes: Shapes) -> Running:
    """What the nodes of onnxruntime's graph take, whose values have these shapes; one of unknown shape takes its start
    alone."""
    constants = {tensor.name for tensor in graph.graph.initializer}
    codes = _codes(graph.graph.node)
    time = 0.0
    products = on_integers = conversions = 0
    for node in graph.graph.node:
        integer = node.op_type in INTEGER_LAYERS
        count = _products(node, shapes) if integer or node.op_type in FLOAT_LAYERS else 0
        products += count
        on_integers += count * integer
        conversions += node.op_type in CONVERSIONS and node.input[0] not in constants
        time += START_NS + count * _rate(node, shapes, integer) + _elements(node, shapes) * _element_rate(node, codes)
    return Running(time / 1000.0, products, on_integers, conversions)


def _codes(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """The values that are codes, as far as the operators say."""
    found: set[str] = set()
    for node in nodes:
        quantizes = node.op_type in ("QuantizeLinear", "QGemm") or node.op_type.startswith("QLinear")
        if quantizes or (node.op_type not in CONVERSIONS and node.input and node.input[0] in found):
            found.update(node.output if node.op_type not in INTEGER_LAYERS or quantizes else ())
    return found


def _elements(node: onnx.NodeProto, shapes: Shapes) -> int:
    return sum(math.prod(shapes[name]) for name in node.output if name in shapes)


def _element_rate(node: onnx.NodeProto, codes: set[str]) -> float:
    if node.op_type in FUNCTIONS:
        return PER_ELEMENT_NS["function"]
    if node.op_type in CONVERSIONS:
        return PER_ELEMENT_NS["conversion"]
    return PER_ELEMENT_NS["integer" if set(node.output) & codes else "float"]


def _rate(node: onnx.NodeProto, shapes: Shapes, integer: bool) -> float:
    """Of one multiplication."""
    if "Conv" in node.op_type:
        weight = shapes.get(node.input[_WEIGHT.get(node.op_type, 1)], ())
        if weight and math.prod(weight[1:]) <= FEW:
            return PER_PRODUCT_NS["few"]
    return PER_PRODUCT_NS["integer" if integer else "float"]


def _products(node: onnx.NodeProto, shapes: Shapes) -> int:
    """The multiplications of a layer."""
    given, made = shapes.get(node.input[0], ()), shapes.get(node.output[0], ())
    if not given or not made:
        return 0
    if "Conv" not in node.op_type:
        turned = any(each.name == "transA" and each.i for each in node.attribute)
        return math.prod(made) * given[0 if turned else -1]
    weight = shapes.get(node.input[_WEIGHT.get(node.op_type, 1)], ())
    return math.prod(given if "Transpose" in node.op_type else made) * math.prod(weight[1:])
