"""ONNX graph -> torch.fx.GraphModule: one ONNX node, one fx node of the same name, differentiable.

    placeholders        the graph's inputs, in order
    parameters          the float initializers; `trainable` ones require gradients
    buffers             BatchNormalization's statistics, integer constants
    <value>__quantizer  a FakeQuantize right after the node that produces the value, and on weights and biases

Names are the ONNX names with every character that Python does not allow in a name replaced by `_`. The maps
from the ONNX names are in `module.meta`: "parameters" (initializer -> attribute) and "quantizers" (value ->
attribute); `node.meta` holds "onnx_name" (nodes only) and "outputs" (the ONNX values it stands for).

What is computed from shapes stays on the CPU, as tensors or Python numbers, wherever the module lives: a batch
dimension stays dynamic and no GPU waits. A value moves to the device where an operator takes it as data.
"""

from __future__ import annotations

import keyword
import operator as python_operator
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx

from qpipe.model.network.invariants import constant_of
from qpipe.model.network.naming import Names
from qpipe.model.operators.table import OPERATORS
from qpipe.model.qdq.bias import BIAS_MAX, BIAS_MIN, QuantizedBias, effective_encodings, quantized_biases
from qpipe.model.simulation.constants import (
    host_constant,
    host_values,
    keywords,
    literal,
    shared_tensor_of,
    statistics,
    stays,
    taken_in,
    tensor_of,
    to_device,
)
from qpipe.model.simulation.opaque import RuntimePart
from qpipe.model.structure.families import MOVING, WIDE_UNSIGNED
from qpipe.model.structure.opaque import Part, units
from qpipe.numerics.fake_quantize import FakeQuantize, fake_quantize
from qpipe.numerics.grid import Encoding, same_grid

if TYPE_CHECKING:
    from qpipe.model.network.facts import Library
    from qpipe.model.network.network import Network
    from qpipe.model.simulation.samples import Array

BOUNDING = frozenset({"Min", "Max", "Clip", "Relu", "Pad", "Concat"})
"""Operators whose output may share the quantizer of their first input, but has to be rounded again."""

_TORCHS_OWN = frozenset({*dir(fx.GraphModule), *dir(type), "training", "meta", "graph"})
"""What every module has an attribute of that name for; of a class also what all classes have."""


def to_torch(
    model: Network,
    quantized: bool = True,
    trainable: Iterable[str] = (),
    device: str = "cpu",
    shared: bool = False,
) -> fx.GraphModule:
    """`model` as a torch.fx module on `device`: its inputs in order -> one tensor, or a tuple of outputs.

    `quantized` inserts fake-quantize at the model's encodings. Parameters whose ONNX names are in `trainable`
    require gradients. All tensors are copies, unless `shared`: then they are the model's own memory, to be
    read alone (what is mapped from a file cannot be written to, and an attempt ends the process). What torch cannot
    compute runs through onnxruntime, without a gradient. Raises ValueError for a trainable name that is no float
    initializer, or for any together with `shared`.
    """
    trainable = tuple(trainable)
    if shared and trainable:
        raise ValueError("a module that shares the model's tensors cannot train any of them.")
    encodings = effective_encodings(model) if quantized else {}
    biases = quantized_biases(model) if quantized else {}
    module = build(model.graph, encodings, biases, trainable, shared, model.facts.custom_ops)
    return module.to(device)


def build(
    graph: ir.Graph,
    encodings: dict[str, Encoding] | None = None,
    biases: dict[tuple[str, int], QuantizedBias] | None = None,
    trainable: tuple[str, ...] = (),
    shared: bool = False,
    custom_ops: tuple[Library, ...] = (),
) -> fx.GraphModule:
    """`graph` as a torch.fx module on the CPU; see `to_torch`. `shared`: its tensors are the graph's own memory, which
    nobody may write to."""
    builder = _Builder(graph, encodings or {}, biases or {}, trainable, shared, custom_ops)
    return builder.module()


