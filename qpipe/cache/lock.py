"""A lock that dies with its holder: an flock on a file, for thousands of actions a run.

filelock's takes 130 µs for acquiring and releasing once (it guards against threads, forks and reentrance), a tenth of
what a cached action costs in all; this one takes 10 µs. One object holds it at a time; taking it twice is a mistake.
"""

from __future__ import annotations

import fcntl
import os
import time
from types import TracebackType

_POLL_S = 0.05


class Lock:
    """The lock at `path`, whose folder exists. Usable as a context manager, which waits for it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._descriptor: int | None = None

    @property
    def is_locked(self) -> bool:
        """Whether this object holds it."""
        return self._descriptor is not None

    def acquire(self, timeout: float | None = None, *, blocking: bool = True) -> Lock:
        """Take it, waiting at most `timeout` seconds; this lock, whose `with` block then ends by releasing it.

        Errors: filelock.Timeout where another holds it; OSError where the file system cannot lock.
        """
        assert self._descriptor is None, "the lock is held already"
        end = None if timeout is None else time.monotonic() + timeout
        while not self._try():
            if not blocking or (end is not None and time.monotonic() >= end):
                from filelock import Timeout

                raise Timeout(self.path)
            time.sleep(_POLL_S)
        return self

    def release(self) -> None:
        """Give it back; nothing where it is not held."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked child may hold the descriptor too
            os.close(descriptor)

    def __enter__(self) -> Lock:
        return self if self.is_locked else self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()

    def _try(self) -> bool:
        """One attempt. A file that was removed or replaced meanwhile is no lock any more: the one there now counts."""
        while True:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(self.path, flags, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _stands(self.path, descriptor):
                    self._descriptor = descriptor
                    return True
            except BlockingIOError:
                return False
            finally:
                if self._descriptor != descriptor:
                    os.close(descriptor)


def _stands(path: str, descriptor: int) -> bool:
    try:
        there = os.lstat(path)
    except FileNotFoundError:
        return False
    mine = os.fstat(descriptor)
    return (there.st_ino, there.st_dev) == (mine.st_ino, mine.st_dev)
