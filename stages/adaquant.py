"""Move weights over their grids, with step sizes and biases, so that a part's output errs least on the data.

    min over W, b, s     E |f(W^ x^ + b) - f(W x + b0)|^2,    W^ = s (clip(round(W / s) + z, qmin, qmax) - z)

Layers, or whole blocks, in order: x^ is what the parts before make of the data, tuned already and with activations
quantized; the target is the float model's, after the activation that follows. Gradients go straight through the
rounding, codes may cross many steps, scales are s0 exp(u), and zero points stay. It begins with the codes that the
model has, so behind `adaround` it goes on from there: give the model that adaround started from as `float_model`. A
part whose output on held-out samples errs no less afterwards stays as it was.

Assumes: weights have encodings (`calibrate`); some hundred samples like those the model will see.
Source: Hubara, Nahshan, Hanani, Banner, Soudry, "Accurate Post Training Quantization With Small Calibration Sets",
arXiv 2006.10518; the options are those of AMD Quark's fast finetuning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from qpipe.errors import InputError
from qpipe.numerics.metric_names import Metric
from qpipe.numerics.thinning import thin, thinned
from qpipe.param import load_factory
from qpipe.stage import NULL, Context, Factory, Range, Samples, stage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qpipe.methods.learning.selection import Score
    from qpipe.model.network.network import Network


def refuse_idle(given: Mapping[str, Any]) -> None:
    """Errors: InputError for options that could not act beside others."""
    if given["drop_ratio"] <= 0 and given["inputs"] == "parallel":
        raise InputError(
            "adaquant.inputs: with drop_ratio 0 a part sees the float model's values alone, got parallel. Leave it out."
        )
    for learned, rate in (("learn_scales", "lr_scales"), ("learn_steps", "lr_steps"), ("update_bias", "lr_biases")):
        if given[learned] is True and given[rate] == 0:
            raise InputError(f"adaquant.{rate}: {learned} is true, got 0. Set {learned}: false, or a rate above 0.")


def scored_by(metric: str, data: Samples, limit: int | None) -> Score:
    """The score by a metric, or by a function of the user's. Errors: InputError where it needs labels that are not
    there; StageError, when it is called, where the function fails."""
    from qpipe.numerics.metrics import LABELLED, score_by_function, score_outputs

    labels = None if data.labels is None else thin(data.labels, limit)
    if metric in LABELLED and labels is None:
        raise InputError(
            f"adaquant.selective_update: '{metric}' needs labels, and the data have none. Give them as 'labels', or "
            "take a metric without: sqnr_db, cosine, mse."
        )
    if metric in get_args(Metric):
        return lambda found, wanted, of: score_outputs(metric, found, None if labels is None else labels[of], wanted)
    function = load_factory(metric)
    return lambda found, _, of: score_by_function(function, metric, found, None if labels is None else labels[of])


@stage(
    version=1,
    config={"data": "${tuning}", "seed": "${seed}"},
    check=refuse_idle,
    not_after={"nearest": "after rounding to nearest the float weights that tell where to go are gone"},
)
def adaquant(
    model: Network,
    data: Samples,
    float_model: Network | None = None,
    *,
    blocks: Literal["auto", "per_layer"] | list[str] = "auto",
    ops: list[str] | None = None,
    begin: Literal["gram", "model"] = "gram",
    limit: Annotated[int, Range(ge=1)] | None = 1000,
    seed: int = 0,
    iterations: Annotated[int, Range(ge=0)] = 300,
    batch_size: Annotated[int, Range(ge=1)] = 32,
    lr: Annotated[float, Range(ge=0)] = 5e-3,
    rates: Literal["relative", "absolute"] = "relative",
    lr_biases: Annotated[float, Range(ge=0)] = 1e-3,
    lr_scales: Annotated[float, Range(ge=0)] = 1e-3,
    lr_steps: Annotated[float, Range(ge=0)] = 1e-3,
    schedule: Literal["cosine", "linear", "constant"] = "cosine",
    lr_adjust: tuple[float, float] | None = None,
    early_stop: Annotated[int, Range(ge=0)] = 0,
    learn_scales: bool | None = None,
    learn_steps: bool | None = None,
    update_bias: bool = True,
    output_qdq: bool = False,
    drop_ratio: Annotated[float, Range(ge=0, le=1)] = 1.0,
    selective_update: bool | Metric | Factory = True,
    inputs: Literal["sequential", "parallel"] = "sequential",
    hold_out: Annotated[float, Range(ge=0, lt=1)] = 0.15,
    memory: Literal["auto", "ram", "disk"] = "auto",
    ctx: Context = NULL,
) -> Network:
    """The model with tuned weights, step sizes and biases, frozen; `metadata["adaquant"]` reports each part.

    `float_model` is the model that was tuned before into this one, the same before its weights moved. `blocks` says
    what is tuned together: auto the blocks of the network, per_layer each layer, or the names of some; `ops` tunes
    these operators alone; `begin` gram solves the codes of a part when its turn has come, model takes those that are
    there; `limit` takes that many samples, evenly spread; `seed` draws what is random. `iterations` steps of
    `batch_size` samples; `lr` of weights, `lr_biases` of biases, `lr_scales` of the logarithms of weight scales,
    `lr_steps` of those of activations; `rates` relative counts weights in steps of their grids and biases in the size
    of what they are added to, absolute in their own units; `schedule` takes the rates to 0; `lr_adjust` [threshold,
    rate] is another rate of weights where the error before lies above the threshold; `early_stop` ends after so many
    looks without a gain (0: never). `learn_scales` and `learn_steps` let the scales of weights and of activations move
    (null: unless they are powers of two); `update_bias` lets biases move; `output_qdq` counts the rounding of the
    output too; `drop_ratio` is the share of inputs that come from the quantized model, the others from the float one;
    `selective_update` keeps a part only where the whole model's outputs err less, or score higher by the metric that it
    names (top1, …, module:function; labels from the data); `inputs` parallel shows each part what the untuned model
    gives. `hold_out` is the share of samples that only judge; `memory` says where what goes into the parts is kept.
    Errors: InputError for options that could not act, a model in which nothing can be tuned, a float model of other
    values, labels that are missing, and data that do not fit; StageError for a metric that fails.
    """
    refuse_idle(locals())
    from qpipe.methods.learning.blockwise import Division, activations, learn_by_parts, refuse_powers_of_two
    from qpipe.methods.learning.stretch import Randomness
    from qpipe.methods.learning.tune import Surroundings, Tuning
    from qpipe.numerics.learning.options import LearningOptions

    if learn_scales:
        refuse_powers_of_two("adaquant", "learn_scales", model, [n for n in model.encodings if n in model.params])
    if learn_steps:
        refuse_powers_of_two("adaquant", "learn_steps", model, activations(model))
    learning = LearningOptions(
        iterations, batch_size, {"weight": lr, "scale": lr_scales, "bias": lr_biases, "act_scale":
        lr_steps}, schedule=schedule, lr_adjust=lr_adjust, early_stop=early_stop, hold_out=hold_out,
    )  # fmt: skip
    metric = selective_update
    score = None if isinstance(metric, bool) else scored_by(metric, data, limit)
    tuning = Tuning(
        learning, "ste_weight", rates == "relative", learn_scales is not False, learn_steps is not False, update_bias,
        output_qdq=output_qdq, random=Randomness(share=drop_ratio), parallel=inputs == "parallel",
        selective=bool(selective_update), score=score, memory=memory, begin=begin, begin_bias=update_bias,
    )  # fmt: skip
    arrays, division = thinned(data.arrays, limit), Division(blocks, ops)
    around = Surroundings(ctx.memo, ctx.seed, ctx.note, ctx.progress, ctx.device, seed)
    return learn_by_parts("adaquant", model, float_model, arrays, division, tuning, around)
