"""The store: digest -> bytes, and action key -> result. Files are the truth.

    blobs/<2>/<digest>        immutable, read-only, named by the BLAKE3 of their content (`b3sum` agrees)
    actions/<2>/<key>.json    the result of an action: its outputs, the blobs they consist of, its provenance
    locks/<2>/<key>.lock      held by the process that computes an action; the kernel frees it when that dies
    running/                  what live processes rely on, so that no cleanup takes it (qpipe.cache.usage)
    pins/<name>.json          results that no cleanup takes until they are unpinned (qpipe.cache.pins)
    tmp/                      files being written: locked by their writer, renamed when whole
    damaged/                  what was not what its name says, kept for a look until the next gc
    index/                    what can be rebuilt (qpipe.cache.index)

What is read is verified; what is missing, damaged or made up is a miss, never an error of the run. What is
written is there whole or not at all, whoever is killed meanwhile: written beside, flushed, moved, the move flushed;
blobs first, then the result that names them. When a result was used last is the modification time of its file.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import mmap
import os
import re
import stat
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpipe.artifacts.artifact import KINDS, references
from qpipe.artifacts.kinds import canonical_json
from qpipe.cache import disk
from qpipe.cache.lock import Lock
from qpipe.cache.usage import Usage
from qpipe.errors import CacheError, DamagedError
from qpipe.keys.hashing import digest_bytes, digest_chunks, is_digest
from qpipe.mapped import mapping_behind

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from qpipe.cache.index import Index

Json = Any
_LOG = logging.getLogger(__name__)
RESULT_LIMIT = 64 << 20  # bytes; a larger result file was not written here
_PORT = re.compile(r"\w[\w.-]*")


class Store:
    """A cache folder. Making one touches nothing; folders appear with the first write."""

    def __init__(self, root: Path, readonly: bool = False) -> None:
        self.root = Path(root)
        self.readonly = readonly
        self._prefix = os.path.join(self.root, "")
        self._verified: dict[str, tuple[int, int, int]] = {}
        self._mapped: weakref.WeakKeyDictionary[mmap.mmap, str] = weakref.WeakKeyDictionary()
        self._prepared = False
        self._usage: Usage | None = None

    @cached_property
    def index(self) -> Index:
        """What can be rebuilt; diskcache is imported with the first use."""
        from qpipe.cache.index import Index

        folder = self.root / "index"
        if not self.readonly and _is_strange_index(folder):
            disk.set_aside(folder, self.root)
        return Index(folder, self.readonly)

    def close(self) -> None:
        """Write the index and rely on nothing any more. The store may be used again afterwards."""
        if "index" in self.__dict__:
            self.index.close()
        self._rely_on_nothing()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # company

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """What is found, put or published meanwhile stays until the end: no cleanup takes it."""
        nested = self._usage is not None
        usage = self._relied_on()
        try:
            yield
        finally:
            if usage is not None and not nested:
                self._rely_on_nothing()

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Many looks at once: no cleanup runs meanwhile. Only inside `using`; not to be held for long."""
        with self._usage or contextlib.nullcontext():
            yield

    def touch(self, keys: Iterable[str]) -> None:
        """These results were used now: of all, they are to go last. What is not there any more is passed over."""
        for key in () if self.readonly else keys:
            with contextlib.suppress(OSError):  # gone, or another user's file in a shared cache
                os.utime(self._action(key), follow_symlinks=False)

    def _relied_on(self) -> Usage | None:
        """The list of what this process relies on, begun with the first write; None where nothing is written."""
        if self._usage is None and not self.readonly:
            self._usage = Usage(self.root)
        return self._usage

    def _rely_on_nothing(self) -> None:
        if self._usage is not None:
            self._usage.close()
            self._usage = None

    # what a store with a remote behind it does more (qpipe.cache.shared.tier)

    is_far = False
    """Whether looking something up has meant asking another machine, so that `expect` is worth its while."""

    def expect(self, keys: Sequence[str]) -> None:
        """`result` will be asked for these next."""

    def doubt(self, digest: str) -> None:
        """Reading the blob failed, here or in a worker. Files need no word: what is gone is gone."""

    def share(self, key: str) -> None:
        """A worker has published this."""

    def flush(self) -> None:
        """What was shared has arrived where others find it, or cannot."""

    def address_elsewhere(self) -> dict[str, Json] | None:
        """What a process on another machine needs to open a cache of its own that passes on what it publishes, as JSON;
        its root is that machine's to choose. None where there is nowhere to pass it on to."""
        return None

    def settle(self) -> list[str]:
        """A run is over, its results are to be where they belong. What there is to say of it, a line each."""
        return self.news()

    def news(self) -> list[str]:
        """What there is to say since the last call, a line each."""
        return []

    def address(self) -> dict[str, Json]:
        """What a worker process needs to open this cache too, as JSON."""
        return {"root": str(self.root)}

    # blobs

    def put(self, buffer: Buffer) -> str:
        """Keep the bytes of a contiguous buffer; their digest. CacheError where they cannot be written.

        A view of a whole blob of this store, as a value that was loaded and is passed on has many, is known: it is
        neither hashed nor written again.
        """
        view = memoryview(buffer)
        mapping = mapping_behind(view)
        digest = self._mapped.get(mapping) if mapping is not None and len(mapping) == view.nbytes else None
        view = view.cast("B") if view.nbytes else memoryview(b"")
        digest = digest or digest_bytes(view)
        if not self._keep(digest, view.nbytes):
            self.write(self._blob(digest), view, disk.move)
        return digest

    def receive(self, digest: str, size: int, chunks: Iterable[bytes]) -> bool:
        """Keep the bytes that come in `chunks` if they are the `size` bytes that `digest` names, and nothing otherwise;
        whether they are. They need not fit into memory. CacheError where they cannot be written."""
        if self._keep(digest, size):
            return True
        received = 0
        with self._new_file(f"{size:,} bytes") as (descriptor, temporary):

            def written() -> Iterator[bytes]:
                nonlocal received
                for chunk in chunks:
                    received += len(chunk)
                    if received > size:
                        return
                    disk.write_all(descriptor, memoryview(chunk))
                    yield chunk

            if digest_chunks(written()) != digest or received != size:
                return False
            disk.seal_file(descriptor)
            self._place_file(temporary, self._blob(digest), disk.move)
        return True

    def open(self, digest: str) -> memoryview:
        """The bytes under `digest`, read-only and mapped, verified once per process.

        DamagedError where they are missing or do not match; what does not match is moved aside, so that the
        next `put` heals it.
        """
        path = self._blob(digest)
        try:
            view, status = disk.view(path)
        except FileNotFoundError as error:
            raise DamagedError(f"blob {digest} is missing from {self.root}.", digest) from error
        except disk.StrangeFileError as error:
            self._set_aside(path, None)
            raise DamagedError(f"blob {digest} in {self.root} is none: {error.strerror}.", digest) from error
        except OSError as error:
            raise CacheError(f"{path} cannot be read: {error.strerror}.") from error
        identity = (status.st_dev, status.st_ino, status.st_size)
        if self._verified.get(digest) != identity:
            if digest_bytes(view) != digest:
                self._set_aside(path, status)
                raise DamagedError(f"blob {digest} in {self.root} does not match its digest.", digest)
            self._verified[digest] = identity
        if (mapping := mapping_behind(view)) is not None:
            self._mapped[mapping] = digest
        return view

    def has(self, digest: str, size: int | None = None) -> bool:
        """Whether there is a blob of that name (and size); its content is not looked at."""
        try:
            status = os.lstat(self._blob(digest))
        except OSError:
            return False
        return stat.S_ISREG(status.st_mode) and size in (None, status.st_size)

    def blobs(self) -> Iterator[tuple[str, int]]:
        """Every blob's digest and size in bytes, in no order."""
        yield from ((name, status.st_size) for name, status in _entries(self.root / "blobs", ""))

    def discard(self, digest: str, grace_s: float) -> bool:
        """Remove a blob that nobody has put for `grace_s` seconds (0: whenever); whether it went."""
        self._refuse_readonly()
        path = self.path(digest)
        try:
            if not disk.is_ours(path, self.root) or (grace_s and _age_s(path) <= grace_s):
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
        if self._usage is None:
            return self.peek(key)
        with self._usage as usage:
            result = self.peek(key)
            if result is not None:
                usage.note("k", key)
        return result

    def peek(self, key: str) -> dict[str, Json] | None:
        """As `result`, but nothing is relied on: a cleanup may take it the moment after."""
        path = self._action(key)
        try:
            return unsealed(key, disk.read_small(path, RESULT_LIMIT))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            _LOG.warning("the result %s is passed over: %s", path, error)
            return None

    def complete(self, result: dict[str, Json]) -> list[str]:
        """The digests of the blobs of a result that are missing or of the wrong size; nothing is read."""
        return [digest for digest, size in result["blobs"].items() if not self.has(digest, size)]

    def publish(self, key: str, result: dict[str, Json]) -> dict[str, Json]:
        """Let `result` stand under `key`, whole or not at all; the result that stands from now on.

        `result["outputs"]` is {port: {"kind", "digest", "size_bytes"}}; `blobs`, {digest: size} of everything
        they consist of, is added here, and so are `ingredients` and `provenance` (with a `duration_s`, seconds) where
        they are missing; the rest is free JSON. The first to publish wins: where a complete
        result stands already, it stays and is returned. DamagedError where a blob of the outputs is missing.
        """
        blobs: dict[str, int] = {}
        for output in result["outputs"].values():
            root = self.open(output["digest"])
            blobs |= {output["digest"]: root.nbytes, **references(root)}
        history = {"ingredients": {}, **result, "provenance": {"duration_s": 0.0, **result.get("provenance", {})}}
        whole: dict[str, Json] = json.loads(canonical_json({**history, "blobs": blobs}))
        _check_result(whole)
        content = memoryview(sealed(key, whole))
        path = self._action(key)
        with self._relied_on() or contextlib.nullcontext() as usage:
            if usage is not None:
                usage.note("k", key)
            for digest in self.complete(whole):
                raise DamagedError(f"blob {digest} of the result {key} is missing from {self.root}.", digest)
            if not self.write(path, content, disk.move_first):
                standing = self.peek(key)
                if standing is not None and not self.complete(standing):
                    return standing
                if not disk.is_file(path):
                    disk.set_aside(path, self.root)
                self.write(path, content, disk.move)
        return whole

    def forget(self, key: str) -> None:
        """Remove the result under `key`, if any; its blobs stay."""
        self._refuse_readonly()
        path = Path(self._action(key))
        try:
            if disk.is_folder(path):
                disk.set_aside(path, self.root)
            elif disk.is_ours(path, self.root):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise _refusal(self.root, error, "a result") from error

    def keys(self) -> Iterator[str]:
        """Every key under which something stands, in no order."""
        yield from (name for name, _ in _entries(self.root / "actions", ".json"))

    def results(self) -> Iterator[tuple[str, os.stat_result]]:
        """Every key under which something stands, and the status of its file, in no order."""
        yield from _entries(self.root / "actions", ".json")

    def age_s(self, key: str) -> float:
        """Seconds since what stands under `key` was published or touched; 0 where nothing stands."""
        try:
            return _age_s(self._action(key))
        except OSError:
            return 0.0

    def lock(self, key: str) -> Lock:
        """The lock of an action, not yet acquired: one process at a time holds it, and its death frees it.

        `acquire(blocking=False)` raises filelock.Timeout where another holds it.
        """
        path = self._place("locks", key, ".lock")
        self._refuse_readonly()
        try:
            disk.make_folder(os.path.dirname(path), self.root, flush=False)
            if os.path.lexists(path) and not disk.is_file(path):
                disk.set_aside(path, self.root)
        except OSError as error:
            raise _refusal(self.root, error, "a lock") from error
        return Lock(path)

    # the files

    def path(self, digest: str) -> Path:
        """Where the bytes under `digest` lie, or would; to be read through `open`."""
        return Path(self._blob(digest))

    def _blob(self, digest: str) -> str:
        return self._place("blobs", digest, "")

    def _action(self, key: str) -> str:
        return self._place("actions", key, ".json")

    def _place(self, kind: str, name: str, suffix: str) -> str:
        """Text, not a Path: a plan asks for thousands of files, and making a Path costs more than a stat."""
        if not is_digest(name):
            raise ValueError(f"not a digest: {name!r}")
        return f"{self._prefix}{kind}/{name[:2]}/{name}{suffix}"

    def _keep(self, digest: str, size: int) -> bool:
        """Whether the blob is there already, and sound; from now on no cleanup takes it."""
        with self._relied_on() or contextlib.nullcontext() as usage:
            if usage is not None:
                usage.note("b", digest)
            if not self.has(digest, size):
                return False
            if not self.readonly:
                with contextlib.suppress(OSError):  # another user's file in a shared cache
                    os.utime(self._blob(digest), follow_symlinks=False)
        try:
            self.open(digest)  # read once per process: what is damaged would else stay, and be lost
        except DamagedError:
            return False
        return True

    def _refuse_readonly(self) -> None:
        if self.readonly:
            raise CacheError(f"the cache {self.root} was opened read-only. Name another with cache.dir.")

    def write(self, target: str, content: memoryview, move: Callable[[str, str], bool]) -> bool:
        """Write beside, flush to disk, move into place; what `move` says. CacheError where that fails."""
        with self._new_file(f"{content.nbytes:,} bytes") as (descriptor, temporary):
            disk.write_all(descriptor, content)
            disk.seal_file(descriptor)
            return self._place_file(temporary, target, move)

    @contextlib.contextmanager
    def _new_file(self, what: str) -> Iterator[tuple[int, str]]:
        """A file to write `what` to, removed at the end if it was not placed. CacheError for whatever the disk says."""
        self._refuse_readonly()
        try:
            self._prepare()
            with disk.temporary_file(f"{self._prefix}tmp") as file:
                yield file
        except OSError as error:
            raise _refusal(self.root, error, what) from error

    def _place_file(self, temporary: str, target: str, move: Callable[[str, str], bool]) -> bool:
        folder = os.path.dirname(target)
        disk.make_folder(folder, self.root)
        if disk.is_folder(target):
            disk.set_aside(target, self.root)
        moved = move(temporary, target)
        disk.flush_folder(folder)
        return moved

    def _prepare(self) -> None:
        """Make the folder, once; remove what killed writers left."""
        if not self._prepared:
            disk.make_folder(f"{self._prefix}tmp", self.root)
            disk.remove_stale(self.root / "tmp")
            self._prepared = True

    def _set_aside(self, path: str, status: os.stat_result | None) -> None:
        """Move a file aside, unless it is another one by now."""
        _LOG.warning("blob %s does not match its digest", path)
        with contextlib.suppress(OSError):
            if not self.readonly and (status is None or os.lstat(path).st_ino == status.st_ino):
                disk.set_aside(path, self.root)


