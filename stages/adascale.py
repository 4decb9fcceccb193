"""Stretch each weight before it is rounded, and the range of its grid, so that a block's output errs least.

    W^ = s clip(round(W / (s e^(s2 + s3 + s4))), qmin, qmax),     s = (e^g max - e^b min) / (2^bits - 1)

s2 has a number for each weight, s3 one for each output channel or scale, s4, of convolutions, one for each input
channel; g and b move both ends of a grid's range. All are 0 at the start, so that the start is what the model was.
Blocks in order; while a block learns, its input is the quantized model's at some elements and the float model's at the
others. Afterwards the factors are folded: what is left are codes and scales. A block whose output on held-out samples
errs no less stays as it was.

Assumes: weights have encodings (`calibrate`); some hundred samples like those the model will see.
Source: Lee, Kim, Kim, Oh, "FlexRound", arXiv 2306.00317; AdaScale as AIMET 2 has it, which needs a table of
architectures: here blocks are found in the graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from qpipe.numerics.thinning import thinned
from qpipe.stage import NULL, Context, Range, Samples, stage

if TYPE_CHECKING:
    from qpipe.model.network.network import Network


@stage(
    version=1,
    config={"data": "${tuning}", "seed": "${seed}"},
    not_after={"nearest": "after rounding to nearest the float weights that tell where to go are gone"},
)
def adascale(
    model: Network,
    data: Samples,
    float_model: Network | None = None,
    *,
    blocks: Literal["auto", "per_layer"] | list[str] = "auto",
    begin: Literal["gram", "model"] = "gram",
    limit: Annotated[int, Range(ge=1)] | None = 1000,
    seed: int = 0,
    iterations: Annotated[int, Range(ge=0)] = 1500,
    batch_size: Annotated[int, Range(ge=1)] = 32,
    lr_ranges: Annotated[float, Range(ge=0)] = 1e-3,
    lr_factors: Annotated[float, Range(ge=0)] = 5e-4,
    drop_ratio: Annotated[float, Range(ge=0, le=1)] = 0.5,
    activations: bool = True,
    selective_update: bool = True,
    hold_out: Annotated[float, Range(ge=0, lt=1)] = 0.15,
    memory: Literal["auto", "ram", "disk"] = "auto",
    ctx: Context = NULL,
) -> Network:
    """The model with weights stretched, rounded and frozen; `metadata["adascale"]` reports each block.

    `float_model` is the model that was tuned before into this one, the same before its weights moved. `blocks`: auto
    the blocks of the network, per_layer each layer, or the names of some; `begin` gram solves the codes of a block when
    its turn has come, model takes those that are there; `limit` takes that many samples, evenly spread; `seed` draws
    what is random. `iterations` steps of `batch_size` samples; `lr_ranges` is the rate of the ranges, `lr_factors` of
    the factors; `drop_ratio` the share of inputs that come from the quantized model; `activations` false learns with
    activations in float. `selective_update` keeps a block only where the whole model's outputs err less; `hold_out` is
    the share of samples that only judge; `memory` says where what goes into the blocks is kept. Errors: InputError for
    a model in which nothing can be tuned, a float model of other values, and data that do not fit.
    """
    from qpipe.methods.learning.blockwise import Division, learn_by_parts
    from qpipe.methods.learning.stretch import Randomness
    from qpipe.methods.learning.tune import Surroundings, Tuning
    from qpipe.numerics.learning.options import LearningOptions

    learning = LearningOptions(iterations, batch_size, {"weight": lr_factors, "scale": lr_ranges}, hold_out=hold_out)
    tuning = Tuning(
        learning, "flexround", learn_scales=lr_ranges > 0, learn_steps=False, update_bias=False,
        activations=activations, random=Randomness(share=drop_ratio),
        selective=selective_update, memory=memory, begin=begin,
    )  # fmt: skip
    arrays = thinned(data.arrays, limit)
    around = Surroundings(ctx.memo, ctx.seed, ctx.note, ctx.progress, ctx.device, seed)
    return learn_by_parts("adascale", model, float_model, arrays, Division(blocks), tuning, around)
