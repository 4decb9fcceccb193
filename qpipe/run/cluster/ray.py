"""Ray as a Cluster: an order is a task, its resources are Ray's own."""

from __future__ import annotations

import contextlib
import functools
import logging
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qpipe.errors import ClusterError, ConfigError
from qpipe.run.cluster import survey
from qpipe.run.cluster.pool import Answer
from qpipe.run.cluster.site import Order, Site
from qpipe.run.workers import Event
from qpipe.stage import Resources

_LOOK_S = 0.2
_CONNECT_S = 15.0
_RETRIES = 3
"""So often an action is begun again whose worker was lost."""


class Ray:
    """The cluster at `address` ("auto", "host:6379", "ray://host:10001"); without one a cluster on this machine."""

    def __init__(self, address: str | None, threads: int) -> None:
        try:
            import ray
            from ray.util.queue import Queue
        except ImportError as error:
            raise ConfigError('run.cluster: Ray is not installed. pip install "qpipe[ray]".') from error
        self._ray = ray
        self.name = address or "a Ray cluster on this machine"
        self._lost = ClusterError(
            f"run.address: the Ray cluster at {address} is lost. What was finished is in the cache; the same command "
            "goes on from there."
        )
        unreachable = ConfigError(
            f"run.address: no Ray cluster lets itself be used at {address}. Start one (`ray start --head`), name its "
            "address, and set RAY_AUTH_MODE=token where it wants one; or leave run.address out for one of your own."
        )
        if address is not None and not _answers(address):
            raise unreachable
        own = {"num_cpus": threads, "include_dashboard": False} if address is None else {}
        try:
            ray.init(
                address or "local", namespace="qpipe", log_to_driver=False, logging_level=logging.CRITICAL, **own
            )
        except (ConnectionError, OSError, ValueError, RuntimeError) as error:
            raise unreachable from error
        self._board = Queue(actor_options={"num_cpus": 0})
        self._keys: dict[Any, str] = {}
        self._task = ray.remote(carry_out)

    def slots(self) -> int:
        with self._losing():
            return int(self._ray.cluster_resources().get("CPU", 0))

    def ask(self, question: Mapping[str, Any]) -> dict[str, Answer]:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        with self._losing():
            nodes = {node["NodeID"]: node for node in self._ray.nodes() if node["Alive"]}
            places = {name: NodeAffinitySchedulingStrategy(name, soft=False) for name in nodes}
            task = self._ray.remote(survey.ask)
            asked = {
                name: task.options(num_cpus=0, scheduling_strategy=place).remote(dict(question))
                for name, place in places.items()
                if nodes[name]["Resources"].get("CPU")
            }
            found: dict[str, Answer] = {}
            for node, ref in asked.items():
                has = nodes[node]["Resources"]
                try:
                    answer = self._ray.get(ref)
                except self._ray.exceptions.RayTaskError as error:
                    answer = {"error": str(error.cause)}
                own = {"cpus": has["CPU"], "gpus": has.get("GPU", 0), "memory_gb": has.get("memory", 0) / 1e9}
                found[nodes[node]["NodeManagerAddress"]] = answer | ({} if "error" in answer else own)
            return found

    def submit(self, name: str, order: Order, needs: Resources, workers: Sequence[str] | None) -> None:
        """Ray holds `needs` against what is free by itself, and knows no tasks of others by name: the locks and leases
        of the cache keep two clients from one action."""
        ref = self._task.options(
            name=name,
            num_cpus=needs.cpus or 1,
            num_gpus=needs.gpus or 0,
            memory=int((needs.memory_gb or 0) * 1e9) or None,
            max_retries=_RETRIES,
        ).remote(order, self._board)
        self._keys[ref] = order["request"]["key"]

    def events(self, timeout_s: float) -> Iterator[tuple[str, Event]]:
        end = time.monotonic() + timeout_s
        while True:
            with self._losing():
                told = self._board.get_nowait_batch(self._board.qsize())
                refs = list(self._keys)
                wait_s = max(min(_LOOK_S, end - time.monotonic()), 0)
                ended = self._ray.wait(refs, num_returns=len(refs), timeout=0)[0] if refs else []
                if not ended and not told and refs:
                    ended = self._ray.wait(refs, timeout=wait_s)[0]
                elif not refs:
                    time.sleep(wait_s)
            yield from told
            for ref in ended:
                yield self._keys.pop(ref), self._ending(ref)
            if told or ended or time.monotonic() >= end:
                return

    def _ending(self, ref: Any) -> Event:
        try:
            event: Event = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            kind = type(error).__name__
            lost = isinstance(error, self._ray.exceptions.WorkerCrashedError)
            said = "its worker was lost, and so were those that took it over" if lost else f"{kind}: {error}"
            return {"event": "failed", "kind": kind, "message": said, "exit_code": 1}
        return event

    def close(self) -> None:
        with contextlib.suppress(Exception):  # a cluster that is gone
            for ref in self._keys:
                self._ray.cancel(ref, force=True)
            self._board.shutdown()
        with contextlib.suppress(Exception):
            self._ray.shutdown()

    @contextlib.contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except (self._ray.exceptions.RayError, ConnectionError) as error:
            raise self._lost from error


def _answers(address: str) -> bool:
    """Whether something listens there; Ray itself would try for minutes. What is no HOST:PORT is Ray's to judge."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return True
    try:
        socket.create_connection((host, int(port)), _CONNECT_S).close()
    except OSError:
        return False
    return True


# On the worker


def carry_out(order: Order, board: Any) -> Event:
    """The task; a process of Ray's runs one at a time."""
    key = order["request"]["key"]
    return _site().carry_out(order, lambda event: board.put((key, event)), lambda: True)


@functools.cache
def _site() -> Site:
    return Site()