def sanitize(name: str) -> str:
    """`name` as a Python name."""
    cleaned = re.sub(r"\W", "_", name, flags=re.ASCII)
    return f"_{cleaned}" if not cleaned or cleaned[0].isdigit() or keyword.iskeyword(cleaned) else cleaned


def value_nodes(module: fx.GraphModule) -> dict[str, fx.Node]:
    """The fx node that holds each ONNX value as its consumers see it, so behind its quantizer."""
    return {name: node for node in module.graph.nodes for name in node.meta.get("outputs", ())}


def fake_quantize_bias(
    bias: torch.Tensor, s_x: torch.Tensor, s_w: torch.Tensor, repeats: int
) -> torch.Tensor:
    """`bias` rounded to the int32 grid with scale s_x * s_w; `s_w` is () or one scale per output channel."""
    scale = s_x * s_w
    scale = scale.repeat(repeats) if scale.ndim else scale
    zero = torch.zeros_like(scale, dtype=torch.int32)
    axis = bias.ndim - 1 if scale.ndim else None
    return fake_quantize(bias, scale, zero, BIAS_MIN, BIAS_MAX, axis)


class _Builder:
    """The state of one translation; `module()` runs it."""

    def __init__(
        self,
        graph: ir.Graph,
        encodings: dict[str, Encoding],
        biases: dict[tuple[str, int], QuantizedBias],
        trainable: tuple[str, ...],
        shared: bool = False,
        custom_ops: tuple[Library, ...] = (),
    ) -> None:
        self.custom_ops = custom_ops
        self.tensor_of = shared_tensor_of if shared else tensor_of
        self.onnx, self.encodings, self.biases = graph, encodings, biases
        self.root, self.graph = torch.nn.Module(), fx.Graph()
        self.env: dict[ir.Value, fx.Node] = {}
        self.moved: dict[ir.Value, fx.Node] = {}
        self.host = host_values(graph)
        self.statistics = statistics(graph)
        self.trainable = self._check_trainable(trainable)
        # Kept for the ONNX nodes, before placeholders and quantizers ask for names.
        self.taken = Names(sanitize(str(node.name)) for node in graph)
        self.attributes = Names(_TORCHS_OWN)
        self.parameters: dict[str, str] = {}
        self.quantizers: dict[str, str] = {}

    def module(self) -> fx.GraphModule:
        """The whole graph, translated."""
        for value in self.onnx.inputs:
            node = self.graph.placeholder(self._free(str(value.name)))
            self._provide(value, node)
        for unit in units(self.onnx):
            if isinstance(unit, Part):
                self._opaque(unit)
            elif unit.op_type != "Constant":
                self._node(unit)
        outputs = tuple(self._output(value) for value in self.onnx.outputs)
        self.graph.output(outputs[0] if len(outputs) == 1 else outputs)
        module = fx.GraphModule(self.root, self.graph, class_name="OnnxModule")
        self._add_aliases(module)  # not before: the module takes over from the root only what the graph refers to
        module.meta["parameters"] = dict(self.parameters)
        module.meta["quantizers"] = dict(self.quantizers)
        return module

    def _output(self, value: ir.Value) -> fx.Node:
        """What leaves the graph as `value`: an input or an initializer leaves it as it came, on no grid."""
        node = self._device(value)
        if value.producer() is None and node.target == self.quantizers.get(str(value.name)):
            return node.all_input_nodes[0]
        return node

    def _node(self, node: ir.Node) -> None:
        op = OPERATORS[node.op_type]
        args = tuple(self._argument(node, i, value, i in op.numbers) for i, value in enumerate(node.inputs))
        kwargs = {name: value for a in node.attributes.values() for name, value in keywords(a)}
        named = [i for i, output in enumerate(node.outputs) if output.name and (i == 0 or _wanted(output))]
        several = op.many or (bool(op.more) and any(named))  # an output behind the first, which is number 0
        if op.more and several:
            kwargs[op.more] = True
        if node.op_type == "Split" and len(node.inputs) == 1:
            kwargs["num_outputs"] = len(node.outputs)
        name = sanitize(str(node.name))
        wide = op.unsigned is not None and any(
            v is not None and v.dtype in WIDE_UNSIGNED for v in node.inputs
        )
        function = op.unsigned if wide and op.unsigned is not None else op.function
        call = self.graph.create_node("call_function", function, args, kwargs, name=name)
        call.meta["onnx_name"] = str(node.name)
        if not several:
            self._provide(node.outputs[0], call)
            return
        for i in named:
            item = self.graph.create_node(
                "call_function",
                python_operator.getitem,
                (call, i),
                name=self._free(str(node.outputs[i].name)),
            )
            self._provide(node.outputs[i], item)

    def _opaque(self, part: Part) -> None:
        """A part that runs through onnxruntime; it is named as its last node is."""
        last = str(part.nodes[-1].name)
        attribute = self._attribute_name(last)
        self.root.add_module(attribute, RuntimePart(self.onnx, part, self.custom_ops))
        args = tuple(self._device(value) for value in part.inputs)
        call = self.graph.create_node("call_module", attribute, args, name=sanitize(last))
        call.meta["onnx_name"] = last
        for i, output in enumerate(part.outputs):
            item = (call, i)
            name = self._free(str(output.name))
            self._provide(output, self.graph.create_node("call_function", python_operator.getitem, item, name=name))

    def _argument(self, node: ir.Node, position: int, value: ir.Value | None, number: bool) -> Any:
        if value is None:
            return None
        array = constant_of(value)
        if number and array is not None:
            return literal(array.tolist())
        bias = self.biases.get((str(node.name), position))
        if bias is not None:
            return self._bias(value, bias)
        if node.op_type not in ("Shape", "Size") and stays(node, self.host):
            return self.env[value] if array is None else self._host_constant(array)
        return self.env[value] if number and value in self.host else self._device(value)

    def _device(self, value: ir.Value) -> fx.Node:
        """The fx node that holds `value` where the module lives."""
        if value not in self.env and constant_of(value) is not None:
            self._provide(value, self._initializer(value))
        node = self.env[value]
        if value not in self.host:
            return node
        if value not in self.moved:
            # The code does not know where it will run: this buffer moves with the module.
            if not hasattr(self.root, "_anchor"):
                self.root.register_buffer("_anchor", torch.empty(0), persistent=False)
            anchor = self.graph.get_attr("_anchor")
            self.moved[value] = self.graph.create_node(
                "call_function", to_device, (node, anchor), name=self._free(f"{value.name}__device")
            )
        return self.moved[value]

    def _host_constant(self, array: np.ndarray[Any, Any]) -> fx.Node:
        """A constant of shape arithmetic, written into the code: a buffer would leave the CPU with the module."""
        dtype = torch.from_numpy(np.zeros((), array.dtype)).dtype
        return self.graph.call_function(host_constant, (literal(array.tolist()), dtype))

    def _initializer(self, value: ir.Value) -> fx.Node:
        """An attribute of the module for the initializer, and the fx node that reads it."""
        name, tensor = str(value.name), self.tensor_of(constant_of(value))
        attribute = self._attribute_name(name)
        if tensor.is_floating_point() and value not in self.statistics:
            parameter = torch.nn.Parameter(tensor, requires_grad=name in self.trainable)
            self.root.register_parameter(attribute, parameter)
        else:
            self.root.register_buffer(attribute, tensor)
        self.parameters[name] = attribute
        return self.graph.create_node("get_attr", attribute, name=self._free(attribute))

    def _provide(self, value: ir.Value, node: fx.Node) -> None:
        """`node` computes `value`; its consumers get what its quantizer, if it has one, makes of that."""
        name = str(value.name)
        node.meta["outputs"] = (name,)
        encoding = self.encodings.get(name)
        self.env[value] = node if encoding is None else self._quantizer(value, node, encoding)

    def _quantizer(self, value: ir.Value, node: fx.Node, encoding: Encoding) -> fx.Node:
        name, source = str(value.name), self._shared_source(value, encoding)
        producer = value.producer()
        if source is not None and producer is not None:
            self.quantizers[name] = self.quantizers[source]
            if producer.op_type in MOVING:
                return node
        else:
            self.quantizers[name] = self._attribute_name(f"{name}__quantizer")
            self.root.add_module(self.quantizers[name], FakeQuantize.from_encoding(encoding))
        made = self.graph.create_node(
            "call_module", self.quantizers[name], (node,), name=self._free(f"{name}__quantizer")
        )
        made.meta["outputs"] = (name,)
        return made

    def _shared_source(self, value: ir.Value, encoding: Encoding) -> str | None:
        """The producer's input whose quantizer has the same grid, where the operator allows to share it."""
        node = value.producer()
        if node is None or node.op_type not in MOVING | BOUNDING or node.inputs[0] is None:
            return None
        source = str(node.inputs[0].name)
        known = self.encodings.get(source)
        return source if known and source in self.quantizers and same_grid(known, encoding) else None

    def _bias(self, value: ir.Value, bias: QuantizedBias) -> fx.Node:
        float_bias = self._device(value)
        scales = [self.graph.get_attr(f"{self.quantizers[name]}.scale") for name in (bias.input, bias.weight)]
        args: tuple[Any, ...] = (float_bias, *scales, bias.repeats)
        made = self.graph.create_node(
            "call_function", fake_quantize_bias, args, name=self._free(f"{bias.name}__quantizer")
        )
        made.meta["outputs"] = ()  # no ONNX value: each layer that shares a bias rounds it on a grid of its own
        return made

    def _add_aliases(self, module: fx.GraphModule) -> None:
        """Every quantized value answers to `<value>__quantizer`, also where it shares another's quantizer."""
        for name, attribute in self.quantizers.items():
            alias = sanitize(f"{name}__quantizer")
            if alias != attribute and not hasattr(module, alias):
                module.add_module(alias, module.get_submodule(attribute))

    def _check_trainable(self, names: tuple[str, ...]) -> frozenset[str]:
        known = self.onnx.initializers
        for name in names:
            array = constant_of(known[name]) if name in known else None
            if array is None or not np.issubdtype(array.dtype, np.floating):
                raise ValueError(f"trainable: the model has no float parameter {name!r}.")
        return frozenset(names)

    def _free(self, wanted: str) -> str:
        """A name for an fx node that no ONNX node and no other fx node has."""
        return self.taken.fresh(sanitize(wanted))

    def _attribute_name(self, wanted: str) -> str:
        """A name for an attribute of the module; torch's own names are not available."""
        return self.attributes.fresh(sanitize(wanted))


def _wanted(output: ir.Value) -> bool:
    return bool(output.uses()) or output.is_graph_output()


See = Callable[[str, Tensor], object]
"""Is given the name of an ONNX value, and the tensor."""


def watched(
    module: fx.GraphModule, arrays: Sequence[Array], see: See, device: str = "cpu"
) -> tuple[Tensor, ...]:
    """The outputs of `module`, which lives on `device`, for one batch, without gradients.

    `see` is called as soon as a value of the graph is there: an input, a parameter before its first reader, what a node
    gives. A value with a quantizer is seen twice, before and after. No value is held longer than its readers need it,
    unless `see` holds it."""
    with torch.inference_mode():
        outputs = _Watcher(module, see).run(*(taken_in(array, device) for array in arrays))
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)


class _Watcher(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, see: See) -> None:
        super().__init__(module)
        self._see = see

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            for name in n.meta.get("outputs", ()):
                self._see(name, result)
        return result
