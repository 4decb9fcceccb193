"""One part as a torch module that is called with the tensors that are learned: the quantized one, differentiable.

Weights come in as they shall count, on their grids already; biases in float, since the model's own rule rounds them
when all is done; the quantizers of activations inside are active, with the step sizes that come in. The quantizer of an
input belongs to the part, that of the output to who reads it, unless `output_qdq`.

While it learns, and then alone,

    inputs        each element is x^ with probability `share`, x otherwise      (Quark's DropRatio; 1: x^ alone)
    quantizers    each element passes unrounded with probability `drop`         (QDrop)

Source: Wei et al., "QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization", arXiv
2203.05740.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.func import functional_call

from qpipe.methods.learning.carry import TOGETHER, Held, feed
from qpipe.model.network.parts import block
from qpipe.model.simulation.module import BOUNDING, to_torch, watched
from qpipe.model.structure.families import MOVING, Joined
from qpipe.numerics.fake_quantize import FakeQuantize
from qpipe.numerics.grid import quantize_dequantize, same_grid

if TYPE_CHECKING:
    from qpipe.methods.learning.parts import Part
    from qpipe.model.network.network import Network
    from qpipe.numerics.grid import Encoding


@dataclass(frozen=True)
class Randomness:
    """What is drawn in each step: see above."""

    share: float = 1.0
    drop: float = 0.0


@dataclass(frozen=True, eq=False)
class Problem:
    """What a part sees and has to give, over all units: x^, x and y, and by what errors in y are weighed, if at all."""

    x_hat: Sequence[Held]
    x: Sequence[Held]
    y: Held
    weights: Held | None = None

    @property
    def alone(self) -> bool:
        """Whether units go through one by one."""
        return any(value.layout is None for value in (*self.x_hat, *self.x, self.y))

    def target(self, index: Tensor, device: str) -> Tensor | tuple[Tensor, Tensor]:
        """y for these units, and the weights of its errors beside it where there are any; units that go one by one are
        stacked in front."""
        y = self._of(self.y, index, device)
        return y if self.weights is None else (y, self._of(self.weights, index, device))

    def _of(self, held: Held, index: Tensor, device: str) -> Tensor:
        rows: Tensor = held.of(index.numpy())
        return (rows if self.alone or held.layout is None else held.layout.joined(rows)).to(device)


class Stretch:
    """`part` of `model`, quantized, over the units of `problem`. `steps` are the grids of the activations inside that
    may be learned here, {the value that leads its group: its encoding}."""

    def __init__(
        self,
        model: Network,
        part: Part,
        problem: Problem,
        *,
        activations: bool = True,
        output_qdq: bool = False,
        random: Randomness | None = None,
        device: str = "cpu",
    ) -> None:
        self.problem, self._random, self._device = problem, random or Randomness(), device
        self.model = learnable_block(model, part, activations, output_qdq)
        self.module = to_torch(self.model, device=device)
        self._draw: torch.Generator | None = None
        self._places = {name: [place] for name, place in self.module.meta["parameters"].items()}
        quantizers: Mapping[str, str] = self.module.meta["quantizers"]
        self.steps: dict[str, Encoding] = {}
        for leader, members in free_groups(model, self.model, part, output_qdq).items():
            attributes = dict.fromkeys(quantizers[name] for name in members)
            self.steps[leader] = self.model.encodings[next(iter(members))]
            self._places[leader] = [f"{attribute}.scale" for attribute in attributes]
        if self._random.drop:
            for attribute in dict.fromkeys(quantizers.values()):
                self.module.get_submodule(attribute).register_forward_hook(self._dropped)

    def learn_steps(self) -> None:
        """From now on the scales of `steps` come in with each call."""
        for leader in self.steps:
            for place in self._places[leader]:
                quantizer = self.module.get_submodule(place.removesuffix(".scale"))
                assert isinstance(quantizer, FakeQuantize)
                quantizer.learn_scale()

    def measured(self) -> tuple[dict[str, int], dict[str, float]]:
        """By value, over the first units: how many numbers a unit has in it, and their root mean square."""
        count = min(TOGETHER, len(self.problem.y.rows))
        calls = feed(self.problem.x_hat, np.arange(count), self._device, self.problem.alone)
        units = 1 if self.problem.alone else count
        features: dict[str, int] = {}
        size: dict[str, float] = {}

        def see(name: str, value: Tensor) -> None:
            if value.is_floating_point():
                features[name] = value.numel() // units
                size[name] = float(value.square().mean(dtype=torch.float64).sqrt())

        watched(self.module, calls[0], see, self._device)
        return features, size

    def batch(self, index: Tensor, draw: torch.Generator | None) -> tuple[Tensor, Any]:
        """(the units themselves, y for them): what a learner hands to `__call__`, and compares with."""
        return index, self.problem.target(index, self._device)

    def __call__(
        self, values: Mapping[str, Tensor], index: Tensor, draw: torch.Generator | None = None
    ) -> Tensor:
        """The outputs for these units with these weights, biases and scales, by name. `draw` is there while learning:
        what is random comes from it."""
        self._draw = draw
        given = {place: tensor for name, tensor in values.items() for place in self._places[name]}
        outputs = [functional_call(self.module, given, call) for call in self._calls(index.numpy())]
        return torch.stack(outputs) if self.problem.alone else outputs[0]

    def _calls(self, index: np.ndarray[Any, Any]) -> list[tuple[Any, ...]]:
        alone, device = self.problem.alone, self._device
        share = self._random.share
        if share <= 0.0:
            return feed(self.problem.x, index, device, alone)
        quantized = feed(self.problem.x_hat, index, device, alone)
        if share >= 1.0 or self._draw is None:
            return quantized
        plain = feed(self.problem.x, index, device, alone)
        return [
            tuple(self._mixed(a, b) for a, b in zip(one, other, strict=True))
            for one, other in zip(quantized, plain, strict=True)
        ]

    def _mixed(self, quantized: Any, plain: Any) -> Any:
        if not isinstance(quantized, Tensor) or not quantized.is_floating_point():
            return quantized
        return torch.where(self._drawn(quantized) < self._random.share, quantized, plain)

    def _dropped(self, quantizer: torch.nn.Module, given: tuple[Tensor, ...], rounded: Tensor) -> Tensor:
        if self._draw is None:
            return rounded
        return torch.where(self._drawn(rounded) < self._random.drop, given[0], rounded)

    def _drawn(self, like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=self._draw).to(like.device)


def learnable_block(model: Network, part: Part, activations: bool, output_qdq: bool) -> Network:
    """`part` of `model` as a model: the weights that are learned without a grid, other constants on theirs for good,
    biases in float."""
    cut = block(model, part.inputs, [part.output])
    weights, constants = set(part.weights), {}
    encodings: dict[str, Encoding] = {}
    for name, encoding in cut.encodings.items():
        if name in cut.graph.initializers:
            if name not in weights:
                constants[name] = quantize_dequantize(cut.param(name), encoding, name)
        elif activations and (output_qdq or name != part.output):
            encodings[name] = encoding
    return cut.with_params(constants).with_facts(biases="float").with_encodings(encodings)


def own_biases(model: Network, part: Part) -> tuple[str, ...]:
    """The biases of the part's layers that nobody else reads and that have no grid of their own, once each."""
    names = dict.fromkeys(layer.bias for layer in part.layers if layer.bias is not None)
    used = model.graph.initializers
    return tuple(name for name in names if len(used[name].uses()) == 1 and name not in model.encodings)


