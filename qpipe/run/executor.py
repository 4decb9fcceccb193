"""Carries a plan out: runs what the walks ask for, publishes results, and tells the walks.

The only one that publishes the results of nodes. Promise: at-least-once execution, exactly-once publication. One
action at a time per key: in this process by the `_wanted` table, between processes by the store's file locks, which
die with their owner.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from heapq import heappop, heappush
from itertools import count
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from qpipe.cache.store import Store
from qpipe.errors import CacheError, ChangedError, DamagedError, InputError, QpipeError
from qpipe.language.catalog import catalog
from qpipe.language.graph import Graph
from qpipe.language.spec import FirstWithin, RunSpec
from qpipe.plan.decision import fits
from qpipe.plan.history import remember
from qpipe.plan.verdicts import Action, State, request
from qpipe.plan.walk import Walk
from qpipe.run.machine import asked_threads, cores
from qpipe.run.performing import as_result, failure
from qpipe.run.workers import Event, InProcess, Pool, Processes

_POLL_S = 0.1
_WAIT_S = 1.0
Urgency = tuple[float, int]
"""Seconds, then steps."""
BEGUN = (-math.inf, 0)


class View(Protocol):
    """Who is told while a run goes on."""

    def started(self, node: str, stage: str) -> None: ...
    def progress(self, node: str, done: int, total: int, what: str) -> None: ...
    def finished(self, node: str, verdict: str, duration_s: float, notes: Sequence[str]) -> None: ...
    def failed(self, node: str, message: str) -> None: ...
    def message(self, text: str) -> None: ...


def open_pool(store: Store, run: RunSpec, log: Path | None = None) -> Pool:
    """The place where actions run, as `run` says; processes are spawned only when an action comes."""
    workers, threads = worker_count(run), thread_count(run)
    return Processes(store.address(), workers, threads, log) if workers else InProcess(store, threads)


def worker_count(run: RunSpec) -> int:
    """How many processes; 0 stands for this one."""
    return min(cores(), 4) if run.workers is None else run.workers


def thread_count(run: RunSpec) -> int:
    """How many threads an action has: of what OMP_NUM_THREADS allows its share of the processors."""
    share = max(1, cores() // max(1, worker_count(run)))
    return run.threads or min(share, asked_threads() or share)


def execute(
    walks: Sequence[Walk],
    store: Store,
    run: RunSpec,
    pool: Pool,
    view: View,
    deadline: float | None = None,
    more: Callable[[], Sequence[Walk]] | None = None,
) -> bool:
    """Run what `walks` lack, until every target of each has its outcome. False where `deadline` (a reading of
    time.monotonic) came before: from then on no action begins, and those under way are finished. `more` is asked for
    further ones whenever a worker would have nothing to do, until it gives none while nothing is under way.

    Errors: CacheError at once, where the cache cannot be written; DamagedError, once what was under way has ended,
    where a blob that an action reads is not what it should be. The store has moved that aside by then, so that what
    made it runs again when all is planned anew.
    """
    one = _Run(walks, store, run, pool, view, deadline, more)
    one.go()
    return not one.late


def forget(walks: Sequence[Walk], store: Store, digest: str) -> None:
    """Drop the results that name a blob which is there and yet is not what they say; move aside every other damaged
    blob that the walks rely on, so that one more round heals them all."""
    results = {
        outcome.key: outcome.result
        for walk in walks
        for outcome in walk.outcomes.values()
        if outcome.key and outcome.result
    }
    if store.has(digest):  # else the store moved it aside, so that its results are incomplete and run again
        for key, result in results.items():
            if digest in result["blobs"]:
                store.forget(key)
    for blob in {blob for result in results.values() for blob in result["blobs"]}:
        if store.has(blob):  # here; what a remote promises is verified when it arrives
            with suppress(DamagedError):
                store.open(blob)


class _Run:
    """The state of one execution; it exists while `go` runs."""

    def __init__(
        self,
        walks: Sequence[Walk],
        store: Store,
        run: RunSpec,
        pool: Pool,
        view: View,
        deadline: float | None,
        more: Callable[[], Sequence[Walk]] | None = None,
    ) -> None:
        self._walks, self._store, self._options, self._pool, self._view = walks, store, run, pool, view
        self._wanted: dict[str, list[tuple[Walk, Action]]] = {}
        self._queue: list[tuple[Urgency, int, str]] = []
        """A heap of (rank, turn, key): the most urgent first, among equals who came first. A key stands in it again
        where another pipeline turns out to need it more urgently."""
        self._ranks: dict[str, Urgency] = {}
        self._turns = count()
        self._times = Times()
        self._urgency = WeakKeyDictionary({walk: urgency(walk.graph, self._times.of(walk)) for walk in walks})
        self._blocked: dict[str, float] = {}
        self._running: dict[str, float] = {}
        self._locks: dict[str, Any] = {}
        self._damage: DamagedError | None = None
        self._stopped = False
        self._deadline = deadline
        self._more = more
        self.late = False

    def go(self) -> None:
        try:
            for walk in self._walks:  # what was planned before, then what follows from it
                self._want(walk, list(walk.running.values()))
            self._advance(self._walks)
            while self._queue or self._blocked or self._running or self._take_more():
                self._start()
                while self._pool.idle and not self._queue and self._take_more():
                    self._start()
                for key, event in self._pool.events(_POLL_S if self._blocked else _WAIT_S):
                    self._handle(key, event)
                self._end_late_ones()
                for line in self._store.news():
                    self._view.message(line)
        finally:
            for lock in self._locks.values():
                lock.release()
        if self._damage is not None:
            raise self._damage

    def _advance(self, walks: Iterable[Walk]) -> None:
        if not self._stopped:
            for walk in walks:
                self._want(walk, walk.advance())

    def _take_more(self) -> bool:
        """Take in what there is besides; whether there was anything."""
        if self._more is None or self._stopped:
            return False
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self.late = self._stopped = True
            return False
        walks = self._more()
        for walk in walks:
            self._urgency[walk] = urgency(walk.graph, self._times.of(walk))
            self._want(walk, list(walk.running.values()))
        return bool(walks)

    def _want(self, walk: Walk, actions: Sequence[Action]) -> None:
        for action in actions:
            self._wanted.setdefault(action.key, []).append((walk, action))
            seconds, steps = self._urgency[walk][action.node]
            rank = (-seconds, -steps)  # what most depends on is begun early
            if rank < self._ranks.get(action.key, (1.0, 0)):
                self._ranks[action.key] = rank
                heappush(self._queue, (rank, next(self._turns), action.key))

    def _start(self) -> None:
        """Begin what can begin: as many as the pool takes, of keys that no other process holds."""
        if self._deadline is not None and time.monotonic() >= self._deadline and not self._stopped:
            self.late = self._stopped = bool(self._queue or self._blocked)
        if self._stopped:
            self._queue.clear()
            self._blocked.clear()
            return
        for key in list(self._blocked):
            if not self._pool.idle:
                return
            if self._lock(key):
                del self._blocked[key]
                self._begin(key)
        while self._queue and self._pool.idle:
            rank, _, key = heappop(self._queue)
            if self._ranks.get(key) != rank:  # it stood further ahead, too
                continue
            self._ranks[key] = BEGUN
            if self._lock(key):
                self._begin(key)
            else:
                self._blocked[key] = time.monotonic()
                self._view.message(f"{self._name(key)}: another process computes it; waiting.")

    def _begin(self, key: str) -> None:
        """Hand the action to the pool, unless another process has just published its result."""
        action = self._wanted[key][0][1]
        found = None if action.always else self._store.result(key)
        if found is not None and not fits(found, catalog()[action.stage]):
            self._store.forget(key)  # it was made up, and would stand in the way of what is made now
            found = None
        if found is not None and not self._store.complete(found):
            self._conclude(key, found, "hit")
            return
        self._running[key] = time.monotonic()
        self._view.started(self._name(key), action.stage)
        self._pool.submit(request(action, self._options.device))

    def _name(self, key: str) -> str:
        walk, action = self._wanted[key][0]
        return walk.label + action.node

    def _lock(self, key: str) -> bool:
        from filelock import Timeout  # not at the top: a run that is all hits locks nothing

        lock = self._store.lock(key)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return False
        except OSError as error:
            raise CacheError(
                f"the cache {self._store.root} cannot be locked ({error.strerror or error})."
            ) from error
        self._locks[key] = lock
        return True

    def _handle(self, key: str, event: Event) -> None:
        if key not in self._wanted:
            return
        if event["event"] == "progress":
            self._view.progress(self._name(key), event["done"], event["total"], event["what"])
            return
        if event["event"] == "published":
            self._store.share(event["key"])
            return
        self._running.pop(key, None)
        if event["event"] == "done":
            self._publish(key, as_result(event))
        elif event["kind"] == "CacheError":
            raise CacheError(event["message"])  # no other action could keep its result either
        elif event["kind"] == "DamagedError":
            self._damage = DamagedError(event["message"], event["digest"])
            self._stopped = True
        else:
            self._fail(key, event)

    def _publish(self, key: str, result: dict[str, Any]) -> None:
        walk, action = self._wanted[key][0]
        if changed := walk.changed(action):
            self._fail(key, failure(ChangedError(_written_to(action, changed))))
            return
        try:
            if action.always:
                self._store.forget(key)  # what it read last time does not stand in the way
            result = self._store.publish(key, result)
        except DamagedError as error:
            self._damage, self._stopped = error, True
            return
        remember(self._store, key, result, walk.folder)
        self._conclude(key, result, "ran")

    def _conclude(self, key: str, result: dict[str, Any], verdict: State) -> None:
        """Tell every node that wanted the key; the first carries the verdict, the others hit."""
        self._unlock(key)
        duration = result["provenance"]["duration_s"] if verdict == "ran" else 0.0
        self._ranks.pop(key, None)
        wanted = self._wanted.pop(key)
        for i, (walk, action) in enumerate(wanted):
            state: State = "ran" if verdict == "ran" and i == 0 else "hit"
            walk.finish(action.node, result, state)
            self._view.finished(walk.label + action.node, state, duration, result.get("notes", ()))
            duration = 0.0
        self._advance({walk: None for walk, _ in wanted})

    def _fail(self, key: str, error: Event) -> None:
        self._unlock(key)
        self._ranks.pop(key, None)
        wanted = self._wanted.pop(key)
        for walk, action in wanted:
            walk.fail(action.node, error)
            self._view.failed(walk.label + action.node, error["message"])
        alone = len(self._walks) == 1 and self._more is None
        refused = error["exit_code"] == InputError.exit_code and alone
        self._stopped = self._stopped or refused or not self._options.keep_going
        self._advance({walk: None for walk, _ in wanted})

    def _unlock(self, key: str) -> None:
        if (lock := self._locks.pop(key, None)) is not None:
            lock.release()

    def _end_late_ones(self) -> None:
        limit = self._options.timeout_s
        if limit is None:
            return
        for key, started in self._running.items():
            if time.monotonic() - started > limit:
                self._pool.cancel(key, f"took longer than run.timeout_s={limit:g} and was ended")


def _written_to(action: Action, params: Sequence[str]) -> str:
    names = ", ".join(f"stages.{action.node}.{name} ({action.written.get(name)})" for name in params)
    return f"{names} was written to while the run went on. The result is not kept; run again."


class Times:
    """What nodes are expected to take, by what they took before, asked once for each stage and name."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], float] = {}

    def of(self, walk: Walk) -> Callable[[str], float]:
        """Seconds by the name of a node; 0 where nothing is known of it."""

        def expected(name: str) -> float:
            node = walk.graph.node(name)
            if isinstance(node, FirstWithin):
                return 0.0
            kind = (node.stage.name, name)
            if kind not in self._known:
                self._known[kind] = walk.expected_s(name) or 0.0
            return self._known[kind]

        return expected


def urgency(graph: Graph, expected_s: Callable[[str], float] = lambda _: 0.0) -> dict[str, Urgency]:
    """For every node the seconds and the number of steps on the longest way from it to an end of the graph; the longest
    is the one that takes longest, and where that is not known the one of most steps."""
    behind: dict[str, Urgency] = dict.fromkeys(graph.order, (0.0, 0))
    found: dict[str, Urgency] = {}
    for name in reversed(graph.order):
        seconds, steps = behind[name]
        found[name] = seconds + expected_s(name), steps + 1
        for sources in graph.inputs[name].values():
            for source in sources:
                behind[source.node] = max(behind[source.node], found[name])
    return found


def exit_code(walks: Sequence[Walk]) -> int:
    """0 where nothing failed; 2 where all that failed was bad input; else 1."""
    errors = [
        outcome.error for walk in walks for outcome in walk.outcomes.values() if outcome.state == "failed"
    ]
    codes = {error["exit_code"] for error in errors if error}
    if not codes:
        return 0
    return 2 if codes == {2} else QpipeError.exit_code
