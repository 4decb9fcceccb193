"""A worker of a cluster, seen from inside: it holds the processes in which actions run, and computes nothing itself.

So a stage that crashes, that does not return or that changes its process takes down none of the cluster's own
processes, and what torch does for minutes keeps no worker from its heartbeats. The processes end with the worker.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qpipe.plan.verdicts import Request
from qpipe.run.machine import Room
from qpipe.run.workers import Event, Processes
from qpipe.stage import Resources

CHILD = "qpipe.run.cluster.child"
_LOOK_S = 0.5
_KEPT_S = 60.0
"""So long a process waits for another action of the same run; importing torch takes seconds."""
_LOG_LIMIT = 1 << 16  # bytes

Order = dict[str, Any]
"""What travels to a worker: the `request`, the address of the `store`, the working `folder`, `timeout_s`, and the `run`
that asks."""
Tell = Callable[[Event], None]


class Site:
    """One worker. `room` says what its actions may take together; None where the cluster itself sees to that."""

    def __init__(self, room: Room | None = None) -> None:
        self._room = room
        self._changed = threading.Condition()
        self._idle: defaultdict[str, list[_Hand]] = defaultdict(list)
        self._timer: threading.Timer | None = None

    def carry_out(self, order: Order, tell: Tell, wanted: Callable[[], bool]) -> Event:
        """The event that the action ends with. What happens meanwhile is told; when nobody wants it any more, or it
        takes longer than it may, its process is ended."""
        request: Request = order["request"]
        with self._shared(request, wanted) as may, self._hand(order) as hand:
            if not may:
                return _ended("nobody waits for it any more")
            hand.processes.submit(request)
            tell({"event": "begun"})
            event = _last(hand.processes, order, tell, wanted)
            return {**event, "log": hand.news()}

    @contextlib.contextmanager
    def _shared(self, request: Request, wanted: Callable[[], bool]) -> Iterator[bool]:
        """Wait until there is room for the action; False where nobody wants it any more."""
        if self._room is None:
            yield True
            return
        needs = Resources(**request["resources"])
        with self._changed:
            while not (fits := self._room.fits(needs)) and wanted():
                self._changed.wait(_LOOK_S)
            share = self._room.take(needs) if fits else None
        try:
            if share is not None:
                request["devices"] = share.devices
            yield share is not None
        finally:
            with self._changed:
                if share is not None:
                    self._room.give(share)
                self._changed.notify_all()

    @contextlib.contextmanager
    def _hand(self, order: Order) -> Iterator[_Hand]:
        """A process for actions of the run: one that is idle, or a new one."""
        with self._changed:
            idle = self._idle.get(order["run"])
            hand = idle.pop() if idle else None
        hand = hand or _Hand(order)
        try:
            yield hand
        except BaseException:
            hand.close()
            raise
        hand.used = time.monotonic()
        with self._changed:
            self._idle[order["run"]].append(hand)
            self._look_later()

    def _look_later(self) -> None:
        if self._timer is None and self._idle:
            self._timer = threading.Timer(_KEPT_S, self._dismiss)
            self._timer.daemon = True
            self._timer.start()

    def _dismiss(self) -> None:
        """End the processes that wait in vain."""
        with self._changed:
            late = time.monotonic() - _KEPT_S
            old = [(run, hand) for run, hands in self._idle.items() for hand in hands if hand.used < late]
            for run, hand in old:
                self._idle[run].remove(hand)
            for run in [run for run, hands in self._idle.items() if not hands]:
                del self._idle[run]
            self._timer = None
            self._look_later()
        for _, hand in old:
            hand.close()


class _Hand:
    """One process, and the file in which it says what it has to say."""

    def __init__(self, order: Order) -> None:
        descriptor, name = tempfile.mkstemp(prefix="qpipe-", suffix=".log")
        os.close(descriptor)
        self._log = Path(name)
        self._read = 0
        self.used = 0.0
        folder = order["folder"] if os.path.isdir(order["folder"]) else tempfile.gettempdir()
        self.processes = Processes(order["store"], 1, 1, self._log, program=CHILD, folder=folder)

    def news(self) -> str:
        """What was said since the last time, at most its end."""
        with open(self._log, "rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(self._read, end - _LOG_LIMIT))
            self._read = end
            return log.read().decode(errors="replace")

    def close(self) -> None:
        self.processes.close()
        self._log.unlink(missing_ok=True)


def _last(processes: Processes, order: Order, tell: Tell, wanted: Callable[[], bool]) -> Event:
    key, limit = order["request"]["key"], order["timeout_s"]
    started = time.monotonic()
    while True:
        for _, event in processes.events(_LOOK_S):
            if event["event"] in ("done", "failed"):
                return event
            tell(event)
        if limit is not None and time.monotonic() - started > limit:
            processes.cancel(key, f"took longer than run.timeout_s={limit:g} and was ended")
        elif not wanted():
            processes.cancel(key, "nobody waits for it any more")


def _ended(reason: str) -> Event:
    return {"event": "failed", "kind": "Ended", "message": reason, "exit_code": 1}
