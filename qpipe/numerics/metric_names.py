"""The names of the metrics that `qpipe.numerics.metrics` computes.

Light on purpose, as `scheme` is: a stage's signature names them, and then numpy must not be loaded.
"""

from __future__ import annotations

from typing import Literal

Comparison = Literal["sqnr_db", "cosine", "mse"]
"""Of a model's outputs with those of the float model."""
Metric = Literal["top1", "top5", Comparison]
"""All of them; top1 and top5 compare outputs with labels."""
LEAST = {"sqnr_db": 30.0}
"""What a goal asks for where nobody says: a drop from float says nothing where float has no noise at all."""


def least_score(metric: str, reference: float, max_drop: float | None, min_score: float | None) -> float | None:
    """The score that a goal asks for: `min_score` itself, else at most `max_drop` below that of float, in sqnr_db
    `LEAST`; None for no goal."""
    if min_score is not None or max_drop is None:
        return min_score
    return LEAST.get(metric, reference - max_drop)
