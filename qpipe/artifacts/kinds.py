"""The kinds of value that travel between stages, except Model: each checks itself at birth, and packs itself into JSON
and blobs. Nothing heavy is imported before an array is at hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpipe.errors import InputError
from qpipe.mapped import let_go, map_file
from qpipe.writing import write_whole

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Buffer

    from qpipe.numerics.grid import Encoding

    Array = np.ndarray[Any, np.dtype[Any]]

Json = Any

Read = Callable[[str], memoryview]

Packed = tuple[Json, Mapping[str, "Buffer"]]

_CHECKED_VALUES = 1 << 22  # looked at together when samples are checked: no copy of the whole array


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs by name, each array (n, ...), and the labels (n, ...) where a metric needs them.

    Arrays come out read-only and in the order of their names. Raises InputError where there is no sample, the
    first dimensions differ, or a number is not finite.
    """

    arrays: dict[str, Array]
    labels: Array | None = None

    def __post_init__(self) -> None:
        _set_arrays(self, "arrays", self.arrays)
        if self.labels is not None:
            object.__setattr__(self, "labels", _read_only("labels", self.labels))
        _check_samples(self._named())

    def __len__(self) -> int:
        return int(next(iter(self.arrays.values())).shape[0])

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        """The arrays in consecutive slices of `size` samples; the last one may be smaller."""
        if size < 1:
            raise ValueError(f"a batch holds at least one sample, got {size}.")
        for start in range(0, len(self), size):
            yield {name: array[start : start + size] for name, array in self.arrays.items()}

    def head(self, count: int) -> Samples:
        """The first `count` samples, or all where there are fewer."""
        labels = None if self.labels is None else self.labels[:count]
        return Samples({name: array[:count] for name, array in self.arrays.items()}, labels)

    def _named(self) -> dict[str, Array]:
        return self.arrays if self.labels is None else {**self.arrays, "labels": self.labels}

    def pack(self) -> Packed:
        arrays, blobs = _pack_arrays(self.arrays)
        labels, label_blobs = _pack_arrays({} if self.labels is None else {"": self.labels}, prefix="labels")
        return {"arrays": arrays, "labels": labels.get("")}, {**blobs, **label_blobs}

    @staticmethod
    def unpack(meta: Json, read: Read) -> Samples:
        """What `pack` was given; not checked again, since it was at birth and its bytes are verified."""
        samples = object.__new__(Samples)
        labels = None if meta["labels"] is None else _unpack_array(meta["labels"], read("labels"))
        object.__setattr__(samples, "arrays", _unpack_arrays(meta["arrays"], read))
        object.__setattr__(samples, "labels", labels)
        return samples


@dataclass(frozen=True, eq=False)
class Statistics:
    """What was measured on a model: arrays by name (read-only), and JSON values such as counts."""

    arrays: dict[str, Array]
    values: dict[str, Json]

    def __post_init__(self) -> None:
        _set_arrays(self, "arrays", self.arrays)
        object.__setattr__(self, "values", _json_copy("statistics", self.values))

    def pack(self) -> Packed:
        arrays, blobs = _pack_arrays(self.arrays)
        return {"arrays": arrays, "values": self.values}, blobs

    @staticmethod
    def unpack(meta: Json, read: Read) -> Statistics:
        return Statistics(_unpack_arrays(meta["arrays"], read), meta["values"])


@dataclass(frozen=True, eq=False)
class Encodings:
    """Grids by value name, without a model around them; in the order of the names."""

    encodings: dict[str, Encoding]

    def __post_init__(self) -> None:
        object.__setattr__(self, "encodings", dict(sorted(self.encodings.items())))

    def pack(self) -> Packed:
        import numpy as np

        grids, scales, zero_points = {}, [], []
        for name, encoding in self.encodings.items():
            scale = np.asarray(encoding.scale, dtype="<f4")
            grid = {field: getattr(encoding, field) for field in _GRID_FIELDS}
            free = {"free_sign": True} if encoding.free_sign else {}  # left out else: others keep their bytes
            grids[name] = grid | free | {"shape": scale.shape}
            scales.append(scale.tobytes())
            zero_points.append(np.asarray(encoding.zero_point, dtype="<i4").tobytes())
        return grids, {"scale": b"".join(scales), "zero_point": b"".join(zero_points)}

    @staticmethod
    def unpack(meta: Json, read: Read) -> Encodings:
        import numpy as np

        from qpipe.numerics.grid import Encoding

        scales, zero_points = np.frombuffer(read("scale"), "<f4"), np.frombuffer(read("zero_point"), "<i4")
        encodings, start = {}, 0
        for name in sorted(meta):
            grid = dict(meta[name])
            shape = tuple(grid.pop("shape"))
            part = slice(start, start := start + int(np.prod(shape, dtype=np.int64)))
            scale, zero_point = scales[part].reshape(shape), zero_points[part].reshape(shape)
            encodings[name] = Encoding(scale=scale, zero_point=zero_point, **grid)
        return Encodings(encodings)


_GRID_FIELDS = ("bitwidth", "signed", "symmetric", "axis", "block_size", "frozen")


@dataclass(frozen=True)
class Scores:
    """JSON values by name: `score` (float, higher is better), `metric`, and whatever the report shows.

    The order of dict entries is that of their names; where order says something, use a list.
    """

    values: dict[str, Json]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", _json_copy("scores", self.values))

    def pack(self) -> Packed:
        return self.values, {}

    @staticmethod
    def unpack(meta: Json, read: Read) -> Scores:
        """What `pack` was given, read from JSON a moment ago: nobody else has a hold of it."""
        scores = object.__new__(Scores)
        object.__setattr__(scores, "values", _json_object("scores", meta))
        return scores


