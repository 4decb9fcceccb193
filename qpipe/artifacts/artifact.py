"""Artifacts: the kinds of value that travel between stages, and how each is saved, loaded and named.

Every kind has one wire form. A root blob, canonical JSON, names the other blobs by digest:

    {"blobs": {"array/input": [digest, size_bytes], ...}, "format": 1, "kind": "Samples", "meta": {...}}

The root's own digest is the artifact's: a Merkle root, so that equal content has one name, variants share
their tensors, and a store can follow references (gc, verify, a remote tier) without knowing any kind.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qpipe.errors import CacheError, DamagedError, InputError
from qpipe.keys.hashing import digest_bytes, is_digest
from qpipe.mapped import let_go, map_file

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Buffer

    from qpipe.numerics.grid import Encoding

    Array = np.ndarray[Any, np.dtype[Any]]

FORMAT = 1
"""The version of the wire form; part of every action key, since the code of this file is not."""

ROOT_LIMIT = 1 << 28
"""Bytes of a root blob: what is larger was not written here."""

Json = Any
Read = Callable[[str], memoryview]
Packed = tuple[Json, Mapping[str, "Buffer"]]
_CHECKED_VALUES = 1 << 22  # looked at together when samples are checked: no copy of the whole array


class Blobs(Protocol):
    """Where blobs are kept: a store; any thread may call it."""

    def put(self, buffer: Buffer) -> str:
        """Keep the bytes; their digest."""

    def open(self, digest: str) -> memoryview:
        """The bytes under `digest`, verified and read-only."""


@dataclass(frozen=True)
class Artifact:
    """A value in a store: its kind, the digest of its root blob, and the bytes of all its blobs together."""

    kind: str
    digest: str
    size_bytes: int


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
            grids[name] = {field: getattr(encoding, field) for field in _GRID_FIELDS} | {"shape": scale.shape}
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
        """Write every file below `folder`, which is made where it is missing."""
        for name in self.contents:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            content = self.read(name)
            target.write_bytes(content)
            let_go(content)

    def pack(self) -> Packed:
        return {"names": list(self.contents)}, {name: self.read(name) for name in self.contents}

    @staticmethod
    def unpack(meta: Json, read: Read) -> Files:
        return Files({name: read(name) for name in meta["names"]})


@dataclass(frozen=True)
class Kind:
    """A kind by name, and where its class is; the class is imported when a value is loaded, not before."""

    name: str
    module: str

    def holds(self, value: object) -> bool:
        """Whether `value` is of this kind; a class that was never imported has no values."""
        module = sys.modules.get(self.module)
        return module is not None and isinstance(value, getattr(module, self.name))

    def load(self, meta: Json, read: Read) -> Any:
        """The value that was packed as `meta` and the blobs that `read` returns by name."""
        module = sys.modules.get(self.module) or importlib.import_module(self.module)
        return getattr(module, self.name).unpack(meta, read)


KINDS: Mapping[str, Kind] = {
    "Model": Kind("Model", "qpipe.model.model"),
    **{name: Kind(name, __name__) for name in ("Samples", "Statistics", "Encodings", "Scores", "Files")},
}


def kind_of(value: object) -> str:
    """The name of the kind `value` is of; TypeError where it is of none."""
    for kind in KINDS.values():
        if kind.holds(value):
            return kind.name
    raise TypeError(f"a value of type {type(value).__qualname__} is of no artifact kind ({', '.join(KINDS)})")


def save(value: Any, store: Blobs) -> Artifact:
    """Keep `value` in the store; equal values, saved by anyone anywhere, are the same artifact."""
    kind = kind_of(value)
    meta, buffers = value.pack()
    digests = _put_all(list(buffers.values()), store)
    sizes = [memoryview(buffer).nbytes for buffer in buffers.values()]
    blobs = dict(zip(buffers, zip(digests, sizes, strict=True), strict=True))
    root = canonical_json({"format": FORMAT, "kind": kind, "meta": meta, "blobs": blobs})
    if len(root) > ROOT_LIMIT:
        raise ValueError(f"the {kind} has {len(root):,} bytes of JSON; keep large values as arrays")
    return Artifact(kind, store.put(root), len(root) + sum(dict(blobs.values()).values()))


def load(artifact: Artifact, store: Blobs) -> Any:
    """The value of an artifact, its arrays read-only views of the store's files.

    DamagedError where a blob is missing, does not match its digest, or is not what the artifact says: its content may
    be anybody's.
    """
    kind, meta, blobs = _parse(store.open(artifact.digest), artifact.digest)
    if kind != artifact.kind:
        raise DamagedError(f"blob {artifact.digest} is a {kind}, not a {artifact.kind}.", artifact.digest)

    def read(name: str) -> memoryview:
        if name not in blobs:
            raise DamagedError(f"{kind} {artifact.digest} names no blob {name!r}.", artifact.digest)
        return store.open(blobs[name][0])

    try:
        return KINDS[kind].load(meta, read)
    except (CacheError, MemoryError):
        raise
    except Exception as error:  # whatever a library says of made-up bytes
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise DamagedError(f"{kind} {artifact.digest} cannot be read: {reason}.", artifact.digest) from error


def _put_all(buffers: list[Buffer], store: Blobs) -> list[str]:
    """The digests of `buffers`, put side by side: 160 flushes to disk one by one took 2.1 s, so 0.25 s."""
    if len(buffers) < 2:
        return [store.put(buffer) for buffer in buffers]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(store.put, buffers))


def references(root: Buffer) -> dict[str, int]:
    """The blobs a root blob names, digest -> size in bytes. DamagedError where it is not a root."""
    return dict(_parse(root)[2].values())


def root_kind(root: Buffer) -> str:
    """The kind of the artifact that a root blob is of. DamagedError where it is not a root."""
    return _parse(root)[0]


def canonical_json(value: Json) -> bytes:
    """JSON, keys sorted, no spaces; numpy scalars as numbers, nan and infinity as Python writes them."""
    return _encode_json(value).encode("utf-8", "surrogatepass")


def _parse(content: Buffer, digest: str | None = None) -> tuple[str, Json, dict[str, tuple[str, int]]]:
    """Kind, meta and blobs of a root; everything checked, since the writer may have been anyone."""
    digest = digest or digest_bytes(content)
    try:
        if memoryview(content).nbytes > ROOT_LIMIT:
            raise ValueError("it is too large")
        root = json.loads(bytes(content))
        kind, version, blobs = root["kind"], root["format"], root["blobs"]
        if version != FORMAT or kind not in KINDS:
            raise ValueError(f"format {version!r}, kind {kind!r}")
        found = {str(name): (digest, size) for name, (digest, size) in blobs.items()}
        for name, (blob, size) in found.items():
            if not is_digest(blob) or type(size) is not int or not 0 <= size < 1 << 62:
                raise ValueError(f"blob {name!r}")
        return kind, root["meta"], found
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"blob {digest} is not the root of an artifact: {error}.", digest) from error


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
