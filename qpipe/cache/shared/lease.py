"""Who computes an action, where several machines share a cache: one lease object per action key.

A holder writes its lease with a new beat every so often. Whoever waits looks at it now and then; if its content does
not change for `lease_s` on the waiter's own monotonic clock, the holder is taken for dead and the lease taken over. No
clock is ever compared with another machine's.

A lease saves work; nothing depends on it. Where two machines do hold one (a suspended laptop wakes up; a store cannot
create exclusively), an action runs twice, and the first result that is published stands. Where the remote fails, the
lease is granted: the lock on this machine is the arbiter then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path

from qpipe.cache.shared.remote import LieError, Remote, RemoteError
from qpipe.keys.hashing import digest

_LIMIT = 4096  # bytes; a larger lease is not one of ours
_SETTLE_S = 0.3  # after a take-over, for another waiter's to arrive
_LOOK_S = (0.5, 5.0)  # between two looks at another's lease: at first, and at most


@dataclasses.dataclass
class _Lease:
    """One of ours: how often it was renewed, and when it was written last; monotonic seconds."""

    beat: int
    written: float


@dataclasses.dataclass
class _Watch:
    """Another's lease: its content, since when that is unchanged, and when to look again; monotonic seconds."""

    content: bytes
    since: float
    next_look: float
    pause_s: float


class Leases:
    """The leases of one process on one remote. Whoever asks for one holds this machine's lock of the same key."""

    def __init__(self, remote: Remote, root: Path) -> None:
        self._remote = remote
        self._root = root
        self._run = secrets.token_hex(8)
        self._lock = threading.Lock()
        self._held: dict[str, _Lease] = {}
        self._watched: dict[str, _Watch] = {}
        self._renewer: threading.Thread | None = None

    def acquire(self, key: str) -> bool:
        """Whether this process computes the action now. Another's lease is looked at only every so often."""
        watch = self._watched.get(key)
        if watch is not None and time.monotonic() < watch.next_look:
            return False
        try:
            granted = self._ask(key, watch)
        except RemoteError:
            granted = True
        if granted:
            self._watched.pop(key, None)
        return granted

    def holds(self, key: str) -> bool:
        """Whether the lease is ours, as far as we know."""
        with self._lock:
            return key in self._held

    def release(self, key: str) -> None:
        """The lease is free, if it was ours."""
        with self._lock:
            held = self._held.pop(key, None)
        if held is None:
            return
        fresh = (
            time.monotonic() - held.written < self._remote.options.lease_s / 2
        )  # nobody can have taken it over yet
        if fresh or self._is_ours(key):
            self._remote.remove(_name(key))

    def _ask(self, key: str, watch: _Watch | None) -> bool:
        if watch is None and self._remote.create(_name(key), self._content(0)):
            self._keep(key)
            return True
        content = self._read(key)
        if content is None:
            return self._ask(key, None) if watch is not None else False
        now = time.monotonic()
        if self._is_dead(content, watch, now):
            return self._take_over(key, content)
        if watch is None or watch.content != content:
            since, pause_s = now, _LOOK_S[0]
        else:
            since, pause_s = (
                watch.since,
                min(watch.pause_s * 1.5, _LOOK_S[1], self._remote.options.lease_s / 4),
            )
        self._watched[key] = _Watch(content, since, now + pause_s, pause_s)
        return False

    def _is_dead(self, content: bytes, watch: _Watch | None, now: float) -> bool:
        """Whether the holder renews no more; one of this machine is dead, since it does not hold the lock."""
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            if json.loads(content)["machine"] == self._machine():
                return True
        unchanged = watch is not None and watch.content == content
        return unchanged and watch is not None and now - watch.since > self._remote.options.lease_s

    def _take_over(self, key: str, content: bytes) -> bool:
        """Write our lease over a dead one, and see whether it stands. Two waiters may do so; the last one's stands."""
        if self._read(key) != content:
            return False
        mine = self._content(0)
        self._remote.write(_name(key), memoryview(mine), len(mine))
        time.sleep(_SETTLE_S)
        if not self._is_ours(key):
            return False
        self._keep(key)
        return True

    def _keep(self, key: str) -> None:
        with self._lock:
            self._held[key] = _Lease(0, time.monotonic())
            if self._renewer is None:
                self._renewer = threading.Thread(target=self._renew, daemon=True, name="qpipe-leases")
                self._renewer.start()

    def _renew(self) -> None:
        while True:
            time.sleep(self._remote.options.lease_s / 4)
            with self._lock:
                held = list(self._held)
            for key in held:
                with contextlib.suppress(RemoteError):
                    self._beat(key)

    def _beat(self, key: str) -> None:
        if not self._is_ours(key):
            with self._lock:
                self._held.pop(
                    key, None
                )  # taken over; what we compute may still be the first to be published
            return
        with self._lock:
            held = self._held.get(key)
            if held is None:
                return
            mine = self._content(held.beat + 1)
        self._remote.write(_name(key), memoryview(mine), len(mine))
        with self._lock:
            held.beat, held.written = held.beat + 1, time.monotonic()
            released = key not in self._held
        if released:  # meanwhile, and its removal may have come before our write
            self._remote.remove(_name(key))

    def _is_ours(self, key: str) -> bool:
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError, RemoteError):
            return bool(json.loads(self._read(key) or b"null")["run"] == self._run)
        return False

    def _read(self, key: str) -> bytes | None:
        try:
            return self._remote.read(_name(key), _LIMIT)
        except LieError:
            return b"?"  # no lease of ours; it is taken over like a dead one

    def _content(self, beat: int) -> bytes:
        return json.dumps({"machine": self._machine(), "run": self._run, "beat": beat}).encode()

    def _machine(self) -> str:
        """The same for all processes that share this machine's lock files, and for no others."""
        boot = Path("/proc/sys/kernel/random/boot_id")
        here = boot.read_text() if boot.exists() else socket.gethostname()
        status = os.stat(self._root)
        return digest("machine", here, status.st_dev, status.st_ino)


def _name(key: str) -> str:
    return f"leases/{key[:2]}/{key}.json"
