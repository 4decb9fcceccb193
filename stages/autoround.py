"""Move each weight by at most half a step, and its scale, along the sign of the gradient of a block's error.

    min over V, s     E |y^ - y|^2,     W^ = s (clip(round(W / s + V) + z, qmin, qmax) - z),   |V| <= 1/2
    V -= rate * sign(dE/dV),            rate falls to 0 along a line

Blocks in order, each on what the blocks before make of the data. After T steps of 1/T a weight can have gone everywhere
between its two codes, whatever the size of the gradients. The best on held-out samples is what counts; a block that
nothing made better stays as it was. It begins with codes solved in closed form.

Assumes: weights have encodings (`calibrate`); some hundred samples like those the model will see.
Source: Cheng, Zhang, Shen, Cai, He, Lv, Liu, "Optimize Weight Rounding via Signed Gradient Descent for the Quantization
of LLMs", arXiv 2309.05516. Its two ends of a range are one scale here, since zero points stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from qpipe.numerics.thinning import thinned
from qpipe.stage import NULL, Context, Range, Samples, stage

if TYPE_CHECKING:
    from qpipe.model.network.network import Network


def rate_for(iterations: int, bits: int) -> float:
    """The rate where none is given: 1 over the iterations, twice that for many of them on at most 3 bits."""
    return (2.0 if iterations >= 1000 and bits <= 3 else 1.0) / max(1, iterations)


@stage(
    version=1,
    config={"data": "${tuning}", "seed": "${seed}"},
    not_after={"nearest": "after rounding to nearest the float weights that tell where to go are gone"},
)
def autoround(
    model: Network,
    data: Samples,
    float_model: Network | None = None,
    *,
    blocks: Literal["auto", "per_layer"] | list[str] = "auto",
    nblocks: Annotated[int, Range(ge=1)] = 1,
    begin: Literal["gram", "model"] = "gram",
    limit: Annotated[int, Range(ge=1)] | None = 1000,
    seed: int = 0,
    iterations: Annotated[int, Range(ge=0)] = 200,
    batch_size: Annotated[int, Range(ge=1)] = 8,
    lr: Annotated[float, Range(gt=0)] | None = None,
    lr_scales: Annotated[float, Range(gt=0)] | None = None,
    learn_ranges: bool = True,
    quantized_input: bool = True,
    selective_update: bool = True,
    hold_out: Annotated[float, Range(ge=0, lt=1)] = 0.15,
    memory: Literal["auto", "ram", "disk"] = "auto",
    ctx: Context = NULL,
) -> Network:
    """The model with weights tuned by signed gradients, frozen; `metadata["autoround"]` reports each block.

    `float_model` is the model that was tuned before into this one, the same before its weights moved. `blocks`: auto
    the blocks of the network, per_layer each layer, or the names of some; `nblocks` takes so many that follow one
    another together; `begin` gram solves the codes of a block when its turn has come, model takes those that are
    there; `limit` takes that many samples, evenly spread; `seed` draws what is random. `iterations` steps of
    `batch_size` samples; `lr` in steps of the grid (null: 1 over the iterations, twice that for 1000 or
    more below 4 bits); `lr_scales` of the logarithms of scales (null: a tenth of that); `learn_ranges` lets scales
    move, unless they are powers of two; `quantized_input` false shows a block the float model's values.
    `selective_update` keeps a block only where the whole model's outputs err less; `hold_out` is the share of samples
    that only judge; `memory` says where what goes into the blocks is kept. Errors: InputError for a model in which
    nothing can be tuned, a float model of other values, and data that do not fit.
    """
    from qpipe.methods.learning.blockwise import Division, learn_by_parts
    from qpipe.methods.learning.stretch import Randomness
    from qpipe.methods.learning.tune import Surroundings, Tuning
    from qpipe.numerics.learning.options import LearningOptions

    bits = min((e.bitwidth for name, e in model.encodings.items() if name in model.params), default=8)
    rate = rate_for(iterations, bits) if lr is None else lr
    of_scales = rate / 10 if lr_scales is None else lr_scales
    learning = LearningOptions(
        iterations, batch_size, {"weight": rate, "scale": of_scales if learn_ranges else 0.0},
        optimizer="signsgd", schedule="linear", hold_out=hold_out,
    )  # fmt: skip
    tuning = Tuning(
        learning, "signed_step", learn_scales=learn_ranges, learn_steps=False, update_bias=False,
        random=Randomness(share=1.0 if quantized_input else 0.0),
        selective=selective_update, memory=memory, begin=begin,
    )  # fmt: skip
    arrays, division = thinned(data.arrays, limit), Division(blocks, together=nblocks)
    around = Surroundings(ctx.memo, ctx.seed, ctx.note, ctx.progress, ctx.device, seed)
    return learn_by_parts("autoround", model, float_model, arrays, division, tuning, around)
