"""Train a quantized network on as much data as there are, with its grids in place.

    min share * distillation + (1 - share) * task      over weights, their scales, step sizes, biases, normalizations

The forward pass is the quantized network's; gradients go straight through the roundings, and step sizes have theirs
(LSQ), or both ends of a range (`range_learning`). Distillation draws the outputs to the float model's, and needs no
labels; `cross_entropy`, or a function of your own, draws them to the labels. Statistics of batch normalizations stay as
they are. It begins at what the model is: after adaround there is less to learn than after calibrate. After each look
the state is kept, so that what was killed goes on there, and the best that samples held out have seen is what comes
out.

Assumes: data as the network was trained on, thousands of samples; on a few hundred 'polish' does better.
Source: Jacob et al., arXiv 1712.05877; Esser et al., "Learned Step Size Quantization", arXiv 1902.08153; Hinton et al.,
"Distilling the Knowledge in a Neural Network", arXiv 1503.02531.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from qpipe.errors import InputError
from qpipe.numerics.thinning import thin, thinned
from qpipe.param import load_factory
from qpipe.stage import NULL, Context, Factory, Range, Samples, stage

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from qpipe.methods.learning.objective import Task
    from qpipe.model.network.network import Network

Rate = Annotated[float, Range(ge=0)]
Share = Annotated[float, Range(ge=0, le=1)]


def refuse_idle(given: Mapping[str, Any]) -> None:
    """Errors: InputError for options of a distillation, or of a task, that is not there."""
    if given["loss"] == "distillation" and given["share"] != 0.5:
        raise InputError("qat.share: with loss: distillation there is no task to share with. Leave it out.")
    if given["loss"] != "distillation" and given["share"] == 0.0 and given["distillation"] != "mse":
        raise InputError("qat.distillation: with share: 0 nothing is distilled. Leave it out, or raise the share.")
    if given["range_learning"] and given["lr_steps"] == 0:
        raise InputError("qat.range_learning: with lr_steps: 0 no range is learned. Leave it out, or give a rate.")
    if given["distillation"] == "mse" and given["temperature"] != 1.0:
        raise InputError("qat.temperature: mse has none. Leave it out, or set distillation: kl.")


def task_of(loss: str, data: Samples) -> Task | None:
    """The task's loss, None where there is none. Errors: InputError where it needs labels that are not there."""
    from qpipe.methods.learning.objective import checked, cross_entropy

    if loss == "distillation":
        return None
    if data.labels is None:
        raise InputError(
            f"qat.loss: '{loss}' needs labels, and the data have none. Give them (in an npz as 'labels'), or set "
            "loss: distillation, which needs none."
        )
    return cross_entropy if loss == "cross_entropy" else checked(load_factory(loss), loss)


@stage(
    version=1,
    config={"data": "training", "outputs": "${goal.outputs}", "seed": "${seed}"},
    check=refuse_idle,
    not_before={
        "cle": "equalization moves the weights away from the grids that were learned",
        "bnf": "folding scales weights that lie on their grids",
        "calibrate": "the step sizes that were learned would be measured anew",
    },
)
def qat(
    model: Network,
    data: Samples,
    float_model: Network | None = None,
    *,
    epochs: Annotated[float, Range(ge=0)] = 2.0,
    batch_size: Annotated[int, Range(ge=1)] = 32,
    loss: Literal["distillation", "cross_entropy"] | Factory = "distillation",
    share: Share = 0.5,
    distillation: Literal["mse", "kl"] = "mse",
    temperature: Annotated[float, Range(gt=0)] = 1.0,
    lr: Rate = 1e-2,
    lr_scales: Rate = 1e-3,
    lr_steps: Rate = 1e-3,
    lr_biases: Rate = 1e-3,
    lr_norms: Rate = 1e-3,
    hold_out: Annotated[float, Range(ge=0, lt=1)] = 0.05,
    range_learning: bool = False,
    looks: Annotated[int, Range(ge=1)] = 10,
    early_stop: Annotated[int, Range(ge=0)] = 0,
    limit: Annotated[int, Range(ge=1)] | None = None,
    outputs: tuple[str, ...] = (),
    seed: int = 0,
    ctx: Context = NULL,
) -> Network:
    """The model trained with its grids in place, weights frozen on them; `metadata["qat"]` reports.

    `float_model` gives the outputs that are distilled, and the weights' float values; it may be left out where no
    weight was tuned. `epochs` is how often the data are gone through, in batches of `batch_size` samples drawn at
    random. `loss` is distillation, cross_entropy of the labels, or module:function of (outputs, labels), torch tensors,
    outputs by name where there are several; beside a task, distillation has this `share`. `distillation` is mse of the
    outputs, or kl of their softmax at `temperature`. A rate of 0 leaves a kind as it is: `lr` in steps of a weight's
    grid, `lr_scales` and `lr_steps` of the logarithms of weights' scales and of activations' step sizes, `lr_biases`
    and `lr_norms` in their own units; all fall along a cosine. `range_learning` learns both ends of activations'
    ranges, each a share of it, where zero points may move, instead of step sizes alone. A share of `hold_out` judges at
    so many `looks`, by the loss (distillation alone: the squared error), and the best is kept; `early_stop` ends after
    so many looks without a gain (0: never). `limit` takes that many samples, evenly spread; `outputs` names those that
    count (none: all of floats); `seed` draws the batches. Errors: InputError for a model without grids, one whose float
    weights are gone, labels that are missing, outputs without a gradient; StageError for a loss that fails.
    """
    from qpipe.methods.learning.objective import Objective, variances_of
    from qpipe.methods.learning.reference import reference_of
    from qpipe.methods.learning.whole import Whole, learnable, refuse_unlearnable, targets_of, trained
    from qpipe.numerics.learning.options import LearningOptions

    if model.facts.came_quantized:
        ctx.note("The model came quantized, and its weights stay on their grids: qat leaves it as it is.")
        return model
    weights, values = learnable(model).weights, [spec.name for spec in model.outputs]
    reference = reference_of(model, float_model, weights, values, "qat")
    arrays, task = thinned(data.arrays, limit), task_of(loss, data)
    labels = None if task is None or data.labels is None else thin(data.labels, limit)
    targets = targets_of(reference, arrays, outputs, ctx.device)
    whole = Whole(model, arrays, targets, labels, ranges=range_learning, device=ctx.device)
    refuse_unlearnable(whole, "qat")
    if range_learning and not whole.ranged:
        raise InputError(
            "qat.range_learning: no activation's zero point may move, since their grids are symmetric or prescribed, "
            "got true. Leave it out."
        )
    rates = {"weight": lr, "scale": lr_scales, "act_scale": lr_steps}
    rates |= {"bias": lr_biases, "norm": lr_norms}
    iterations = round(epochs * whole.samples * (1.0 - hold_out) / batch_size)
    options = LearningOptions(
        iterations, batch_size, rates, hold_out=hold_out, early_stop=early_stop,
        check_every=max(1, iterations // looks), check_samples=1024,
    )  # fmt: skip
    objective = Objective(tuple(targets), variances_of(targets), distillation, temperature, share, task)
    found, report = trained(
        whole, reference, objective, options, said=[loss, share, distillation, temperature],
        seed=ctx.seed(str(seed)), memo=ctx.memo, progress=lambda done, total: ctx.progress(done, total, "iterations"),
    )  # fmt: skip
    if report["kept"] == "before":
        ctx.note("The held-out samples do not gain by qat: the model stays as it is.")
    return found.with_metadata({"qat": {"loss": loss, **report}})
