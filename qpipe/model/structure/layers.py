"""The layers that have weights, with everything that a method which tunes weights has to know of them.

A layer is a Conv, ConvTranspose, Gemm or MatMul whose weight is an initializer, with its bias and with the
activation that follows it alone: one node (Relu, Clip, PRelu, Gelu, …) or a closed chain of elementwise nodes
(x * Sigmoid(x), x * Tanh(Softplus(x)), x * Clip(x + 3) / 6, …).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import onnx_ir as ir

from qpipe.model.network.invariants import constant_tensor

if TYPE_CHECKING:
    from qpipe.model.network.network import Editor, Network

LayerType = Literal["Conv", "ConvTranspose", "Gemm", "MatMul"]

_ACTIVATIONS = (
    *("Relu", "Clip", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "ThresholdedRelu", "Gelu", "Sigmoid"),
    *("HardSigmoid", "HardSwish", "Tanh", "Softplus", "Softsign", "Mish"),
)
_ALONE = frozenset(_ACTIVATIONS)
NONLINEAR = _ALONE | {"Erf", "Exp", "Sqrt", "Abs", "Max", "Min", "Pow", "Shrink"}
LINEAR = frozenset({"Add", "Sub", "Mul", "Div", "Neg", "Identity"})
_LONGEST = 12
"""Nodes in the longest chain that is taken for an activation; Gelu by tanh, written out, has 8."""


@dataclass(frozen=True)
class Layer:
    """One layer. `input`, `output` and `activation_output` are names of values, `weight` and `bias` names of
    initializers, `name`, `add` and `activation` names of nodes.

    `output` is the value after the bias; `activation_output` the value after the activation (`output` itself
    where none follows). `channel_axis` is the axis of the weight that counts output channels (of a group, for
    ConvTranspose); `transposed` says that a Gemm stores its weight as (O, K). Spatial attributes are empty
    for Gemm and MatMul; `pads` are all beginnings, then all ends, as in ONNX; `output_shape` is given only
    where a ConvTranspose asks for one; `auto_pad` is NOTSET wherever the import could compute the pads.
    """

    name: str
    op_type: LayerType
    input: str
    weight: str
    bias: str | None
    output: str
    activation: tuple[str, ...]
    activation_output: str
    groups: int
    channel_axis: int
    weight_shape: tuple[int, ...]
    add: str | None = None
    transposed: bool = False
    kernel_shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()
    auto_pad: str = "NOTSET"

    @property
    def channels(self) -> int:
        """The number of output channels, over all groups."""
        per_group = self.weight_shape[self.channel_axis]
        return per_group * self.groups if self.op_type == "ConvTranspose" else per_group

    @property
    def depthwise(self) -> bool:
        """Whether every group has one input channel."""
        if self.groups == 1 or not self.kernel_shape:
            return False
        inputs = (
            self.weight_shape[0] // self.groups if self.op_type == "ConvTranspose" else self.weight_shape[1]
        )
        return inputs == 1


def find_layers(model: Network | Editor) -> tuple[Layer, ...]:
    """The layers of `model` in topological order; `refused_layers` lists the ones that are none, and why."""
    found = (_layer(node) for node in model.graph)
    return tuple(layer for layer in found if isinstance(layer, Layer))


def refused_layers(model: Network) -> dict[str, str]:
    """The nodes that multiply by a weight and still are no layer, by name, each with its reason."""
    found = ((str(node.name), _layer(node)) for node in model.graph)
    return {name: reason for name, reason in found if isinstance(reason, str)}


def _layer(node: ir.Node) -> Layer | str | None:
    """The layer at `node`, the reason why it is none, or None for a node without weights."""
    if node.domain or node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return None
    data, weight = node.inputs[0], node.inputs[1]
    if data is None or weight is None:
        return "it has no input or no weight"
    if data.is_initializer():
        return None if weight.is_initializer() else "its weight stands on the left of the input"
    if not weight.is_initializer():
        constant, producer = from_initializers(weight), weight.producer()
        if not constant and "Conv" not in node.op_type:
            return None
        if constant and producer is not None and producer.op_type == "Transpose":
            return "its weight is another's, transposed: tied_weights: copy in 'prepare' gives it one of its own"
        return "its weight is computed in the graph"
    if "Conv" in node.op_type:
        return _conv(node, data, weight)
    return _gemm(node, data, weight) if node.op_type == "Gemm" else _matmul(node, data, weight)


def _conv(node: ir.Node, data: ir.Value, weight: ir.Value) -> Layer | str:
    transposed = node.op_type == "ConvTranspose"
    shape = _shape(weight)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and not bias.is_initializer():
        return "its bias is computed in the graph"
    spatial = len(shape) - 2
    activation, last = following_activation(node.outputs[0])
    return Layer(
        name=str(node.name),
        op_type="ConvTranspose" if transposed else "Conv",
        input=str(data.name),
        weight=str(weight.name),
        bias=None if bias is None else str(bias.name),
        output=str(node.outputs[0].name),
        activation=activation,
        activation_output=last,
        groups=node.attributes.get_int("group", 1),
        channel_axis=1 if transposed else 0,
        weight_shape=shape,
        kernel_shape=shape[2:],
        strides=tuple(node.attributes.get_ints("strides", (1,) * spatial)),
        dilations=tuple(node.attributes.get_ints("dilations", (1,) * spatial)),
        pads=tuple(node.attributes.get_ints("pads", (0,) * 2 * spatial)),
        output_padding=tuple(node.attributes.get_ints("output_padding", (0,) * spatial)),
        output_shape=tuple(node.attributes.get_ints("output_shape", ())),
        auto_pad=node.attributes.get_string("auto_pad", "NOTSET"),
    )


def _gemm(node: ir.Node, data: ir.Value, weight: ir.Value) -> Layer | str:
    said = node.attributes
    if said.get_int("transA", 0) or said.get_float("alpha", 1.0) != 1.0 or said.get_float("beta", 1.0) != 1.0:
        return "it transposes its input or scales by alpha or beta"
    transposed = bool(said.get_int("transB", 0))
    shape = _shape(weight)
    axis = 0 if transposed else 1
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and (not bias.is_initializer() or not _is_bias(bias, shape[axis])):
        return "what it adds is not one number per output channel"
    activation, last = following_activation(node.outputs[0])
    return Layer(
        name=str(node.name),
        op_type="Gemm",
        input=str(data.name),
        weight=str(weight.name),
        bias=None if bias is None else str(bias.name),
        output=str(node.outputs[0].name),
        activation=activation,
        activation_output=last,
        groups=1,
        channel_axis=axis,
        weight_shape=shape,
        transposed=transposed,
    )


def _matmul(node: ir.Node, data: ir.Value, weight: ir.Value) -> Layer | str:
    shape = _shape(weight)
    if len(shape) != 2:
        return f"its weight has {len(shape)} dimensions, not 2"
    output, add, bias = node.outputs[0], None, None
    after = _only_consumer(output)
    if after is not None and after.op_type == "Add" and not after.domain:
        other = after.inputs[1] if after.inputs[0] is output else after.inputs[0]
        if other is not None and other.is_initializer() and _is_bias(other, shape[1]):
            output, add, bias = after.outputs[0], str(after.name), str(other.name)
    activation, last = following_activation(output)
    return Layer(
        name=str(node.name),
        op_type="MatMul",
        input=str(data.name),
        weight=str(weight.name),
        bias=bias,
        output=str(output.name),
        activation=activation,
        activation_output=last,
        groups=1,
        channel_axis=1,
        weight_shape=shape,
        add=add,
    )


def following_activation(value: ir.Value) -> tuple[tuple[str, ...], str]:
    """The nodes of the activation that alone reads `value`, and the name of the value that it produces.

    Grows the set of elementwise nodes that read only `value`, each other and constants, until nobody else
    reads `value` and exactly one result leaves the set; no activation where that never happens."""
    nothing: tuple[tuple[str, ...], str] = ((), str(value.name))
    if value.is_graph_output():
        return nothing
    region: list[ir.Node] = []
    inside = {value}
    while len(region) < _LONGEST:
        node = next((node for node in _candidates(inside, region)), None)
        if node is None:
            return nothing
        region.append(node)
        inside.update(node.outputs)
        if _closed(value, region):
            break
    else:
        return nothing
    if not any(node.op_type in (NONLINEAR if len(region) > 1 else _ALONE) for node in region):
        return nothing
    if len(region) > 1:
        region = _with_trailing_factor(region)
    region = _with_trailing_bounds(region)
    return tuple(str(node.name) for node in region), str(region[-1].outputs[0].name)


def _candidates(inside: set[ir.Value], region: list[ir.Node]) -> Iterator[ir.Node]:
    for value in [*(output for node in reversed(region) for output in node.outputs), *inside]:
        for node in value.consumers():
            known = all(v is None or v in inside or from_initializers(v) for v in node.inputs)
            if node not in region and not node.domain and node.op_type in NONLINEAR | LINEAR and known:
                yield node


def _closed(value: ir.Value, region: list[ir.Node]) -> bool:
    """Whether nothing outside `region` reads `value`, and one value alone, the last, leaves the region."""
    if any(node not in region for node in value.consumers()):
        return False
    leaving = [
        output
        for node in region
        for output in node.outputs
        if output.is_graph_output() or any(reader not in region for reader in output.consumers())
    ]
    return leaving == [region[-1].outputs[0]]


def _with_trailing_factor(region: list[ir.Node]) -> list[ir.Node]:
    """Gelu and HardSwish, written out, may end with a constant factor: `0.5 *` or `/ 6`."""
    after = _only_consumer(region[-1].outputs[0])
    if after is None or after.domain or after.op_type not in ("Mul", "Div"):
        return region
    others = [value for value in after.inputs if value is not region[-1].outputs[0]]
    scalar = len(others) == 1 and others[0] is not None and _size(others[0]) == 1
    return [*region, after] if scalar and after.inputs[0] is not None else region


def _with_trailing_bounds(region: list[ir.Node]) -> list[ir.Node]:
    """A Clip with one bound per channel is written as Relu, then Min with a constant: the bounds belong to it."""
    while (after := _only_consumer(region[-1].outputs[0])) is not None:
        others = [value for value in after.inputs if value is not region[-1].outputs[0]]
        bounds = all(value is not None and from_initializers(value) for value in others)
        if after.domain or after.op_type not in ("Min", "Max") or not bounds:
            break
        region = [*region, after]
    return region


def _only_consumer(value: ir.Value) -> ir.Node | None:
    consumers = value.consumers()
    return consumers[0] if len(consumers) == 1 and not value.is_graph_output() else None


def from_initializers(value: ir.Value) -> bool:
    """Whether `value` follows from initializers alone."""
    return bool(initializers_behind(value))


def initializers_behind(value: ir.Value) -> list[ir.Value]:
    """The initializers that `value` follows from, or is; none where anything else is behind it."""
    stack, seen, found = [value], {value}, list[ir.Value]()
    while stack:
        current = stack.pop()
        if current.is_initializer():
            found.append(current)
            continue
        producer = current.producer()
        if producer is None:
            return []
        fresh = [other for other in producer.inputs if other is not None and other not in seen]
        seen.update(fresh)
        stack += fresh
    return found


def _is_bias(value: ir.Value, channels: int) -> bool:
    shape = _shape(value)
    return bool(shape) and shape[-1] == channels and _size(value) == channels


def _size(value: ir.Value) -> int | None:
    tensor = constant_tensor(value)
    return None if tensor is None else tensor.size


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.const_value is not None
    return tuple(int(size) for size in value.const_value.shape.numpy())
