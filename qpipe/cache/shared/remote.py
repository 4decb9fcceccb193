"""The remote side of a shared cache, as something that may be slow, gone or lying.

Every request has a deadline and a few tries. When these are used up the remote is given up for the rest of the process,
with one sentence in `news`, and every later request answers at once as if nothing were there. So a run loses time to a
bad remote once, and results never.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, Literal, TypeVar

from qpipe.cache.shared.objects import Objects, check_url, open_objects
from qpipe.errors import CacheError
from qpipe.keys.hashing import digest_bytes

T = TypeVar("T")
Mode = Literal["write", "read", "off"]

_LOG = logging.getLogger(__name__)
_PAUSES_S = (0.2, 0.6, 1.8)  # between the tries; each is stretched or shortened by up to a half
_LEAST_RATE = 250_000  # bytes per second; what is slower counts as hanging
_SMALL = 1 << 20  # bytes; what any request may carry besides
_OPENING_S = 30.0  # seconds that getting ready may take besides: imports, credentials, a busy machine
_PIECE = 16 << 20  # bytes that may be on their way before an upload tells how it gets on

_UNWRITABLE = frozenset({errno.EROFS, errno.ENOSPC, errno.EDQUOT})
"""What a folder says that is mounted read-only, or full."""


class RemoteError(Exception):
    """The remote did not do what it was asked to; it has been given up, or refuses to be written."""


class LieError(Exception):
    """What came from the remote is not what it was said to be."""


@dataclasses.dataclass(frozen=True)
class RemoteOptions:
    """Where the shared cache is and how it is used. A lease that is not renewed for `lease_s` is taken over."""

    url: str
    mode: Mode = "write"
    timeout_s: float = 10.0
    lease_s: float = 60.0
    secret_file: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("write", "read", "off"):
            raise ValueError(f"remote_mode must be write, read or off, got {self.mode!r}.")
        for name in ("timeout_s", "lease_s"):
            if not 0 < getattr(self, name) <= 86_400:
                raise ValueError(
                    f"remote_{name} must be above 0 and at most 86400, got {getattr(self, name)}."
                )
        check_url(self.url)

    @property
    def name(self) -> str:
        """What stands for this place in the local index."""
        return digest_bytes(self.url.encode())[:16]


class Remote:
    """The objects at a URL. Any thread may call; no method but `write`, `create` and `read` raises RemoteError."""

    def __init__(self, options: RemoteOptions, objects: Objects | None = None) -> None:
        self.options = options
        self.requests: Counter[str] = Counter()
        self._objects = objects or open_objects(options.url, options.timeout_s)
        self._lock = threading.Lock()
        self._alive = options.mode != "off"
        self._writable = options.mode == "write"
        self._news: list[str] = []
        self._opening = threading.Lock()
        self._opened = False

    @property
    def readable(self) -> bool:
        return self._alive

    @property
    def writable(self) -> bool:
        return self._alive and self._writable

    def news(self) -> list[str]:
        """What there is to say since the last call, a line each."""
        with self._lock:
            told, self._news = self._news, []
        return told

    def give_up(self, reason: str) -> None:
        """Use the remote no more; said once."""
        self._end(
            f"The remote cache {self.options.url} {reason}; from here on the local cache alone is used."
        )

    def read(self, name: str, limit: int) -> bytes | None:
        """The content of a small object, or None where there is none. LieError where it is larger than `limit`."""
        try:
            return self._ask("read", lambda call: b"".join(self._pieces(name, limit, call)))
        except FileNotFoundError:
            return None

    def fetch(self, name: str, limit: int, take: Callable[[Iterator[bytes]], T]) -> T:
        """What `take` makes of the content, which comes in pieces; it is called again where a try failed.

        FileNotFoundError where there is no such object; LieError where it is larger than `limit`; what `take` raises.
        """

        def work(call: Call[T]) -> T:
            try:
                return take(self._shielded(name, limit, call))
            except _ShieldedError as shielded:
                raise shielded.error from None

        return self._ask("read", work, limit)

    def _shielded(self, name: str, limit: int, call: Call[T]) -> Iterator[bytes]:
        """The pieces; errors of the network pass through who takes them, and are not mistaken for theirs."""
        try:
            yield from self._pieces(name, limit, call)
        except GeneratorExit:
            raise
        except Exception as error:
            raise _ShieldedError(error) from error

    def _pieces(self, name: str, limit: int, call: Call[T]) -> Iterator[bytes]:
        size = 0
        with contextlib.closing(self._objects.read(name)) as pieces:
            for piece in pieces:
                call.beat()
                size += len(piece)
                if size > limit:
                    raise LieError(f"{name} is larger than {limit:,} bytes")
                yield piece

    def size(self, name: str) -> int | None:
        """Bytes of an object, or None where there is none, or where the remote cannot tell."""
        with contextlib.suppress(FileNotFoundError, RemoteError):
            return self._ask("size", lambda call: self._objects.size(name))
        return None

    def write(self, name: str, content: memoryview | Path, size: int) -> None:
        """Let the content stand under `name`, whatever stood there."""
        self._change("write", lambda call: self._objects.write(name, content, call.beat), size)

    def create(self, name: str, content: bytes) -> bool:
        """Let the content stand under `name` unless something does already; whether it did not."""
        try:
            self._change("create", lambda call: self._objects.create(name, content), len(content))
        except FileExistsError:
            return False
        return True

    def remove(self, name: str) -> None:
        """No such object any more, as far as the remote lets us."""
        with contextlib.suppress(RemoteError, FileNotFoundError):
            self._change("remove", lambda call: self._objects.remove(name), 0)

    def _change(self, kind: str, work: Callable[[Call[None]], None], size: int) -> None:
        if not self.writable:
            raise RemoteError(f"{self.options.url} is not written to")
        try:
            self._ask(kind, work, size)
        except PermissionError as error:
            with self._lock:
                told, self._writable = not self._writable, False
                if not told:
                    self._news.append(
                        f"The remote cache {self.options.url} refuses to be written ({_sentence(error)}); "
                        "from here on it is only read."
                    )
            raise RemoteError(str(error)) from error
        except FileNotFoundError as error:
            if kind == "remove":
                raise
            self.give_up(f"is not there ({_sentence(error)})")
            raise RemoteError(str(error)) from error

    def _ask(self, kind: str, work: Callable[[Call[T]], T], size: int = 0) -> T:
        """What `work` returns, within the deadline and the tries. RemoteError where the remote is given up."""
        started = time.monotonic()
        for pause_s in (*_PAUSES_S, None):
            if not self._alive:
                raise RemoteError(f"{self.options.url} was given up")
            self.requests[kind] += 1
            try:
                return self._try(kind, work, size)
            except (FileNotFoundError, FileExistsError, LieError, CacheError):
                raise
            except PermissionError as error:
                if kind not in ("read", "size"):
                    raise
                self._lose(error)
            except Exception as error:  # whatever a package raises for a network that fails
                if kind not in ("read", "size") and getattr(error, "errno", None) in _UNWRITABLE:
                    raise PermissionError(os.strerror(error.errno)) from error  # type: ignore[attr-defined]
                _LOG.info("%s of %s failed: %s", kind, self.options.url, _sentence(error))
                elapsed_s = time.monotonic() - started
                if pause_s is None or elapsed_s > 1.5 * self.options.timeout_s:
                    self._lose(error)
                else:
                    time.sleep(pause_s * random.uniform(0.5, 1.5))
        raise AssertionError("unreachable")

    def _try(self, kind: str, work: Callable[[Call[T]], T], size: int) -> T:
        patience_s = self.options.timeout_s
        with self._opening:
            if not self._opened:
                Call(lambda call: self._objects.open()).wait(patience_s + _OPENING_S, patience_s + _OPENING_S)
                self._opened = True
        stall_s = patience_s + (min(size, _PIECE) / _LEAST_RATE if kind == "write" else 0.0)
        return Call(work).wait(stall_s, patience_s + max(size, _SMALL) / _LEAST_RATE)

    def _lose(self, error: BaseException) -> None:
        self.give_up(f"cannot be used ({_sentence(error)})")
        raise RemoteError(_sentence(error)) from error

    def _end(self, sentence: str) -> None:
        with self._lock:
            if self._alive:
                self._alive = False
                self._news.append(sentence)


class _ShieldedError(Exception):
    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Call(Generic[T]):
    """Work in a thread of its own, which is left to itself when it hangs."""

    def __init__(self, work: Callable[[Call[T]], T]) -> None:
        self._work = work
        self._done = threading.Event()
        self._result: list[T] = []
        self._error: BaseException | None = None
        self._heard = time.monotonic()
        self._abandoned = False
        threading.Thread(target=self._run, daemon=True, name="qpipe-remote").start()

    def beat(self) -> None:
        """The work gets on. Ends the thread's work where nobody waits for it any more."""
        if self._abandoned:
            raise TimeoutError("nobody waits for it")
        self._heard = time.monotonic()

    def wait(self, stall_s: float, total_s: float) -> T:
        """The result, or what the work raised; TimeoutError after `stall_s` without a sign, or after `total_s`."""
        started = time.monotonic()
        while True:
            now = time.monotonic()
            left_s = min(self._heard + stall_s, started + total_s) - now
            if self._done.wait(max(left_s, 0.0)):
                break
            if left_s <= 0:
                self._abandoned = True
                raise TimeoutError(f"no answer within {now - self._heard:.3g} s")
        if self._error is not None:
            raise self._error
        return self._result[0]

    def _run(self) -> None:
        try:
            self._result.append(self._work(self))
        except BaseException as error:
            self._error = error
        finally:
            self._done.set()


def _sentence(error: BaseException) -> str:
    """The first line of what an error says, with its kind where it says little."""
    lines = str(error).strip().splitlines()
    text = lines[0][:160] if lines else ""
    return text if len(text.split()) > 2 else f"{type(error).__name__}: {text}".rstrip(": ")
