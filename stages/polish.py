"""Polish a quantized network as a whole: what its parts could not know of one another.

    min (y^ - y)^2 over the variance of y,   y the float model's outputs, y^ those of the quantized network,
        + features * (z^ - z)^2 over the variance of z,   z the outputs of blocks, the mean over them

by Adam along a cosine, over everything that a target lets move: weights on their grids (straight through the rounding),
the scales of weights, the step sizes of activations, biases, and normalizations. It begins at what the model is, best
a network that adaround or a blockwise method has tuned, needs no labels, and ends with the best that samples held out
have seen: with the start, where they do not gain.

Assumes: some hundred samples like those the model will see; `float_model`, the model whose weights were tuned.
Source: the global fine-tuning of AE-QDrop (2024) and of Joint ViT PTQ, arXiv 2602.18861; step sizes: Esser et al.,
"Learned Step Size Quantization", arXiv 1902.08153; straight through: Bengio et al., arXiv 1308.3432.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from qpipe.errors import InputError
from qpipe.numerics.thinning import thinned
from qpipe.stage import NULL, Context, Range, Samples, stage

if TYPE_CHECKING:
    from qpipe.model.network.network import Network

Rate = Annotated[float, Range(ge=0)]


@stage(
    version=1,
    config={"data": "${tuning}", "outputs": "${goal.outputs}", "seed": "${seed}"},
    not_before={
        "cle": "equalization moves the weights away from the grids that were learned",
        "bnf": "folding scales weights that lie on their grids",
        "calibrate": "the step sizes that were learned would be measured anew",
    },
)
def polish(
    model: Network,
    data: Samples,
    float_model: Network | None = None,
    *,
    iterations: Annotated[int, Range(ge=0)] = 300,
    batch_size: Annotated[int, Range(ge=1)] = 32,
    loss: Literal["mse", "kl"] = "mse",
    temperature: Annotated[float, Range(gt=0)] = 1.0,
    features: Annotated[float, Range(ge=0)] = 0.0,
    lr: Rate = 1e-2,
    lr_scales: Rate = 1e-3,
    lr_steps: Rate = 1e-3,
    lr_biases: Rate = 1e-3,
    lr_norms: Rate = 1e-3,
    hold_out: Annotated[float, Range(ge=0, lt=1)] = 0.15,
    early_stop: Annotated[int, Range(ge=0)] = 0,
    limit: Annotated[int, Range(ge=1)] | None = 1000,
    outputs: tuple[str, ...] = (),
    seed: int = 0,
    ctx: Context = NULL,
) -> Network:
    """The model with weights, scales, step sizes and biases learned together, frozen; `metadata["polish"]` reports.

    `float_model` gives the outputs to be matched and the weights' float values; it may be left out where no weight was
    tuned. `iterations` steps of `batch_size` samples follow `loss`: mse of the outputs, or kl of their softmax at
    `temperature`; `features` weighs the errors of blocks' outputs beside it. A rate of 0 leaves a kind as it is: `lr`
    in steps of a weight's grid, `lr_scales` and `lr_steps` of the logarithms of weights' scales and of activations'
    step sizes, `lr_biases` and `lr_norms` in their own units. A share of `hold_out` judges ten times, by the squared
    error, and the best is kept that is worse, by more than the noise, at none of several outputs; `early_stop` ends
    after so many looks without a gain (0: never). `limit` takes that many samples, evenly spread; `outputs` names those
    that count (none: all of floats); `seed` draws the batches. Errors: InputError for a model without grids, one whose
    float weights are gone, outputs without a gradient, and data that do not fit.
    """
    from qpipe.methods.learning.objective import Objective, variances_of
    from qpipe.methods.learning.reference import reference_of
    from qpipe.methods.learning.whole import (
        Whole,
        block_outputs,
        content_of,
        learnable,
        refuse_unlearnable,
        targets_of,
        trained,
    )
    from qpipe.numerics.learning.options import LearningOptions

    if model.facts.came_quantized:
        ctx.note("The model came quantized, and its weights stay on their grids: polish leaves it as it is.")
        return model
    values = [spec.name for spec in model.outputs] + (list(block_outputs(model)) if features else [])
    reference = reference_of(model, float_model, learnable(model).weights, values, "polish")
    arrays = thinned(data.arrays, limit)
    targets = targets_of(reference, arrays, outputs, ctx.device)
    whole = Whole(model, arrays, targets, like=reference if features else None, device=ctx.device)
    refuse_unlearnable(whole, "polish")
    if features and not whole.blocks:
        raise InputError("polish.features: no block ends inside the model, so there is nothing to weigh. Leave it out.")
    rates = {"weight": lr, "scale": lr_scales, "act_scale": lr_steps}
    rates |= {"bias": lr_biases, "norm": lr_norms}
    options = LearningOptions(iterations, batch_size, rates, hold_out=hold_out, early_stop=early_stop)
    objective = Objective(
        tuple(targets), variances_of(targets), loss, temperature, features=features,
        block_variances=whole.block_variances() if features else (),
    )  # fmt: skip
    said = [loss, temperature, features, *content_of(reference if features else None)]
    found, report = trained(
        whole, reference, objective, options, said=said, seed=ctx.seed(str(seed)),
        memo=ctx.memo, progress=lambda done, total: ctx.progress(done, total, "iterations"),
    )  # fmt: skip
    if report["kept"] == "before":
        ctx.note("The held-out samples do not gain by polish: the model stays as it is.")
    return found.with_metadata({"polish": {"loss": loss, **report}})