def groups(model: Network) -> dict[str, list[str]]:
    """The activations that share a grid since an operator moves or bounds numbers between them: {the first: all}, in
    the order of the graph. Their steps go together."""
    joined: Joined[str] = Joined()
    for node in model.graph:
        if node.op_type not in MOVING | BOUNDING:
            continue
        for value in (*node.inputs, *node.outputs[1:]):
            ends = [str(v.name) for v in (node.outputs[0], value) if v is not None]
            grids = [model.encodings[end] for end in ends if _activation(model, end)]
            if len(grids) == 2 and same_grid(*grids):
                joined.join(ends[1], [ends[0]])
    found: dict[str, list[str]] = {}
    order = [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]
    for value in order:
        if _activation(model, str(value.name)):
            found.setdefault(joined.leader(str(value.name)), []).append(str(value.name))
    return {members[0]: members for members in found.values()}


def free_groups(model: Network, cut: Network, part: Part, output_qdq: bool) -> dict[str, list[str]]:
    """The groups of which nothing outside the part reads anything, {the first: those that have a quantizer in it}."""
    inside = {str(node.name) for node in cut.graph}
    values = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)
    free = {}
    for leader, members in groups(model).items():
        here = [name for name in members if name in cut.encodings]
        readers = {
            str(node.name)
            for name in members
            if not (output_qdq and name == part.output)
            for node in values[name].consumers()
            if node.op_type not in ("Shape", "Size")
        }
        if here and readers <= inside and model.encodings[leader].axis is None:
            free[leader] = here
    return free


def _activation(model: Network, name: str) -> bool:
    return name in model.encodings and name not in model.graph.initializers
