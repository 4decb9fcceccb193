"""Keep some of the samples away from calibration and tuning: what a pipeline chooses by.

A technique that is judged by the samples that it was made on looks better than it is, and one that is chosen by the
evaluation makes the evaluation's score too good. So every choice is made on samples that are neither: a share of the
calibration, drawn by a seed, so that data which are sorted by class keep every class on both sides.

    split: {uses: hold_out}                    # tuning: most of the samples; held_out: the rest
    calibrate: {model: cle, data: split.tuning}
    score: {model: calibrate, float_model: prepare, held_out: split.held_out}

Assumes: samples that are independent of one another; frames of one film held out are no hold-out.
Source: own; the hold-out is that of M. Stone, Cross-Validatory Choice and Assessment of Statistical Predictions, 1974.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, NamedTuple

from qpipe.stage import NULL, Context, Range, Samples, stage

if TYPE_CHECKING:
    from collections.abc import Sequence

FEWEST = 16
"""Of fewer samples none is held out: a handful of them says nothing, and calibration needs them more."""


class Split(NamedTuple):
    """The two parts, which share no sample."""

    tuning: Samples
    held_out: Samples


def drawn(count: int, held: int, seed: int) -> list[bool]:
    """For each of `count` samples whether it is one of the `held` that are held out."""
    import numpy as np

    chosen = np.zeros(count, bool)
    chosen[np.random.default_rng(seed).permutation(count)[:held]] = True
    return [bool(one) for one in chosen]


def picked(data: Samples, places: Sequence[int]) -> Samples:
    """The samples at `places`, with their labels."""
    arrays = {name: array[places] for name, array in data.arrays.items()}
    return Samples(arrays, None if data.labels is None else data.labels[places])


@stage(version=1, config={"data": "calibration", "seed": "${seed}"})
def hold_out(
    data: Samples,
    *,
    share: Annotated[float, Range(gt=0, lt=1)] = 0.2,
    limit: Annotated[int, Range(ge=1)] | None = 256,
    seed: int = 0,
    ctx: Context = NULL,
) -> Split:
    """`tuning`, the samples that calibration and tuning may see, and `held_out`, those that choices are made on.

    `share` of the samples are held out, at most `limit` of them, drawn by `seed`; of fewer than 16 none, and both
    parts are all samples, which is noted.
    """
    count = len(data)
    held = min(round(count * share), limit or count)
    if count < FEWEST or not 0 < held < count:
        ctx.note(f"{count} samples are too few to hold some out: choices are made on those of the calibration.")
        return Split(data, data)
    chosen = drawn(count, held, seed)
    parts = {side: [place for place, one in enumerate(chosen) if one is side] for side in (False, True)}
    return Split(picked(data, parts[False]), picked(data, parts[True]))
