"""A cluster as a Pool: orders go out, and what comes back says that a result stands in the cache; bytes travel there.

Where every worker sees the folder of the cache, all work in it. Else `cache.remote` has to be one that is written to:
each worker fetches what it reads from there into a cache of its own and puts what it makes, and nothing comes here but
what the report and the exports read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from qpipe.cache.store import Store
from qpipe.errors import ConfigError
from qpipe.keys.hashing import digest
from qpipe.language.spec import RunSpec
from qpipe.param import listed
from qpipe.plan.verdicts import OF_STAGE, Request
from qpipe.run.cluster.site import Order
from qpipe.run.workers import Ask, Event
from qpipe.stage import Resources

_LOOK_S = 5.0
_LEAST = 4
"""So many actions are handed out though no worker is there: clusters that grow by demand have to see some."""

_COUNTED = ("cpus", "gpus", "memory_gb")

Answer = dict[str, Any]


class Cluster(Protocol):
    """What is asked of a scheduler."""

    name: str
    """What a message calls it."""

    def slots(self) -> int:
        """How many threads its workers have together, as far as it says."""

    def ask(self, question: Mapping[str, Any]) -> dict[str, Answer]:
        """{worker: what `qpipe.run.cluster.survey` answers there, and its `cpus`}, of the workers there are now."""

    def submit(self, name: str, order: Order, needs: Resources, workers: Sequence[str] | None) -> None:
        """Carry the order out on one of `workers`, None for any, and on another where that one is lost. Orders of one
        `name`, whoever they are from, may be carried out once for all."""

    def events(self, timeout_s: float) -> Iterator[tuple[str, Event]]:
        """(key, event) of what happened, waiting at most `timeout_s` for the first. Errors: ClusterError where the
        cluster is lost."""

    def close(self) -> None:
        """What was submitted is not wanted any more."""


class ClusterPool:
    """The Pool of one run. `log` takes what the processes on the workers say."""

    def __init__(self, cluster: Cluster, store: Store, run: RunSpec, log: Path | None = None) -> None:
        self._cluster, self._store, self._options, self._log = cluster, store, run, log
        self._run = secrets.token_hex(8)
        self._flight: set[str] = set()
        self._lent: set[str] = set()
        self._surveyed: set[str] = set()
        self._answers: dict[str, Answer] = {}
        self._probe: str | None = None
        self._address: dict[str, Any] = store.address()
        self._slots, self._looked = 0, -_LOOK_S

    @property
    def idle(self) -> int:
        """A quarter more than there is room for, so that no worker waits for this process; or `run.workers`."""
        if self._options.workers is not None:
            return self._options.workers - len(self._flight)
        if time.monotonic() - self._looked >= _LOOK_S:
            self._looked, self._slots = time.monotonic(), self._cluster.slots()
        return max(_LEAST, self._slots + -(-self._slots // 4)) - len(self._flight)

    def room(self, needs: Resources) -> bool:
        """The cluster sees to that."""
        return True

    def check(self, asks: Sequence[Ask]) -> None:
        """Hold the workers against what will be asked of them. Errors: ConfigError."""
        made_of = {ask.ingredients["stage"]: {name: ask.ingredients[name] for name in OF_STAGE} for ask in asks}
        stages = {name: made for name, made in made_of.items() if name not in self._surveyed}
        if stages:
            self._survey(stages)
            self._surveyed.update(stages)
        for ask in asks if self._answers else ():
            refuse_unmet(ask, list(self._answers.values()))

    def _survey(self, stages: Mapping[str, Mapping[str, Any]]) -> None:
        """Ask the workers what they have and which keys they give; settle where bytes travel."""
        root, self._probe = str(self._store.root), self._store.put(_identity(self._store.root))
        question = {"root": root, "probe": self._probe, "folder": os.getcwd(), "stages": stages}
        self._answers = self._cluster.ask(question)
        for worker, answer in self._answers.items():
            refuse_unlike(worker, answer, stages)
        blind = [worker for worker, answer in self._answers.items() if not answer["sees"]]
        if blind:
            self._probe = None
            elsewhere = self._store.address_elsewhere()
            if elsewhere is None:
                raise ConfigError(
                    f"run.address: the worker {blind[0]} does not see the cache {root}. Name a folder that all "
                    "machines see with cache.dir, or a shared cache that is written to with cache.remote."
                )
            self._address = elsewhere

    def submit(self, request: Request) -> None:
        key, needs = request["key"], Resources(**request["resources"])
        self._lend(request)
        order: Order = {
            "run": self._run,
            "store": self._address,
            "folder": os.getcwd(),
            "timeout_s": self._options.timeout_s,
            "request": {**request, "probe": self._probe},
        }
        place = digest("place", self._address if self._probe is None else self._probe)
        fit = [worker for worker, answer in self._answers.items() if not lacks(needs, answer)]
        if not fit:  # what it took before, which is more than anybody has; what is asked for was checked
            needs = dataclasses.replace(needs, memory_gb=None)
        some = None if len(fit) in (0, len(self._answers)) else fit
        self._flight.add(key)
        self._cluster.submit(f"qpipe-{key}-{place[:8]}", order, needs, some)

    def _lend(self, request: Request) -> None:
        """What the action reads lies where workers find it."""
        if self._probe is not None:
            return
        makers = request["provenance"].get("makers", {}).values()
        new = {key for made in makers for _, key in made if key} - self._lent
        for key in new:
            self._store.share(key)
        if new:
            self._lent |= new
            self._store.flush()

    def events(self, timeout_s: float) -> Iterator[tuple[str, Event]]:
        for key, event in self._cluster.events(timeout_s):
            if key not in self._flight:  # another run's
                continue
            if event["event"] in ("done", "failed"):
                self._flight.discard(key)
                self._keep(event.pop("log", ""))
            yield key, event

    def _keep(self, said: str) -> None:
        if said and self._log is not None:
            with contextlib.suppress(OSError), open(self._log, "a") as log:
                log.write(said)

    def cancel(self, key: str, reason: str) -> None:
        """The worker's clock decides: it knows when the action began."""

    def close(self) -> None:
        self._cluster.close()


