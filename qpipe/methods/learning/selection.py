"""Whether a model keeps what was learned for a part: by what its outputs err, or by a score of the task.

Both models, the one before and the tuned one, go to the end in float behind the part, so that only it and those before
count. By error, the tuned one is kept where its outputs err less in all, none of several more than before beyond the
noise; by score, where that is higher, and where both score the same, by error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qpipe.numerics.learning.losses import loses

Array = npt.NDArray[Any]
Outputs = Mapping[str, Array]
Score = Callable[[Outputs, Outputs, Array], float]
"""(a model's outputs, those of the float model, which samples they are of) -> higher is better."""


def relative_errors(found: Outputs, wanted: Outputs) -> torch.Tensor:
    """(n, K), float64: the squared error of each of n rows over the mean square of each of K outputs."""
    rows = []
    for name, target in wanted.items():
        flat = target.reshape(len(target), -1)
        squares = np.square(np.subtract(found[name].reshape(flat.shape), flat, dtype=np.float64)).sum(1)
        rows.append(squares / max(float(np.square(flat, dtype=np.float64).sum()) / len(flat), 1e-300))
    return torch.from_numpy(np.stack(rows, 1))


def gains(
    before: Outputs, after: Outputs, wanted: Outputs, score: Callable[[Outputs], float] | None
) -> tuple[bool, dict[str, float]]:
    """Whether the outputs `after` are better than those `before`, and what was measured, for the report."""
    errors = [relative_errors(each, wanted) for each in (before, after)]
    means = [float(each.mean(0).sum()) for each in errors]
    report = {"model_error_before": means[0], "model_error_after": means[1]}
    better = means[1] < means[0] and not bool(loses(*errors).any())
    if score is None:
        return better, report
    scores = [score(each) for each in (before, after)]
    better = scores[1] > scores[0] or (scores[1] == scores[0] and better)
    return better, report | {"model_score_before": scores[0], "model_score_after": scores[1]}
