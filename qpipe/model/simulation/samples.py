"""Samples as a model takes them: batches that fit its inputs.

An array of the data counts the samples along its first axis, whatever axis of the model's input they lie along: a
state of [layers, n, hidden] is given as (samples, layers, hidden), a scalar as one number for each sample.

Where an input has a fixed number of samples, every batch has that size; the last one is filled up with the
first samples again, and what they give is cut off. Otherwise batches are as large as asked for, and the last
may be smaller. What has no axis for samples, such as a sampling rate, is one value for a whole batch: where the samples
differ in it, and where an output has none, they go through one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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


@dataclass(frozen=True)
class Axes:
    """The axis along which the samples lie in each input and output, in their order; None where there is none.
    `size` is how many a batch has, None where that is open."""

    size: int | None
    inputs: tuple[int | None, ...]
    outputs: tuple[int | None, ...]


_CALLED_BATCH = ("batch", "n", "b", "bs", "batchsize", "batch_size")


def batch_axes(model: Network) -> Axes:
    """Where a model's samples lie: along the dimension that is named like a batch, else along an open first one, else
    along the first.

    Raises InputError where inputs have several fixed sizes for them."""
    name = batch_name(model)
    shapes = [spec.shape for spec in model.inputs]
    size = None if name else next((shape[0] for shape in shapes if shape), None)
    inputs = tuple(_axis(shape, name, size) for shape in shapes)
    placed = [(shape, axis) for shape, axis in zip(shapes, inputs, strict=True) if axis is not None]
    fixed = sorted({dim for shape, axis in placed if isinstance(dim := shape[axis], int)})
    if len(fixed) > 1:
        raise InputError(
            f"The model's inputs have different fixed batch sizes: {fixed}. Where one is no batch, make it a constant "
            "with model.inputs={NAME: VALUE}."
        )
    size = fixed[0] if fixed else None
    outputs = tuple(_output_axis(spec.shape, name, size) for spec in model.outputs)
    return Axes(size, inputs, outputs)


def batch_name(model: Network) -> str | None:
    """What the dimension that counts the samples is called; None where it is fixed."""
    names = [dim for spec in model.inputs for dim in spec.shape if isinstance(dim, str)]
    first = [spec.shape[0] for spec in model.inputs if spec.shape and isinstance(spec.shape[0], str)]
    called = [name for name in [*first, *names] if "batch" in name.lower() or name.lower() in _CALLED_BATCH]
    return next(iter([*called, *first]), None)


def _axis(shape: Sequence[int | str], name: str | None, size: int | str | None) -> int | None:
    if name is not None and name in shape:
        return list(shape).index(name)
    if not shape:
        return None
    if name is None and shape[0] != size and list(shape).count(size or "") == 1:
        return list(shape).index(size or "")
    return 0


def _output_axis(shape: Sequence[int | str], name: str | None, size: int | str | None) -> int | None:
    """As of an input, but that a first dimension of another size than a batch has is none of samples."""
    if name is not None and name in shape:
        return list(shape).index(name)
    if shape and (isinstance(shape[0], str) or shape[0] == size):
        return 0
    return list(shape).index(size) if size is not None and list(shape).count(size) == 1 else None


def batches(model: Network, arrays: Mapping[str, Array], size: int) -> Iterator[Batch]:
    """The samples of `arrays` as batches for `model`.

    Raises InputError where an input has no array, or one of another type or shape.
    """
    inputs, axes = fitting(model, arrays), batch_axes(model)
    total = sample_count(model, arrays)
    step = axes.size or (size if _alike(inputs, axes) else 1)
    if step > 1 and not _alike(inputs, axes):
        raise InputError("The samples differ in an input that is one value for a whole batch, and a batch is fixed.")
    for start in range(0, total, step):
        rows = np.arange(start, start + step) if axes.size else np.arange(start, min(start + step, total))
        plain = rows[-1] < total
        parts = (array[start : int(rows[-1]) + 1] if plain else array[rows % total] for array in inputs)
        fed = (_placed(part, axis) for part, axis in zip(parts, axes.inputs, strict=True))
        yield Batch(tuple(fed), min(step, total - start))


def _placed(array: Array, axis: int | None) -> Array:
    """Samples along the first axis as an input takes them."""
    return np.asarray(array[0] if axis is None else np.moveaxis(array, 0, axis), order="C")


def _alike(inputs: Sequence[Array], axes: Axes) -> bool:
    """Whether the samples agree in all that is one value for a whole batch."""
    shared = (array for array, axis in zip(inputs, axes.inputs, strict=True) if axis is None)
    return all(bool((array[:1] == array).all()) for array in shared)


def by_sample(output: Array, axis: int | None, fed: int) -> Array | None:
    """An output of a batch of `fed` samples with the samples along its first axis; None where it does not tell them
    apart."""
    if axis is None and fed == 1 and output.ndim and len(output) == 1:  # a batch of one that the file fixed
        return output
    if axis is None or output.ndim <= axis or output.shape[axis] != fed:
        return output[None] if fed == 1 else None
    return np.moveaxis(output, axis, 0)


def sample_count(model: Network, arrays: Mapping[str, Array]) -> int:
    """How many samples `batches` goes through. Raises InputError where an input has no array."""
    _refuse_missing(model, arrays)
    return min(len(arrays[spec.name]) for spec in model.inputs)


def fitting(model: Network, arrays: Mapping[str, Array]) -> tuple[Array, ...]:
    """The arrays of the model's inputs, in their order, in their types.

    Floats become the input's float type and integers its integer type. Raises InputError, one sentence that
    says what the model wants, for an array that is missing, of another kind, or of another shape.
    """
    _refuse_missing(model, arrays)
    axes = batch_axes(model).inputs
    return tuple(_as_input(spec, axis, arrays[spec.name]) for spec, axis in zip(model.inputs, axes, strict=True))


def _refuse_missing(model: Network, arrays: Mapping[str, Array]) -> None:
    missing = [spec.name for spec in model.inputs if spec.name not in arrays]
    if missing:
        raise InputError(
            f"The data hold no array for the model's input {', '.join(map(repr, missing))}; "
            f"they hold {', '.join(map(repr, sorted(arrays)))}."
        )


def _as_input(spec: ValueSpec, axis: int | None, array: Array) -> Array:
    _refuse_kind(spec, array)
    shape = [dim for place, dim in enumerate(spec.shape) if place != axis]
    fits = array.ndim == len(shape) + 1 and all(
        isinstance(dim, str) or dim == size for dim, size in zip(shape, array.shape[1:], strict=True)
    )
    if not fits:
        found, asked = ", ".join(map(str, array.shape[1:])), ", ".join(map(str, shape))
        way_out = ""
        if axis != 0:
            taken = ", ".join(map(str, spec.shape))
            way_out = f" Its whole input is [{taken}]; the data count the samples along their first axis"
            way_out += f" (data.batch_axis={{{spec.name}: {axis}}} says that they lie along another)." if axis else "."
        raise InputError(f"One sample of '{spec.name}' has shape ({found}), the model takes ({asked}).{way_out}")
    return in_type(spec, array)


def _refuse_kind(spec: ValueSpec, array: Array) -> None:
    wanted = np.dtype(spec.dtype)
    kinds = {"f": "f", "i": "iu", "u": "iu", "b": "b", "O": "U"}
    kind = "f" if spec.floating else wanted.kind
    if array.dtype != wanted and array.dtype.kind not in kinds.get(kind, ""):
        taken = "text" if kind == "O" else wanted
        raise InputError(f"The model's input '{spec.name}' is {taken}, the data give {array.dtype}.")


def in_type(spec: ValueSpec, array: Array) -> Array:
    """`array` in the type of an input. Raises InputError for one of another kind, and for numbers that the type cannot
    hold."""
    _refuse_kind(spec, array)
    wanted = np.dtype(spec.dtype)
    computed = np.dtype(np.float32) if wanted == np.float64 else wanted  # an input of doubles is cast inside
    if array.dtype == computed == wanted:
        return array
    with np.errstate(over="ignore"):
        narrow = array.astype(computed, copy=False)
    if spec.floating and (np.isinf(narrow) & np.isfinite(array)).any():
        raise InputError(f"The data for '{spec.name}' hold numbers that {computed} cannot hold. Scale them.")
    return array.astype(wanted, copy=False)
