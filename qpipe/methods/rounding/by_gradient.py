"""AdaRound as published, one layer: which way to round each weight, learned on the outputs behind the activation.

    min over V of mean |f(W^ x~) - f(W x)|^2 + reg_param * sum(1 - |2 h(V) - 1|^beta)

x~ is x^, the layer's inputs in the quantized model, or element by element x^ with probability `drop_ratio` and x,
those in the float model, otherwise. Adam at a constant rate. Every seventh sample is held out and judges the roundings
as they would be for good: nearest rounding is kept where nothing was better.

Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", arXiv 2004.10568.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import functional_call

from qpipe.methods.placement.calibration import content
from qpipe.methods.rounding.walk import Rounded
from qpipe.model.network.parts import block
from qpipe.model.simulation.module import to_torch
from qpipe.numerics.learning.losses import mse
from qpipe.numerics.learning.optimize import learn
from qpipe.numerics.learning.options import LearningOptions
from qpipe.numerics.learning.roundings import start

if TYPE_CHECKING:
    from qpipe.model.network.network import Network
    from qpipe.model.structure.layers import Layer

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


def round_by_gradient(
    model: Network,
    layer: Layer,
    x_hat: Sequence[Tensor],
    x: Sequence[Tensor],
    *,
    options: GradientOptions,
    seed: int,
    memo: Memo,
    progress: Callable[[int, int], None] | None = None,
) -> Rounded:
    """The layer's weight, rounded; the report has the error over the outputs' energy, on the samples held out."""
    encoding, device = model.encodings[layer.weight], x[0].device
    part = block(model, [layer.input], [layer.activation_output])
    module = to_torch(part, quantized=False, device=str(device))
    name = module.meta["parameters"][layer.weight]
    with torch.no_grad():
        targets = torch.cat([module(batch) for batch in x])
    inputs = torch.cat(list(x_hat))
    given = inputs if options.drop_ratio >= 1.0 else torch.cat(list(x))

    def forward(values: dict[str, Tensor], batch: Tensor, draw: torch.Generator | None) -> Tensor:
        outputs: Tensor = functional_call(module, {name: values["weight"]}, (batch,))
        return outputs

    def run(*_: Any) -> dict[str, Any]:
        weight = torch.tensor(model.param(layer.weight), device=device)
        learned = learn(
            {"weight": start("rectified_sigmoid", weight, weight, encoding)},
            forward,
            _samples(inputs, given, targets, options.drop_ratio),
            len(inputs),
            options=options.learning(encoding.bitwidth, _at_once(inputs, targets)),
            loss=mse(1 if layer.kernel_shape else -1),
            held_out=torch.arange(0, len(inputs), HELD_OUT) if len(inputs) >= HELD_OUT else None,
            seed=seed,
            progress=progress,
        )
        kept = "gradient" if learned.report["kept"] == "after" else "nearest"
        return {"weight": learned.values["weight"].cpu().numpy(), "report": {**learned.report, "kept": kept}}

    data = [each.cpu().numpy() for each in (inputs, targets, *([] if given is inputs else [given]))]
    found = memo("gradient", run, content(part), data, encoding.to_json(), asdict(options), seed)
    return Rounded(found["weight"], None, replace(encoding, frozen=True), found["report"])


def _samples(inputs: Tensor, given: Tensor, targets: Tensor, ratio: float) -> Any:
    """Batches by their indices; while learning, an element of `inputs` gives way to the float one by 1 - `ratio`."""

    def batches(index: Tensor, draw: torch.Generator | None) -> tuple[Tensor, Tensor]:
        index = index.to(inputs.device)
        x, y = inputs.index_select(0, index), targets.index_select(0, index)
        if draw is None or ratio >= 1.0:
            return x, y
        taken = torch.rand(x.shape, generator=draw).to(x.device) < ratio
        return torch.where(taken, x, given.index_select(0, index)), y

    return batches


def _at_once(inputs: Tensor, targets: Tensor) -> int | None:
    """How many samples run through the layer together."""
    if inputs.is_cuda:
        return None
    largest = max(each[0].numel() * each.element_size() for each in (inputs, targets))
    return max(1, CACHED_BYTES // max(1, largest))
