"""Random small ONNX models, as exporters and people write them, for hypothesis.

`cases()` draws a model and inputs for it. A model is grown piece by piece (`graph_pieces`); around it come the habits
that differ between exporters: opset, IR version, where constants live, names, dead and doubled nodes, what is an input
or an output. Every model is one that onnxruntime runs, and whose outputs do not hang on the last bits of its weights.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import onnx
import onnxruntime
from hypothesis import assume
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]
Choice = TypeVar("Choice")

BATCH = 3
NEWEST_OPSET = 25
"""The newest that onnxruntime runs with operators that the pieces write."""
NASTY = (
    "plain", "with space", "имя/слой", "a.b:0", "long" * 60, "v__float", "w__quantized", "name_1", "0", "__", "’“\t",
    "x__dequantized", "bias", "weight.bias", "batch", "N", "\n", "{}", "../up", "конец\\", "input",
)  # fmt: skip


@dataclass(frozen=True)
class Value:
    """A float value of the graph; dimension 0 is the batch, `BATCH` samples of it here."""

    name: str
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        return len(self.shape)


@dataclass(frozen=True)
class Case:
    """A model, inputs for it, and a seed for whatever a property draws besides."""

    proto: onnx.ModelProto
    feeds: Mapping[str, Array]
    seed: int

    def __repr__(self) -> str:
        return f"Case(seed={self.seed}, feeds={ {n: a.shape for n, a in self.feeds.items()} },\n{text(self.proto)})"


@dataclass
class Net:
    """A graph that grows: `draw` decides, `rng` fills the weights."""

    draw: Any
    rng: np.random.Generator
    opset: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    params: dict[str, Array] = field(default_factory=dict)
    values: list[Value] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)
    nasty: bool = False

    def of(self, *choices: Choice) -> Choice:
        """One of `choices`; hypothesis shrinks towards the first."""
        return self.draw(st.sampled_from(choices))  # type: ignore[no-any-return]

    def int(self, low: int, high: int) -> int:
        """A whole number, both ends included; shrinks towards `low`."""
        return self.draw(st.integers(low, high))  # type: ignore[no-any-return]

    def flag(self) -> bool:
        """Shrinks towards False."""
        return self.draw(st.booleans())  # type: ignore[no-any-return]

    def name(self, prefix: str) -> str:
        """A name that no value has yet."""
        wanted = self.of(*NASTY) if self.nasty and self.flag() else f"{prefix}{len(self.taken)}"
        while wanted in self.taken:
            wanted += "_1"
        self.taken.add(wanted)
        return wanted

    def param(self, array: Any, prefix: str = "w") -> str:
        """A constant of the graph; one in three times an earlier one of the same shape and kind, if there is one."""
        array = np.asarray(array)
        twins = [name for name, other in self.params.items() if _alike(name, prefix, other, array)]
        if twins and array.dtype == np.float32 and self.int(0, 2) == 2:
            return self.of(*twins)
        name = self.name(prefix)
        self.params[name] = array
        return name

    def weight(self, *shape: int, spread: bool = True) -> str:
        """Normal numbers, of a fan-in's size; rows that differ by a factor of ten or so, now and then a dead one."""
        array = self.rng.standard_normal(shape) / np.sqrt(max(np.prod(shape[1:]), 1))
        if spread:
            array *= np.exp(self.rng.standard_normal(shape[0])).reshape(-1, *(1,) * (len(shape) - 1))
        if self.int(0, 9) == 9:
            array[0] = 0.0
        return self.param(array.astype(np.float32), "w")

    def vector(self, *shape: int) -> str:
        """Normal numbers: a bias, or the constant of some arithmetic."""
        return self.param(self.rng.standard_normal(shape).astype(np.float32), "b")

    def ints(self, *numbers: int) -> str:
        """A constant of int64: axes, shapes, pads."""
        return self.param(np.array(numbers, np.int64), "i")

    def scalar(self, number: float) -> str:
        """A float constant without dimensions."""
        return self.param(np.array(number, np.float32), f"c{number:g}_")

    def emit(self, op_type: str, inputs: Sequence[str], outputs: int = 1, **attributes: Any) -> list[str]:
        """A node; the names of its outputs. Attributes that are None are left out."""
        given = {key: value for key, value in attributes.items() if value is not None}
        names = [self.name("v") for _ in range(outputs)]
        self.nodes.append(helper.make_node(op_type, list(inputs), names, **given))
        return names

    def add(self, op_type: str, inputs: Sequence[str], shape: Sequence[int], **attributes: Any) -> Value:
        """A node with one output, of `shape`, which later pieces may read."""
        (name,) = self.emit(op_type, inputs, **attributes)
        return self.keep(name, shape)

    def keep(self, name: str, shape: Sequence[int]) -> Value:
        """Let later pieces read the value `name`."""
        self.values.append(Value(name, tuple(shape)))
        return self.values[-1]


