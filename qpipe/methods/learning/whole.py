"""A whole quantized network as a function of what is learned, and the network that has what came of it.

    weights         on their grids (straight through the rounding), the scales of the grids with them
    step sizes      of activations; those that share a grid since numbers only move between them go together. Or both
                    ends of their ranges (`ranges`), where zero points may move
    biases, norms   in float; the model's own rule rounds biases when all is done

Grids that a target prescribes stay: scales that are powers of two, those of looked-up tables, and zero points that are
not learned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx
from torch.func import functional_call

from qpipe.errors import InputError
from qpipe.methods.learning.objective import Objective, Targets
from qpipe.methods.learning.stretch import groups
from qpipe.model.network.network import Network
from qpipe.model.simulation.constants import taken_in
from qpipe.model.simulation.module import to_torch, value_nodes
from qpipe.model.simulation.run import run
from qpipe.model.simulation.samples import batch_axes, batches
from qpipe.model.structure.blocks import find_blocks
from qpipe.model.structure.layers import find_layers
from qpipe.model.structure.opaque import is_opaque
from qpipe.model.structure.operands import find_operands
from qpipe.numerics.fake_quantize import FakeQuantize
from qpipe.numerics.learning.cells import powers_of_two
from qpipe.numerics.learning.optimize import Learned, Learning
from qpipe.numerics.learning.options import LearningOptions
from qpipe.numerics.learning.roundings import start
from qpipe.numerics.learning.variables import Ends, Free, Step, Variable
from qpipe.numerics.metrics import counting

if TYPE_CHECKING:
    from qpipe.numerics.grid import Encoding

Array = npt.NDArray[Any]
Memo = Callable[..., Any]
NORMS = frozenset({"LayerNormalization", "GroupNormalization", "InstanceNormalization", "BatchNormalization"})
"""Operators whose second and third input are a float scale and shift of each channel."""
SEEN = 32
"""Samples at once where nothing is learned."""
OF_BLOCKS = 256
"""Samples from which the variances of blocks' outputs are taken."""


@dataclass(frozen=True)
class Learnable:
    """What of a network is learned, by the names of initializers and of activations: `weights` on grids, `biases`,
    `norms`, and `steps`, {the activation that leads its grid: all that are on it}."""

    weights: tuple[str, ...]
    biases: tuple[str, ...]
    norms: tuple[str, ...]
    steps: Mapping[str, tuple[str, ...]]


def learnable(model: Network) -> Learnable:
    """All that can be learned in `model`."""
    graph, encodings = model.graph, model.encodings
    weights = dict.fromkeys(operand.weight for operand in find_operands(model) if operand.weight in encodings)
    biases = dict.fromkeys(
        layer.bias for layer in find_layers(model) if layer.bias is not None and layer.bias not in encodings
    )
    inputs = [v for node in graph if node.op_type in NORMS and not node.domain for v in node.inputs[1:3]]
    norms = dict.fromkeys(str(v.name) for v in inputs if v is not None and v.is_initializer() and v.dtype is not None)
    floats = (name for name in norms if name not in encodings and model.param(name).dtype == np.float32)
    fixed = {grid_of(encodings[name]) for name in encodings if name in graph.initializers}
    steps = {
        leader: tuple(members)
        for leader, members in groups(model).items()
        if not powers_of_two(encodings[leader])
        and encodings[leader].axis is None
        and grid_of(encodings[leader]) not in fixed  # what is looked up is on the grid of its table
    }
    return Learnable(tuple(weights), tuple(biases), tuple(floats), steps)


def grid_of(encoding: Encoding) -> tuple[Any, ...]:
    """What two grids have in common that are one."""
    return encoding.bitwidth, encoding.signed, encoding.scale.tobytes(), encoding.zero_point.tobytes()


