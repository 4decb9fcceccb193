"""Two models side by side: how far the outputs of one moved from those of the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from qpipe.errors import InputError
from qpipe.methods.comparison.inputs import trial_inputs

if TYPE_CHECKING:
    from qpipe.model.network.network import Array, Network
    from qpipe.model.runtime.options import Mode

OWN = 4.0
"""How many times its own error a model may lie from another that computes the same, in another order."""


def outputs_error(
    before: Network, after: Network, arrays: Mapping[str, Array] | None = None, size: int = 32
) -> float:
    """max |y - y'| / max |y| over the outputs of the float models, in onnxruntime.

    On the first `size` samples of `arrays`, or on inputs made up. Raises InputError for samples that do not fit, and
    where `before` runs on nothing that was made up.
    """
    from qpipe.model.runtime.session import make_session

    fed, expected = _run(before, "reference", arrays, size)
    found: list[Array] = make_session(after, quantized=False, lean=True).run(None, fed)
    return largest_error(expected, found)


def own_error(model: Network, arrays: Mapping[str, Array] | None = None, size: int = 32) -> float:
    """How far the float model's outputs lie apart without onnxruntime's optimizations and with all of them: what no
    rewriting can be held to. On the same inputs as `outputs_error`, which raises the same."""
    return largest_error(*(_run(model, mode, arrays, size)[1] for mode in ("plain", "deploy")))


def _run(
    model: Network, mode: Mode, arrays: Mapping[str, Array] | None, size: int
) -> tuple[dict[str, Array], list[Array]]:
    """The first inputs that the model runs on, and its outputs."""
    from qpipe.model.runtime.session import make_session

    session, reason = make_session(model, mode, quantized=False, lean=True), ""
    for fed in trial_inputs(model, arrays, batch=2 if arrays is None else size):
        try:
            return fed, session.run(None, fed)
        except Exception as error:  # onnxruntime's errors have no common type
            reason = first_line(error)
    what = "the samples" if arrays is not None else "any input made up for it. Wire samples on the port `data`"
    raise InputError(f"onnxruntime does not run the model on {what} ({reason}).")


def first_line(error: Exception) -> str:
    """What an error says, in a line: onnxruntime's are whole pages."""
    said = str(error).strip().splitlines()
    return said[0] if said else type(error).__name__


def largest_error(wanted: Sequence[Array], found: Sequence[Array]) -> float:
    """The largest `relative_error` of the outputs."""
    return max(map(relative_error, wanted, found), default=0.0)


def relative_error(wanted: Array, found: Array) -> float:
    """max |wanted - found| / max |wanted|; infinite where shapes, or which numbers are finite, differ."""
    if wanted.shape != found.shape:
        return float("inf")
    a, b = wanted.astype(np.float64), found.astype(np.float64)
    finite = np.isfinite(a)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(b[finite]).all():
        return float("inf")
    if not finite.any():
        return 0.0
    return float(np.abs(a[finite] - b[finite]).max() / max(float(np.abs(a[finite]).max()), 1e-12))
