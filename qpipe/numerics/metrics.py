"""Scores of a model's outputs, one number each, higher is better, independent of the size of batches.

top1, top5   share of samples whose label is the best, or among the five best
sqnr_db      10 log10(sum r^2 / sum (y - r)^2) over all elements, y the outputs and r the reference
cosine       mean over samples of <y, r> / (|y| |r|), a sample flattened
mse          mean (y - r)^2; the one function here where lower is better: `METRICS["mse"]` is its negative
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qpipe.errors import InputError, StageError

Array = npt.NDArray[Any]

HIGHEST_SQNR_DB = 300.0
"""What equal tensors score, instead of an infinity that JSON cannot hold; float32 noise ends near 150."""


def top1(outputs: Array, labels: Array) -> float:
    """The share of labels that have the highest output; see `ranks`."""
    return _share_above(outputs, labels, 1)


def top5(outputs: Array, labels: Array) -> float:
    """The share of labels among the five highest outputs; see `ranks`."""
    return _share_above(outputs, labels, 5)


def ranks(outputs: Array, labels: Array) -> npt.NDArray[np.int64]:
    """Each label's place among the classes, 0 the highest; ties go to the lower class number.

    The classes lie on the last axis when `labels` has the shape of the rest, else on axis 1. Negative labels
    are left out. An output vector that holds a nan ranks its label last. Raises InputError where shapes or
    labels do not fit.
    """
    outputs, labels = np.asarray(outputs), np.asarray(labels)
    if labels.ndim == outputs.ndim and labels.shape[-1] == 1:
        labels = labels[..., 0]
    if (
        outputs.ndim > 1
        and labels.shape != outputs.shape[:-1]
        and labels.shape == outputs.shape[:1] + outputs.shape[2:]
    ):
        outputs = np.moveaxis(outputs, 1, -1)
    if outputs.ndim < 1 or labels.shape != outputs.shape[:-1]:
        raise InputError(f"Labels of shape {labels.shape} do not fit outputs of shape {outputs.shape}.")
    classes = outputs.shape[-1]
    scores, wanted = outputs.reshape(-1, classes), labels.reshape(-1).astype(np.int64)
    scores, wanted = scores[wanted >= 0], wanted[wanted >= 0]
    if not wanted.size:
        raise InputError("There is no label to compare the outputs with.")
    if wanted.max() >= classes:
        raise InputError(f"Label {wanted.max()} is beyond the {classes} classes of the outputs.")
    own = np.take_along_axis(scores, wanted[:, None], 1)
    before = (scores > own) | ((scores == own) & (np.arange(classes) < wanted[:, None]))
    return np.asarray(np.where(np.isnan(scores).any(1), classes, before.sum(1)), np.int64)


def sqnr_db(outputs: Array, reference: Array) -> float:
    """The signal-to-quantization-noise ratio in dB, at most `HIGHEST_SQNR_DB`; nan scores as noise alone."""
    y, r = _pair(outputs, reference)
    signal, noise = float(np.sum(r * r)), float(np.sum((y - r) ** 2))
    if noise == 0.0:
        return HIGHEST_SQNR_DB
    if not math.isfinite(noise) or signal == 0.0:
        return -HIGHEST_SQNR_DB
    return max(-HIGHEST_SQNR_DB, min(HIGHEST_SQNR_DB, 10.0 * math.log10(signal / noise)))


def energies(outputs: Array, reference: Array) -> tuple[Array, Array]:
    """(outputs, reference) of one number a sample, of which any number of samples have the same sqnr_db."""
    y, r = _pair(outputs, reference)
    y, r = y.reshape(len(y), -1), r.reshape(len(r), -1)
    signal = np.sqrt(np.sum(r * r, axis=1, keepdims=True))
    return signal + np.sqrt(np.sum((y - r) ** 2, axis=1, keepdims=True)), signal


def cosine(outputs: Array, reference: Array) -> float:
    """The mean cosine of each sample's outputs and reference; two zero vectors agree, nan scores -1."""
    y, r = _pair(outputs, reference)
    y, r = y.reshape(len(y), -1), r.reshape(len(r), -1)
    lengths = np.linalg.norm(y, axis=1) * np.linalg.norm(r, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = np.where(lengths == 0, np.all(y == r, axis=1), np.sum(y * r, axis=1) / lengths)
    return float(np.mean(np.nan_to_num(value, nan=-1.0)))


def mse(outputs: Array, reference: Array) -> float:
    """The mean squared error, lower is better; infinite where the outputs hold a nan."""
    y, r = _pair(outputs, reference)
    value = float(np.mean((y - r) ** 2))
    return math.inf if math.isnan(value) else value


def negative_mse(outputs: Array, reference: Array) -> float:
    """The mean squared error with its sign turned, so that higher is better."""
    return 0.0 - mse(outputs, reference)  # not -0.0 for equal tensors


METRICS: Mapping[str, Callable[[Array, Array], float]] = {
    "top1": top1,
    "top5": top5,
    "sqnr_db": sqnr_db,
    "cosine": cosine,
    "mse": negative_mse,
}
"""By name, higher is better: of (outputs, labels) for top1 and top5, (outputs, reference) else."""

MEANS = frozenset({"top1", "top5", "cosine", "mse"})
"""The metrics that are means over samples."""

LABELLED = frozenset({"top1", "top5"})
"""The metrics that need labels; the others compare with the float model's outputs."""


def score_outputs(
    metric: str,
    outputs: Mapping[str, Array],
    labels: Array | None,
    reference: Mapping[str, Array] | None,
    only: Sequence[str] = (),
) -> float:
    """The metric of a model's outputs by name: of the first that counts against the labels, or the mean of
    `scores_by_output`. Raises InputError where what the metric needs is missing or does not fit."""
    refuse_missing(metric, labels, reference)
    if labels is not None and metric in LABELLED:
        return METRICS[metric](next(iter(counting(outputs, only).values())), labels)
    scores = scores_by_output(metric, outputs, reference or {}, only).values()
    return sum(scores) / len(scores)


def scores_by_output(
    metric: str, outputs: Mapping[str, Array], reference: Mapping[str, Array], only: Sequence[str] = ()
) -> dict[str, float]:
    """The metric of each output that counts against the reference's."""
    return {name: METRICS[metric](outputs[name], values) for name, values in counting(reference, only).items()}


def counting(outputs: Mapping[str, Array], only: Sequence[str] = ()) -> dict[str, Array]:
    """The outputs that a score is made of: those named, else those of floats, else all. Integers, such as indices and
    masks that pass through, say little of a model whose numbers moved. Raises InputError for a name that is none."""
    unknown = [name for name in only if name not in outputs]
    if unknown:
        raise InputError(f"goal.outputs: no output '{unknown[0]}'. Outputs: {', '.join(outputs)}.")
    floats = [name for name, array in outputs.items() if np.asarray(array).dtype.kind == "f"]
    return {name: outputs[name] for name in only or floats or outputs}


def refuse_missing(metric: str, labels: Array | None, reference: Mapping[str, Array] | None) -> None:
    """Raises InputError where the metric needs labels or a reference that are not there."""
    if metric in LABELLED and labels is None:
        raise InputError(
            f"The metric '{metric}' needs labels, and the data have none. Give them as 'labels', or take a "
            "metric without: sqnr_db, cosine, mse."
        )
    if metric not in LABELLED and reference is None:
        raise InputError(f"The metric '{metric}' compares with the float model: wire `float_model` to it.")


def score_by_function(
    function: Callable[..., Any], name: str, outputs: Mapping[str, Array], labels: Array | None
) -> float:
    """What a user's function of (outputs, labels) returns. Raises StageError, one line with its `name`, where it fails
    or returns no finite number."""
    given = next(iter(outputs.values())) if len(outputs) == 1 else dict(outputs)
    try:
        returned = function(given, labels)
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


def _share_above(outputs: Array, labels: Array, places: int) -> float:
    return float(np.mean(ranks(outputs, labels) < places))


def _pair(outputs: Array, reference: Array) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    y, r = np.asarray(outputs, np.float64), np.asarray(reference, np.float64)
    if y.shape != r.shape or not y.size:
        raise InputError(
            f"Outputs of shape {y.shape} cannot be compared with a reference of shape {r.shape}."
        )
    return (y.reshape(1), r.reshape(1)) if y.ndim == 0 else (y, r)
