"""Round each weight up or down so that the layer's output errs least on the data, where nearest is not best.

    gram        min over codes of E |W x - W^ x^|^2, in closed form on the second moments of the inputs
    gradient    min over V of |f(W^ x^) - f(W x)|^2 + reg_param * sum(1 - |2 h(V) - 1|^beta), f the activation

Layers in order, each once: x^ is what the layers before make of the data, tuned already and with activations
quantized; x is the float model's. `gram` also moves the bias by W E[x] - W^ E[x^]. A layer whose result is no
better than nearest rounding keeps that; each one that is not tuned is noted with its reason. Afterwards the
weights lie on their grids, and their encodings are frozen.

Assumes: weights have encodings (`calibrate`); some hundred samples like those the model will see. A MatMul
without a bias gets none.
Source: Nagel, Amjad, van Baalen, Louizos, Blankevoort, "Up or Down? Adaptive Rounding for Post-Training
Quantization", arXiv 2004.10568; for the closed form see qpipe.numerics.rounding.gram and its sources.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any, Literal

from qpipe.errors import InputError
from qpipe.numerics.thinning import thinned
from qpipe.stage import NULL, Context, Range, Samples, stage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from qpipe.methods.rounding.walk import Rounded
    from qpipe.model.network.network import Network
    from qpipe.model.structure.layers import Layer

READ_BY = {
    "gram": ("beam", "scale_search", "bias_correction"),
    "gradient": (
        "iterations", "batch_size", "lr", "reg_param", "beta_range", "warm_start", "early_stop",
        "lr_adjust", "drop_ratio",
    ),
}  # fmt: skip
"""The options that one solver alone reads."""

POSITIONS = {"gram": 25, "gradient": 64}
"""Places of a sample that count: for moments fewer do, as every sample counts in every step."""


def refuse_unread(given: Mapping[str, Any]) -> None:
    """Errors: InputError where an option that only the other solver reads is set away from its default."""
    parameters, solver = inspect.signature(adaround).parameters, given["solver"]
    for owner, names in READ_BY.items():
        changed = [name for name in names if owner != solver and given[name] != parameters[name].default]
        if changed:
            raise InputError(
                f"adaround: the solver '{solver}' does not read {', '.join(map(repr, changed))}. Leave it out, "
                f"or set solver: {owner}."
            )
    if not given["asymmetric"]:
        for name in ("selective_update", "drop_ratio"):
            if given[name] != parameters[name].default:
                raise InputError(f"adaround: '{name}' needs asymmetric: true, got false. Leave one of them out.")


def refuse_untunable(model: Network, layers: tuple[Layer, ...], reasons: Mapping[str, str]) -> None:
    """Errors: InputError where there is no layer to tune, with the way out."""
    if layers:
        return
    if reasons and all(reason == "its weight was tuned before" for reason in reasons.values()):
        raise InputError("Every weight of the model was tuned before; there is nothing left to round.")
    found = "; ".join(f"'{name}': {reason}" for name, reason in reasons.items()) or "there is no layer"
    if not model.encodings:
        out = "Put the stage 'calibrate' before 'adaround'."
    elif any(name in model.params for name in model.encodings):
        out = "What has a grid is no layer that can be tuned: put 'nearest' in the place of 'adaround'."
    else:
        out = "'calibrate' left every weight in float, and its notes say why: leave 'adaround' out."
    raise InputError(f"No layer can be tuned: {found}. {out}")


@stage(
    version=1,
    config={"data": "${tuning}", "seed": "${seed}"},
    check=refuse_unread,
    not_after={
        "nearest": "after rounding to nearest there is nothing left to tune",
        "bias_correction": "the correction belongs to the rounding that adaround replaces",
    },
    not_before={"bias_correction": "the tuned rounding already carries the correction"},
)
def adaround(
    model: Network,
    data: Samples,
    *,
    solver: Literal["gram", "gradient"] = "gram",
    asymmetric: bool = True,
    limit: Annotated[int, Range(ge=1)] | None = 1000,
    seed: int = 0,
    beam: Annotated[int, Range(ge=1)] = 8,
    scale_search: bool = False,
    bias_correction: bool = True,
    positions: Annotated[int, Range(ge=1)] | None = None,
    iterations: Annotated[int, Range(ge=1)] | None = None,
    batch_size: Annotated[int, Range(ge=1)] = 32,
    lr: Annotated[float, Range(gt=0)] = 1e-3,
    reg_param: Annotated[float, Range(ge=0)] = 0.01,
    beta_range: tuple[float, float] = (20.0, 2.0),
    warm_start: Annotated[float, Range(ge=0, lt=1)] = 0.2,
    early_stop: Annotated[int, Range(ge=0)] = 0,
    lr_adjust: tuple[float, float] | None = None,
    drop_ratio: Annotated[float, Range(ge=0, le=1)] = 1.0,
    selective_update: bool = False,
    ctx: Context = NULL,
) -> Network:
    """The model with tuned weights, frozen on their grids; `metadata["adaround"]` reports each layer.

    `solver` gram solves on second moments of the inputs, gradient follows the paper; `seed` draws what is random.
    Both solvers: `asymmetric` false tunes on the float model's inputs; `limit` takes that many samples, evenly spread,
    and `positions` places of each (null: 25 for gram, 64 for gradient); `selective_update` keeps a layer's result only
    where the model's outputs err less with it. gram: `beam` candidates per row; `scale_search` lets the scales move;
    `bias_correction` lets biases take up the mean error. gradient: `iterations` steps (null: 10000, 15000 below 8 bits)
    of `batch_size` samples with `lr`; `reg_param` weighs the rounding term, whose exponent goes through
    `beta_range` after a share of `warm_start` steps, as in the paper; `early_stop` ends after so many checks without a
    gain (0: never); `lr_adjust` (threshold, rate) takes that rate for layers whose loss with nearest rounding lies
    above; `drop_ratio` is the share of input elements taken from x^ rather than x.
    Errors: InputError for options that the solver does not read, a model in which nothing can be tuned, and data that
    do not fit.
    """
    refuse_unread(locals())
    from qpipe.methods.rounding.by_gradient import GradientOptions, round_by_gradient
    from qpipe.methods.rounding.by_gram import round_by_gram
    from qpipe.methods.rounding.walk import Walk, round_in_order, tunable_layers, with_biases
    from qpipe.numerics.rounding.gram import GramOptions

    gains_biases = solver == "gram" and bias_correction
    source = with_biases(model, tunable_layers(model)[0]) if gains_biases else model
    layers, reasons = tunable_layers(source)
    if not layers and model.facts.came_quantized:
        ctx.note(
            "The model came quantized, and its weights stay on their grids: adaround leaves it as it is."
        )
        return model
    refuse_untunable(model, layers, reasons)
    gram = GramOptions(beam=beam, scale_search=scale_search, update_bias=bias_correction)
    gradient = GradientOptions(
        iterations, batch_size, lr, reg_param, beta_range, warm_start, early_stop, lr_adjust, drop_ratio
    )

    def tune(index: int, layer: Layer, x_hat: list[Tensor], x: list[Tensor]) -> Rounded:
        problem, own = (source, layer, x_hat, x), ctx.seed(str(seed), layer.name)
        places = positions or POSITIONS[solver]
        if solver == "gram":
            return round_by_gram(*problem, options=gram, positions=places, seed=own, memo=ctx.memo)
        return round_by_gradient(
            *problem, options=gradient, positions=places, seed=own, memo=ctx.memo,
            progress=lambda done, total: ctx.progress(index * total + done, len(layers) * total, layer.name),
        )  # fmt: skip

    walk = Walk(source, thinned(data.arrays, limit), asymmetric=asymmetric, device=ctx.device)
    tuned, reports = round_in_order(
        source, layers, walk, tune, note=ctx.note, progress=ctx.progress, selective=selective_update
    )
    for name, reason in reasons.items():
        ctx.note(f"'{name}' is not tuned: {reason}.")
    return tuned.with_metadata({"adaround": {"solver": solver, "layers": reports, "not_tuned": reasons}})
