"""The store: digest -> bytes, and action key -> result. Files are the truth.

    blobs/<2>/<digest>        immutable, read-only, named by the BLAKE3 of their content (`b3sum` agrees)
    actions/<2>/<key>.json    the result of an action: its outputs, the blobs they consist of, its provenance
    locks/<2>/<key>.lock      held by the process that computes an action; the kernel frees it when that dies
    tmp/                      files being written: locked by their writer, renamed when whole
    damaged/                  blobs that did not match their name, kept for a look
    index/                    what can be rebuilt (qpipe.index)

What is read is verified; what is missing, damaged or made up is a miss, never an error of the run. What is
written is there whole or not at all, whoever is killed meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import mmap
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from qpipe.artifact import KINDS, canonical_json, references
from qpipe.errors import CacheError, DamagedError
from qpipe.hashing import digest_bytes, is_digest

if TYPE_CHECKING:
    from filelock import FileLock
    from typing_extensions import Buffer

    from qpipe.index import Index

Json = Any
_LOG = logging.getLogger(__name__)
_RESULT_LIMIT = 64 << 20  # bytes; a larger result file was not written here
_MAPPED_SIZE = 1 << 16  # smaller blobs are read: a page table costs more than a copy
_STALE_S = 60.0  # a temporary file younger than this may not have been locked yet
_ABANDONED_S = 86_400.0  # where files cannot be locked, only age says that a writer is gone
_PORT = re.compile(r"\w[\w.-]*")


class Store:
    """A cache folder. Making one touches nothing; folders appear with the first write."""

    def __init__(self, root: Path, readonly: bool = False) -> None:
        self.root = Path(root)
        self.readonly = readonly
        self._prefix = os.path.join(self.root, "")
        self._verified: dict[str, tuple[int, int, int]] = {}
        self._prepared = False

    @cached_property
    def index(self) -> Index:
        """What can be rebuilt; diskcache is imported with the first use."""
        from qpipe.index import Index

        return Index(self.root / "index", self.readonly)

    def close(self) -> None:
        """Write the index. The store may be used again afterwards."""
        if "index" in self.__dict__:
            self.index.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # blobs

    def put(self, buffer: Buffer) -> str:
        """Keep the bytes of a contiguous buffer; their digest. CacheError where they cannot be written."""
        view = memoryview(buffer)
        view = view.cast("B") if view.nbytes else memoryview(b"")
        digest = digest_bytes(view)
        if not self._keep(digest, view.nbytes):
            self._write(self._blob(digest), view, _move)
        return digest

    def open(self, digest: str) -> memoryview:
        """The bytes under `digest`, read-only and mapped, verified once per process.

        DamagedError where they are missing or do not match; what does not match is moved aside, so that the
        next `put` heals it.
        """
        path = self._blob(digest)
        try:
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                view = _view(file, status.st_size)
        except FileNotFoundError as error:
            raise DamagedError(f"blob {digest} is missing from {self.root}.", digest) from error
        except OSError as error:
            raise CacheError(f"{path} cannot be read: {error.strerror}.") from error
        identity = (status.st_dev, status.st_ino, status.st_size)
        if self._verified.get(digest) != identity:
            if digest_bytes(view) != digest:
                self._set_aside(path, status)
                raise DamagedError(f"blob {digest} in {self.root} does not match its digest.", digest)
            self._verified[digest] = identity
        return view

    def has(self, digest: str, size: int | None = None) -> bool:
        """Whether there is a blob of that name (and size); its content is not looked at."""
        try:
            status = os.stat(self._place("blobs", digest, ""))
        except OSError:
            return False
        return stat.S_ISREG(status.st_mode) and size in (None, status.st_size)

    def blobs(self) -> Iterator[tuple[str, int]]:
        """Every blob's digest and size in bytes, in no order."""
        yield from ((entry.name, entry.stat().st_size) for entry in _entries(self.root / "blobs", ""))

    def discard(self, digest: str, grace_s: float) -> bool:
        """Remove a blob that nobody has put for `grace_s` seconds; whether it went."""
        self._refuse_readonly()
        path = self._blob(digest)
        try:
            if _age_s(path) <= grace_s:
                return False
            path.unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise _refusal(self.root, error, "a blob") from error
        return True

    # results

    def result(self, key: str) -> dict[str, Json] | None:
        """What was published under `key`, or None. A file that `publish` did not write is a miss; logged."""
        path = self._action(key)
        try:
            if os.stat(path).st_size > _RESULT_LIMIT:
                raise ValueError("it is too large")
            record = json.loads(path.read_bytes())
            result: dict[str, Json] = record["result"]
            if record["seal"] != _seal(key, result):
                raise ValueError("its seal does not match")
            _check_result(result)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            _LOG.warning("the result %s is passed over: %s", path, error)
            return None
        return result

    def complete(self, result: dict[str, Json]) -> list[str]:
        """The digests of the blobs of a result that are missing or of the wrong size; nothing is read."""
        return [digest for digest, size in result["blobs"].items() if not self.has(digest, size)]

    def publish(self, key: str, result: dict[str, Json]) -> dict[str, Json]:
        """Let `result` stand under `key`, whole or not at all; the result that stands from now on.

        `result["outputs"]` is {port: {"kind", "digest", "size_bytes"}}; `blobs`, {digest: size} of everything
        they consist of, is added here; the rest is free JSON. The first to publish wins: where a complete
        result stands already, it stays and is returned. DamagedError where a blob of the outputs is missing.
        """
        blobs: dict[str, int] = {}
        for output in result["outputs"].values():
            root = self.open(output["digest"])
            blobs |= {output["digest"]: root.nbytes, **references(root)}
        whole: dict[str, Json] = json.loads(canonical_json({**result, "blobs": blobs}))
        _check_result(whole)
        for digest in self.complete(whole):
            raise DamagedError(f"blob {digest} of the result {key} is missing from {self.root}.", digest)
        content = canonical_json({"result": whole, "seal": _seal(key, whole)})
        path = self._action(key)
        if not self._write(path, memoryview(content), _move_first):
            standing = self.result(key)
            if standing is not None and not self.complete(standing):
                return standing
            self._write(path, memoryview(content), _move)
        return whole

    def forget(self, key: str) -> None:
        """Remove the result under `key`, if any; its blobs stay."""
        self._refuse_readonly()
        try:
            self._action(key).unlink(missing_ok=True)
        except OSError as error:
            raise _refusal(self.root, error, "a result") from error

    def keys(self) -> Iterator[str]:
        """Every key under which something stands, in no order."""
        yield from (entry.name.removesuffix(".json") for entry in _entries(self.root / "actions", ".json"))

    def age_s(self, key: str) -> float:
        """Seconds since something was published under `key`; 0 where nothing stands."""
        try:
            return _age_s(self._action(key))
        except OSError:
            return 0.0

    def lock(self, key: str) -> FileLock:
        """The lock of an action, not yet acquired: one process at a time holds it, and its death frees it.

        `acquire(blocking=False)` raises filelock.Timeout where another holds it.
        """
        from filelock import FileLock

        path = Path(self._place("locks", key, ".lock"))
        self._refuse_readonly()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _refusal(self.root, error, "a lock") from error
        return FileLock(path)

    # the files

    def _blob(self, digest: str) -> Path:
        return Path(self._place("blobs", digest, ""))

    def _action(self, key: str) -> Path:
        return Path(self._place("actions", key, ".json"))

    def _place(self, kind: str, name: str, suffix: str) -> str:
        """Text, not a Path: a plan asks for thousands of blobs, and making a Path costs more than the stat."""
        if not is_digest(name):
            raise ValueError(f"not a digest: {name!r}")
        return f"{self._prefix}{kind}/{name[:2]}/{name}{suffix}"

    def _keep(self, digest: str, size: int) -> bool:
        """Whether the blob is there already; if so it counts as new again, lest a gc takes it just now."""
        if not self.has(digest, size):
            return False
        if not self.readonly:
            with contextlib.suppress(OSError):  # another user's file in a shared cache
                os.utime(self._blob(digest))
        return True

    def _refuse_readonly(self) -> None:
        if self.readonly:
            raise CacheError(f"the cache {self.root} was opened read-only. Name another with cache.dir.")

    def _write(self, target: Path, content: memoryview, move: Callable[[Path, Path], bool]) -> bool:
        """Write beside, flush to disk, move into place; what `move` says. CacheError where that fails."""
        self._refuse_readonly()
        try:
            self._prepare()
            _make_folder(target.parent)
            with _temporary_file(self.root / "tmp", content) as temporary:
                moved = move(temporary, target)
            _flush_folder(target.parent)
        except OSError as error:
            raise _refusal(self.root, error, f"{content.nbytes:,} bytes") from error
        return moved

    def _prepare(self) -> None:
        """Make the folder, once; remove what killed writers left."""
        if self._prepared:
            return
        folder = self.root / "tmp"
        folder.mkdir(parents=True, exist_ok=True)
        for entry in os.scandir(folder):
            with contextlib.suppress(OSError):
                _remove_stale(entry)
        self._prepared = True

    def _set_aside(self, path: Path, status: os.stat_result) -> None:
        _LOG.warning("blob %s does not match its digest", path)
        if self.readonly:
            return
        with contextlib.suppress(OSError):  # another process was first
            (self.root / "damaged").mkdir(exist_ok=True)
            if os.stat(path).st_ino == status.st_ino:
                os.replace(path, self.root / "damaged" / path.name)


