"""Where the quantizers of a model go: a target's table applied to a graph.

An activation has a grid when a node wants one on its input or gives one to its output. Two things move that:
a fused activation takes over the quantizer of the node in front of it, and a node that only moves values puts
its output on its input's grid, in both directions. Behind a layer whose kernel gives floats all stays in float up to
the next layer, unless it meets what is on a grid; what is joined as it leaves the model may stay in float. What never
has a grid: integers; values that do not come from the data (masks, positions); the inside of a function written out;
scores on their way to a Softmax once something is added to them, since a mask of minus infinity would take the whole
range.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeGuard

from qpipe.methods.placement.filters import Overridden
from qpipe.methods.placement.float_parts import decided, ending, spectra, sums
from qpipe.methods.placement.survival import Links, survivals
from qpipe.model.network.invariants import constant_tensor
from qpipe.model.structure.families import Joined
from qpipe.model.structure.layers import find_layers, initializers_behind
from qpipe.model.structure.opaque import read_values
from qpipe.model.structure.operands import computed_factors, find_operands
from qpipe.numerics.observers import weight_encoding
from qpipe.numerics.scheme import Scheme, TensorScheme, code_bounds

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx_ir as ir

    from qpipe.methods.placement.target import Target
    from qpipe.model.network.network import Network
    from qpipe.model.structure.operands import Operand
    from qpipe.numerics.grid import Encoding


@dataclass(frozen=True)
class Placement:
    """Which tensors of a model get a grid.

    - `weights`: initializer -> its scheme, and the axis of the channels (per_channel) or of the blocks
      (per_block; a weight that cannot be cut into whole blocks is per_channel instead);
    - `in_float`: the other weights, each with the reason, in a clause;
    - `turned`: weights whose channels not all that multiply by them count along one axis -> these nodes, the one
      whose axis it is first;
    - `activations`: value -> its scheme, for those whose range has to be observed, in the graph's order;
    - `grids`: all activations that get one, in groups that must have the same;
    - `shared`: the groups among `activations` of more than one value;
    - `follows`: value -> the value of its group whose range alone counts: what a Min or a Relu cuts off, or a
      MaxPool passes over, needs no code;
    - `survives`: value -> what counts of it, where those that read it pick or cut off (`survival`);
    - `fixed`: value -> the grid that the target prescribes; no value is both here and in `activations`;
    - `covered`: values among `activations` whose grid begins at 0 and ends at a power of two, at 1 at most;
    - `constants`: initializer -> its scheme, of what is added to an activation or multiplied with it.
    """

    weights: dict[str, tuple[TensorScheme, int]] = field(default_factory=dict)
    in_float: dict[str, str] = field(default_factory=dict)
    turned: dict[str, tuple[str, ...]] = field(default_factory=dict)
    activations: dict[str, TensorScheme] = field(default_factory=dict)
    grids: tuple[tuple[str, ...], ...] = ()
    follows: dict[str, str] = field(default_factory=dict)
    survives: dict[str, Links] = field(default_factory=dict)
    fixed: dict[str, Encoding] = field(default_factory=dict)
    covered: tuple[str, ...] = ()
    constants: dict[str, TensorScheme] = field(default_factory=dict)

    @property
    def shared(self) -> tuple[tuple[str, ...], ...]:
        return tuple(group for group in self.grids if len(group) > 1 and group[0] not in self.fixed)


def place(model: Network, target: Target, scheme: Scheme) -> Placement:
    """The quantizers that `target` wants in `model`, with the grids of `scheme`."""
    marks = _Marks(model, target)
    schemes = Overridden(model, scheme)
    chosen: dict[str, list[tuple[str, TensorScheme, int]]] = {}
    in_float = marks.in_float(model)
    for operand in find_operands(model):
        why = marks.why_float(operand)
        if why is None:
            asked = target.weight.settled(schemes.weight(operand.weight))
            given = (operand.name, *weight_scheme(operand, asked))
            chosen.setdefault(operand.weight, []).append(given)
        else:
            in_float.setdefault(operand.weight, why)
    weights = Placement(
        weights={name: each[0][1:] for name, each in sorted(chosen.items())},
        in_float={name: why for name, why in in_float.items() if name not in chosen},
        turned={
            name: tuple(node for node, _, _ in each)
            for name, each in chosen.items()
            if each[0][1].granularity != "per_tensor" and len({axis for _, _, axis in each}) > 1
        },
    )
    if scheme.activation is None:
        return weights
    marks.place()
    groups = marks.groups()
    grids = {name: each for group in groups if (each := schemes.activation(group)) for name in group}
    constants = _constants(marks, grids, schemes, weights)
    fixed = marks.fixed(grids, groups) | marks.looked_up(constants, groups)
    in_order = {name: grids[name] for name in marks.names if name in grids and name not in fixed}
    follows = {name: last for name, last in marks.follows(groups).items() if name not in fixed}
    survives = _reached(marks.survives, [name for name in in_order if name not in follows])
    in_float = {name: why for name, why in weights.in_float.items() if name not in constants}
    covered = tuple(name for name in marks.covered(groups) if name in in_order)
    return replace(
        weights, in_float=in_float, activations=in_order, grids=groups, follows=follows, survives=survives, fixed=fixed,
        covered=covered, constants=constants,
    )  # fmt: skip


def _constants(
    marks: _Marks, grids: Mapping[str, TensorScheme], schemes: Overridden, weights: Placement
) -> dict[str, TensorScheme]:
    """The schemes of constants that meet activations of 8 bits: like theirs, of 16 bits if only stored."""
    constants = {
        name: replace(grids[data], granularity="per_tensor", observer="minmax")
        for name, data in marks.constants.items()
        if data in grids and grids[data].bitwidth == 8 and name not in weights.weights
    }
    for name, data in marks.stored.items():
        beside = schemes.activation((data,))
        if beside is not None and beside.bitwidth == 8:
            constants[name] = replace(beside, bitwidth=16, granularity="per_tensor", observer="minmax")
    return constants


def _reached(survives: dict[str, Links], names: list[str]) -> dict[str, Links]:
    """Of `survives` what tells of `names`, at once or by way of others."""
    found: dict[str, Links] = {}
    while names:
        name = names.pop()
        if name in survives and name not in found:
            found[name] = survives[name]
            names += [link.other for link in survives[name] if link.other]
    return {name: found[name] for name in survives if name in found}


def weight_scheme(operand: Operand, scheme: TensorScheme) -> tuple[TensorScheme, int]:
    """The scheme of a weight and its axis: that of the output channels, or that of the blocks.

    What cannot be cut into whole blocks is per channel, and what has no channels of its own per tensor.
    """
    if scheme.granularity == "per_block":
        axis = operand.inner_axis
        if axis is not None and operand.shape[axis] % scheme.block_size == 0:
            return scheme, axis
        # ONNX blocks along one axis only: each place of a 3x3 kernel would have scales of its own.
        scheme = replace(scheme, granularity="per_channel", block_size=0)
    if scheme.granularity == "per_channel" and operand.channel_axis is None:
        scheme = replace(scheme, granularity="per_tensor")
    return scheme, operand.channel_axis or 0


class _Marks:
    """The values of one graph that are to have a grid, and which of them share one."""

    def __init__(self, model: Network, target: Target) -> None:
        from qpipe.methods.placement.filters import left_in_float
        from qpipe.model.structure.composite import find_composites

        self.graph, self.target = model.graph, target
        self.narrow = _narrow(model, target.one_channel)
        left = left_in_float(model.graph, target.nodes)
        self.left = replace(left, nodes=left.nodes | self.narrow)
        self.data = data_values(model.graph)
        self.data_names = {str(value.name) for value in self.data}
        self.composites = find_composites(model.graph, self.data, target.composite)
        self.spectra = spectra(model.graph, target.float_spectra)
        self.adds = {layer.add for layer in find_layers(model) if layer.add is not None}
        self.biased = {layer.name for layer in find_layers(model) if layer.add is not None}
        self.fused: set[ir.Node] = set()
        self.given: set[ir.Value] = set()
        """What comes out of its node on a grid, whoever reads it."""
        self.marked: dict[ir.Value, None] = {}
        self.joined: Joined[ir.Value] = Joined()
        self.softmax: list[ir.Value] = []
        self.constants: dict[str, str] = {}
        """Operands of elementwise nodes, and tables: the initializer -> the activation that it meets, or becomes."""
        self.tables: dict[str, list[str]] = {}
        self.stored: dict[str, str] = {}
        """Tables that are added in float, positions: the initializer -> the activation."""
        self.cut: dict[ir.Value, ir.Value] = {}
        self.survives = survivals(self.graph, self.data)
        self.names = [str(value.name) for value in self._values()]

    def why_float(self, operand: Operand) -> str | None:
        """Why a weight has no grid, in a clause; None where it gets one."""
        if operand.op_type not in self.target.weights:
            return f"the target '{self.target.name}' quantizes no weight of {operand.op_type}"
        if self.graph.node(operand.name) in self.narrow:
            return f"the target '{self.target.name}' leaves layers of one channel in float"
        if self.graph.node(operand.name) in self.spectra:
            return "it makes a spectrum, of which a logarithm is taken"
        if self.left.has(self.graph.node(operand.name)) or operand.weight in self.left.values:
            return "target.nodes leaves it in float"
        if operand.input not in self.data_names:
            return "what it multiplies does not come from the data"
        return None

    def in_float(self, model: Network) -> dict[str, str]:
        """Weights that are computed, and those of operators whose weights no target quantizes, each with the reason."""
        found = dict.fromkeys(computed_factors(model), "it is computed in the graph")
        for node in self.graph:
            if node.domain or not any(output in self.data for output in node.outputs):
                continue
            for value in (node.inputs[place] for place in _WITHOUT_GRID.get(node.op_type, ())):
                for source in initializers_behind(value) if value is not None else ():
                    tensor = constant_tensor(source)
                    if tensor is not None and _is_float(source) and len(tensor.shape) > 1 and tensor.size > 1:
                        why = f"the target '{self.target.name}' quantizes no weight of {node.op_type}"
                        found.setdefault(str(source.name), why)
        return found

    def place(self) -> None:
        """Marks every value that the target wants quantized, and joins those that share a grid."""
        inside = {node for composite in self.composites for node in composite.nodes}
        results = {composite.result: composite for composite in self.composites}
        share = self.target.share
        in_float = decided(self.graph, share) | ending(self.graph, self.target.float_ends, share) | self.spectra
        if self.target.float_outputs:
            added = sums(self.graph, self.target.float_sums, self.composites)
            in_float |= added
            for node in self.graph if self.target.tables else ():
                if node in added:
                    self._stored(node)
        for node in self.graph:
            composite = results.get(node.outputs[0])
            if composite is not None and not any(self.left.has(each) for each in composite.nodes):
                if self._meets_grid([composite.root]):
                    self._mark([composite.root])
                    self._give([composite.result])
            elif not (node in inside or node in in_float or self.left.has(node)):
                self._node(node)

    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The marked values by the grid they are on, in the graph's order, what is excluded left out."""
        members: dict[ir.Value, list[ir.Value]] = {}
        for value in self._values():
            members.setdefault(self.joined.leader(value), []).append(value)
        wanted = {self.joined.leader(value) for value in self.marked}
        groups = (
            tuple(str(v.name) for v in values if v.name not in self.left.values)
            for leader, values in members.items()
            if leader in wanted
        )
        return tuple(group for group in groups if group)

    def fixed(
        self, schemes: Mapping[str, TensorScheme], groups: Iterable[tuple[str, ...]]
    ) -> dict[str, Encoding]:
        """The outputs of Softmax, and what shares their grid: scale 2^-bitwidth, zero point qmin."""
        return {name: _unit_grid(schemes[name]) for name in self._of_softmax("fixed", groups)}

    def covered(self, groups: Iterable[tuple[str, ...]]) -> list[str]:
        """The same where the grid only has to cover what they give."""
        return self._of_softmax("covering", groups)

    def _of_softmax(self, kind: str, groups: Iterable[tuple[str, ...]]) -> list[str]:
        names = {str(value.name) for value in self.softmax} if self.target.softmax == kind else set()
        return [name for group in groups if names & set(group) for name in group]

    def looked_up(
        self, constants: Mapping[str, TensorScheme], groups: Iterable[tuple[str, ...]]
    ) -> dict[str, Encoding]:
        """What is looked up in tables, and what shares its grid: that of the table."""
        found = {}
        for name, outputs in self.tables.items():
            table = constant_tensor(self.graph.initializers[name])
            if name in constants and table is not None:
                encoding = weight_encoding(table.numpy(), constants[name], 0, name)
                reached = (group for group in groups if set(outputs) & set(group))
                found.update({each: encoding for group in reached for each in group})
        return found

    def _node(self, node: ir.Node) -> None:
        from qpipe.model.structure.composite import data_inputs

        op = node.op_type
        if op in self.target.tables and node.outputs[0] in self.data:
            self._table(node)
        if op in self.target.share or _picks(node):
            self._share(node, data_inputs(node, self.data))
            if not self.given.isdisjoint(node.inputs):
                self.given.update(node.outputs)
            return
        rule = self.target.quantize.get(op)
        if rule is None or node.outputs[0] not in self.data:
            return
        continues = op in self.target.weights or op == "Softmax" or node in self.fused or str(node.name) in self.adds
        if not continues and not self._meets_grid(node.inputs):
            return
        if node not in self.fused and str(node.name) not in self.adds:
            chosen = (
                node.inputs if rule.inputs is None else [node.inputs[i] for i in _within(rule.inputs, node)]
            )
            self._mark(chosen)
            if op in self.target.constants:
                self._constant(node)
        if op in self.target.bound and node not in self.fused:
            self._bound(node)
        if rule.outputs:
            self._mark_output(node)

    def _mark_output(self, node: ir.Node) -> None:
        """Marks the output, unless the next node is computed in the same kernel and has the quantizer."""
        from qpipe.model.structure.composite import only_consumer

        if str(node.name) in self.biased:
            return
        op = "MatMul" if str(node.name) in self.adds else node.op_type
        if op in self.target.float_outputs:
            return
        following = only_consumer(node.outputs[0])
        if (
            following is not None
            and following.op_type in self.target.fused.get(op, ())
            and not self.left.has(following)
            and all(v is None or v.is_initializer() for v in following.inputs[1:])
        ):
            self.fused.add(following)
            return
        self._give(node.outputs)
        if node.op_type == "Softmax":
            self.softmax.append(node.outputs[0])

    def _meets_grid(self, inputs: Iterable[ir.Value | None]) -> bool:
        """Whether one of `inputs` is on a grid anyway; always where no layer gives floats."""
        return not self.target.float_outputs or not self.given.isdisjoint(inputs)

    def _give(self, values: Iterable[ir.Value]) -> None:
        self._mark(values)
        self.given.update(values)

    def _mark(self, values: Iterable[ir.Value | None]) -> None:
        self.marked.update({value: None for value in values if value is not None and value in self.data})

    def _constant(self, node: ir.Node) -> None:
        """A constant operand has a grid of its own, without which the node has no integer kernel; one that others read
        too has it where it is one number, which any grid over it holds exactly."""
        import numpy as np

        for value, other in (node.inputs, node.inputs[::-1]):
            tensor = None if value is None or not value.is_initializer() else value.const_value
            if value is None or tensor is None or not _is_float(value) or value.name in self.left.values:
                continue
            if node.op_type == "PRelu" and tensor.size == 1:
                continue  # it is written as a LeakyRelu, whose slope is no tensor
            own = tensor.size == 1 or len(value.uses()) == 1
            if other is not None and other in self.data and own and np.isfinite(tensor.numpy()).all():
                self.constants[str(value.name)] = str(other.name)

    def _table(self, node: ir.Node) -> None:
        """A table has a grid, and what is looked up in it the same, where that leaves it near enough to what it is."""
        value = node.inputs[0]
        if self._is_table(value) and all(reader.op_type == node.op_type for reader in value.consumers()):
            self.constants[str(value.name)] = str(node.outputs[0].name)
            self._mark(node.outputs)
            self.tables.setdefault(str(value.name), []).append(str(node.outputs[0].name))

    def _stored(self, node: ir.Node) -> None:
        """A table of positions that is added in float has one of 16 bits, which halves its bytes and changes nothing:
        with 8 a ViT lost 0.7 dB."""
        for value, other in (node.inputs, node.inputs[::-1]):
            if other in self.data and self._is_table(value) and len(value.uses()) == 1 and not self.left.has(node):
                self.stored[str(value.name)] = str(other.name)

    def _is_table(self, value: ir.Value | None) -> TypeGuard[ir.Value]:
        """Whether a constant is large, and 8 bits leave it near enough to what it is."""
        tensor = None if value is None or not value.is_initializer() else value.const_value
        if value is None or tensor is None or tensor.size < _TABLE or value.name in self.left.values:
            return False
        return _is_float(value) and _fits_8_bits(tensor.numpy())

    def _share(self, node: ir.Node, inputs: list[ir.Value]) -> None:
        outputs = [value for value in node.outputs if value in self.data]
        if inputs:
            self.joined.join(inputs[0], [*inputs[1:], *outputs])

    def _bound(self, node: ir.Node) -> None:
        """The input goes onto the output's grid, where nobody else reads it and the bounds are constants. So does each
        that is joined and has come from a kernel of its own, which then rounds it once and not twice."""
        from qpipe.model.structure.composite import data_inputs, only_consumer

        data = data_inputs(node, self.data)
        if node.op_type == "Concat":
            chosen = [value for value in data if self._computed(value)]
        else:
            chosen = data if len(data) == 1 and all(v is data[0] or _is_constant(v) for v in node.inputs) else []
        for value in chosen:
            if only_consumer(value) is node:
                self.cut[value] = node.outputs[0]
                self.joined.join(value, [node.outputs[0]])

    def _computed(self, value: ir.Value) -> bool:
        """Whether a value is computed, not moved from what others may read, and on no grid that its kernel wants."""
        node = value.producer()
        return node is not None and not (node.op_type in self.target.share or node.op_type == "Softmax" or _picks(node))

    def follows(self, groups: Iterable[tuple[str, ...]]) -> dict[str, str]:
        """What is cut off or passed over afterwards, and the last value of its group that it comes down to."""
        found = {}
        bounded = {str(value.name): str(after.name) for value, after in self.cut.items()}
        for group in groups:
            picked = {
                name: self.survives[name][0].other
                for name in group
                if name in self.survives and all(link.same and link.other in group for link in self.survives[name])
            }
            cut = picked | bounded
            for name in group:
                last = name
                while last in cut:
                    last = cut[last]
                if last != name and last in group:
                    found[name] = last
        return found

    def _values(self) -> list[ir.Value]:
        """All activations in the graph's order."""
        produced = (output for node in self.graph for output in node.outputs)
        return [value for value in [*self.graph.inputs, *produced] if value in self.data]


