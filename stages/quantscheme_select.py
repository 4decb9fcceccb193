"""Which observers suit this model: every candidate is tried, for weights and for activations; the best win.

    score(candidate) = sqnr_db of the outputs against the float model's, by default

Weights are tried with float activations, activations with float weights, so that neither choice hides the
other. One pass of the float model serves all candidates; no labels are needed. The scores go to the `choice`
port of `calibrate`. A last candidate gives each weight its own observer and grid, those of the least

    tr(dW H dW^T) / tr(W H W^T), H = E[x x^T] of what goes into its layer in the float model

among the observers that look for a small error, on the scheme's grid and on `weight_grids`.

Assumes: `calibration` are samples like those the model will see. Scores are taken on `evaluation` where it is wired,
on `calibration` otherwise. A tie goes to the candidate that stands first, and so does a choice among candidates that
all leave more noise than signal.
Source: own; sqnr is known as tf_enhanced in AIMET, whose AutoQuant tries schemes in the same way.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from qpipe.errors import InputError
from qpipe.methods.placement.target import Target
from qpipe.numerics.metric_names import Comparison
from qpipe.numerics.scheme import (
    LOW_BITWIDTH,
    Granularity,
    Observer,
    Scheme,
    TensorScheme,
    with_granularity,
)
from qpipe.numerics.thinning import thinned
from qpipe.stage import NULL, Context, Range, Samples, Scores, stage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from qpipe.methods.placement.placement import Placement
    from qpipe.model.network.network import Network
    from qpipe.numerics.grid import Encoding

    Encodings = Mapping[str, Encoding]

WEIGHT_OBSERVERS: tuple[Observer, ...] = ("minmax", "sqnr", "mse", "percentile", "entropy")
ACTIVATION_OBSERVERS: tuple[Observer, ...] = ("minmax", "moving_average", *WEIGHT_OBSERVERS[1:])
WeightGrid = Literal["max", "full_range", "signed_max", "asymmetric"]
_BY_ERROR = ("minmax", "sqnr", "mse")
_PER_WEIGHT = "per_weight"


def candidates(
    scheme: TensorScheme, observers: tuple[Observer, ...], percentiles: tuple[float, ...]
) -> Iterator[TensorScheme]:
    """`scheme` with each observer; the percentile observer once per percentile."""
    for observer in observers:
        for percentile in percentiles if observer == "percentile" else (scheme.percentile,):
            yield replace(scheme, observer=observer, percentile=percentile)


def trials(
    scheme: Scheme,
    weight_observers: tuple[Observer, ...],
    activation_observers: tuple[Observer, ...],
    percentiles: tuple[float, ...],
) -> list[tuple[str, TensorScheme]]:
    """All candidates as (side, scheme of its tensors), in the order of trial."""
    found = [("weight", each) for each in candidates(scheme.weight, weight_observers, percentiles)]
    if scheme.activation is not None:
        sided = candidates(scheme.activation, activation_observers, percentiles)
        found += [("activation", each) for each in sided]
    return found


def on_grid(scheme: TensorScheme, grid: WeightGrid) -> TensorScheme:
    """`scheme` with the grid. Raises ValueError where its codes cannot have it."""
    if grid == "asymmetric":
        return replace(scheme, symmetric=False, grid="max")
    return replace(scheme, symmetric=True, grid=grid)


def other_grids(
    scheme: TensorScheme, observers: tuple[Observer, ...], grids: tuple[WeightGrid, ...] | None, target: Target
) -> list[TensorScheme]:
    """`scheme` on each of `grids` that `target` takes, by the observers that look for a small error. None: all grids up
    to 4 bits, where codes are computed with as floats; above, zero points would cost time."""
    low: tuple[WeightGrid, ...] = ("max", "signed_max", "asymmetric") if scheme.bitwidth <= LOW_BITWIDTH else ()
    found = []
    for grid in (low if grids is None else grids) if scheme.signed else ():
        each = on_grid(scheme, grid)
        if target.weight.broken(each) is None:
            found += [replace(each, observer=observer) for observer in observers if observer in _BY_ERROR]
    return found


def least(
    options: Sequence[tuple[Placement, Encodings]], losses: Callable[[Encodings], Mapping[str, float]]
) -> tuple[dict[str, dict[str, Any]], dict[str, Encoding]]:
    """What to change for each weight, and its grid: the option of the least loss, the first of equals."""
    changes: dict[str, dict[str, Any]] = {}
    grids: dict[str, Encoding] = {}
    lowest: dict[str, float] = {}
    for placement, encodings in options:
        found = losses(encodings)
        for name, encoding in encodings.items():
            if not encoding.frozen and found[name] < lowest.get(name, float("inf")):
                scheme = placement.weights[name][0]
                fields = ("observer", "percentile", "grid", "symmetric")
                changes[name] = {field: getattr(scheme, field) for field in fields}
                lowest[name], grids[name] = found[name], encoding
    return changes, grids


def with_candidate(scheme: Scheme, side: str, candidate: TensorScheme) -> Scheme:
    """`scheme` with the candidate on its side."""
    if side == "weight":
        return replace(scheme, weight=candidate)
    return replace(scheme, activation=candidate)


def refuse_trials(given: Mapping[str, Any]) -> None:
    """Errors: ValueError for a list without candidates, or a candidate that no tensor can have; InputError for a
    scheme or a grid that the target forbids.
    """
    given["target"].check(given["scheme"])
    names = ("weight_observers", "activation_observers", "percentiles")
    for name in names:
        if not given[name]:
            raise ValueError(f"{name} is empty; name at least one.")
    scheme = with_granularity(given["scheme"], given["weight_granularity"])
    for side, candidate in trials(scheme, *(given[name] for name in names)):
        with_candidate(scheme, side, candidate)
    for grid in given["weight_grids"] or ():
        broken = given["target"].weight.broken(on_grid(scheme.weight, grid))
        if broken is not None:
            raise InputError(f"weight_grids: the target '{given['target'].name}' takes weights with {broken}.")


def row(side: str, scheme: TensorScheme, score: float) -> dict[str, Any]:
    """One line of the table: what was tried, and what it scored."""
    percentile = scheme.percentile if scheme.observer == "percentile" else None
    return {"side": side, "observer": scheme.observer, "percentile": percentile, "score": score}


def best(table: list[dict[str, Any]], side: str, metric: str) -> dict[str, Any]:
    """The row of the side with the highest score; the first of equals, and where no signal is left."""
    rows = [line for line in table if line["side"] == side]
    if drowned(rows, metric):
        return rows[0]
    return max(rows, key=lambda line: float(line["score"]))


def drowned(rows: list[dict[str, Any]], metric: str) -> bool:
    """Whether the noise is louder than the signal with every candidate: such scores say nothing."""
    return metric == "sqnr_db" and all(line["score"] <= 0.0 for line in rows)


def scored(
    model: Network, data: Samples, metric: str, batch_size: int, limit: int | None, ctx: Context
) -> Callable[[Encodings], float]:
    """A function that scores the model with given encodings against the float model, on `data`."""
    from qpipe.model.simulation.run import run
    from qpipe.numerics.metrics import METRICS

    samples = thinned(data.arrays, limit)

    def outputs(candidate: Network, quantized: bool) -> dict[str, Any]:
        return run(candidate, samples, batch_size=batch_size, quantized=quantized, device=ctx.device)

    reference = outputs(model, False)

    def score(encodings: Encodings) -> float:
        found = outputs(model.with_encodings(encodings), True)
        values = [METRICS[metric](found[name], reference[name]) for name in reference]
        return sum(values) / len(values)

    return score


def attempts(
    tried: Sequence[tuple[str, TensorScheme]],
    encodings: Callable[[str, TensorScheme], Encodings],
    score: Callable[[Encodings], float],
    progress: Callable[[int, int, str], None],
) -> tuple[list[dict[str, Any]], list[Encodings]]:
    """The table of what every candidate scored, and the grids that each of its rows had."""
    table: list[dict[str, Any]] = []
    grids: list[Encodings] = []
    for side, candidate in tried:
        progress(len(table), len(tried), f"{side} {candidate.observer}")
        grids.append(encodings(side, candidate))
        table.append(row(side, candidate, score(grids[-1])))
    return table, grids


def named(winners: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The winners as `calibrate` reads them: `weight_observer`, `weight_percentile`, and so for activations."""
    return {
        f"{side}_{key}": line[key] for side, line in winners.items() for key in ("observer", "percentile")
    }


