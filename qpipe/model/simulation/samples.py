"""Samples as a model takes them: batches that fit its inputs.

Where an input has a fixed first dimension, every batch has that size; the last one is filled up with the
first samples again, and what they give is cut off. Otherwise batches are as large as asked for, and the last
may be smaller.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qpipe.errors import InputError

if TYPE_CHECKING:
    from qpipe.model.network.network import Network, ValueSpec

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Batch:
    """Arrays in the order of the model's inputs; the first `count` samples are those that count."""

    arrays: tuple[Array, ...]
    count: int


def batches(model: Network, arrays: Mapping[str, Array], size: int) -> Iterator[Batch]:
    """The samples of `arrays` as batches for `model`.

    Raises InputError where an input has no array, or one of another type or shape.
    """
    inputs = fitting(model, arrays)
    total = sample_count(model, arrays)
    fixed = fixed_batch_size(model)
    step = fixed or size
    for start in range(0, total, step):
        rows = np.arange(start, start + step) if fixed else np.arange(start, min(start + step, total))
        plain = rows[-1] < total
        parts = (array[start : int(rows[-1]) + 1] if plain else array[rows % total] for array in inputs)
        yield Batch(tuple(np.ascontiguousarray(part) for part in parts), min(step, total - start))


def sample_count(model: Network, arrays: Mapping[str, Array]) -> int:
    """How many samples `batches` goes through. Raises InputError where an input has no array."""
    _refuse_missing(model, arrays)
    return min(len(arrays[spec.name]) for spec in model.inputs)


def fixed_batch_size(model: Network) -> int | None:
    """The first dimension of the model's inputs where it is a number; None where it is dynamic."""
    sizes = {spec.shape[0] for spec in model.inputs if spec.shape}
    fixed = [size for size in sizes if isinstance(size, int)]
    if len(fixed) > 1:
        raise InputError(f"The model's inputs have different fixed batch sizes: {sorted(fixed)}.")
    return fixed[0] if fixed else None


def fitting(model: Network, arrays: Mapping[str, Array]) -> tuple[Array, ...]:
    """The arrays of the model's inputs, in their order, in their types.

    Floats become the input's float type and integers its integer type. Raises InputError, one sentence that
    says what the model wants, for an array that is missing, of another kind, or of another shape.
    """
    _refuse_missing(model, arrays)
    return tuple(_as_input(spec, arrays[spec.name]) for spec in model.inputs)


def _refuse_missing(model: Network, arrays: Mapping[str, Array]) -> None:
    missing = [spec.name for spec in model.inputs if spec.name not in arrays]
    if missing:
        raise InputError(
            f"The data hold no array for the model's input {', '.join(map(repr, missing))}; "
            f"they hold {', '.join(map(repr, sorted(arrays)))}."
        )


def _as_input(spec: ValueSpec, array: Array) -> Array:
    wanted = np.dtype(spec.dtype)
    kinds = {"f": "f", "i": "iu", "u": "iu", "b": "b"}
    if array.dtype != wanted and array.dtype.kind not in kinds.get(wanted.kind, ""):
        raise InputError(f"The model's input '{spec.name}' is {wanted}, the data give {array.dtype}.")
    shape = spec.shape[1:]
    fits = array.ndim == len(spec.shape) and all(
        isinstance(dim, str) or dim == size for dim, size in zip(shape, array.shape[1:], strict=True)
    )
    if not fits:
        found, asked = ", ".join(map(str, array.shape[1:])), ", ".join(map(str, shape))
        raise InputError(f"One sample of '{spec.name}' has shape ({found}), the model takes ({asked}).")
    return array if array.dtype == wanted else _converted(spec, array, wanted)


def _converted(spec: ValueSpec, array: Array, wanted: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore"):
        converted = array.astype(wanted)
    if wanted.kind == "f" and (np.isinf(converted) & np.isfinite(array)).any():
        raise InputError(f"The data for '{spec.name}' hold numbers that {wanted} cannot hold. Scale them.")
    return converted