_WITHOUT_GRID = {"Gather": (0,), "LSTM": (1, 2), "GRU": (1, 2), "RNN": (1, 2), "DeformConv": (1,)}
"""Operators whose weights no target quantizes: which of their inputs."""


_TABLE = 1 << 12
"""Elements from which on a table is worth a grid."""
_NEAR_DB = 30.0


def _fits_8_bits(table: npt.NDArray[Any]) -> bool:
    """Whether one grid of 8 bits over `table` has noise, step^2 / 12, of at most -30 dB of what it holds."""
    import numpy as np

    step = (max(float(table.max()), 0.0) - min(float(table.min()), 0.0)) / 255
    power = float(np.mean(np.square(table), dtype=np.float64))
    return bool(np.isfinite(power)) and power * 12 >= step**2 * 10 ** (_NEAR_DB / 10)


def _unit_grid(scheme: TensorScheme) -> Encoding:
    """The grid over [0, 1) that an integer Softmax assumes."""
    import numpy as np

    from qpipe.numerics.grid import Encoding

    qmin, _ = code_bounds(scheme.bitwidth, scheme.signed)
    step = np.asarray(2.0**-scheme.bitwidth, np.float32)
    return Encoding(scheme.bitwidth, scheme.signed, False, step, np.asarray(qmin, np.int32))


