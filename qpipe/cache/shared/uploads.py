"""Results on their way to the remote side of a cache: in the background, blobs first, the result when they are there.

A run never waits for an upload but at its end, in `drain`. What could not be sent is remembered by its key, so that a
later run that finds it in the local cache can try again.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from qpipe.cache.shared.remote import Remote, RemoteError
from qpipe.errors import CacheError

_LOG = logging.getLogger(__name__)
_THREADS = 8
_IN_MEMORY = 8 << 20  # bytes; a larger blob is sent from its file
_ASKED_FOR = 1 << 20  # bytes; whether a larger blob is there already is asked before it is sent


@dataclasses.dataclass
class Upload:
    """One result: its key, how it is written when its blobs are there, and what to do when all is over."""

    key: str
    blobs: Mapping[str, int]
    content: bytes
    overwrite: bool
    ended: Callable[[], None]
    left: int = 0
    failed: bool = False


class Uploads:
    """Uploads of one process. `path` is where the local cache has a blob, `verified` its bytes."""

    def __init__(
        self, remote: Remote, path: Callable[[str], Path], verified: Callable[[str], memoryview]
    ) -> None:
        self._remote, self._path, self._verified = remote, path, verified
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._open = 0
        self._keys: set[str] = set()
        self._threads: list[threading.Thread] = []
        self.known: set[str] = set()
        self.doubted: set[str] = set()
        self.unsent: set[str] = set()

    def sends(self, key: str) -> bool:
        """Whether the result is on its way."""
        with self._changed:
            return key in self._keys

    def add(self, upload: Upload) -> None:
        """Send it in the background."""
        blobs = [digest for digest in upload.blobs if digest not in self.known]
        upload.left = len(blobs)
        with self._changed:
            self._open += 1
            self._keys.add(upload.key)
        for digest in blobs:
            self._later(partial(self._send_blob, upload, digest))
        if not blobs:
            self._later(partial(self._send_result, upload))

    def later(self, work: Callable[[], None]) -> None:
        """Do something else in the background, which `drain` waits for."""
        with self._changed:
            self._open += 1

        def task() -> None:
            try:
                work()
            finally:
                self._close()

        self._later(task)

    def drain(self) -> None:
        """Wait until nothing is left. Every request has its deadline, so this ends."""
        with self._changed:
            self._changed.wait_for(lambda: self._open == 0)

    def _later(self, task: Callable[[], None]) -> None:
        self._tasks.put(task)
        with self._changed:
            if len(self._threads) < min(_THREADS, self._tasks.qsize()):
                thread = threading.Thread(target=self._work, daemon=True, name="qpipe-upload")
                self._threads.append(thread)
                thread.start()

    def _work(self) -> None:
        while True:
            try:
                self._tasks.get()()
            except Exception:
                _LOG.exception("an upload ended unexpectedly")

    def _send_blob(self, upload: Upload, digest: str) -> None:
        try:
            if not upload.failed and digest not in self.known:
                self._send(digest)
        except RemoteError:
            upload.failed = True
            self.unsent.add(upload.key)
        except CacheError as error:  # it is gone, or damaged: there is nothing to send
            _LOG.info("%s is not uploaded: %s", upload.key, error)
            upload.failed = True
        except BaseException:
            upload.failed = True
            raise
        finally:
            with self._changed:
                upload.left -= 1
                last = upload.left == 0
            if last:
                self._send_result(upload)

    def _send(self, digest: str) -> None:
        view = self._verified(digest)
        name = blob_name(digest)
        there = (
            view.nbytes >= _ASKED_FOR
            and digest not in self.doubted
            and self._remote.size(name) == view.nbytes
        )
        if not there:
            content = view if view.nbytes <= _IN_MEMORY else self._path(digest)
            self._remote.write(name, content, view.nbytes)
        self.known.add(digest)

    def _send_result(self, upload: Upload) -> None:
        try:
            if not upload.failed:
                name = result_name(upload.key)
                if upload.overwrite:
                    self._remote.write(name, memoryview(upload.content), len(upload.content))
                else:
                    self._remote.create(name, upload.content)
                self.unsent.discard(upload.key)
        except RemoteError:
            self.unsent.add(upload.key)
        finally:
            with self._changed:
                self._keys.discard(upload.key)
            try:
                upload.ended()
            finally:
                self._close()

    def _close(self) -> None:
        with self._changed:
            self._open -= 1
            self._changed.notify_all()


def blob_name(digest: str) -> str:
    """The name of a blob's object."""
    return f"blobs/{digest[:2]}/{digest}"


def result_name(key: str) -> str:
    """The name of a result's object."""
    return f"actions/{key[:2]}/{key}.json"
