"""Dask as a Cluster: an order is a task under the key of its action, so that clients of one scheduler share it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qpipe.errors import ClusterError, ConfigError
from qpipe.run.cluster import survey
from qpipe.run.cluster.pool import Answer
from qpipe.run.cluster.site import Order, Site
from qpipe.run.machine import Room, devices
from qpipe.run.workers import Event
from qpipe.stage import Resources

_TOPIC = "qpipe"
_CONNECT_S = 15.0
_FETCH_S = 60.0


class Dask:
    """The scheduler at `address`; without one a cluster on this machine, of one worker with `threads`."""

    def __init__(self, address: str | None, threads: int) -> None:
        try:
            import distributed
        except ImportError as error:
            raise ConfigError('run.cluster: Dask is not installed. pip install "qpipe[dask]".') from error
        _hush()
        self.name = address or "a Dask cluster on this machine"
        self._lost = ClusterError(
            f"run.address: the Dask scheduler at {address} is lost. What was finished is in the cache; the same "
            "command goes on from there."
        )
        self._own = None
        if address is None:  # in this process: what computes are processes of their own all the same
            self._own = distributed.LocalCluster(
                n_workers=1, threads_per_worker=threads, processes=False, dashboard_address=None
            )
        try:
            self._client = distributed.Client(self._own or address, timeout=_CONNECT_S, set_as_default=False)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"run.address: no Dask scheduler answers at {address}. Start one (`dask scheduler`) and name its "
                "address, or leave run.address out for a cluster on this machine."
            ) from error
        self._happened: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._futures: dict[str, Any] = {}
        self._client.subscribe_topic(_TOPIC, self._told)

    def slots(self) -> int:
        try:
            return sum(self._client.nthreads().values())
        except Exception as error:  # whatever the network says
            raise self._lost from error

    def ask(self, question: Mapping[str, Any]) -> dict[str, Answer]:
        try:
            answers = self._client.run(ask, dict(question), on_error="return")
            workers = self._client.scheduler_info(n_workers=-1)["workers"]
        except Exception as error:
            raise self._lost from error
        return {
            name: {"error": f"{type(answer).__name__}: {answer}"}
            if isinstance(answer, Exception)
            else answer | {"cpus": workers[name]["nthreads"], "memory_gb": _memory_gb(workers[name], answer)}
            for name, answer in answers.items()
            if name in workers
        }

    def submit(self, name: str, order: Order, needs: Resources, workers: Sequence[str] | None) -> None:
        key = order["request"]["key"]
        future = self._client.submit(
            carry_out, {**order, "name": name}, key=name, workers=workers, allow_other_workers=False, pure=False
        )
        self._futures[key] = future
        future.add_done_callback(lambda ended: self._happened.put((key, ended)))

    def events(self, timeout_s: float) -> Iterator[tuple[str, Event]]:
        with contextlib.suppress(queue.Empty):
            key, what = self._happened.get(timeout=timeout_s)
            while True:
                yield key, what if isinstance(what, dict) else self._ending(key, what)
                key, what = self._happened.get_nowait()

    def _told(self, event: tuple[float, Event]) -> None:
        told = dict(event[1])
        self._happened.put((told.pop("key"), told))

    def _ending(self, key: str, future: Any) -> Event:
        """What a task that is over gave back, let go of at once: a failure is nobody else's."""
        del self._futures[key]
        try:
            if future.status == "error":
                return _given_up(future.exception(timeout=_FETCH_S))
            if future.status == "finished":
                event: Event = future.result(timeout=_FETCH_S)
                return event
        except Exception as error:
            raise self._lost from error
        finally:
            future.release()
        raise self._lost

    def close(self) -> None:
        with contextlib.suppress(Exception):  # a scheduler that is gone
            self._client.cancel(list(self._futures.values()), force=False)
        for each in (self._client, self._own):
            if each is not None:
                with contextlib.suppress(Exception):
                    each.close(timeout=_CONNECT_S)


def _hush() -> None:
    """What matters of what Dask logs is said in one line; some of its loggers have levels of their own."""
    of_dask = ("distributed", "tornado", "asyncio")
    for name in (*of_dask, *logging.root.manager.loggerDict):
        if name.partition(".")[0] in of_dask:
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _memory_gb(worker: Mapping[str, Any], answer: Answer) -> float:
    """What the worker may use, by what it was started with; 0 there stands for all that the machine has."""
    limit = worker.get("memory_limit") or 0
    return min(limit / 1e9, answer["memory_gb"]) if limit else float(answer["memory_gb"])


def _given_up(error: BaseException) -> Event:
    """The failure of a task that Dask gave up."""
    lost = type(error).__name__ == "KilledWorker"
    said = "its worker was lost, and so were those that took it over" if lost else f"{type(error).__name__}: {error}"
    return {"event": "failed", "kind": type(error).__name__, "message": said, "exit_code": 1}


# On the worker


async def ask(question: survey.Question) -> Answer:
    """The survey, beside the worker's event loop: its heartbeats go on."""
    return await asyncio.to_thread(survey.ask, question)


def carry_out(order: Order) -> Event:
    """The task."""
    from distributed import Status, get_worker

    worker = get_worker()
    key, ending = order["request"]["key"], (Status.closing, Status.closed, Status.failed)

    def tell(event: Event) -> None:
        worker.log_event(_TOPIC, {"key": key, **event})

    def wanted() -> bool:
        task = worker.state.tasks.get(order["name"])
        return task is not None and task.state != "cancelled" and worker.status not in ending

    return _site_of(worker).carry_out(order, tell, wanted)


_lock = threading.Lock()
_sites: dict[str, Site] = {}
"""Of the workers of this process, by their addresses."""


def _site_of(worker: Any) -> Site:
    with _lock:
        if worker.address not in _sites:
            limit = worker.memory_manager.memory_limit
            _sites[worker.address] = Site(Room(worker.state.nthreads, devices(), limit / 1e9 if limit else None))
        return _sites[worker.address]