def data_values(graph: ir.Graph) -> set[ir.Value]:
    """The float values that follow from a float input, from an embedding, or from integers that a layer reads as
    numbers (an image of bytes, counts); not masks, not positions.

    Codes that stayed codes are none, nor is the scale that goes with them; what they stand for is."""
    return _following(graph, counted_values(graph))


def counted_values(graph: ir.Graph) -> set[ir.Value]:
    """The float values that follow from integer inputs alone and that lead to what a layer reads: what is cast, one-hot
    or computed from them. What becomes an angle is a position, and what only meets data later a mask: not these."""
    others = _following(graph, set())
    counted = {value for value in graph.inputs if value.dtype is not None and value.dtype.is_integer()}
    for node in graph:
        if node.op_type not in _MEASURES and any(value in counted for value in read_values(node)):
            counted.update(value for value in node.outputs if value.name and value not in others)
    layers = [node for node in graph if node.op_type in _LAYERS and not node.domain]
    angles = _leading(counted, [value for node in graph if node.op_type in _ANGLES for value in node.inputs])
    read = _leading(counted, [value for node in layers for value in node.inputs], _ANGLES)
    return {value for value in read - angles if _is_float(value)}


_LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_ANGLES = frozenset({"Sin", "Cos"})
_MEASURES = frozenset({"Shape", "Size"})


