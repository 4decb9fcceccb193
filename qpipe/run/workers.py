"""Where an action runs: in worker processes of this machine, or in this process.

Workers are spawned once and kept (importing torch takes seconds), speak JSON lines over a socket pair, and die with
their owner: the end of the socket ends them. A worker that dies takes only its own action with it.
"""

from __future__ import annotations

import json
import os
import queue
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from qpipe.cache.store import Store
from qpipe.plan.verdicts import Request
from qpipe.run.isolation import Isolation
from qpipe.run.machine import keep_freed_memory, load_ahead, load_late, set_threads
from qpipe.run.performing import failure, perform

Event = dict[str, Any]
_CHUNK = 1 << 16


class Pool(Protocol):
    """What the executor asks of a place where actions run."""

    @property
    def idle(self) -> int:
        """How many more requests can be submitted now."""

    def submit(self, request: Request) -> None:
        """Begin an action."""

    def events(self, timeout_s: float) -> Iterator[tuple[str, Event]]:
        """(key, event) of what happened, waiting at most `timeout_s` for the first; `event["event"]` is progress,
        done or failed."""

    def cancel(self, key: str, reason: str) -> None:
        """End the action; it fails with `reason`."""

    def close(self) -> None:
        """End all workers."""


class InProcess:
    """Actions run in this process, one at a time, when their events are asked for: for debuggers and tiny stages.

    Of progress nothing is told: it would come when the action is over.
    """

    def __init__(self, store: Store, threads: int) -> None:
        self._store = store
        self._threads = threads
        self._waiting: deque[Request] = deque()
        self._isolation = Isolation()
        set_threads(threads)
        keep_freed_memory()

    @property
    def idle(self) -> int:
        return 0 if self._waiting else 1

    def submit(self, request: Request) -> None:
        self._waiting.append(request)

    def events(self, timeout_s: float) -> Iterator[tuple[str, Event]]:
        if self._waiting:
            request = self._waiting.popleft()
            try:
                event = {"event": "done", **self._perform(request)}
            except Exception as error:  # the node's failure, whatever it is
                event = failure(error)
            yield request["key"], event
        else:
            time.sleep(timeout_s)  # what is waited for happens in other processes

    def _perform(self, request: Request) -> dict[str, Any]:
        return perform(request, self._store, lambda _: None, self._threads, self._isolation)

    def cancel(self, key: str, reason: str) -> None:
        """Nothing runs while the executor looks."""

    def close(self) -> None:
        """Nothing to end."""


class Processes:
    """`count` worker processes; each is spawned when it is first needed."""

    def __init__(self, store: dict[str, Any], count: int, threads: int, log: Path | None = None) -> None:
        self._command = [sys.executable, "-m", "qpipe.run.workers", json.dumps(store), str(threads)]
        self._count = count
        self._threads = threads
        self._log = log
        self._selector = selectors.DefaultSelector()
        self._free: list[_Worker] = []
        self._busy: dict[str, _Worker] = {}

    @property
    def idle(self) -> int:
        return self._count - len(self._busy)

    def submit(self, request: Request) -> None:
        worker = self._free.pop() if self._free else self._spawn()
        worker.key = request["key"]
        self._busy[request["key"]] = worker
        with suppress(OSError):  # it died while idle; `events` will see the end of its socket
            worker.send(request)

    def events(self, timeout_s: float) -> Iterator[tuple[str, Event]]:
        for ready, _ in self._selector.select(timeout_s):
            worker: _Worker = ready.data
            for event in worker.receive():
                key = worker.key
                if event["event"] in ("done", "failed"):
                    self._busy.pop(key, None)
                    if event.pop("spent", ()):
                        self._retire(worker)
                    else:
                        self._free.append(worker)
                yield key, event
            if worker.ended and worker.socket.fileno() >= 0:
                yield from self._buried(worker)

    def cancel(self, key: str, reason: str) -> None:
        worker = self._busy.get(key)
        if worker is not None:
            worker.reason = reason
            worker.process.kill()

    def close(self) -> None:
        for worker in [*self._free, *self._busy.values()]:
            self._selector.unregister(worker.socket)
            worker.end()
        self._free, self._busy = [], {}

    def _retire(self, worker: _Worker) -> None:
        """End a worker in which an action has left something behind; another takes its place when it is needed."""
        self._selector.unregister(worker.socket)
        worker.end()

    def _spawn(self) -> _Worker:
        worker = _Worker(self._command, self._threads, self._log)
        self._selector.register(worker.socket, selectors.EVENT_READ, worker)
        return worker

    def _buried(self, worker: _Worker) -> Iterator[tuple[str, Event]]:
        """The failure of the action that a dead worker had, if it had one."""
        self._selector.unregister(worker.socket)
        worker.end()
        if worker in self._free:
            self._free.remove(worker)
        if self._busy.get(worker.key) is worker:
            del self._busy[worker.key]
            message = worker.reason or f"its worker process {cause(worker.process.wait())}"
            yield worker.key, {"event": "failed", "kind": "WorkerDied", "message": message, "exit_code": 1}


