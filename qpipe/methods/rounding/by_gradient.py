"""AdaRound as published, one layer: which way to round each weight, learned on the outputs behind the activation.

    min over V of mean |f(W^ x~) - f(W x)|^2 + reg_param * sum(1 - |2 h(V) - 1|^beta)

x~ is x^, the layer's inputs in the quantized model, or element by element x^ with probability `drop_ratio` and x,
those in the float model, otherwise. Adam at a constant rate. Every seventh sample is held out and judges the roundings
as they would be for good: nearest rounding is kept where nothing was better.

Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", arXiv 2004.10568.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.func import functional_call

from qpipe.methods.placement.calibration import content
from qpipe.methods.rounding.walk import Rounded
from qpipe.model.network.parts import block
from qpipe.model.simulation.module import to_torch
from qpipe.model.structure.geometry import unfold_of
from qpipe.numerics.learning.losses import mse
from qpipe.numerics.learning.optimize import Batches, learn
from qpipe.numerics.learning.options import LearningOptions
from qpipe.numerics.learning.roundings import start
from qpipe.numerics.rounding.unfold import Unfold, sample_positions

if TYPE_CHECKING:
    from qpipe.model.network.network import Network
    from qpipe.model.structure.layers import Layer

Array = npt.NDArray[Any]
Memo = Callable[..., Any]
HELD_OUT = 7
"""Every so-manieth sample only judges."""
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
    learning_rate: float = 1e-3
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
            rates={"weight": self.learning_rate},
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
    forward: Callable[[Tensor, Tensor], Tensor]

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

    Only the outputs at `positions` places per sample count, drawn with `seed`; of a depthwise layer, and of one whose
    activation differs from place to place, all do.
    """
    encoding = model.encodings[layer.weight]
    mixed = options.drop_ratio < 1.0
    given = (model, layer, x_hat, x, mixed)
    posed = _whole(*given) if _is_whole(model, layer) else _rows(*given, positions, seed)

    def run(*_: Any) -> dict[str, Any]:
        weight, samples = torch.tensor(model.param(layer.weight), device=x[0].device), len(posed.targets)
        learned = learn(
            {"weight": start("rectified_sigmoid", weight, weight, encoding)},
            lambda values, batch, draw: posed.forward(values["weight"], batch),
            posed.batches(options.drop_ratio),
            samples,
            options=options.learning(encoding.bitwidth, posed.at_once()),
            loss=mse(posed.channel_axis),
            held_out=torch.arange(0, samples, HELD_OUT) if samples >= HELD_OUT else None,
            seed=seed,
            progress=progress,
        )
        kept = "gradient" if learned.report["kept"] == "after" else "nearest"
        return {"weight": learned.values["weight"].cpu().numpy(), "report": {**learned.report, "kept": kept}}

    part = content(block(model, [layer.input], [layer.activation_output]))
    data = [each.cpu().numpy() for each in (posed.inputs, posed.targets, *([posed.given] if mixed else []))]
    found = memo("gradient", run, part, data, encoding.to_json(), asdict(options), seed)
    return Rounded(found["weight"], None, replace(encoding, frozen=True), found["report"])


def _is_whole(model: Network, layer: Layer) -> bool:
    """Whether the layer runs as it is: a depthwise one is slower in rows; one that reads a constant for each place in
    its activation has none."""
    if layer.depthwise:
        return True
    nodes = [node for node in model.graph if node.name in layer.activation]
    read = {str(value.name) for node in nodes for value in node.inputs if value is not None} & set(model.params)
    axis = -1 - len(layer.kernel_shape)
    shapes = [model.param(name).shape for name in read if model.param(name).size > 1]
    return any(len(s) < -axis or math.prod(s) != s[axis] or s[axis] != layer.channels for s in shapes)


