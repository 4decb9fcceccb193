"""AdaRound as published, one layer: which way to round each weight, learned on the outputs behind the activation.

    min over V of mean |f(W^ x~) - f(W x)|^2 + reg_param * sum(1 - |2 h(V) - 1|^beta)

x~ is x^, the layer's inputs in the quantized model, or element by element x^ with probability `drop_ratio` and x,
those in the float model, otherwise. Adam at a constant rate. Every tenth sample is held out and judges the roundings
as they would be for good: nearest rounding is kept where nothing was better.

Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", arXiv 2004.10568.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.fx import GraphModule
from torch.nn.functional import conv1d, conv2d, conv3d, linear

from qpipe.methods.placement.calibration import content
from qpipe.methods.rounding.walk import Rounded
from qpipe.model.network.parts import block
from qpipe.model.simulation.module import to_torch
from qpipe.model.structure.geometry import unfold_of
from qpipe.numerics.learning.losses import mse
from qpipe.numerics.learning.optimize import Batches, learn
from qpipe.numerics.learning.options import LearningOptions
from qpipe.numerics.learning.roundings import start
from qpipe.numerics.rounding.moments import HELD_OUT_EVERY
from qpipe.numerics.rounding.unfold import Unfold, sample_positions

if TYPE_CHECKING:
    from qpipe.model.network.network import Network
    from qpipe.model.structure.layers import Layer

Apply = Callable[[Tensor, Tensor], Tensor]
"""(weight, inputs of some samples) -> their outputs behind the activation."""
Cut = Callable[[Tensor, int], Tensor]
"""(a batch, the number of its first sample) -> what of it counts."""
Memo = Callable[..., Any]
CACHED_BYTES = 3 << 19
"""What a part of a batch may take as inputs or outputs, so that they stay in a core's cache: measured, on a CPU."""


@dataclass(frozen=True)
class GradientOptions:
    """The defaults are the paper's and AIMET's. `iterations` None: 10000, or 15000 below 8 bits.

    `early_stop` counts the looks without a gain after which to stop, 0 never stops; a look follows every 250 iterations
    once the warm start is over. `lr_adjust` (threshold, rate) takes that rate where the error of nearest rounding, as
    it is minimized, lies above the threshold. `drop_ratio` 1 learns on x^ alone, 0 on x alone.
    """

    iterations: int | None = None
    batch_size: int = 32
    lr: float = 1e-3
    reg_param: float = 0.01
    beta_range: tuple[float, float] = (20.0, 2.0)
    warm_start: float = 0.2
    early_stop: int = 0
    lr_adjust: tuple[float, float] | None = None
    drop_ratio: float = 1.0

    def iterations_for(self, bitwidth: int) -> int:
        """The iterations to run for weights of `bitwidth`."""
        return self.iterations if self.iterations is not None else (10000 if bitwidth >= 8 else 15000)

    def learning(self, bitwidth: int, at_once: int | None) -> LearningOptions:
        """The same for the loop that learns."""
        return LearningOptions(
            iterations=self.iterations_for(bitwidth),
            batch_size=self.batch_size,
            rates={"weight": self.lr},
            schedule="constant",
            check_every=250,
            early_stop=self.early_stop,
            at_once=at_once,
            lr_adjust=self.lr_adjust,
            reg_param=self.reg_param,
            beta_range=self.beta_range,
            warm_start=self.warm_start,
        )