def _age_s(path: str | Path) -> float:
    return time.time() - os.lstat(path).st_mtime


def _is_strange_index(folder: Path) -> bool:
    """Whether SQLite would follow a link out of the cache, or wait for a pipe."""
    if not os.path.lexists(folder):
        return False
    if not disk.is_folder(folder):
        return True
    return any(not entry.is_file(follow_symlinks=False) for entry in os.scandir(folder))


def _entries(folder: Path, suffix: str) -> Iterator[tuple[str, os.stat_result]]:
    """The files below `folder` whose names are digests with `suffix`: the digests, and their status. Links count as
    nothing, those to folders too."""
    for shelf in os.scandir(folder) if disk.is_folder(folder) else ():
        if not shelf.is_dir(follow_symlinks=False):
            continue
        for entry in os.scandir(shelf):
            name = entry.name.removesuffix(suffix)
            if entry.name == name + suffix and is_digest(name) and name[:2] == shelf.name:
                with contextlib.suppress(FileNotFoundError):  # another process removed it
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        yield name, status


def sealed(key: str, result: dict[str, Json]) -> bytes:
    """The content of the file in which `result` stands under `key`."""
    text = canonical_json(result)
    return b'{"result":%b,"seal":"%b"}' % (text, _seal_of(key, text))