class _Worker:
    """One spawned process and this side of its socket."""

    def __init__(self, command: list[str], threads: int, log: Path | None) -> None:
        self.socket, theirs = socket.socketpair()
        count = str(threads)
        environment = os.environ | {
            "OMP_NUM_THREADS": count,
            "MKL_NUM_THREADS": count,
            "OPENBLAS_NUM_THREADS": count,
        }
        with open(log or os.devnull, "ab") as output:
            self.process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,  # Ctrl-C is the executor's to handle
            )
        theirs.close()
        self.key = ""
        self.reason = ""
        self.ended = False
        self._pending = b""

    def send(self, message: Request) -> None:
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Event]:
        try:
            chunk = self.socket.recv(_CHUNK)
        except OSError:
            chunk = b""
        self.ended = not chunk
        *lines, self._pending = (self._pending + chunk).split(b"\n")
        return [json.loads(line) for line in lines]

    def end(self) -> None:
        self.socket.close()
        self.process.kill()
        self.process.wait()


def cause(status: int) -> str:
    """How a process ended, by its status."""
    if status == -signal.SIGKILL:
        return "was killed (signal 9: out of memory, or by hand)"
    return f"ended by signal {-status}" if status < 0 else f"ended with status {status}"


def open_at(address: dict[str, Any]) -> Store:
    """The store that another process opened, by its `address()`."""
    if address.get("remote") is None:
        return Store(Path(address["root"]))
    from qpipe.cache.shared.tier import open_address

    return open_address(address)


def serve(store: Store, threads: int, fd: int) -> None:
    """The worker's side: perform requests one after another until the socket ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed_memory()
    load_late()
    sys.path.insert(0, os.getcwd())  # a user's factories are found from the working directory
    connection = socket.socket(fileno=fd)
    requests: queue.Queue[Request] = queue.Queue()
    threading.Thread(target=_listen, args=(connection, requests), daemon=True).start()

    def emit(event: Event) -> None:
        connection.sendall(json.dumps(event).encode() + b"\n")

    isolation = Isolation()
    with store.using():  # whatever its actions put or find stays at least until this process ends
        while True:
            request = requests.get()
            load_ahead(request.get("ingredients", {}).get("libraries", ()))
            try:
                event = {"event": "done", **perform(request, store, emit, threads, isolation)}
            except Exception as error:  # the node's failure, whatever it is; the worker lives on
                event = failure(error)
            emit({**event, "spent": isolation.spent})


def _listen(connection: socket.socket, requests: queue.Queue[Request]) -> None:
    """Queue requests; when the owner is gone, end this process at once, in the middle of whatever it does.

    An owner that was killed before it read all that was sent to it leaves not an end but a reset, an OSError.
    """
    try:
        with connection.makefile("rb") as lines:
            for line in lines:
                requests.put(json.loads(line))
    finally:
        os._exit(1)


if __name__ == "__main__":
    serve(open_at(json.loads(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]))
