"""Score a model on samples: by a metric of the task, or by how near its outputs are to those of the float model.

    top1, top5          share of the samples whose label has the highest, one of the five highest logits
    sqnr_db, cosine     of the outputs against those of `float_model`; no labels needed
    mse                 the same, negated: for every metric, higher is better
    module:function     a function of your own: (outputs, labels) -> number, higher is better

What is scored on `held_out` besides is for choosing (qpipe's first_within): the metric, where these samples have the
labels for it, and sqnr_db, each with what every part of the samples says of it.

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
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from qpipe.model.network.network import Network
    from qpipe.numerics.jackknife import Rows

    Outputs = Mapping[str, NDArray[Any]]
    Score = Callable[[Outputs, NDArray[Any] | None, Outputs | None], float]
    """Of outputs, labels, and the float model's outputs."""


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


def scorer(metric: Metric | Factory, outputs: tuple[str, ...]) -> Score:
    """The metric as a function, of the outputs that count."""
    from qpipe.numerics.metrics import counting, score_by_function, score_outputs

    if metric in get_args(Metric):
        return lambda found, labels, reference: score_outputs(metric, found, labels, reference, outputs)
    function = load_factory(metric)

    def score(found: Outputs, labels: NDArray[Any] | None, _: Outputs | None) -> float:
        return score_by_function(function, metric, counting(found, outputs) if outputs else found, labels)

    return score


def judged(
    metric: Metric | Factory, outputs: tuple[str, ...], found: Outputs, labels: NDArray[Any] | None,
    reference: Outputs | None,
) -> dict[str, Any]:  # fmt: skip
    """`score` of all held-out samples, and `parts`, what each part of them says; none where parts have no score."""
    from qpipe.errors import StageError
    from qpipe.numerics.jackknife import pseudo_values
    from qpipe.numerics.metrics import MEANS, counting, energies

    score = scorer(metric, outputs)
    if metric == "sqnr_db" and reference is not None:  # large outputs are read once, not once for each part
        pairs = {name: energies(found[name], wanted) for name, wanted in counting(reference, outputs).items()}
        found, reference = ({name: pair[side] for name, pair in pairs.items()} for side in (0, 1))

    def of(rows: Rows) -> float:
        own, other = ({name: array[rows] for name, array in each.items()} for each in (found, reference or {}))
        return score(own, None if labels is None else labels[rows], None if reference is None else other)

    whole = score(found, labels, reference)
    try:
        count = len(next(iter(found.values())))
        return {"score": whole, "parts": pseudo_values(of, count, mean=metric in MEANS)}
    except (InputError, StageError):  # a metric of the user's may need every class, or more samples
        return {"score": whole, "parts": []}


def on_held_out(
    metric: Metric | Factory, outputs: tuple[str, ...], held_out: Samples, found: Outputs, reference: Outputs | None,
    labelled: bool, ctx: Context,
) -> dict[str, Any]:  # fmt: skip
    """{metric: what it says of the held-out samples}: the one asked for where it can be had, then sqnr_db. `labelled`
    says whether the metric has labels elsewhere, so that it needs them here."""
    from qpipe.errors import StageError

    names: list[str] = [metric] if held_out.labels is not None or not labelled else []
    if metric in get_args(Comparison):
        names = [metric]
    if reference is not None:
        names += [name for name in ("sqnr_db",) if name not in names]
    said = {}
    for name in names:
        try:
            said[name] = judged(name, outputs, found, held_out.labels, reference)
        except StageError as error:
            ctx.note(f"The held-out samples cannot be scored by {name}: {error}")
    return said


@stage(
    version=1,
    config={"data": "evaluation", "metric": "${goal.metric}", "outputs": "${goal.outputs}"},
    wired=refuse_what_lacks,
)
def evaluate(
    model: Network,
    data: Samples,
    float_model: Network | None = None,
    held_out: Samples | None = None,
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
    onnxruntime the QDQ graph as it is deployed. `quantized: false` scores the float weights. What is scored on
    `held_out` is in `held_out`, by metric. Errors: InputError for labels or a float model that are missing, and data
    that do not fit; StageError where a metric of the user's fails.
    """
    from qpipe.model.simulation.run import run
    from qpipe.numerics.metrics import LABELLED, refuse_missing, scores_by_output

    data = spread(data, limit)
    own = metric not in get_args(Metric)

    def outputs_of(scored: Network, samples: Samples, simulated: bool) -> Outputs:
        return run(
            scored, samples.arrays, batch_size=batch_size, quantized=simulated, backend=backend,
            device=ctx.device, progress=lambda done, total: ctx.progress(done, total, "samples"),
        )  # fmt: skip

    def reference_of(samples: Samples) -> Outputs | None:
        return None if float_model is None else outputs_of(float_model, samples, False)

    reference = None if own or metric in LABELLED else reference_of(data)
    if not own:
        refuse_missing(metric, data.labels, reference)
    found = outputs_of(model, data, quantized)
    said: dict[str, Any] = {"metric": metric, "n": len(data), "backend": backend, "quantized": quantized}
    said = {"score": scorer(metric, outputs)(found, data.labels, reference), **said}
    if reference is not None and len(each := scores_by_output(metric, found, reference, outputs)) > 1:
        worst = min(each, key=lambda name: each[name])
        mean = f"the mean of {len(each)}: {said['score']:.6g}"
        ctx.note(f"{metric} of the worst output, '{worst}': {each[worst]:.6g}; {mean}.")
        said |= {"worst": each[worst], "worst_output": worst}
    if held_out is not None:
        seen, wanted = outputs_of(model, held_out, quantized), reference_of(held_out)
        labelled = metric in LABELLED or (own and data.labels is not None)
        said["held_out"] = on_held_out(metric, outputs, held_out, seen, wanted, labelled, ctx)
    return Scores(said)