def _leading(
    within: set[ir.Value], ends: Iterable[ir.Value | None], stops: frozenset[str] = frozenset()
) -> set[ir.Value]:
    """The values of `within` that lead to `ends`, these included, by way of no operator of `stops`."""
    found: set[ir.Value] = set()
    pending = list(ends)
    while pending:
        value = pending.pop()
        if value is None or value in found or value not in within:
            continue
        found.add(value)
        producer = value.producer()
        if producer is not None and producer.op_type not in stops:
            pending += producer.inputs
    return found


def _following(graph: ir.Graph, more: set[ir.Value]) -> set[ir.Value]:
    """The float values that follow from float inputs, from `more` and from embeddings."""
    data = {v for v in graph.inputs if v.dtype is not None and v.dtype.is_floating_point()} | more
    for node in graph:
        if node.op_type == "DynamicQuantizeLinear":
            continue
        table = constant_tensor(node.inputs[0]) if node.op_type == "Gather" and node.inputs else None
        embedding = table is not None and table.size > 1
        decoded = node.op_type == "DequantizeLinear"
        if embedding or decoded or any(value in data for value in read_values(node)):
            data.update(value for value in node.outputs if value.name and _is_float(value))
    return {value for value in data if _is_float(value)}


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.name == "FLOAT"  # 8-bit floats are codes


def _picks(node: ir.Node) -> bool:
    """Resize by nearest neighbours moves values only."""
    return node.op_type == "Resize" and node.attributes.get_string("mode", "nearest") == "nearest"


def _narrow(model: Network, op_types: Iterable[str]) -> frozenset[ir.Node]:
    """The layers of `op_types` with one channel in and one out."""
    chosen = [layer for layer in find_layers(model) if layer.op_type in op_types]
    return frozenset(
        model.graph.node(layer.name) for layer in chosen if layer.weight_shape[:2] == (1, 1) and layer.groups == 1
    )


def _is_constant(value: ir.Value | None) -> bool:
    return value is None or value.is_initializer()


def _within(positions: tuple[int, ...], node: ir.Node) -> list[int]:
    return [i for i in positions if i < len(node.inputs)]
