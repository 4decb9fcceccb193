"""How sure a score is: what each part of the samples says of it.

With the samples in g parts, theta the score of all and theta_(-i) that of all but part i,

    p_i = g theta - (g - 1) theta_(-i)        noise of theta = standard deviation of p / sqrt(g)

For a mean, such as top1, p_i is the mean of part i; for other scores (a ratio in dB, a mean precision) it is what comes
nearest to that. Two models that saw the same samples differ by the mean of the differences of their p_i, with a noise
of its own, which is much smaller than that of either.

Source: Tukey, Bias and confidence in not-quite large samples, 1958; Efron and Stein, The jackknife estimate of
variance, 1981.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.intp]

PARTS = 20


def pseudo_values(
    score: Callable[[Rows], float], count: int, parts: int = PARTS, *, mean: bool = False
) -> list[float]:
    """The p_i of a score of `count` samples, by `score` of the samples at given places; of fewer than `parts` samples
    one for each. Every part takes every so manieth sample, so that sorted data are spread over all. A score that is a
    `mean` over samples is asked for each part alone, which reads the samples once."""
    parts = min(parts, count)
    places: Any = np.arange(count)
    if mean:
        return [score(places[places % parts == part]) for part in range(parts)]
    whole = score(places)
    return [parts * whole - (parts - 1) * score(places[places % parts != part]) for part in range(parts)]
