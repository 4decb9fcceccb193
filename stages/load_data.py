"""Bring samples in: an npz file, a folder of images, or a Python factory; the same files give the same bytes.

An image becomes x = (pixel * scale - mean) / std, channel by channel, in float32, after its shorter side was
resized to size / crop and the middle of `size` cut out (`fit: crop`), or after it was resized to `size` as it
is (`fit: stretch`).

Assumes: the first axis of every array counts the samples, or `batch_axis` says which one does. An npz holds one array
per model input, under the input's name, and `labels` where a metric needs them. Images have their class from a CSV
(`filename,label`), or from one sub-folder per class, numbered in the order of their names.
Source: own; the image preprocessing is the usual one of ImageNet classifiers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from qpipe.errors import InputError
from qpipe.numerics.thinning import spread, thinned
from qpipe.param import load_factory
from qpipe.stage import NULL, Context, Factory, Range, Samples, stage

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = dict[str, NDArray[Any]]


def read_npz(path: Path) -> Arrays:
    """{name: array} of an npz file. Errors: InputError for another file, or pickled data."""
    import zipfile

    import numpy as np

    if not path.is_file():
        raise InputError(f"There is no data file {path}.")
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path} is no npz file. Save it with np.savez(path, <input>=…, labels=…).")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # zipfile, zlib and numpy each have their own, a header of 2**40 rows a MemoryError
        said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise InputError(f"{path} cannot be read as npz without pickle: {said}") from error
    other = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
    if other:  # numpy hands out the bytes of what does not begin as an array does
        raise InputError(f"{path}: {other[0]!r} is no array. Save it with np.savez(path, <input>=…, labels=…).")
    return arrays


def from_factory(factory: str, split: str, limit: int | None, axes: Mapping[str, int]) -> Arrays:
    """{name: array} of what `module:function` returns for `split`: a mapping of arrays, or an iterable of them."""
    import numpy as np

    returned = load_factory(factory)(split=split)
    if isinstance(returned, Mapping):
        return sample_first(factory, {str(name): _array(value) for name, value in returned.items()}, axes)
    if not isinstance(returned, Iterable):
        raise InputError(
            f"{factory} returned {type(returned).__name__}; it has to return a mapping of arrays by input "
            "name, or an iterable of such mappings."
        )
    batches = list(_batches(factory, returned, limit, axes))
    if not batches:
        raise InputError(f"{factory} yields no batch for split '{split}'.")
    joined: Arrays = {}
    for name in batches[0]:
        try:
            joined[name] = np.concatenate([batch[name] for batch in batches])[:limit]
        except ValueError as error:
            raise InputError(f"{factory}: the batches of '{name}' do not fit together: {error}") from error
    return joined


def _batches(
    factory: str, batches: Iterable[Any], limit: int | None, axes: Mapping[str, int]
) -> Iterator[Arrays]:
    """Batches as {name: array} until `limit` samples are there; all must carry the names of the first."""
    names: list[str] | None = None
    taken = 0
    for index, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise InputError(
                f"{factory} yields {type(batch).__name__} as batch {index}; each batch has to be a mapping "
                "of arrays by input name (and `labels`)."
            )
        arrays = sample_first(factory, {str(name): _array(value) for name, value in batch.items()}, axes)
        names = names or sorted(arrays)
        if sorted(arrays) != names:
            raise InputError(f"{factory}: batch {index} holds {sorted(arrays)}, the first one {names}.")
        if any(array.ndim == 0 for array in arrays.values()):
            raise InputError(
                f"{factory}: batch {index} holds single numbers alone; the first axis counts the samples."
            )
        yield arrays
        taken += min((len(array) for array in arrays.values()), default=0)
        if limit is not None and taken >= limit:
            return


def _array(value: Any) -> NDArray[Any]:
    import numpy as np

    array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    words = array.dtype.kind == "O" and array.size and all(isinstance(item, str) for item in array.flat)
    return array.astype(str) if words else array


def sample_first(source: str, arrays: Mapping[str, NDArray[Any]], axes: Mapping[str, int]) -> Arrays:
    """The arrays with the samples along their first axis: along which one they lie in some, `axes` say, and a single
    number is every sample's. Errors: InputError for an axis or a name that is not there."""
    import numpy as np

    for name, axis in axes.items():
        if name not in arrays:
            raise InputError(f"batch_axis: {source} holds no array '{name}', only {', '.join(sorted(arrays))}.")
        if not -arrays[name].ndim <= axis < arrays[name].ndim:
            raise InputError(f"batch_axis: array '{name}' has the shape {arrays[name].shape}, so no axis {axis}.")
    moved = {name: np.moveaxis(array, axes.get(name, 0), 0) if array.ndim else array for name, array in arrays.items()}
    count = max((len(array) for array in moved.values() if array.ndim), default=None)
    if count is None:
        return moved
    return {name: array if array.ndim else np.full(count, array) for name, array in moved.items()}


