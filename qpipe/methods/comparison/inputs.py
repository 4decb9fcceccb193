"""What a model is tried on: samples where there are any, else inputs made up in the sizes that it may want.

The open dimensions of a published model are seldom free: the sides of an image have to be multiples of 32, a signal
longer than a window, a batch 1. No file says so, hence sizes are tried, the smallest first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from qpipe.model.simulation.samples import batch_name, batches

if TYPE_CHECKING:
    from qpipe.model.network.network import Array, Network

SIZES = (8, 32, 64, 160, 320, 640, 1600, 16000)
"""What open dimensions behind the first are tried with: for pools and feature pyramids, then for signals."""
LARGEST = 1 << 22
"""No input of more elements is made up."""


def trial_inputs(
    model: Network, arrays: Mapping[str, Array] | None = None, seed: int = 0, batch: int = 2
) -> Iterator[dict[str, Array]]:
    """What to try the model on, by input name: the first `batch` samples of `arrays`, else one made-up input after the
    other, until one serves. Raises InputError for samples that do not fit."""
    if arrays is not None:
        given = next(batches(model, arrays, batch))
        yield dict(zip([spec.name for spec in model.inputs], given.arrays, strict=True))
        return
    seen: set[tuple[tuple[int, ...], ...]] = set()
    for lengths, size in _order(model):
        for first in dict.fromkeys((batch, 1)):
            found = random_inputs(model, seed, first, size, lengths)
            shapes = (*(array.shape for array in found.values()), (int(lengths),))
            if shapes not in seen and max((array.size for array in found.values()), default=0) <= LARGEST:
                seen.add(shapes)
                yield found


def _order(model: Network) -> list[tuple[bool, int]]:
    """Whether integers are lengths, and the size of open dimensions. Beside a signal they are, and it has to be long:
    by a number of windows that is 0 some models divide, which ends the process."""
    plain = [(False, size) for size in SIZES]
    if not any(np.dtype(spec.dtype).kind in "iu" and len(spec.shape) < 2 for spec in model.inputs):
        return plain
    samples = batch_name(model)
    floats = [spec.shape for spec in model.inputs if spec.floating]
    signals = all(sum(isinstance(dim, str) and dim != samples for dim in shape) == 1 for shape in floats)
    lengths = [(True, size) for size in sorted(SIZES, key=lambda size: abs(size - 1600))]
    return [*lengths, *plain] if signals and floats else [*plain, *lengths]


def random_inputs(
    model: Network, seed: int = 0, batch: int = 2, size: int = 8, lengths: bool = False
) -> dict[str, Array]:
    """Standard normal floats, integers of 0 and 1 (valid as indices, masks and token types alike), some words where the
    input is text; the dimension that counts the samples is `batch`, any other open one `size`. With `lengths`, integers
    in a row are `size`: how much of each sample there is."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, Array] = {}
    samples = batch_name(model)
    for index, spec in enumerate(model.inputs):
        shape = [dim if isinstance(dim, int) else batch if dim == samples else size for dim in spec.shape]
        dtype = np.dtype(spec.dtype)
        if spec.floating:
            arrays[spec.name] = rng.standard_normal(shape).astype(dtype)
        elif dtype.kind == "O":
            arrays[spec.name] = np.full(shape, "a text of some words", dtype)
        elif lengths and len(shape) < 2:
            arrays[spec.name] = np.full(shape, size).astype(dtype)
        else:
            ones = np.ones(shape) if index else rng.integers(0, 2, shape)
            arrays[spec.name] = ones.astype(dtype)
    return arrays
