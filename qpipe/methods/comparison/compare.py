"""Two models side by side: how far the outputs of one moved from those of the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qpipe.methods.comparison.check import random_inputs, relative_error
from qpipe.model.simulation.run import batches

if TYPE_CHECKING:
    from qpipe.model.model import Array, Model


def outputs_error(
    before: Model, after: Model, arrays: Mapping[str, Array] | None = None, size: int = 32
) -> float:
    """max |y - y'| / max |y| over the outputs of the float models, in onnxruntime.

    On the first `size` samples of `arrays`, or on random inputs. Raises InputError for samples that do not
    fit.
    """
    if arrays is None:
        fed = random_inputs(before)
    else:
        batch = next(batches(before, arrays, size))
        fed = dict(zip([spec.name for spec in before.inputs], batch.arrays, strict=True))
    pairs = zip(*(_outputs(model, fed) for model in (before, after)), strict=True)
    return max((relative_error(expected, found) for expected, found in pairs), default=0.0)


def _outputs(model: Model, fed: Mapping[str, Array]) -> list[Array]:
    from qpipe.model.runtime.session import make_session

    found: list[Array] = make_session(model, quantized=False, lean=True).run(None, dict(fed))
    return found