def _age_s(path: Path) -> float:
    return time.time() - path.stat().st_mtime


def _view(file: BinaryIO, size: int) -> memoryview:
    if size < _MAPPED_SIZE:
        return memoryview(file.read())
    return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


@contextlib.contextmanager
def _temporary_file(folder: Path, content: memoryview) -> Iterator[Path]:
    """A read-only file that is on the disk; its lock, held meanwhile, says that its writer lives."""
    path = folder / secrets.token_hex(16)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        while content:
            content = content[os.write(descriptor, content[: 1 << 30]) :]
        os.fchmod(descriptor, 0o444)
        os.fsync(descriptor)
        yield path
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _move(temporary: Path, target: Path) -> bool:
    os.replace(temporary, target)
    return True


def _move_first(temporary: Path, target: Path) -> bool:
    """Move unless `target` exists; whether it did not."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if target.exists():
            return False
        os.replace(temporary, target)
    return True


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        _flush_folder(folder.parent)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems flush no folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_stale(entry: os.DirEntry[str]) -> None:
    """Remove a temporary file whose writer is gone: nobody holds its lock, or it is a day old."""
    age_s = time.time() - entry.stat().st_mtime
    if age_s < _STALE_S:
        return
    with open(entry.path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:  # a file system without locks
            if age_s < _ABANDONED_S:
                return
        os.unlink(entry.path)


def _entries(folder: Path, suffix: str) -> Iterator[os.DirEntry[str]]:
    """The files below `folder` whose names are digests with `suffix`."""
    with contextlib.suppress(FileNotFoundError):
        for shelf in os.scandir(folder):
            if shelf.is_dir():
                for entry in os.scandir(shelf):
                    if entry.name.endswith(suffix) and is_digest(entry.name.removesuffix(suffix)):
                        yield entry


def _seal(key: str, result: dict[str, Json]) -> str:
    return digest_bytes(canonical_json([key, result]))


def _check_result(result: dict[str, Json]) -> None:
    """ValueError (or KeyError, TypeError) where a result is not of the form that `publish` describes."""
    blobs = result["blobs"]
    for digest, size in blobs.items():
        if not is_digest(digest) or type(size) is not int or not 0 <= size < 1 << 62:
            raise ValueError(f"blob {digest!r} of size {size!r}")
    for port, output in result["outputs"].items():
        if not _PORT.fullmatch(port) or output["kind"] not in KINDS or output["digest"] not in blobs:
            raise ValueError(f"output {port!r}: {output!r}")
        if type(output["size_bytes"]) is not int or not 0 <= output["size_bytes"] < 1 << 62:
            raise ValueError(f"output {port!r} of size {output['size_bytes']!r}")


def _refusal(root: Path, error: OSError, what: str) -> CacheError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        way_out = "Free some space (`qpipe cache gc`), or name a larger disk with cache.dir"
        return CacheError(f"the cache {root} has no room left for {what}. {way_out}.")
    way_out = "Name a folder that can be written with cache.dir or QPIPE_CACHE_DIR"
    return CacheError(f"the cache {root} cannot be written ({error.strerror or error}). {way_out}.")