@dataclass(frozen=True, eq=False)
class Files:
    """File contents by relative path: bytes, or the path of a file to take them from.

    Raises InputError for a path that is absolute, climbs out or is not in plain form.
    """

    contents: dict[str, Buffer | Path]

    def __post_init__(self) -> None:
        for name in self.contents:
            _check_file_name(name)
        object.__setattr__(self, "contents", dict(sorted(self.contents.items())))

    def read(self, name: str) -> memoryview:
        """The bytes of one file, mapped rather than read where they lie in a file."""
        content = self.contents[name]
        return _map_file(content) if isinstance(content, Path) else memoryview(content)

    def write(self, folder: Path) -> None:
        """Write every file below `folder`, which is made where it is missing. QpipeError where the system refuses."""
        for name in self.contents:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            content = self.read(name)
            write_whole(target, content)
            let_go(content)

    def pack(self) -> Packed:
        return {"names": list(self.contents)}, {name: self.read(name) for name in self.contents}

    @staticmethod
    def unpack(meta: Json, read: Read) -> Files:
        return Files({name: read(name) for name in meta["names"]})


def canonical_json(value: Json) -> bytes:
    """JSON, keys sorted, no spaces; numpy scalars as numbers, nan and infinity as Python writes them."""
    return _encode_json(value).encode("utf-8", "surrogatepass")


def _plain_scalar(value: Any) -> Any:
    item = getattr(value, "item", None)
    if item is None or getattr(value, "ndim", 1) != 0:
        raise TypeError(f"a value of type {type(value).__qualname__} is not JSON")
    return item()


_encode_json = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_plain_scalar
).encode
"""Made once: json.dumps makes an encoder for each call that asks for anything."""


def _json_copy(what: str, values: Mapping[str, Json]) -> dict[str, Json]:
    return _json_object(what, json.loads(canonical_json(values)))


def _json_object(what: str, values: Json) -> dict[str, Json]:
    if not isinstance(values, dict):
        raise TypeError(f"{what} are values by name, got {type(values).__qualname__}")
    return values


def _read_only(name: str, value: Any) -> Array:
    import numpy as np

    array: Array = np.asarray(value).view()
    if array.dtype.hasobject or array.dtype.fields is not None:
        raise InputError(f"array '{name}' has dtype {array.dtype}. Only plain numbers and text can be kept.")
    array.flags.writeable = False
    return array


def _set_arrays(owner: object, field: str, arrays: Mapping[str, Any]) -> None:
    found = {name: _read_only(name, arrays[name]) for name in sorted(arrays)}
    object.__setattr__(owner, field, found)


def _check_samples(arrays: Mapping[str, Array]) -> None:
    import numpy as np

    sizes = {name: array.shape[0] if array.ndim else None for name, array in arrays.items()}
    if not set(sizes) - {"labels"}:
        raise InputError("the samples hold no input. Give one array per model input, under its name.")
    if len(set(sizes.values())) > 1 or None in sizes.values():
        found = ", ".join(f"'{name}' {array.shape}" for name, array in arrays.items())
        raise InputError(f"the samples differ in their first dimension, the number of samples: {found}.")
    if 0 in sizes.values():
        raise InputError("the samples are empty: their first dimension, the number of samples, is 0.")
    for name, array in arrays.items():
        if array.dtype.kind not in "fcV":
            continue
        step = max(1, _CHECKED_VALUES * len(array) // max(1, array.size))
        for start in range(0, len(array), step):
            finite = np.isfinite(array[start : start + step])
            if not finite.all():
                first = start + int(np.argmin(finite.reshape(len(finite), -1).all(axis=1)))
                raise InputError(f"'{name}' holds a number that is not finite, first in sample {first}.")


def _pack_arrays(arrays: Mapping[str, Array], prefix: str = "array/") -> tuple[Json, dict[str, Buffer]]:
    import numpy as np

    meta: dict[str, Json] = {}
    blobs: dict[str, Buffer] = {}
    for name, array in arrays.items():
        dtype = array.dtype.newbyteorder("<")
        plain = array.astype(dtype, order="C", copy=False).reshape(-1).view(np.uint8)
        meta[name] = {"dtype": dtype.name if dtype.kind == "V" else dtype.str, "shape": list(array.shape)}
        blobs[prefix + name] = plain.data
    return meta, blobs


def _unpack_arrays(meta: Json, read: Read) -> dict[str, Array]:
    return {name: _unpack_array(form, read(f"array/{name}")) for name, form in meta.items()}


def _unpack_array(form: Json, data: memoryview) -> Array:
    import numpy as np

    try:
        dtype = np.dtype(form["dtype"])
    except TypeError:
        import ml_dtypes  # bfloat16 and its like are known to numpy once this is imported

        dtype = np.dtype(getattr(ml_dtypes, form["dtype"]))
    return np.frombuffer(data, dtype).reshape(form["shape"])


def _check_file_name(name: str) -> None:
    parts = name.split("/")
    if {"", ".", ".."} & set(parts) or "\\" in name or "\0" in name:
        raise InputError(f"'{name}' cannot name a file: give a relative path without '..'.")


def _map_file(path: Path) -> memoryview:
    with open(path, "rb") as file:
        if not path.stat().st_size:
            return memoryview(b"")
        return map_file(file.fileno(), path.stat().st_size, path)
