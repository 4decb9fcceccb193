"""Score a model on samples: by a metric of the task, or by how near its outputs are to those of the float model.

    top1, top5          share of the samples whose label has the highest, one of the five highest logits
    sqnr_db, cosine     of the outputs against those of `float_model`; no labels needed
    mse                 the same, negated: for every metric, higher is better
    module:function     a function of your own: (outputs, labels) -> number, higher is better

Assumes: labels for top1 and top5, `float_model` for sqnr_db, cosine and mse. With several outputs, top1 and top5 look
at the first of floats, the others take the mean over those of floats and say which is the worst, and a function of your
own gets a dict by output name. `outputs` names those that count instead.
Source: own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from qpipe.errors import InputError
from qpipe.numerics.metric_names import Comparison, Metric
from qpipe.numerics.thinning import thin, thinned
from qpipe.param import load_factory
from qpipe.stage import NULL, Context, Factory, Maker, Range, Samples, Scores, stage

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from qpipe.model.network.network import Network

    Outputs = Mapping[str, NDArray[Any]]


def spread(data: Samples, limit: int | None) -> Samples:
    """At most `limit` of the samples, evenly spread, with their labels."""
    labels = None if data.labels is None else thin(data.labels, limit)
    return data if limit is None else Samples(thinned(data.arrays, limit), labels)


def refuse_what_lacks(params: Mapping[str, Any], makers: Mapping[str, tuple[Maker, ...]]) -> None:
    """Raise InputError where the metric wants labels or a float model that are surely not there: what is seen before
    any data are loaded."""
    metric = params["metric"]
    if metric in get_args(Comparison) and not makers.get("float_model"):
        raise InputError(f"The metric '{metric}' compares with the float model: wire `float_model` to it.")
    for data in makers.get("data", ()):
        source = data.params.get("path") or data.params.get("images")
        if metric in ("top1", "top5") and data.stage == "load_data" and source and without_labels(data.params):
            raise InputError(
                f"The metric '{metric}' needs labels, and {source} has none. Give them (in an npz as 'labels', of "
                "images as sub-folders or a CSV), or take a metric without: goal.metric=sqnr_db, cosine, mse."
            )


def without_labels(params: Mapping[str, Any]) -> bool:
    """Whether an npz file, or a folder of images, surely gives no labels; False where that cannot be seen."""
    import zipfile

    path: Path | None = params.get("path")
    images: Path | None = params.get("images")
    try:
        if path is not None:
            with zipfile.ZipFile(path) as file:
                return "labels.npy" not in file.namelist()
        if images is None or not images.is_dir() or params.get("labels") is not None:
            return False
        return not any(entry.is_dir() for entry in images.iterdir())
    except (OSError, zipfile.BadZipFile):
        return False  # whoever loads it says what is wrong


@stage(
    version=1,
    config={"data": "evaluation", "metric": "${goal.metric}", "outputs": "${goal.outputs}"},
    wired=refuse_what_lacks,
)
def evaluate(
    model: Network,
    data: Samples,
    float_model: Network | None = None,
    *,
    metric: Metric | Factory = "top1",
    outputs: tuple[str, ...] = (),
    backend: Literal["simulation", "onnxruntime"] = "simulation",
    quantized: bool = True,
    batch_size: Annotated[int, Range(ge=1)] = 64,
    limit: Annotated[int, Range(ge=1)] | None = None,
    ctx: Context = NULL,
) -> Scores:
    """`score` (higher is better), `metric`, and `n`, the number of samples; of several outputs also the `worst`.

    `metric` is top1, top5, sqnr_db, cosine, mse or a function of your own, module:function; higher is better.
    `outputs` names the outputs that count; by default all of floats. `batch_size` samples are run at a time.
    `limit` takes that many samples, evenly spread. `backend` simulation runs the torch module with fake-quantize,
    onnxruntime the QDQ graph as it is deployed. `quantized: false` scores the float weights. Errors: InputError for
    labels or a float model that are missing, and data that do not fit; StageError where a metric of the user's
    fails.
    """
    from qpipe.model.simulation.run import run
    from qpipe.numerics.metrics import (
        LABELLED,
        counting,
        refuse_missing,
        score_by_function,
        score_outputs,
        scores_by_output,
    )

    data = spread(data, limit)
    own = metric not in get_args(Metric)

    def outputs_of(scored: Network, simulated: bool) -> Outputs:
        return run(
            scored, data.arrays, batch_size=batch_size, quantized=simulated, backend=backend,
            device=ctx.device, progress=lambda done, total: ctx.progress(done, total, "samples"),
        )  # fmt: skip

    compared = not own and metric not in LABELLED and float_model is not None
    reference = outputs_of(float_model, False) if compared and float_model is not None else None
    if not own:
        refuse_missing(metric, data.labels, reference)
    found = outputs_of(model, quantized)
    said: dict[str, Any] = {"metric": metric, "n": len(data), "backend": backend, "quantized": quantized}
    if own:
        given = counting(found, outputs) if outputs else found
        return Scores({"score": score_by_function(load_factory(metric), metric, given, data.labels), **said})
    score = score_outputs(metric, found, data.labels, reference, outputs)
    if reference is not None and len(each := scores_by_output(metric, found, reference, outputs)) > 1:
        worst = min(each, key=lambda name: each[name])
        ctx.note(f"{metric} of the worst output, '{worst}': {each[worst]:.6g}; the mean of {len(each)}: {score:.6g}.")
        said |= {"worst": each[worst], "worst_output": worst}
    return Scores({"score": score, **said})