def _whole(model: Network, layer: Layer, x_hat: Sequence[Tensor], x: Sequence[Tensor], mixed: bool) -> Problem:
    """The layer with all that it puts out."""
    part = block(model, [layer.input], [layer.activation_output])
    module = to_torch(part, quantized=False, device=str(x[0].device))
    name = module.meta["parameters"][layer.weight]
    inputs, targets = torch.cat(list(x_hat)), torch.cat([_run(module, batch) for batch in x])
    given = torch.cat(list(x)) if mixed else inputs

    def forward(weight: Tensor, batch: Tensor) -> Tensor:
        outputs: Tensor = functional_call(module, {name: weight}, (batch,))
        return outputs

    return Problem(inputs, given, targets, 0, 1 if layer.kernel_shape else -1, forward)


def _rows(
    model: Network, layer: Layer, x_hat: Sequence[Tensor], x: Sequence[Tensor], mixed: bool, positions: int, seed: int
) -> Problem:
    """The layer as a product of matrices, at some places of each sample."""
    unfold, device = unfold_of(layer, tuple(x[0].shape[2:])), x[0].device
    part = block(model, [layer.input], [layer.activation_output])
    module = to_torch(part, quantized=False, device=str(device))
    inputs, given, targets, taken = [], [], [], 0
    count = math.prod(unfold.output_shape(tuple(x[0].shape)))
    for quantized, plain in zip(x_hat, x, strict=True):
        where = sample_positions(count, positions, taken, len(plain), seed)
        inputs.append(_by_sample(unfold.rows(quantized, where), len(plain)))
        given.append(_by_sample(unfold.rows(plain, where), len(plain)) if mixed else inputs[-1])
        targets.append(_at(_run(module, plain), where, bool(layer.kernel_shape)))
        taken += len(plain)
    rows, product = torch.cat(inputs, 1), _product(model, layer, unfold, device)
    return Problem(rows, torch.cat(given, 1) if mixed else rows, torch.cat(targets), 1, -1, product)


def _run(module: torch.nn.Module, batch: Tensor) -> Tensor:
    with torch.no_grad():
        outputs: Tensor = module(batch)
    return outputs


def _by_sample(rows: Tensor, samples: int) -> Tensor:
    """(groups, samples * places, K) as (groups, samples, places, K)."""
    return rows.reshape(rows.shape[0], samples, -1, rows.shape[-1])


def _at(outputs: Tensor, where: Array, spatial: bool) -> Tensor:
    """The outputs at some places of each sample, (samples, places, channels)."""
    flat = outputs.flatten(2).transpose(1, 2) if spatial else outputs.reshape(len(outputs), -1, outputs.shape[-1])
    return flat.take_along_dim(torch.tensor(where, device=flat.device)[:, :, None], 1)


def _product(
    model: Network, layer: Layer, unfold: Unfold, device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    """(weight, rows of some samples) -> what the layer puts out behind its activation, (samples, places, channels)."""
    given = np.zeros(1, np.float32) if layer.bias is None else model.param(layer.bias).reshape(-1)
    bias = torch.tensor(given, device=device)
    tail = None
    if layer.activation:
        tail = to_torch(block(model, [layer.output], [layer.activation_output]), quantized=False, device=str(device))
    ones = (1,) * len(layer.kernel_shape)

    def forward(weight: Tensor, rows: Tensor) -> Tensor:
        groups, samples, places, k = rows.shape
        matrix = unfold.weight_rows(weight)
        if groups == 1:
            y = torch.addmm(bias, rows.reshape(-1, k), matrix[0].T)
        else:
            y = torch.bmm(rows.reshape(groups, -1, k), matrix.transpose(1, 2))
            y = y.transpose(0, 1).reshape(samples * places, -1) + bias
        shaped = y.reshape(samples * places, -1, *ones) if ones else y.reshape(samples, places, -1)
        after: Tensor = shaped if tail is None else tail(shaped)
        return after.reshape(samples, places, -1)

    return forward
