"""Round the weights of a block together, so that the block's output errs least; activations' steps with them.

    min over V, s, b     E (y^ - y)^2 g^2  +  reg_param * sum(1 - |2 h(V) - 1|^beta),     W^ = s (floor(W / s) + h(V))

Blocks in order, each on what the blocks before make of the data, with activations quantized. h(V) goes from 0 to 1 and
ends at either; g is 1 (mse), or says how much the model's outputs make of an error in y (fisher_diag, the diagonal of
J^T J). With `drop` every quantizer of an activation lets elements through unrounded, at random, while the block learns
(QDrop). The default, `rounding: ste_weight`, moves weights through the rounding instead of V: from codes that are
solved already it gained more. It begins with codes solved in closed form. A block whose output on held-out samples
errs no less afterwards stays as it was.

Assumes: weights have encodings (`calibrate`); some hundred samples like those the model will see.
Source: Li, Gong, Tan, Yang, Hu, Zhang, Yu, Wang, Gu, "BRECQ", arXiv 2102.05426; Wei, Gong, Li, Liu, Yu, "QDrop", arXiv
2203.05740. g is estimated from random directions of the outputs, where BRECQ takes one gradient of the task's loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from qpipe.errors import InputError
from qpipe.numerics.thinning import thinned
from qpipe.stage import NULL, Context, Range, Samples, stage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qpipe.model.network.network import Network

OF_THE_SIGMOID = {"reg_param": 0.01, "beta_range": (20.0, 2.0), "warm_start": 0.2}
"""What the rectified sigmoid alone reads, and the defaults."""


def refuse_unread(given: Mapping[str, Any]) -> None:
    """Errors: InputError where an option that the rounding does not read is set away from its default."""
    if given["rounding"] == "rectified_sigmoid":
        return
    changed = [name for name, default in OF_THE_SIGMOID.items() if given[name] != default]
    if changed:
        raise InputError(
            f"brecq.{changed[0]}: the rounding '{given['rounding']}' does not read it, got {given[changed[0]]}. "
            "Leave it out, or set rounding: rectified_sigmoid."
        )


@stage(
    version=1,
    config={"data": "${tuning}", "seed": "${seed}"},
    check=refuse_unread,
    not_after={"nearest": "after rounding to nearest the float weights that tell where to go are gone"},
)
def brecq(
    model: Network,
    data: Samples,
    float_model: Network | None = None,
    *,
    blocks: Literal["auto", "per_layer"] | list[str] = "auto",
    begin: Literal["gram", "model"] = "gram",
    limit: Annotated[int, Range(ge=1)] | None = 1000,
    seed: int = 0,
    rounding: Literal["rectified_sigmoid", "ste_weight", "flexround", "signed_step"] = "ste_weight",
    loss: Literal["mse", "fisher_diag"] = "fisher_diag",
    iterations: Annotated[int, Range(ge=0)] = 300,
    batch_size: Annotated[int, Range(ge=1)] = 32,
    lr: Annotated[float, Range(ge=0)] = 5e-3,
    lr_biases: Annotated[float, Range(ge=0)] = 1e-3,
    lr_scales: Annotated[float, Range(ge=0)] = 1e-3,
    lr_steps: Annotated[float, Range(ge=0)] = 1e-3,
    reg_param: Annotated[float, Range(ge=0)] = 0.01,
    beta_range: tuple[float, float] = (20.0, 2.0),
    warm_start: Annotated[float, Range(ge=0, lt=1)] = 0.2,
    early_stop: Annotated[int, Range(ge=0)] = 0,
    drop: Annotated[float, Range(ge=0, lt=1)] = 0.0,
    input_drop: Annotated[float, Range(ge=0, le=1)] = 0.0,
    selective_update: bool = True,
    hold_out: Annotated[float, Range(ge=0, lt=1)] = 0.15,
    memory: Literal["auto", "ram", "disk"] = "auto",
    ctx: Context = NULL,
) -> Network:
    """The model with the weights of each block tuned together, frozen; `metadata["brecq"]` reports each block.

    `float_model` is the model that was tuned before into this one, the same before its weights moved. `blocks`: auto
    the blocks of the network, per_layer each layer, or the names of some; `begin` gram solves the codes of a block
    when its turn has come, model takes those that are there; `limit` takes that many samples, evenly spread; `seed`
    draws what is random. `rounding` says what is learned of a weight; `loss` fisher_diag weighs errors by what the
    outputs make of them. `iterations` steps of `batch_size` samples; `lr` of what is learned of the
    weights, `lr_biases` of biases, `lr_scales` of the logarithms of weight scales, `lr_steps` of those of
    activations, 0 leaves them; `reg_param` weighs the rounding term, whose exponent goes through `beta_range` after a
    share of `warm_start` iterations; `early_stop` ends after so many looks without a gain (0: never). `drop` is the
    probability that a quantizer lets an element through; `input_drop` the share of inputs that come from the float
    model; `selective_update` keeps a block only where the whole model's outputs err less; `hold_out` the share of
    samples that only judge; `memory` says where what goes into the blocks is kept. Errors: InputError for options that
    the rounding does not read, a model in which nothing can be tuned, a float model of other values, and data that do
    not fit.
    """
    refuse_unread(locals())
    from qpipe.methods.learning.blockwise import Division, learn_by_parts
    from qpipe.methods.learning.stretch import Randomness
    from qpipe.methods.learning.tune import Surroundings, Tuning
    from qpipe.numerics.learning.options import LearningOptions

    rates = {"weight": lr, "scale": lr_scales, "bias": lr_biases, "act_scale": lr_steps}
    learning = LearningOptions(
        iterations, batch_size, rates, early_stop=early_stop, hold_out=hold_out,
        reg_param=reg_param, beta_range=beta_range, warm_start=warm_start,
    )  # fmt: skip
    random = Randomness(share=1.0 - input_drop, drop=drop)
    tuning = Tuning(
        learning, rounding, random=random, selective=selective_update, memory=memory, begin=begin, loss=loss
    )
    arrays = thinned(data.arrays, limit)
    around = Surroundings(ctx.memo, ctx.seed, ctx.note, ctx.progress, ctx.device, seed)
    return learn_by_parts("brecq", model, float_model, arrays, Division(blocks), tuning, around)