def _alike(name: str, prefix: str, other: Array, array: Array) -> bool:
    return name.startswith(prefix) and other.shape == array.shape and other.dtype == array.dtype


@st.composite
def cases(
    draw: Any, kinds: Collection[str] | None = None, largest: int = 8, strange: bool = True, oldest: int = 13
) -> Case:
    """A model of up to `largest` pieces, of all kinds or of `kinds`, of opset `oldest` or later, with inputs for it.

    Without `strange` it has plain names, one place for constants, and nothing dead or doubled."""
    from tests.model.graph_pieces import PIECES, fits

    seed = draw(st.integers(0, 2**16))
    opset = draw(st.integers(oldest, NEWEST_OPSET)) if strange else 21
    net = Net(draw, np.random.default_rng(seed), opset, nasty=strange and draw(st.booleans()))
    inputs = [_input(net) for _ in range(2 if strange and net.int(0, 3) == 3 else 1)]
    for _ in range(net.int(1, largest)):
        value = net.values[-1 - (0 if net.int(0, 3) < 3 else net.int(0, len(net.values) - 1))]
        able = [p for p in PIECES if fits(p, value, opset) and (kinds is None or p.name in kinds)]
        if able:
            net.of(*able).write(net, value)
    outputs = _outputs(net, strange)
    proto = _finished(net, inputs, outputs, strange)
    feeds = {v.name: net.rng.standard_normal(v.shape).astype(np.float32) for v in inputs}
    if not strange or net.flag():
        feeds = {name: array * np.float32(net.of(1.0, 3.0, 0.2)) for name, array in feeds.items()}
    case = Case(proto, feeds, seed)
    assume(steady(case))
    return case


def _input(net: Net) -> Value:
    rank = net.of(4, 2, 3, 5)
    spatial = [net.int(1, 7 if rank < 5 else 4) for _ in range(rank - 2)]
    value = Value(net.name("x"), (BATCH, net.of(4, 1, 2, 3, 6, 8), *spatial))
    net.values.append(value)
    return value


def _outputs(net: Net, strange: bool) -> list[Value]:
    """The last value, and sometimes others on the way, an input or a parameter."""
    outputs = [net.values[-1]]
    for _ in range(net.int(0, 2)):
        outputs.append(net.of(*net.values))
    floats = [name for name, array in net.params.items() if array.dtype == np.float32]
    if strange and floats and net.int(0, 9) == 9:
        name = net.of(*floats)
        outputs.append(Value(name, net.params[name].shape))
    return list({value.name: value for value in outputs}.values())


def _finished(net: Net, inputs: list[Value], outputs: list[Value], strange: bool) -> onnx.ModelProto:
    if strange:
        _litter(net)
    dynamic = not strange or net.int(0, 3) < 3
    listed = [_declared(v, dynamic) for v in inputs]
    results = [_declared(v, dynamic and v.name not in net.params) for v in outputs]
    place = net.of("initializer", "node", "input", "mixed") if strange else "initializer"
    tensors, constants = [], []
    for name, array in net.params.items():
        tensor = numpy_helper.from_array(array, name)
        if place == "node" or (place == "mixed" and net.flag()):
            constants.append(helper.make_node("Constant", [], [name], value=tensor))
            continue
        tensors.append(tensor)
        if place == "input":
            listed.append(helper.make_tensor_value_info(name, tensor.data_type, array.shape))
    graph = helper.make_graph([*constants, *net.nodes], "main", listed, results, tensors)
    if strange:
        _name_nodes(net, graph)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", net.opset)])
    proto.ir_version = 3 if place == "input" and net.opset < 21 else 10 if net.opset < 25 else 12
    return proto