@stage(
    version=1,
    config={"calibration": "${tuning}", "scheme": "${scheme}", "target": "${target}"},
    check=refuse_trials,
)
def quantscheme_select(
    model: Network,
    calibration: Samples,
    evaluation: Samples | None = None,
    *,
    scheme: Scheme,
    target: Target,
    weight_observers: tuple[Observer, ...] = WEIGHT_OBSERVERS,
    activation_observers: tuple[Observer, ...] = ACTIVATION_OBSERVERS,
    percentiles: tuple[float, ...] = (99.9, 99.99, 99.999),
    weight_granularity: Granularity | None = None,
    per_weight: bool = True,
    weight_grids: tuple[WeightGrid, ...] | None = None,
    metric: Comparison = "sqnr_db",
    batch_size: Annotated[int, Range(ge=1)] = 32,
    limit: Annotated[int, Range(ge=1)] | None = 256,
    ctx: Context = NULL,
) -> Scores:
    """The winning `weight_observer` and `activation_observer`, their percentiles, and the `table` of scores; in
    `weights` the observer and the grid of each weight, where choosing `per_weight` scores best.

    `scheme` and `target` say what is quantized, and how; `weight_granularity` replaces the scheme's.
    `weight_observers` and `activation_observers` are tried, those by percentile with each of `percentiles`.
    `weight_grids` are tried for single weights; null: up to 4 bits max, signed_max and asymmetric where the target
    takes them, else the scheme's alone. `metric` compares the outputs with the float model's, run with `batch_size`
    samples at a time. `score` is that of both winners together. `limit` takes that many samples of the calibration
    and of the evaluation, evenly spread. Errors: InputError for data that do not fit the model.
    """
    refuse_trials(locals())
    from qpipe.methods.mixing.sensitivity import GramSensitivity
    from qpipe.methods.placement.calibration import activation_encodings, observed, weight_encodings
    from qpipe.methods.placement.placement import place

    scheme = with_granularity(scheme, weight_granularity)
    observers = observed(
        model, thinned(calibration.arrays, limit), place(model, target, scheme), ctx.memo,
        batch_size=batch_size, device=ctx.device,
    )  # fmt: skip
    score = scored(model, evaluation or calibration, metric, batch_size, limit, ctx)

    @functools.cache
    def placed(side: str, candidate: TensorScheme) -> Placement:
        return place(model, target, with_candidate(scheme, side, candidate))

    def encodings(side: str, candidate: TensorScheme) -> Encodings:
        placement = placed(side, candidate)
        return weight_encodings(model, placement) if side == "weight" else activation_encodings(placement, observers)

    tried = trials(scheme, weight_observers, activation_observers, percentiles)
    table, grids = attempts(tried, encodings, score, ctx.progress)
    winners = {side: best(table, side, metric) for side in dict(tried)}
    chosen = {side: grids[table.index(line)] for side, line in winners.items()}
    for side in winners:
        if drowned([line for line in table if line["side"] == side], metric):
            ctx.note(f"No {side} observer leaves a signal (all at most 0 dB): the first one stays.")
    weights: dict[str, Any] = {}
    if per_weight:
        options = [(placed(*each), found) for each, found in zip(tried, grids, strict=True) if each[0] == "weight"]
        for each in other_grids(scheme.weight, weight_observers, weight_grids, target):
            options.append((placed("weight", each), encodings("weight", each)))
        loss = GramSensitivity(model, thinned(calibration.arrays, limit), {}, ctx.memo, seed=0, device=ctx.device)
        changes, own = least(options, loss.each)
        table.append({"side": "weight", "observer": _PER_WEIGHT, "percentile": None, "score": score(own)})
        if max(0.0 if metric == "sqnr_db" else -math.inf, winners["weight"]["score"]) < table[-1]["score"]:
            weights, chosen["weight"] = {"weights": changes}, own
    together = {name: grid for found in chosen.values() for name, grid in found.items()}
    return Scores({"score": score(together), "metric": metric, **named(winners), **weights, "table": table})