def unsealed(key: str, content: bytes) -> dict[str, Json]:
    """The result in such a content.

    Raises ValueError, KeyError, TypeError, AttributeError or RecursionError for any other content.
    """
    record = json.loads(content)
    result: dict[str, Json] = record["result"]
    as_written = content[:10] == b'{"result":' and content[-75:-66] == b',"seal":"'
    text = content[10:-75] if as_written else canonical_json(result)
    if record["seal"].encode() != _seal_of(key, text):
        raise ValueError("its seal does not match")
    _check_result(result)
    return result


def _seal_of(key: str, text: bytes) -> bytes:
    """The seal of the result under `key` of which `text` is the canonical JSON."""
    return digest_bytes(b'["%b",%b]' % (key.encode(), text)).encode()


def _check_result(result: dict[str, Json]) -> None:
    """ValueError (or KeyError, TypeError) where a result is not of the form that `publish` describes."""
    blobs = result["blobs"]
    for digest, size in blobs.items():
        if not is_digest(digest) or type(size) is not int or not 0 <= size < 1 << 62:
            raise ValueError(f"blob {digest!r} of size {size!r}")
    for port, output in result["outputs"].items():
        if set(output) != {"kind", "digest", "size_bytes"}:
            raise ValueError(f"output {port!r}: {output!r}")
        if not _PORT.fullmatch(port) or output["kind"] not in KINDS or output["digest"] not in blobs:
            raise ValueError(f"output {port!r}: {output!r}")
        if type(output["size_bytes"]) is not int or not 0 <= output["size_bytes"] < 1 << 62:
            raise ValueError(f"output {port!r} of size {output['size_bytes']!r}")
        if output["size_bytes"] > sum(blobs.values()):
            raise ValueError(f"output {port!r} is larger than all its blobs")
    _check_history(result["ingredients"], result["provenance"])
    if not set(map(type, result.get("notes", ()))) <= {str}:
        raise ValueError("its notes are no text")
    if not all(is_digest(part) for part in result.get("parts", ())):
        raise ValueError("its parts are no keys")