def _identity(root: Path) -> bytes:
    """The same for all who open this cache on this machine, and for no other cache."""
    place = ""
    with contextlib.suppress(OSError):  # what cannot be written is told by who writes there
        root.mkdir(parents=True, exist_ok=True)
        status = os.stat(root)
        place = f"{status.st_dev}:{status.st_ino}"
    return f"the cache {root} of {socket.gethostname()}, {place}".encode()


def refuse_unlike(worker: str, answer: Answer, stages: Mapping[str, Mapping[str, Any]]) -> None:
    """Errors: ConfigError where keys would be others on a worker."""
    if "error" in answer:
        raise ConfigError(
            f"run.address: the worker {worker} cannot run qpipe ({answer['error']}). Install there what is here."
        )
    here = {name: version for made_of in stages.values() for name, version in made_of["libraries"].items()}
    there = answer["libraries"]
    apart = [f"{name} {there[name] or 'missing'} instead of {here.get(name)}" for name in there]
    if apart:
        raise ConfigError(
            f"run.address: the worker {worker} on {answer['host']} has {', '.join(apart)}, so that its results would "
            "have other keys. Install there what is here."
        )
    if answer["stages"]:
        raise ConfigError(
            f"run.address: the worker {worker} on {answer['host']} has other code, or none, of "
            f"{listed(answer['stages'])}, so that its results would have other keys. Install the same there."
        )


def refuse_unmet(ask: Ask, answers: Sequence[Answer]) -> None:
    """Errors: ConfigError where no worker has what is asked for: it would wait for ever."""
    if all(lacks(ask.needs, answer) for answer in answers):
        most = {name: max(answer[name] for answer in answers) for name in _COUNTED}
        short = lacks(ask.needs, most) or [name for name in _COUNTED if getattr(ask.needs, name)]
        said = ", ".join(f"{name}={getattr(ask.needs, name):g}" for name in short)
        there = ", ".join(f"{name}={value:g}" for name, value in most.items())
        raise ConfigError(
            f"{ask.address}.resources: asks for {said}, and no worker has that (the most there is: {there}). Ask for "
            "less, or start larger workers."
        )


def lacks(needs: Resources, answer: Mapping[str, Any]) -> list[str]:
    """The names of the resources of which a worker has less than is needed."""
    return [name for name in _COUNTED if (getattr(needs, name) or 0) > answer[name]]
