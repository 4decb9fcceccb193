"""Give every tensor that the target quantizes its grid, from one pass of the float model over samples.

The target says where quantizers stand and which values share one grid, the scheme how each grid is made.
Observers see the float model's values in a stream, so memory does not grow with the number of samples;
weights are searched exactly.

    range [lo, hi] by the observer -> scale = (hi - lo) / (qmax - qmin), zero exactly representable

Assumes: samples like those that the model will see. Weights that a method has tuned, whose encodings are
frozen, keep their grid. Values are not rounded here: the encodings are simulated, and written by `export`.
Source: own; the observers' sources are in qpipe.numerics.observers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from qpipe.errors import InputError
from qpipe.methods.placement.target import Target
from qpipe.numerics.scheme import Granularity, Scheme, with_granularity, with_observers
from qpipe.numerics.thinning import thinned
from qpipe.stage import NULL, Context, Range, Samples, Scores, stage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qpipe.model.network.network import Network


HARD = (
    "Weights have one scale per tensor, the hard case. The target takes one per channel, too: "
    "scheme.weight.granularity=auto."
)


def could_have_channels(scheme: Scheme, target: Target) -> bool:
    """Whether weights have one scale per tensor, and the target would take one per channel."""
    from dataclasses import replace

    if scheme.weight.granularity != "per_tensor":
        return False
    return target.weight.settled(replace(scheme.weight, granularity="auto")).granularity == "per_channel"


def refuse_scheme(given: Mapping[str, Any]) -> None:
    """Errors: InputError for a scheme that the target forbids, ValueError where the scheme's weights cannot have
    the granularity that replaces theirs. That one is for baselines: it is not held against the target.
    """
    given["target"].check(given["scheme"])
    with_granularity(given["scheme"], given["weight_granularity"])


@stage(
    version=1,
    config={"data": "${tuning}", "scheme": "${scheme}", "target": "${target}"},
    check=refuse_scheme,
    not_after={"amp": "one scheme for all would take the place of the mix"},
)
def calibrate(
    model: Network,
    data: Samples,
    choice: Scores | None = None,
    *,
    scheme: Scheme,
    target: Target,
    weight_granularity: Granularity | None = None,
    batch_size: Annotated[int, Range(ge=1)] = 32,
    limit: Annotated[int, Range(ge=1)] | None = None,
    ctx: Context = NULL,
) -> Network:
    """The model with an encoding for every weight and activation that `target` quantizes.

    `scheme` gives bitwidths, grids and observers. `batch_size` samples are run at a time.
    `choice`, from `quantscheme_select`, replaces the scheme's observers; `weight_granularity` replaces the
    scheme's. `limit` takes that many samples, evenly spread; None all. Errors: InputError for data that do
    not fit the model or hold nan, naming the tensor, and for a model in which the target quantizes nothing.
    """
    from qpipe.methods.placement.calibration import all_encodings, frozen_weights, observed
    from qpipe.methods.placement.placement import place
    from qpipe.methods.placement.remarks import joined_inputs, remarks, weights_in_float

    target.check(scheme)
    scheme = with_granularity(scheme, weight_granularity)
    placement = place(model, target, scheme if choice is None else with_observers(scheme, choice.values))
    if not placement.weights and not placement.activations:
        why = f" {weights_in_float(placement, {})}" if placement.in_float else ""
        raise InputError(f"The target '{target.name}' quantizes nothing in this model.{why}")
    observers = observed(
        model, thinned(data.arrays, limit), placement, ctx.memo, batch_size=batch_size,
        also=joined_inputs(model, placement), device=ctx.device,
        progress=lambda done, total: ctx.progress(done, total, "samples"),
    )  # fmt: skip
    encodings = all_encodings(model, placement, observers)
    if placement.weights and could_have_channels(scheme, target):
        ctx.note(HARD)
    for sentence in remarks(model, placement, observers, encodings, data.arrays):
        ctx.note(sentence)
    if kept := frozen_weights(model):
        why = "The model came quantized" if model.facts.came_quantized else "Tuned before"
        ctx.note(f"{why}, so their grid stays: {', '.join(kept)}.")
    return model.with_facts(biases=target.bias, on_codes=target.on_codes).with_encodings(encodings)