class Whole:
    """`model` over the samples of `arrays`; `targets` are what its `outputs` have to be, by name, (n, ...) each.

    `like` is the float model whose blocks' outputs are to be met as well, None for none; `ranges` learns both ends of
    the ranges of activations whose zero points are free."""

    def __init__(
        self,
        model: Network,
        arrays: Mapping[str, Array],
        targets: Mapping[str, Array],
        labels: Array | None = None,
        *,
        like: Network | None = None,
        ranges: bool = False,
        device: str = "cpu",
    ) -> None:
        self.model, self.arrays, self.device = model, dict(arrays), device
        self.learnable = learnable(model)
        self.ranged = frozenset(name for name in self.learnable.steps if ranges and not model.encodings[name].symmetric)
        self.blocks = () if like is None else block_outputs(model)
        self._like = None if like is None else to_torch(like, quantized=False, device=device)
        self.names = tuple(targets)
        self.targets = [torch.from_numpy(np.ascontiguousarray(each)).to(device) for each in targets.values()]
        self.labels = None if labels is None else torch.tensor(labels).to(device)
        self._axes = batch_axes(model)
        specs = [spec.name for spec in model.outputs]
        self._places = [specs.index(name) for name in self.names]
        self.module = to_torch(without_weight_grids(model, self.learnable.weights), device=device)
        if self._like is not None:
            _show(self.module, self.blocks)
            _show(self._like, self.blocks, alone=True)
        parameters, quantizers = self.module.meta["parameters"], self.module.meta["quantizers"]
        learned = (*self.learnable.weights, *self.learnable.biases, *self.learnable.norms)
        self._attributes = {name: [parameters[name]] for name in learned if name in parameters}
        for leader, members in self.learnable.steps.items():
            attributes = dict.fromkeys(quantizers[name] for name in members)
            self._attributes[leader] = [f"{attribute}.scale" for attribute in attributes]
            for attribute in attributes:
                quantizer = self.module.get_submodule(attribute)
                assert isinstance(quantizer, FakeQuantize)
                quantizer.learn_scale(zero_point=leader in self.ranged)

    @property
    def samples(self) -> int:
        """How many there are."""
        return len(self.targets[0])

    def batch(self, index: Tensor, draw: torch.Generator | None = None) -> tuple[Tensor, Targets]:
        """(the samples themselves, what the outputs have to be for them; while learning the blocks' outputs, too)."""
        blocks = () if draw is None or self._like is None else self._of_float(index)
        labels = None if self.labels is None else self.labels[index]
        return index, Targets([y[index] for y in self.targets], labels, blocks)

    def block_variances(self) -> tuple[float, ...]:
        """The variance of each block's output in the float model, over all its numbers; 1 for one that never moves."""
        sums = np.zeros((len(self.blocks), 3))
        for index in torch.split(torch.arange(min(self.samples, OF_BLOCKS)), SEEN):
            found = [value.double() for value in self._of_float(index)]
            sums += [[value.numel(), float(value.sum()), float(value.square().sum())] for value in found]
        means, squares = sums[:, 1] / sums[:, 0], sums[:, 2] / sums[:, 0]
        moves = squares - np.square(means) > 1e-12 * squares  # less is rounding
        return tuple(np.where(moves, squares - np.square(means), 1.0).tolist())

    def _of_float(self, index: Tensor) -> list[Tensor]:
        """What the float model's blocks give, flattened."""
        assert self._like is not None
        with torch.no_grad():
            return _joined([self._like(*inputs) for inputs, _ in self._fed(index)])

    def _fed(self, index: Tensor) -> list[tuple[tuple[Any, ...], int]]:
        """The inputs of the batches that these samples make, and how many of each count."""
        rows = {name: array[index.numpy()] for name, array in self.arrays.items()}
        found = batches(self.model, rows, len(index))
        return [(tuple(taken_in(array, self.device) for array in batch.arrays), batch.count) for batch in found]

    def __call__(
        self, values: Mapping[str, Tensor], index: Tensor, draw: torch.Generator | None = None
    ) -> list[Tensor]:
        """The outputs for these samples, with these values by name, (n, ...) each; while learning (`draw`) those of
        blocks behind them, flattened."""
        given = self._given(values)
        parts: list[list[Tensor]] = []
        seen: list[Sequence[Tensor]] = []
        for inputs, count in self._fed(index):
            found = functional_call(self.module, given, inputs)
            outputs = found if isinstance(found, tuple | list) else (found,)
            fed = self._axes.size or count
            parts.append([self._rows(outputs[place], place, fed)[:count] for place in self._places])
            seen.append(outputs[len(outputs) - len(self.blocks) :])
        own = parts[0] if len(parts) == 1 else [torch.cat(each) for each in zip(*parts, strict=True)]
        return own if draw is None else [*own, *_joined(seen)]

    def _given(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        given = {}
        for name, tensor in values.items():
            for place in self._attributes.get(name, ()):
                if name in self.ranged:
                    given[place], given[place.removesuffix("scale") + "zero_point"] = tensor[0], tensor[1]
                else:
                    given[place] = tensor
        return given

    def _rows(self, output: Tensor, place: int, fed: int) -> Tensor:
        axis = self._axes.outputs[place]
        if axis is None and fed == 1:
            return output if output.ndim and len(output) == 1 else output[None]
        if axis is None or output.ndim <= axis or output.shape[axis] != fed:
            name = self.names[self._places.index(place)]
            raise InputError(f"The output '{name}' does not tell its samples apart, so that nothing is learned on it.")
        return output.movedim(axis, 0)

    def start(self, float_model: Network, *, learn_scales: bool = True) -> dict[str, Variable]:
        """The variables, which are at first what `model` has; `float_model` says where between codes weights lie."""
        found: dict[str, Variable] = {}
        tables = {str(v.name) for node in self.model.graph if node.op_type == "Gather" for v in node.inputs[:1] if v}
        for name in self.learnable.weights:
            encoding = self.model.encodings[name]
            scales = learn_scales and not powers_of_two(encoding) and name not in tables
            weight, now = (torch.tensor(each.param(name), device=self.device) for each in (float_model, self.model))
            margin = 0.0 if encoding.bitwidth <= 2 else 0.45
            found[name] = start("ste_weight", weight, now, encoding, learn_scale=scales, margin=margin)
        for name in self.learnable.biases:
            found[name] = Free(torch.tensor(self.model.param(name), device=self.device))
        for name in self.learnable.norms:
            found[name] = Free(torch.tensor(self.model.param(name), device=self.device), "norm")
        for leader in self.learnable.steps:
            kind = Ends if leader in self.ranged else Step
            found[leader] = kind(self.model.encodings[leader], device=self.device)
        return {name: variable for name, variable in found.items() if name in self._attributes}

    def finished(self, learned: Learned) -> Network:
        """The network with what was learned; its weights are frozen on their grids."""
        editor = self.model.edit()
        for name, value in learned.values.items():
            encoding = learned.encodings.get(name)
            if name in self.learnable.steps:
                assert encoding is not None
                for member in self.learnable.steps[name]:
                    old, zero_point = editor.encodings[member], encoding.zero_point
                    editor.encodings[member] = replace(old, scale=encoding.scale, zero_point=zero_point)
                continue
            editor.set_param(name, value.cpu().numpy())
            if encoding is not None:
                editor.encodings[name] = encoding
        return editor.model()


def block_outputs(model: Network) -> tuple[str, ...]:
    """The values in which the blocks of `model` end, but for its outputs."""
    outputs = {spec.name for spec in model.outputs}
    return tuple(block.output for block in find_blocks(model) if block.output not in outputs)


def _show(module: fx.GraphModule, names: Sequence[str], alone: bool = False) -> None:
    """Lets `module` give these values, as their readers see them, behind its outputs, or `alone`."""
    nodes = value_nodes(module)
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    before = output.args[0] if isinstance(output.args[0], tuple) else (output.args[0],)
    output.args = ((*(() if alone else before), *(nodes[name] for name in names)),)
    module.graph.eliminate_dead_code()
    module.recompile()


def _joined(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Each value of several batches as one row of numbers."""
    return [torch.cat([value.flatten() for value in each]) for each in zip(*parts, strict=True)]


def without_weight_grids(model: Network, weights: Sequence[str]) -> Network:
    """`model` whose `weights` have no quantizer, and whose biases are float."""
    kept = {name: encoding for name, encoding in model.encodings.items() if name not in weights}
    return model.with_facts(biases="float").with_encodings(kept)


def targets_of(
    float_model: Network, arrays: Mapping[str, Array], only: Sequence[str], device: str = "cpu"
) -> dict[str, Array]:
    """What the float model's outputs that count are for the samples, by name."""
    found = run(float_model, arrays, batch_size=SEEN, quantized=False, device=device)
    return {name: array for name, array in counting(found, tuple(only)).items() if array.dtype.kind == "f"}


def refuse_unlearnable(whole: Whole, stage: str) -> None:
    """Errors: InputError where nothing is there to be learned, or the outputs have no gradient."""
    found = whole.learnable
    if not found.weights and not found.steps:
        raise InputError(f"{stage}: the model has no grid that could be learned. Put 'calibrate' before '{stage}'.")
    values = {name: v.value() for name, v in whole.start(whole.model).items()}
    if not any(output.requires_grad for output in whole(values, torch.arange(1))):
        opaque = [str(node.name) for node in whole.model.graph if is_opaque(node)]
        raise InputError(
            f"{stage}: no gradient reaches the weights from the outputs {', '.join(whole.names)}: what is between runs "
            f"in onnxruntime ({', '.join(opaque) or 'integers'}). Name other outputs, or leave {stage} out."
        )


def trained(
    whole: Whole,
    float_model: Network,
    objective: Objective,
    options: LearningOptions,
    *,
    said: Sequence[Any],
    seed: int,
    memo: Memo,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Network, dict[str, Any]]:
    """The network with all of it learned, or as it was where held-out samples or those learned on do not gain, and the
    report. The state after each look is a sub-result of the cache, so that what was interrupted goes on; `said` are
    JSON values that say what else, beside options and data, the objective depends on."""
    learning = Learning(
        whole.start(float_model), whole, whole.batch, whole.samples,
        options=options, loss=objective.loss, judge=objective.judge, seed=seed, progress=progress,
    )  # fmt: skip
    weights = {name: float_model.param(name) for name in whole.learnable.weights}
    targets = dict(zip(whole.names, (t.cpu().numpy() for t in whole.targets), strict=True))
    labels = None if whole.labels is None else whole.labels.cpu().numpy()
    said = [*said, sorted(whole.ranged)]
    problem = [content_of(whole.model), weights, whole.arrays, targets, labels, asdict(options), said, seed]
    state = packed(learning.state())
    while not learning.over:
        until = learning.done + options.every

        def go(*_: Any, until: int = until) -> dict[str, Any]:
            learning.run(until)
            return packed(learning.state())

        state = memo("learned", go, problem, until, state)
        learning.load(unpacked(state))
    learned = learning.learned()
    report = learned.report
    for key in ("outputs_before", "outputs_after"):
        if key in report:
            report[key] = dict(zip(whole.names, report[key], strict=True))
    if report["tuning_after"] > report["tuning_before"]:  # few held-out samples gain by chance; those learned on, too?
        values = {name: v.final() for name, v in whole.start(float_model).items()}
        encodings = {name: encoding for name, (_, encoding) in values.items() if encoding is not None}
        report |= {"kept": "before", "changed": 0.0}
        learned = Learned({name: value for name, (value, _) in values.items()}, encodings, report)
    return whole.finished(learned), report


def content_of(model: Network | None) -> list[Any]:
    """All that a model computes with, as a sub-result's inputs; nothing for none."""
    if model is None:
        return []
    meta, blobs = Network(model.ir, model.encodings).pack()
    return [meta, {name: np.frombuffer(blob, np.uint8) for name, blob in sorted(blobs.items())}]


def packed(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state of learning as arrays by path, and the JSON values beside them."""
    arrays: dict[str, Array] = {}

    def taken(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            arrays[path] = value.detach().cpu().numpy().copy()
            return {"tensor": path}
        if isinstance(value, Mapping):
            return {"mapping": {str(key): taken(item, f"{path}.{key}") for key, item in value.items()}}
        if isinstance(value, list | tuple):
            return [taken(item, f"{path}.{place}") for place, item in enumerate(value)]
        return value

    return {"tree": taken(state, "state"), **arrays}


def unpacked(found: Mapping[str, Any]) -> Any:
    """What `packed` took apart."""

    def given(value: Any) -> Any:
        if isinstance(value, Mapping) and "tensor" in value:
            return torch.tensor(found[value["tensor"]])
        if isinstance(value, Mapping):
            return {key: given(item) for key, item in value["mapping"].items()}
        return [given(item) for item in value] if isinstance(value, list) else value

    return given(found["tree"])