def _check_history(ingredients: Json, provenance: Json) -> None:
    """ValueError where what others read without a further look is not there, or not of its type."""
    mappings = [ingredients, provenance]
    mappings += [ingredients.get(name, ingredients) for name in ("libraries", "params", "ports")]
    mappings += [provenance.get(name, provenance) for name in ("listings", "makers", "written")]
    if set(map(type, mappings)) != {dict}:
        raise ValueError("its ingredients or its provenance are of another form")
    for name in ("duration_s", "cpu_s", "peak_rss_bytes", "started"):
        number = provenance.get(name, 0.0)
        if type(number) not in (int, float) or not 0 <= number < 1e15:
            raise ValueError(f"its {name} is impossible")
    if not {type(provenance.get("node")), type(ingredients.get("stage"))} <= {str, type(None)}:
        raise ValueError("its node or its stage is no text")


def _refusal(root: Path, error: OSError, what: str) -> CacheError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        way_out = "Free some space (`qpipe cache gc`), or name a larger disk with cache.dir"
        return CacheError(f"the cache {root} has no room left for {what}. {way_out}.")
    way_out = "Name a folder that can be written with cache.dir or QPIPE_CACHE_DIR"
    return CacheError(f"the cache {root} cannot be written ({error.strerror or error}). {way_out}.")