@dataclass(frozen=True, eq=False)
class Problem:
    """A layer as something to learn. `inputs` and `given` are x^ and x, or their rows, with the samples along `axis`;
    `targets` have samples first, and their channels along `channel_axis`; `forward` takes the weight and the inputs of
    some samples to what the targets are of."""

    inputs: Tensor
    given: Tensor
    targets: Tensor
    axis: int
    channel_axis: int
    forward: Apply

    def batches(self, ratio: float) -> Batches:
        """Samples by their indices; while learning, an element of `inputs` gives way to `given` by 1 - `ratio`."""

        def batches(index: Tensor, draw: torch.Generator | None) -> tuple[Tensor, Tensor]:
            index = index.to(self.inputs.device)
            x, y = self.inputs.index_select(self.axis, index), self.targets.index_select(0, index)
            if draw is None or ratio >= 1.0:
                return x, y
            taken = torch.rand(x.shape, generator=draw).to(x.device) < ratio
            return torch.where(taken, x, self.given.index_select(self.axis, index)), y

        return batches

    def at_once(self) -> int | None:
        """How many samples run through the layer together: as many as a core's cache holds."""
        if self.inputs.is_cuda:
            return None
        samples = max(1, len(self.targets))
        largest = max(each.numel() * each.element_size() // samples for each in (self.inputs, self.targets))
        return max(1, CACHED_BYTES // max(1, largest))


def round_by_gradient(
    model: Network,
    layer: Layer,
    x_hat: Sequence[Tensor],
    x: Sequence[Tensor],
    *,
    options: GradientOptions,
    positions: int,
    seed: int,
    memo: Memo,
    progress: Callable[[int, int], None] | None = None,
) -> Rounded:
    """The layer's weight, rounded; the report has the error over the outputs' energy, on the samples held out.

    Only the outputs at `positions` places per sample count, drawn with `seed`; of a depthwise layer a window of about
    as many, of one whose activation differs from place to place, all.
    """
    encoding = model.encodings[layer.weight]
    posed = _posed(model, layer, x_hat, x, options.drop_ratio < 1.0, positions, seed)

    def run(*_: Any) -> dict[str, Any]:
        weight, samples = torch.tensor(model.param(layer.weight), device=x[0].device), len(posed.targets)
        learned = learn(
            {"weight": start("rectified_sigmoid", weight, weight, encoding)},
            lambda values, batch, draw: posed.forward(values["weight"], batch),
            posed.batches(options.drop_ratio),
            samples,
            options=options.learning(encoding.bitwidth, posed.at_once()),
            loss=mse(posed.channel_axis),
            held_out=_held_out(samples),
            seed=seed,
            progress=progress,
        )
        kept = "gradient" if learned.report["kept"] == "after" else "nearest"
        return {"weight": learned.values["weight"].cpu().numpy(), "report": {**learned.report, "kept": kept}}

    part = content(block(model, [layer.input], [layer.activation_output]))
    tensors = [posed.inputs, posed.targets, *([] if posed.given is posed.inputs else [posed.given])]
    data = [each.cpu().numpy() for each in tensors]
    found = memo("gradient", run, part, data, encoding.to_json(), asdict(options), seed)
    return Rounded(found["weight"], None, replace(encoding, frozen=True), found["report"])


def _held_out(samples: int) -> Tensor | None:
    """The samples that only judge, those that `gram` holds out too; None where there are fewer than five."""
    found = torch.arange(HELD_OUT_EVERY // 2 - 1, samples, HELD_OUT_EVERY)
    return found if len(found) else None


def _posed(
    model: Network, layer: Layer, x_hat: Sequence[Tensor], x: Sequence[Tensor], mixed: bool, positions: int, seed: int
) -> Problem:
    """The layer as a product of matrices at some places; a depthwise one, slower so, as itself on a window."""
    part = block(model, [layer.input], [layer.activation_output])
    module = to_torch(part, quantized=False, device=str(x[0].device))
    forward: Apply
    cuts: tuple[Cut, Cut]
    outputs = [_run(module, batch) for batch in x]
    unfold, shape, device = unfold_of(layer, tuple(x[0].shape[2:])), tuple(x[0].shape), x[0].device
    if _differs_by_place(model, layer) or (layer.depthwise and layer.op_type != "Conv"):
        forward, cuts, axis = _whole(module, layer), (_uncut, _uncut), 0
    elif layer.depthwise:
        forward, cuts, axis = _convolution(model, layer, device), _windows(unfold, shape, positions, seed), 0
    else:
        forward, cuts, axis = _product(model, layer, unfold, device), _places(unfold, shape, positions, seed), 1
    cut, after = cuts
    inputs = torch.cat(_each(cut, x_hat), axis)
    given = torch.cat(_each(cut, x), axis) if mixed else inputs
    channel_axis = 1 if axis == 0 and layer.kernel_shape else -1
    return Problem(inputs, given, torch.cat(_each(after, outputs)), axis, channel_axis, forward)


def _each(cut: Cut, batches: Sequence[Tensor]) -> list[Tensor]:
    """What `cut` takes of each batch, samples counted through."""
    firsts = itertools.accumulate((len(batch) for batch in batches), initial=0)
    return [cut(batch, first) for batch, first in zip(batches, firsts, strict=False)]


def _differs_by_place(model: Network, layer: Layer) -> bool:
    """Whether the activation reads a constant that is neither one number nor one a channel."""
    nodes = [node for node in model.graph if node.name in layer.activation]
    read = {str(value.name) for node in nodes for value in node.inputs if value is not None} & set(model.params)
    axis = -1 - len(layer.kernel_shape)
    shapes = [model.param(name).shape for name in read if model.param(name).size > 1]
    return any(len(s) < -axis or math.prod(s) != s[axis] or s[axis] != layer.channels for s in shapes)


def _uncut(batch: Tensor, first: int) -> Tensor:
    return batch


def _whole(module: GraphModule, layer: Layer) -> Apply:
    """(weight, inputs) -> outputs, by the layer as it is."""
    name = module.meta["parameters"][layer.weight]
    return lambda weight, batch: functional_call(module, {name: weight}, (batch,))


def _places(unfold: Unfold, shape: tuple[int, ...], positions: int, seed: int) -> tuple[Cut, Cut]:
    """How to take some places of each sample: the rows that lead to them, (groups, samples, places, K), and what is
    there, (samples, places, channels)."""
    count = math.prod(unfold.output_shape(shape))

    def rows(x: Tensor, first: int) -> Tensor:
        found = unfold.rows(x, sample_positions(count, positions, first, len(x), seed))
        return found.reshape(found.shape[0], len(x), -1, found.shape[-1])

    def outputs(y: Tensor, first: int) -> Tensor:
        flat = y.reshape(len(y), -1, y.shape[-1]) if unfold.kind == "linear" else y.flatten(2).transpose(1, 2)
        where = torch.tensor(sample_positions(count, positions, first, len(y), seed), device=y.device)
        return flat.take_along_dim(where[:, :, None], 1)

    return rows, outputs


def _windows(unfold: Unfold, shape: tuple[int, ...], positions: int, seed: int) -> tuple[Cut, Cut]:
    """How to take a window of about `positions` places of each sample: what it is computed from, and what is there."""
    sizes, rank = unfold.output_shape(shape), len(unfold.kernel_shape)
    window = tuple(min(size, math.ceil(positions ** (1 / rank) - 1e-9)) for size in sizes)
    reach = tuple(
        (window[i] - 1) * unfold.strides[i] + unfold.dilations[i] * (unfold.kernel_shape[i] - 1) + 1
        for i in range(rank)
    )
    before = replace(unfold, kernel_shape=reach, dilations=(1,) * rank, groups=1)
    after, starts = Unfold("conv", kernel_shape=window), math.prod(before.output_shape(shape))

    def cut(by: Unfold, batch: Tensor, first: int) -> Tensor:
        where = sample_positions(starts, 1, first, len(batch), seed)
        return by.rows(batch, where).reshape(len(batch), batch.shape[1], *by.kernel_shape)

    return partial(cut, before), partial(cut, after)


def _convolution(model: Network, layer: Layer, device: torch.device) -> Apply:
    """(weight, windows with their borders) -> outputs of a convolution behind its activation."""
    convolve = {1: conv1d, 2: conv2d, 3: conv3d}[len(layer.kernel_shape)]
    bias, tail = _bias(model, layer, device), _tail(model, layer, device)
    settings: dict[str, Any] = {"stride": layer.strides, "dilation": layer.dilations, "groups": layer.groups}

    def forward(weight: Tensor, windows: Tensor) -> Tensor:
        return tail(convolve(windows, weight, bias, **settings))

    return forward


def _product(model: Network, layer: Layer, unfold: Unfold, device: torch.device) -> Apply:
    """(weight, rows of some samples) -> outputs behind the activation, (samples, places, channels)."""
    bias, tail, ones = _bias(model, layer, device), _tail(model, layer, device), (1,) * len(layer.kernel_shape)

    def forward(weight: Tensor, rows: Tensor) -> Tensor:
        groups, samples, places, k = rows.shape
        matrix = unfold.weight_rows(weight)
        if groups == 1:
            y = linear(rows.reshape(-1, k), matrix[0], bias)
        else:
            by_group = torch.bmm(rows.reshape(groups, -1, k), matrix.transpose(1, 2))
            y = by_group.transpose(0, 1).reshape(-1, len(bias)) + bias
        shaped = y.reshape(-1, y.shape[-1], *ones) if ones else y.reshape(samples, places, -1)
        return tail(shaped).reshape(samples, places, -1)

    return forward


def _run(module: torch.nn.Module, batch: Tensor) -> Tensor:
    with torch.no_grad():
        outputs: Tensor = module(batch)
    return outputs


def _bias(model: Network, layer: Layer, device: torch.device) -> Tensor:
    """The bias, (channels,): zeros where there is none."""
    given = np.zeros(layer.channels, np.float32) if layer.bias is None else model.param(layer.bias).reshape(-1)
    return torch.tensor(given, device=device)


def _tail(model: Network, layer: Layer, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The activation."""
    if not layer.activation:
        return lambda y: y
    return to_torch(block(model, [layer.output], [layer.activation_output]), quantized=False, device=str(device))