def check_arrays(source: str, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Errors: InputError, one line naming the array: none at all, empty, no sample axis, other lengths, NaN, inf."""
    import numpy as np

    if not set(arrays) - {"labels"}:
        raise InputError(f"{source} holds no array for a model input, only {sorted(arrays)}.")
    first = next(name for name in arrays if name != "labels")
    for name, array in arrays.items():
        if array.dtype.kind not in ("fiub" if name == "labels" else "fiubU"):
            wanted = "numbers" if name == "labels" else "numbers, or text as numpy's str"
            raise InputError(f"{source}: array '{name}' has dtype {array.dtype}; it has to hold {wanted}.")
        if array.ndim == 0:
            raise InputError(f"{source}: array '{name}' is a single number, and there are no samples beside it.")
        if array.size == 0:
            raise InputError(f"{source}: array '{name}' is empty, shape {array.shape}.")
        if len(array) != len(arrays[first]):
            raise InputError(
                f"{source}: array '{name}' has {len(array)} samples, '{first}' has {len(arrays[first])}. If they lie "
                f"along another axis than the first, say data.batch_axis={{{name}: AXIS}}."
            )
        if array.dtype.kind == "f" and (bad := _first_not_finite(array)) is not None:
            found = "NaN" if np.isnan(array[bad]).any() else "inf"
            raise InputError(f"{source}: array '{name}' holds {found}, first in sample {bad}.")


def _first_not_finite(array: NDArray[Any]) -> int | None:
    """Index of the first sample with NaN or inf; one sample at a time, so that the data are not copied."""
    import numpy as np

    return next((index for index, sample in enumerate(array) if not np.isfinite(sample).all()), None)


def from_images(
    folder: Path, labels: Path | None, limit: int | None, name: str, ctx: Context, **how: Any
) -> Arrays:
    """{name: images} and their `labels`, where the folder or the CSV gives any; `how` fills Preprocessing."""
    if importlib.util.find_spec("PIL") is None:
        raise InputError("Reading images needs Pillow: pip install 'qpipe[images]'.")
    from qpipe.numerics.images import Preprocessing, find_images, stack_images

    size = how["size"]
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise InputError(f"size has to be [height, width], got {list(size)}.")
    files, classes = find_images(folder, labels)
    kept = spread(len(files), limit)
    arrays: Arrays = {
        name: stack_images([files[index] for index in kept], Preprocessing(**how), ctx.progress)
    }
    return arrays if classes is None else {**arrays, "labels": classes[kept]}


def source_of(given: Mapping[str, Any]) -> str:
    """Where the samples come from. Errors: InputError unless exactly one of path, images and factory is given."""
    sources = [name for name in ("path", "images", "factory") if given[name] is not None]
    if len(sources) != 1:
        raise InputError(
            f"load_data takes one of path, images and factory, got {' and '.join(sources) or 'none'}."
        )
    if given["reads"] and given["factory"] is None:
        raise InputError(f"`reads` goes with `factory`; `{sources[0]}` counts by its content anyway.")
    if given["labels"] is not None and given["images"] is None:
        raise InputError(f"`labels` goes with `images`; with `{sources[0]}` they are the array named labels.")
    return str(given[sources[0]])


def refuse_sources(given: Mapping[str, Any]) -> None:
    """Errors: as `source_of`."""
    source_of(given)


@stage(version=1, check=refuse_sources)
def load_data(
    *,
    path: Path | None = None,
    images: Path | None = None,
    labels: Path | None = None,
    factory: Factory | None = None,
    reads: tuple[Path, ...] = (),
    split: str = "calibration",
    limit: Annotated[int, Range(ge=1)] | None = None,
    input_name: str = "image",
    size: tuple[int, ...] | None = None,
    fit: Literal["crop", "stretch"] = "crop",
    crop: Annotated[float, Range(gt=0, le=1)] = 1.0,
    mode: Literal["RGB", "BGR", "L"] = "RGB",
    scale: Annotated[float, Range(gt=0)] = 1 / 255,
    mean: tuple[float, ...] = (0.0,),
    std: tuple[float, ...] = (1.0,),
    layout: Literal["NCHW", "NHWC"] = "NCHW",
    batch_axis: dict[str, int] | None = None,
    ctx: Context = NULL,
) -> Samples:
    """Samples from one source: `path` (npz), `images` (a folder, with `labels`) or `factory` (with `split`).

    `reads` names the files and folders that the factory opens by itself, so that their content counts.
    `limit` keeps that many samples, evenly spread (of a factory's batches: the first ones). `input_name` names the
    model input that images go to; `size`, `fit`, `crop`, `mode`, `scale`, `mean`, `std` and `layout` say how they are
    prepared. `batch_axis` says along which axis the samples lie in an array that does not begin with them ({state: 1}).
    A single number is the same for all samples. Errors: InputError, one line, for a source that cannot be read or
    arrays that cannot serve.
    """
    source = source_of(locals())
    if path is not None:
        arrays = sample_first(source, read_npz(path), batch_axis or {})
    elif factory is not None:
        arrays = from_factory(factory, split, limit, batch_axis or {})
    elif images is not None:
        arrays = from_images(
            images, labels, limit, input_name, ctx,
            size=size, fit=fit, ratio=crop, mode=mode, scale=scale, mean=mean, std=std, layout=layout,
        )  # fmt: skip
    arrays = thinned(arrays, limit)
    check_arrays(source, arrays)
    targets = arrays.pop("labels", None)
    return Samples(arrays, targets)