def _litter(net: Net) -> None:
    """A node that nobody reads, and one that does what another does already."""
    if net.int(0, 4) == 4:
        net.emit("Relu", [net.of(*net.values).name])
    if net.nodes and net.int(0, 4) == 4:
        twin = onnx.NodeProto()
        twin.CopyFrom(net.of(*net.nodes))
        twin.output[:] = [net.name("v") for _ in twin.output]
        net.nodes.append(twin)
    if net.int(0, 9) == 9:
        net.params[net.name("unused")] = np.ones(3, np.float32)


def _declared(value: Value, dynamic: bool) -> onnx.ValueInfoProto:
    shape = ["N", *value.shape[1:]] if dynamic else value.shape
    return helper.make_tensor_value_info(value.name, TensorProto.FLOAT, shape)


def _name_nodes(net: Net, graph: onnx.GraphProto) -> None:
    style = net.of("none", "plain", "nasty", "same")
    for index, node in enumerate(graph.node):
        if style == "plain":
            node.name = f"/{node.op_type}_{index}"
        elif style == "nasty":
            node.name = NASTY[index % len(NASTY)]
        elif style == "same":
            node.name = "node"


def reference(proto: onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """What onnxruntime makes of the bytes of `proto`, nothing optimized, by the names of its outputs.

    It refuses two nodes of one name, which ONNX allows: those lose their names first."""
    if len({node.name for node in proto.graph.node if node.name}) < sum(bool(n.name) for n in proto.graph.node):
        proto = nameless(proto)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def nameless(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose nodes have no names."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for node in copy.graph.node:
        node.ClearField("name")
    return copy


def steady(case: Case) -> bool:
    """Whether all outputs are finite and follow a relative change of 1e-6 of every weight and input by 2e-5 at most.

    What moves further than that is not determined to 1e-4 by float32 weights that are rounded once more."""
    wanted = reference(case.proto, case.feeds)
    if not all(np.isfinite(array).all() and np.abs(array).max(initial=0) < 1e8 for array in wanted.values()):
        return False
    rng = np.random.default_rng(case.seed)
    moved = onnx.ModelProto()
    moved.CopyFrom(case.proto)
    constants = [node.attribute[0].t for node in moved.graph.node if node.op_type == "Constant"]
    sizes = {name for node in moved.graph.node if node.op_type == "Resize" for name in node.input[1:]}
    for tensor in [*moved.graph.initializer, *constants]:
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in sizes:
            tensor.CopyFrom(numpy_helper.from_array(_shaken(numpy_helper.to_array(tensor), rng), tensor.name))
    found = reference(moved, {name: _shaken(array, rng) for name, array in case.feeds.items()})
    return all(distance(wanted[name], found[name]) <= 2e-5 for name in wanted)


def _shaken(array: Array, rng: np.random.Generator) -> Array:
    return np.asarray(array * (1 + 1e-6 * rng.uniform(-1, 1, array.shape)), np.float32)


def distance(wanted: Array, found: Array) -> float:
    """max |wanted - found| / max |wanted|, of one output; two arrays of zeros are 0 apart."""
    assert wanted.shape == found.shape, (wanted.shape, found.shape)
    difference = np.abs(wanted.astype(np.float64) - found).max(initial=0.0)
    return float(difference / max(np.abs(wanted).max(initial=0.0), 1e-30)) if difference else 0.0


def text(proto: onnx.ModelProto) -> str:
    """The graph as ONNX text, its tensors' numbers left out."""
    lines = [f"opset {proto.opset_import[0].version}, IR {proto.ir_version}"]
    lines += [f"in  {v.name!r} {_dims(v)}" for v in proto.graph.input]
    lines += [f"    {t.name!r} {list(t.dims)}" for t in proto.graph.initializer]
    for node in proto.graph.node:
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute if node.op_type != "Constant"}
        lines.append(f"    {list(node.output)} = {node.op_type} {list(node.input)} {given or ''} {node.name!r}")
    return "\n".join([*lines, *(f"out {v.name!r} {_dims(v)}" for v in proto.graph.output)])


def _dims(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
