"""What running processes rely on in a cache folder, said where a cleanup sees it.

    running/guard     flock: shared while a process looks something up and notes it, exclusive during a cleanup
    running/<name>    one per store in use: a line for every result (`k <key>`) that it found or published and every
                      blob (`b <digest>`) that it put; locked by its process, so that the kernel says who lives

The rule: note it, then look. Both happen under the shared guard, so that a cleanup, which holds the guard alone, comes
either before (what it took is a miss) or after (what was noted stays until its process ends). There are no clocks, no
time-outs and nothing to clean up after a kill: a list that nobody locks is removed by the next cleanup. A cleanup holds
the guard while it removes files, for a second or so; running processes wait that long at their next look.

Rejected: a run that holds one shared lock for its duration (a month-long run would keep every cleanup out), and grace
periods by modification time (a clock that is set, or an action that takes longer, breaks them; they remain only where
the file system has no locks).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qpipe.cache.disk import is_file, is_folder, make_folder, open_regular, set_aside
from qpipe.errors import CacheError
from qpipe.keys.hashing import is_digest

_PATIENCE_S = 60.0  # how long a cleanup waits for processes that look something up; that takes milliseconds
_POLL_S = 0.02
_GUARD = "guard"


@dataclass(frozen=True)
class InUse:
    """What live processes rely on; `certain` is False where the file system has no locks to tell who lives."""

    keys: frozenset[str]
    blobs: frozenset[str]
    certain: bool


class Usage:
    """The list of one store in one process. Threads may share it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._mutex = threading.Lock()
        self._guard: int | None = None
        self._list: int | None = None
        self._lockless = False
        self._lookers = 0
        self._noted: set[str] = set()
        self._pending: list[str] = []

    def __enter__(self) -> Usage:
        """From here on no cleanup runs, until as many exits; what is noted is written by then."""
        with self._mutex:
            if not self._lookers:
                self._lock()
            self._lookers += 1
        return self

    def __exit__(self, *exception: object) -> None:
        with self._mutex:
            self._lookers -= 1
            if not self._lookers:
                self._write()
                if self._guard is not None and not self._lockless:
                    fcntl.flock(self._guard, fcntl.LOCK_UN)

    def note(self, kind: str, name: str) -> None:
        """Rely on a result (kind "k") or a blob ("b"), to be called between enter and exit."""
        line = f"{kind} {name}\n"
        if line not in self._noted:
            self._noted.add(line)
            self._pending.append(line)

    def close(self) -> None:
        """Rely on nothing any more."""
        with self._mutex:
            for descriptor in (self._list, self._guard):
                if descriptor is not None:
                    os.close(descriptor)
            self._list = self._guard = None
            self._noted, self._pending = set(), []

    __del__ = close

    def _lock(self) -> None:
        """The guard, shared. A cache that cannot be written, or locked, is used without: nobody can clean it either."""
        if self._lockless:
            return
        try:
            if self._guard is None:
                self._guard = _open_guard(self._root)
            fcntl.flock(self._guard, fcntl.LOCK_SH)
        except OSError:
            self._lockless = True

    def _write(self) -> None:
        lines, self._pending = self._pending, []
        if not lines or self._lockless:
            return
        with contextlib.suppress(OSError):  # a full disk: whatever is lost now is a miss, and computed again
            if self._list is None:
                path = self._root / "running" / secrets.token_hex(16)
                self._list = os.open(
                    path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666
                )
                fcntl.flock(self._list, fcntl.LOCK_EX | fcntl.LOCK_NB)
            content = "".join(lines).encode()
            while content:
                content = content[os.write(self._list, content) :]


@contextlib.contextmanager
def alone(root: Path) -> Iterator[InUse]:
    """Nobody looks anything up in the cache meanwhile; what live processes rely on. CacheError where it is refused."""
    try:
        guard = _open_guard(root)
    except OSError as error:
        raise CacheError(f"the cache {root} cannot be written ({error.strerror or error}).") from error
    try:
        certain = _lock_alone(guard, root)
        keys, blobs = _read_lists(root / "running") if certain else (set(), set())
        yield InUse(frozenset(keys), frozenset(blobs), certain)
    finally:
        os.close(guard)


def _open_guard(root: Path) -> int:
    make_folder(root / "running", root)
    path = root / "running" / _GUARD
    if os.path.lexists(path) and not is_file(path):
        set_aside(path, root)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)


def _lock_alone(guard: int, root: Path) -> bool:
    """Whether the guard is held now; False where the file system has no locks."""
    end = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError as error:
            if time.monotonic() > end:
                raise CacheError(
                    f"the cache {root} is in use: a process has been looking things up in it for {_PATIENCE_S:g} s. "
                    "Try again when it is done."
                ) from error
            time.sleep(_POLL_S)
        except OSError:
            return False


def _read_lists(folder: Path) -> tuple[set[str], set[str]]:
    """The names in the lists of live processes; the lists of dead ones are removed."""
    found: dict[str, set[str]] = {"k": set(), "b": set()}
    for entry in os.scandir(folder) if is_folder(folder) else ():
        if entry.name == _GUARD:
            continue
        try:
            descriptor, _ = open_regular(entry.path)
        except OSError:
            continue
        with open(descriptor, encoding="ascii", errors="replace") as file:
            if _is_abandoned(descriptor):
                os.unlink(entry.path)
                continue
            for line in file:
                kind, _, name = line.rstrip("\n").partition(" ")
                if kind in found and is_digest(name):
                    found[kind].add(name)
    return found["k"], found["b"]


def _is_abandoned(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
