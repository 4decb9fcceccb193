"""Score a model on samples: by a metric of the task, or by how near its outputs are to those of the float
model.

    top1, top5          share of the samples whose label has the highest, one of the five highest logits
    sqnr_db, cosine     of the outputs against those of `float_model`; no labels needed
    mse                 the same, negated: for every metric, higher is better
    module:function     a function of your own: (outputs, labels) -> number, higher is better

Assumes: labels for top1 and top5, `float_model` for sqnr_db, cosine and mse. With several outputs, top1 and
top5 look at the first, the others take the mean over all, and a function of your own gets a dict by output
name.
Source: own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from qpipe.errors import InputError, StageError
from qpipe.param import load_factory
from qpipe.stage import NULL, Context, Factory, Range, Samples, Scores, stage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from qpipe.model import Model

    Outputs = Mapping[str, NDArray[Any]]

Metric = Literal["top1", "top5", "sqnr_db", "cosine", "mse"]


def spread(data: Samples, limit: int | None) -> Samples:
    """At most `limit` of the samples, evenly spread, with their labels."""
    from qpipe.model.run import thinned

    labels = None if data.labels is None else thinned({"labels": data.labels}, limit)["labels"]
    return data if limit is None else Samples(thinned(data.arrays, limit), labels)


def score_labels(metric: str, outputs: Outputs, data: Samples) -> float:
    """top1 or top5 of the first output. Errors: InputError where the labels do not fit."""
    from qpipe.numerics.metrics import METRICS

    assert data.labels is not None
    logits = next(iter(outputs.values()))
    return METRICS[metric](logits, data.labels)


def score_against(metric: str, outputs: Outputs, reference: Outputs) -> float:
    """sqnr_db, cosine or -mse of the outputs against the float ones; with several outputs, their mean."""
    from qpipe.numerics.metrics import METRICS

    scores = [METRICS[metric](outputs[name], reference[name]) for name in reference]
    return sum(scores) / len(scores)


def score_by_function(name: str, outputs: Outputs, data: Samples) -> float:
    """What the user's function returns. Errors: StageError, one line with its name, where it fails."""
    import numpy as np

    function = load_factory(name)
    given = next(iter(outputs.values())) if len(outputs) == 1 else dict(outputs)
    try:
        returned = function(given, data.labels)
    except Exception as error:  # the function is the user's: whatever it raises is theirs to read
        raise StageError(f"The metric {name} raised {type(error).__name__}: {error}") from error
    value = np.asarray(returned)
    if value.size != 1 or value.dtype.kind not in "fiub":
        found = f"an array of shape {value.shape}" if value.ndim else repr(returned)
        raise StageError(f"The metric {name} returned {found}; it has to return one number.")
    score = float(value.item())
    if not np.isfinite(score):
        raise StageError(f"The metric {name} returned {score}; a score has to be finite.")
    return score


@stage(version=1, config={"data": "evaluation", "metric": "${goal.metric}"})
def evaluate(
    model: Model,
    data: Samples,
    float_model: Model | None = None,
    *,
    metric: Metric | Factory = "top1",
    backend: Literal["simulation", "onnxruntime"] = "simulation",
    quantized: bool = True,
    batch_size: Annotated[int, Range(ge=1)] = 64,
    limit: Annotated[int, Range(ge=1)] | None = None,
    ctx: Context = NULL,
) -> Scores:
    """`score` (higher is better), `metric`, and `n`, the number of samples.

    `limit` takes that many samples, evenly spread. `backend` simulation runs the torch module with
    fake-quantize, onnxruntime the QDQ graph as it is deployed. `quantized: false` scores the float weights.
    Errors: InputError for labels or a float model that are missing, and data that do not fit; StageError
    where a metric of the user's fails.
    """
    from qpipe.model.run import run
    from qpipe.numerics.metrics import LABELLED

    data = spread(data, limit)
    own = metric not in get_args(Metric)
    if metric in LABELLED and data.labels is None:
        raise InputError(
            f"The metric '{metric}' needs labels, and the data have none. Give them as 'labels', or take a "
            "metric without: sqnr_db, cosine, mse."
        )
    if not own and metric not in LABELLED and float_model is None:
        raise InputError(f"The metric '{metric}' compares with the float model: wire `float_model` to it.")

    def outputs_of(scored: Model, simulated: bool) -> Outputs:
        return run(
            scored, data.arrays, batch_size=batch_size, quantized=simulated, backend=backend,
            device=ctx.device, progress=lambda done, total: ctx.progress(done, total, "samples"),
        )  # fmt: skip

    outputs = outputs_of(model, quantized)
    if own:
        score = score_by_function(metric, outputs, data)
    elif float_model is None or metric in LABELLED:
        score = score_labels(metric, outputs, data)
    else:
        score = score_against(metric, outputs, outputs_of(float_model, False))
    said = {"metric": metric, "n": len(data), "backend": backend, "quantized": quantized}
    return Scores({"score": score, **said})
