"""Two models side by side: how far the outputs of one moved from those of the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from qpipe.model.simulation.samples import batches

if TYPE_CHECKING:
    from qpipe.model.network.network import Array, Network


def outputs_error(
    before: Network, after: Network, arrays: Mapping[str, Array] | None = None, size: int = 32
) -> float:
    """max |y - y'| / max |y| over the outputs of the float models, in onnxruntime.

    On the first `size` samples of `arrays`, or on random inputs. Raises InputError for samples that do not fit.
    """
    if arrays is None:
        fed = random_inputs(before)
    else:
        batch = next(batches(before, arrays, size))
        fed = dict(zip([spec.name for spec in before.inputs], batch.arrays, strict=True))
    pairs = zip(*(_outputs(model, fed) for model in (before, after)), strict=True)
    return max((relative_error(expected, found) for expected, found in pairs), default=0.0)


def _outputs(model: Network, fed: Mapping[str, Array]) -> list[Array]:
    from qpipe.model.runtime.session import make_session

    found: list[Array] = make_session(model, quantized=False, lean=True).run(None, dict(fed))
    return found


def random_inputs(model: Network, seed: int = 0, batch: int = 2) -> dict[str, Array]:
    """Standard normal floats, integers of 0 and 1 (valid as indices, masks and token types alike); a dynamic
    first dimension is `batch`, any other 8."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, Array] = {}
    for index, spec in enumerate(model.inputs):
        first = spec.shape[0] if spec.shape else None
        shape = [size if isinstance(size, int) else batch if size == first else 8 for size in spec.shape]
        dtype = np.dtype(spec.dtype)
        if dtype.kind == "f":
            arrays[spec.name] = rng.standard_normal(shape).astype(dtype)
        else:
            ones = np.ones(shape) if index else rng.integers(0, 2, shape)
            arrays[spec.name] = ones.astype(dtype)
    return arrays


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
