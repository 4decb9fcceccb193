"""Artifacts: how a value of any kind is saved, loaded and named.

Every kind has one wire form. A root blob, canonical JSON, names the other blobs by digest:

    {"blobs": {"array/input": [digest, size_bytes], ...}, "format": 1, "kind": "Samples", "meta": {...}}

The root's own digest is the artifact's: a Merkle root, so that equal content has one name, variants share
their tensors, and a store can follow references (gc, verify, a remote tier) without knowing any kind.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from qpipe.artifacts import kinds
from qpipe.artifacts.kinds import Json, Read, canonical_json
from qpipe.errors import CacheError, DamagedError
from qpipe.keys.hashing import digest_bytes, is_digest

if TYPE_CHECKING:
    from typing_extensions import Buffer

FORMAT = 1
"""The version of the wire form; part of every action key, since the code of this file is not."""

ROOT_LIMIT = 1 << 28
"""Bytes of a root blob: what is larger was not written here."""


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


@dataclass(frozen=True)
class Kind:
    """A kind by name, and where its class is; the class is imported when a value is loaded, not before."""

    name: str
    module: str
    type: str

    def holds(self, value: object) -> bool:
        """Whether `value` is of this kind; a class that was never imported has no values."""
        module = sys.modules.get(self.module)
        return module is not None and isinstance(value, getattr(module, self.type))

    def load(self, meta: Json, read: Read) -> Any:
        """The value that was packed as `meta` and the blobs that `read` returns by name."""
        module = sys.modules.get(self.module) or importlib.import_module(self.module)
        return getattr(module, self.type).unpack(meta, read)


FACE_MODULE = "qpipe.model.model"
NETWORK_MODULE = "qpipe.model.network.network"
KINDS: Mapping[str, Kind] = {
    "Model": Kind("Model", NETWORK_MODULE, "Network"),
    **{
        name: Kind(name, kinds.__name__, name)
        for name in ("Samples", "Statistics", "Encodings", "Scores", "Files")
    },
}


def with_face(value: Any) -> Any:
    """A Network as a `Model`, with all that can be done with one at hand, for a stage that asks for it."""
    return importlib.import_module(FACE_MODULE).Model.of(value)


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
