"""Mixed precision: the cheapest mix of bitwidths that keeps the score, or the best one within a budget.

    1  sensitivity   every group of tensors alone at every candidate, all else in float: one score each
    2  front         choices from the cheapest up, always the step that loses least per cost; the first that meets
                     `max_drop`, by bisection on the true simulation, or an integer programme under `budget`
    3  conversions   neighbours take one bitwidth where the goal still holds

A group is what has to go together: values on one grid, a layer's weight with its input, what one operator reads.
Losses of groups are taken to add up; that only proposes, for what is chosen was measured whole, and no uniform
candidate that keeps the goal is both as cheap and as good. Weights of every candidate are quantized from the float
weights. Every score is kept, so another budget, another goal or one more candidate re-uses all that exist.

Assumes: float weights (`bnf`, `cle` before, `adaround` after). Weights that were tuned keep their grid. A score
that is noisy is not trusted to say that a finer grid is worse.
Source: own; the three phases are those of AIMET's automatic mixed precision, the front that of Sinha and Zoltners
(qpipe.numerics.allocation), the layerwise error that of GPTQ, arXiv 2210.17323.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args

from qpipe.errors import InputError
from qpipe.methods.placement.target import Target
from qpipe.numerics.metric_names import Comparison, Metric, least_score
from qpipe.numerics.scheme import Scheme, with_observers
from qpipe.numerics.thinning import thin, thinned
from qpipe.param import load_factory
from qpipe.stage import NULL, Context, Factory, Range, Samples, Scores, stage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qpipe.methods.mixing.choices import Choices
    from qpipe.methods.mixing.judge import Judge
    from qpipe.model.network.network import Network

FLOAT = "float"


class Mixed(NamedTuple):
    """What amp returns: the model, and how it was found."""

    model: Network
    scores: Scores


def candidate_scheme(name: str, scheme: Scheme) -> Scheme | None:
    """`scheme` with the bitwidths of `w4a8`, of `w4` (weights alone), or None for `float`.

    Errors: ValueError for a name that is none, or bitwidths that the scheme cannot have.
    """
    if name == FLOAT:
        return None
    found = re.fullmatch(r"w(\d+)(?:a(\d+))?", name)
    if not found:
        raise ValueError(f"a candidate is a text like w4a8, w4 (weights alone) or float, got {name!r}.")
    activation = scheme.activation
    if found[2] is not None:
        if activation is None:
            raise ValueError(f"the scheme leaves activations in float: write w{found[1]} instead of {name}.")
        activation = replace(activation, bitwidth=int(found[2]))
    weight = replace(scheme.weight, bitwidth=int(found[1]))
    return replace(scheme, weight=weight, activation=activation, name=name)


def admitted(scheme: Scheme, target: Target) -> tuple[str, ...]:
    """The candidates where none are named: 4- and 8-bit weights, 8- and 16-bit activations and the scheme's own
    bitwidths, as far as the target takes them; w4a16 only where it does not take w4a8."""
    own = f"w{scheme.weight.bitwidth}"
    names = ["w4", "w8", own]
    if scheme.activation is not None:
        own += f"a{scheme.activation.bitwidth}"
        names = ["w4a8", "w8a8", "w4a16", "w8a16", own]
    found = [name for name in dict.fromkeys(names) if takes(target, candidate_scheme(name, scheme))]
    return tuple(name for name in found if name != "w4a16" or name == own or "w4a8" not in found)


def takes(target: Target, scheme: Scheme | None) -> bool:
    """Whether the target admits the scheme."""
    try:
        if scheme is not None:
            target.check(scheme)
    except InputError:
        return False
    return True


def refuse(given: Mapping[str, Any]) -> None:
    """Errors: ValueError, InputError for candidates that are none or that the target forbids, and for no goal."""
    target, candidates = given["target"], given["candidates"]
    if given["max_drop"] is None and given["min_score"] is None and given["budget"] is None:
        raise ValueError("set max_drop, min_score or budget: without a goal there is nothing to choose by.")
    if candidates is None:
        target.check(given["scheme"])
        return
    if len(set(candidates)) != len(candidates) or len(candidates) < 2:
        raise ValueError(f"candidates: name at least two different ones, got {list(candidates)}.")
    for name in candidates:
        scheme = candidate_scheme(name, given["scheme"])
        if scheme is not None:
            target.check(scheme)
        elif target.activations == "required":
            raise InputError(f"The target '{target.name}' takes quantized activations: leave out 'float'.")
    if set(candidates) == {FLOAT}:
        raise ValueError("candidates: 'float' alone leaves nothing to choose.")


def find(
    model: Network, data: Mapping[str, Any], schemes: Mapping[str, Scheme | None], target: Target,
    batch_size: int, ctx: Context,
) -> tuple[Choices, Any]:  # fmt: skip
    """The groups of `model` with the grids of every candidate, and the observers that made them."""
    from qpipe.methods.mixing.choices import find_choices
    from qpipe.methods.placement.calibration import all_encodings, frozen_weights, observed
    from qpipe.methods.placement.placement import place

    placements = {name: place(model, target, s) for name, s in schemes.items() if s is not None}
    first = next(iter(placements.values()))
    observers = observed(model, data, first, ctx.memo, batch_size=batch_size, device=ctx.device)
    grids = {
        name: all_encodings(model, placements[name], observers)
        if name in placements
        else frozen_weights(model)
        for name in schemes
    }
    return find_choices(model, first, grids, data), observers


def judge(
    model: Network, data: Samples, metric: str, outputs: tuple[str, ...], limit: int | None, name: str,
    batch_size: int, ctx: Context,
) -> Judge:  # fmt: skip
    """Scores of `model` by `metric` on at most `limit` of the samples; its sub-results are called `name`."""
    from qpipe.methods.mixing.judge import Judge

    function = None if metric in get_args(Metric) else load_factory(metric)
    arrays, labels = thinned(data.arrays, limit), None if data.labels is None else thin(data.labels, limit)
    return Judge(
        model, arrays, labels, metric, ctx.memo, name=name, function=function, outputs=outputs,
        batch_size=batch_size, device=ctx.device,
    )  # fmt: skip


def searched(held_out: Samples, evaluation: Samples, metric: str) -> bool:
    """Whether the search can be on the samples that were held out: they have the labels that the metric needs."""
    return metric in get_args(Comparison) or held_out.labels is not None or evaluation.labels is None


def shortfall(metric: str, least: float | None, budget: float | None, reached: float, score: float) -> str:
    """A sentence about a goal that no mix keeps: what float reached, and what the best mix has."""
    within = "" if budget is None else f" within the budget of {budget:g}"
    asked = f"{metric} at {least:.6g} or above (float has {reached:.6g})"
    return f"No mix{within} keeps {asked}: the best one has {score:.6g}."


@stage(
    version=1,
    config={
        "calibration": "${tuning}", "evaluation": "evaluation", "scheme": "${scheme}", "target": "${target}",
        "metric": "${goal.metric}", "outputs": "${goal.outputs}", "max_drop": "${goal.max_drop}",
        "min_score": "${goal.min_score}", "seed": "${seed}",
    },
    check=refuse,
    not_after={
        "adaround": "weights that are tuned keep their grid, so that there is little left to mix",
        "nearest": "weights that are rounded keep their grid, so that there is little left to mix",
    },
)  # fmt: skip
def amp(
    model: Network,
    calibration: Samples,
    evaluation: Samples,
    choice: Scores | None = None,
    held_out: Samples | None = None,
    *,
    scheme: Scheme,
    target: Target,
    candidates: tuple[str, ...] | None = None,
    method: Literal["sqnr_db", "evaluation", "gram"] = "sqnr_db",
    metric: Metric | Factory = "top1",
    outputs: tuple[str, ...] = (),
    max_drop: Annotated[float, Range(ge=0)] | None = 0.01,
    min_score: float | None = None,
    budget: Annotated[float, Range(gt=0)] | None = None,
    cost: Literal["bitops", "size"] = "bitops",
    conversion_slack: Annotated[float, Range(ge=0)] = 0.05,
    limit: Annotated[int, Range(ge=1)] | None = 256,
    batch_size: Annotated[int, Range(ge=1)] = 64,
    seed: int = 0,
    ctx: Context = NULL,
) -> Mixed:
    """`model` with the grids of the chosen mix, and `scores`: what was tried, what it scored and what it costs.

    `scheme` and `target` say what is quantized, and how; `metric` what is kept, of `outputs`, where several count.
    `candidates` are bitwidths like w4a8, w4 (weights alone) or float, all else is the scheme's; null: the scheme's
    own, w4a8, w8a8 and w8a16, those that the target takes. `choice` brings the observers of quantscheme_select.
    `method` measures each group by the sqnr of the outputs on `limit` samples of the calibration, by `metric` on
    `limit` of the evaluation, or estimates it from second moments (gram). `max_drop` may be lost of `metric` against
    float, on all of the evaluation, or it has to be `min_score`; null: as good as `budget` allows. `held_out` takes the
    place of the evaluation, unless labels that the metric needs are there alone. `budget` is a share
    of the costliest candidate's `cost`. `batch_size` samples are run at a time; `seed` draws what is random.
    `conversion_slack` is the share of the chosen cost that fewer conversions may add. Where no mix keeps the goal, the
    best one comes out, with a note.
    Errors: InputError for candidates that the target forbids, for data that do not fit or are none, and for a
    budget below the cheapest mix.
    """
    refuse(locals())
    from qpipe.methods.mixing.mix import Problem, report, solve
    from qpipe.methods.mixing.sensitivity import GramSensitivity, loss_of, score_alone

    if held_out is not None and searched(held_out, evaluation, metric):
        evaluation = held_out
    model = model.with_facts(biases=target.bias, on_codes=target.on_codes)
    used = scheme if choice is None else with_observers(scheme, choice.values)
    schemes = {name: candidate_scheme(name, used) for name in candidates or admitted(scheme, target)}
    whole = judge(model, evaluation, metric, outputs, None, "mix", batch_size, ctx)
    by, few = (metric, evaluation) if method == "evaluation" else ("sqnr_db", calibration)
    single = judge(model, few, by, outputs, limit, "alone", batch_size, ctx)
    choices, observers = find(model, calibration.arrays, schemes, target, batch_size, ctx)
    if not choices.groups:
        ctx.note(f"All candidates ({', '.join(schemes)}) come to the same grids in this model.")
    if method == "gram":
        samples = thinned(calibration.arrays, limit)
        gram = GramSensitivity(model, samples, observers, ctx.memo, seed=seed, device=ctx.device)
        alone = score_alone(choices, gram.score, ctx.progress)
    else:
        alone = score_alone(choices, lambda _, grids: single.score(grids), ctx.progress)
    reference = single.float_score() if by != "sqnr_db" else 0.0
    problem = Problem(choices, [[loss_of(by, score, reference) for score in row] for row in alone], cost)
    reached = whole.float_score()
    least = least_score(metric, reached, max_drop, min_score)
    solution = solve(
        problem, lambda mix: whole.score(choices.encodings(mix)),
        least, budget, conversion_slack,
    )  # fmt: skip
    said = report(problem, solution, alone)
    if not solution.found.met:
        ctx.note(shortfall(metric, least, budget, reached, said["score"]))
    table = {row["group"]: row["candidate"] for row in said["groups"]}
    mixed = model.with_encodings(choices.encodings(solution.choice)).with_metadata({"amp": table})
    told = {"metric": metric, "float": reached, "met": solution.found.met, "cost": cost, "method": method}
    return Mixed(mixed, Scores({**told, **said}))
