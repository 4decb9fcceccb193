"""Which choices mattered in a sweep: the share of the scores' variance that each explains, with how sure that is.

    score = m + sum over the choices k of  a_k[value of k]  + rest,    share_k = (R2 of all - R2 without k)

by least squares over the trials that have a score. Of a full grid the shares are those of an analysis of variance; of
a search, which tries some combinations more than others, what only k explains. `rest` are interactions and noise:
where it is large, the shares say little. The error is the spread of the share over resampled trials (bootstrap, 30
draws).

Source: own; R. A. Fisher, "Statistical Methods for Research Workers", 1925; B. Efron, "Bootstrap Methods: Another
Look at the Jackknife", 1979.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from numpy.typing import NDArray

FEWEST = 8
"""Trials below which nothing is said."""
DRAWS = 30
LEVELS = 4
"""Numbers of more values than eight are grouped into so many, equally full."""


class Share(NamedTuple):
    """What a choice explains of the variance, in [0, 1], and the standard error of that."""

    key: str
    share: float
    error: float


class Importance(NamedTuple):
    """The shares, the largest first; what all choices explain together; over how many trials."""

    shares: tuple[Share, ...]
    together: float
    trials: int


def importance(choices: Sequence[Mapping[str, str]], scores: Sequence[float]) -> Importance | None:
    """Of trials with these choices, {key: value}, and scores; None where they are too few to say anything: less than
    `FEWEST`, or no more than the model has numbers."""
    import numpy as np

    keys = list(dict.fromkeys(key for each in choices for key in each))
    columns = {key: _levels([each.get(key, "") for each in choices]) for key in keys}
    columns = {key: column for key, column in columns.items() if len(set(column)) > 1}
    numbers = 1 + sum(len(set(column)) - 1 for column in columns.values())
    values = np.asarray(scores, float)
    if len(values) < max(FEWEST, numbers + 2) or not columns or np.ptp(values) == 0:
        return None
    designs = {key: _indicators(column) for key, column in columns.items()}
    together, shares = _shares(designs, values)
    rng = np.random.default_rng(0)
    drawn = [_shares({key: each[rows] for key, each in designs.items()}, values[rows])[1]
             for rows in (rng.integers(0, len(values), len(values)) for _ in range(DRAWS))]
    found = [Share(key, shares[key], float(np.std([each[key] for each in drawn]))) for key in designs]
    return Importance(tuple(sorted(found, key=lambda each: -each.share)), together, len(values))


def _shares(designs: Mapping[str, NDArray[Any]], values: NDArray[Any]) -> tuple[float, dict[str, float]]:
    together = _explained(list(designs.values()), values)
    without = {key: _explained([each for other, each in designs.items() if other != key], values) for key in designs}
    return together, {key: max(0.0, together - rest) for key, rest in without.items()}


def _explained(designs: Sequence[NDArray[Any]], values: NDArray[Any]) -> float:
    """R2 of the least squares fit."""
    import numpy as np

    total = float(np.sum((values - values.mean()) ** 2))
    if total == 0.0:
        return 0.0
    design = np.column_stack([np.ones(len(values)), *designs])
    fitted = design @ np.linalg.lstsq(design, values, rcond=None)[0]
    return max(0.0, 1.0 - float(np.sum((values - fitted) ** 2)) / total)


def _indicators(column: Sequence[str]) -> NDArray[Any]:
    """A column of 0 and 1 for every value but the first."""
    import numpy as np

    values = list(dict.fromkeys(column))[1:]
    return np.asarray([[float(each == value) for value in values] for each in column])


def _levels(column: Sequence[str]) -> list[str]:
    """The values; many numbers as the group of their rank."""
    if len(set(column)) <= 2 * LEVELS:
        return list(column)
    try:
        order = sorted({float(each) for each in column if each})
    except ValueError:
        return list(column)
    rank = {value: str(LEVELS * place // len(order)) for place, value in enumerate(order)}
    return [rank[float(each)] if each else "" for each in column]
