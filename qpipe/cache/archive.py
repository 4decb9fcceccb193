"""An archive of a part of a cache, to be carried to another one: for CI, or a colleague.

A zip file without compression, so that blobs are streamed and every zip tool can look inside:

    qpipe-cache.json       {"format": 1}
    actions/<key>.json     results, as they stand in a cache
    blobs/<digest>         everything they consist of

The bytes depend on what it holds alone: entries in the order of their names, no times, no owners. What is taken in is
verified like any blob and any result: by its digest, its seal, and one against the other. Nothing is written but under
a digest, so that no name in an archive is ever a path here. A result comes in with all its blobs or not at all.
"""

from __future__ import annotations

import json
import logging
import re
import zipfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from qpipe.artifacts.kinds import canonical_json
from qpipe.cache.audit import contradiction
from qpipe.cache.store import RESULT_LIMIT, Store, sealed, unsealed
from qpipe.errors import CacheError, DamagedError, InputError
from qpipe.writing import beside

FORMAT = 1
_MANIFEST = "qpipe-cache.json"
_ENTRY = re.compile(r"actions/([0-9a-f]{64})\.json|blobs/([0-9a-f]{64})")
_CHUNK = 1 << 22  # bytes
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip file can say
_BAD = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, EOFError, zipfile.BadZipFile)
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exported:
    """How many results (sub-results among them) and blobs an archive holds, and its size."""

    results: int
    blobs: int
    size_bytes: int


@dataclass(frozen=True)
class Imported:
    """How many results came in, how many were there already, and how many entries were passed over."""

    results: int
    standing: int
    refused: int


def export(store: Store, keys: Collection[str], path: Path) -> Exported:
    """Write the results under `keys`, their sub-results and all their blobs to `path`, whole or not at all.

    What is not complete in the store is left out. CacheError where the file cannot be written, DamagedError where a
    blob turns out damaged (it is moved aside).
    """
    results = _with_parts(store, keys)
    blobs = {digest for result in results.values() for digest in result["blobs"]}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside(path) as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                _add(archive, _MANIFEST, canonical_json({"format": FORMAT}))
                for key, result in sorted(results.items()):
                    _add(archive, f"actions/{key}.json", sealed(key, result))
                for digest in sorted(blobs):
                    _add(archive, f"blobs/{digest}", store.open(digest))
            size = file.tell()
    except OSError as error:
        raise CacheError(f"'{path}' cannot be written: {error.strerror or error}.") from error
    return Exported(len(results), len(blobs), size)


def _with_parts(store: Store, keys: Collection[str]) -> dict[str, dict[str, Any]]:
    """The complete results under `keys`, and those of their sub-results that still stand."""
    found: dict[str, dict[str, Any]] = {}
    pending = list(keys)
    while pending:
        key = pending.pop()
        result = store.result(key) if key not in found else None
        if result is not None and not store.complete(result):
            found[key] = result
            pending += result.get("parts", ())
    return found


def _add(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.create_system, info.external_attr, info.file_size = 3, 0o444 << 16, len(content)
    with archive.open(info, "w") as file:
        for start in range(0, len(content), _CHUNK):
            file.write(content[start : start + _CHUNK])


def import_archive(store: Store, path: Path) -> Imported:
    """Take in what `path` holds. What does not fit is passed over with a warning, the rest comes in.

    InputError where the file is no such archive; CacheError where the store cannot be written.
    """
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            _check_manifest(archive)
            return _Import(store, archive, size).go()
    except FileNotFoundError as error:
        raise InputError(f"import: no file '{path}'.") from error
    except (*_BAD, NotImplementedError, RuntimeError) as error:  # what zipfile says of a made-up directory
        raise InputError(f"import: '{path}' is not an archive that `qpipe cache export` wrote: {error}.") from error


def _check_manifest(archive: zipfile.ZipFile) -> None:
    info = archive.getinfo(_MANIFEST)
    if info.file_size > 1 << 10:
        raise ValueError("its manifest is too large")
    if (found := json.loads(archive.read(info)).get("format")) != FORMAT:
        raise ValueError(f"its format is {found!r}, and this version reads {FORMAT}")


class _Import:
    """One archive on its way into a store."""

    def __init__(self, store: Store, archive: zipfile.ZipFile, size: int) -> None:
        self._store = store
        self._archive = archive
        self._size = size
        self._refused = 0
        self._entries: dict[str, dict[str, zipfile.ZipInfo]] = {"actions": {}, "blobs": {}}
        self._doubted: set[str] = set()

    def go(self) -> Imported:
        for info in self._archive.infolist():
            self._sort(info)
        came = standing = 0
        for key, info in sorted(self._entries["actions"].items()):
            before = self._store.result(key)
            if before is not None and not self._store.complete(before):
                standing += 1
            elif (problem := self._take(key, info)) is None:
                came += 1
            else:
                self._pass_over(f"result {key[:16]}", problem)
        return Imported(came, standing, self._refused)

    def _sort(self, info: zipfile.ZipInfo) -> None:
        """Note an entry, or pass it over: nothing but plainly stored entries under names that `export` gives."""
        if info.filename == _MANIFEST:
            return
        match = _ENTRY.fullmatch(info.filename)
        known = self._entries[info.filename.partition("/")[0]] if match else {}
        name = (match[1] or match[2]) if match else ""
        if match is None:
            self._pass_over(repr(info.filename[:80]), "no such name is ever written")
        elif name in known:
            self._pass_over(info.filename, "it is there twice")
        elif info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            self._pass_over(info.filename, "it is compressed or encrypted")
        elif info.file_size != info.compress_size or info.file_size > self._size:
            self._pass_over(info.filename, f"it claims to hold {info.file_size:,} bytes")
        else:
            known[name] = info

    def _take(self, key: str, info: zipfile.ZipInfo) -> str | None:
        """Take one result in; why not, if not."""
        if info.file_size > RESULT_LIMIT:
            return "it is too large"
        try:
            result = unsealed(key, self._archive.read(info))
        except _BAD as error:
            return str(error) or type(error).__name__
        for digest, size in sorted(result["blobs"].items()):
            if not self._receive(digest, size):
                return f"its blob {digest[:16]} is missing, or is not what its name says"
        if (problem := contradiction(self._store, result)) is not None:
            return problem
        try:
            self._store.publish(key, result)
        except DamagedError as error:
            return str(error)
        return None

    def _receive(self, digest: str, size: int) -> bool:
        info = self._entries["blobs"].get(digest)
        if digest in self._doubted:
            return False
        if self._store.has(digest, size):
            return self._store.receive(digest, size, ())
        try:
            good = info is not None and info.file_size == size and self._read(info, digest)
        except _BAD:
            good = False
        if not good:
            self._doubted.add(digest)
        return good

    def _read(self, info: zipfile.ZipInfo, digest: str) -> bool:
        with self._archive.open(info) as file:
            return self._store.receive(digest, info.file_size, _chunks(file))

    def _pass_over(self, what: str, why: str) -> None:
        self._refused += 1
        _LOG.warning("import: %s is passed over: %s", what, why.rstrip("."))


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK):
        yield chunk
