"""Pipelines that come one after another, each when a worker has nothing to do: a search, whose next trial depends on
what those before it came to. They share every action as those of a sweep do; one whose results are all there is over
at once.
"""

from __future__ import annotations

import dataclasses
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import current_thread, main_thread
from types import FrameType
from typing import Any

from qpipe.cache.store import Store
from qpipe.errors import CacheError, ConfigError, DamagedError, InputError, QpipeError
from qpipe.plan.estimate import misses
from qpipe.plan.keyring import Keyring
from qpipe.plan.walk import Walk
from qpipe.run.checkout import Checkout
from qpipe.run.deployment import deployments
from qpipe.run.executor import View, execute, exit_code, forget, open_pool
from qpipe.run.record import RunInfo
from qpipe.run.sweep import (
    BUDGET_SPENT,
    GOAL_MISSED,
    HEAL_ROUNDS,
    INTERRUPTED,
    NO_RECORD,
    NOT_CACHED,
    Job,
    hits,
    keep_within,
    leave,
    plan_job,
    refusal,
    unwritten,
)
from qpipe.run.workers import Pool

Tell = Callable[[Job, Mapping[str, Any] | None], None]
"""Hears of every trial that is over, with its record; None where it was refused, or left none. The record says where a
trial was stopped before it was over."""


def run_stream(jobs: Iterator[Job], tell: Tell, store: Store, view: View, command: Sequence[str]) -> int:
    """Carry out what `jobs` gives, as long as it gives any, and tell of each as it ends. The exit status: of the
    trials that failed the worst; 3 where none is within the goal; 4, 5 and 130 as of a run."""
    first = next(jobs, None)
    if first is None:
        return 0
    with store.using():
        stream = _Stream(first, jobs, tell, store, view, command)
        status = stream.go()
    keep_within(store, first.spec.cache_max_bytes, view)
    return status


class _Stream:
    """The trials that are under way, and what is known of those that were."""

    def __init__(
        self, first: Job, jobs: Iterator[Job], tell: Tell, store: Store, view: View, command: Sequence[str]
    ) -> None:
        self._first, self._pending, self._jobs, self._tell = first, [first], jobs, tell
        self._store, self._view = store, view
        self._info = RunInfo(command, first.folder, time.time())
        self._checkout = Checkout(Path.cwd())
        self._keyring = Keyring(store)
        self._open: dict[Walk, Job] = {}
        self._statuses: set[int] = set()
        self._met: set[bool | None] = set()
        self._missed = 0
        self._width = 1
        self._pool: Pool
        budget_s = first.spec.run.budget_s
        self._deadline = None if budget_s is None else time.monotonic() + budget_s
        self._damaged: Counter[str] = Counter()

    def go(self) -> int:
        options = self._first.spec.run
        folder = self._first.swept.folder if self._first.swept else self._first.folder
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "workers.log"
        pool = self._pool = open_pool(self._store, options, log)
        self._checkout.ask()
        stopped = ""
        try:
            while not self._round():
                pass
        except _OutOfTime:
            stopped = "budget_spent"
            self._view.message(f"run.budget_s={options.budget_s:g} is spent. {_KEPT}")
        except KeyboardInterrupt:
            stopped = "interrupted"
            self._view.message(f"Interrupted. {_KEPT}")
        finally:
            pool.close()
            with suppress(OSError):
                if log.stat().st_size == 0:
                    log.unlink()
        self._end(stopped)
        return self._status(stopped)

    def _round(self) -> bool:
        """Carry out what comes; False where the cache was damaged, and what is under way is to be planned anew."""
        walks = list(self._open)
        try:
            options, pool = self._first.spec.run, self._pool
            if not execute(walks, self._store, options, pool, self._view, self._deadline, self._more):
                raise _OutOfTime
        except DamagedError as error:
            self._heal(error, list(self._open))
            self._pending, self._open = [*self._open.values(), *self._pending], {}
        return not self._pending

    def _heal(self, error: DamagedError, walks: Sequence[Walk]) -> None:
        """Forget what rests on a damaged blob, so that it runs again. Errors: CacheError where it is damaged again and
        again."""
        self._view.message(f"The cache is damaged: {error} What made it runs again.")
        self._damaged[error.digest] += 1
        if self._damaged[error.digest] >= HEAL_ROUNDS:
            raise CacheError(
                f"The cache at {self._store.root} stays damaged after {HEAL_ROUNDS} attempts. Check the disk."
            ) from error
        self._store.doubt(error.digest)
        forget(walks, self._store, error.digest)
        self._keyring = Keyring(self._store)

    def _more(self) -> list[Walk]:
        """Say what is over; the next trial that has anything to run. Those that have not are over at once. No more are
        under way than there are workers: what begins late knows more."""
        with undisturbed():
            self._conclude()
            self._width = max(self._width, self._pool.idle)
        while len(self._open) < self._width:
            with undisturbed():
                if (job := self._next()) is None:
                    break
                if (walk := self._planned(job)) is None:
                    continue
                self._open[walk] = job
                if walk.running:
                    return [walk]
                self._conclude()
        return []

    def _next(self) -> Job | None:
        return self._pending.pop(0) if self._pending else next(self._jobs, None)

    def _planned(self, job: Job) -> Walk | None:
        """Its walk, as far as the cache carries it; None where the trial, or the search, is refused."""
        try:
            with self._store.looking():
                walk = plan_job(job, self._keyring, self._store)
        except ConfigError as error:
            self._view.message(f"qpipe: {error}")
            self._statuses.add(error.exit_code)
            self._tell(job, None)
            return None
        options = job.spec.run
        if options.max_misses is not None:
            options = dataclasses.replace(options, max_misses=max(0, options.max_misses - self._missed))
        if (refused := refusal([walk], options)) is not None:
            self._view.message(refused)
            self._statuses.add(NOT_CACHED)
            self._jobs = iter(())
            return None
        self._missed += len(misses([walk]).certain)
        return walk

    def _conclude(self) -> None:
        """Write the records of the trials that are over, and tell of them."""
        over = [walk for walk in self._open if all(name in walk.outcomes for name in walk.graph.targets)]
        for walk in over:
            self._leave(walk, self._open.pop(walk), "")

    def _leave(self, walk: Walk, job: Job, stopped: str) -> None:
        self._store.touch(hits([walk]))
        self._statuses.add(exit_code([walk]))
        measured = {} if stopped else deployments(walk, self._store, job.spec.run, self._view)
        words = [*self._info.command[: len(self._info.command) - len(self._first.overrides)], *job.overrides]
        info = dataclasses.replace(
            self._info, command=words, folder=job.folder, finished=time.time(), stopped=stopped,
            git=self._checkout.found(),
        )
        try:
            record = leave(job, walk, self._store, info, measured)
        except DamagedError as error:
            self._heal(error, [walk])
            self._pending.append(job)
            return
        except CacheError:
            raise
        except (QpipeError, OSError) as error:
            self._view.message(f"qpipe: {job.label}{unwritten(error)} {NO_RECORD}")
            self._statuses.add(QpipeError.exit_code)
            self._tell(job, None)
            return
        self._met.add(record["goal"]["met"])
        self._tell(job, record)

    def _end(self, stopped: str) -> None:
        """What is over is told of; what was stopped leaves its record, too."""
        self._conclude()
        for walk, job in list(self._open.items()):
            self._leave(walk, job, stopped)

    def _status(self, stopped: str) -> int:
        if stopped == "interrupted":
            return INTERRUPTED
        bad = (NOT_CACHED, QpipeError.exit_code, InputError.exit_code)
        failed = [status for status in bad if status in self._statuses]
        if failed or stopped:
            return failed[0] if failed else BUDGET_SPENT
        return GOAL_MISSED if False in self._met and True not in self._met else 0


_KEPT = "What was finished is in the cache, and the search goes on from there: qpipe --resume FOLDER."


@contextmanager
def undisturbed() -> Iterator[None]:
    """An interrupt waits until what lies within is done, a second one does not: what composes a config, or writes the
    study, is not left in the middle of it."""
    came: list[int] = []

    def wait(number: int, frame: FrameType | None) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM) if current_thread() is main_thread() else ()
    before = {number: signal.signal(number, wait) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


class _OutOfTime(Exception):
    """`run.budget_s` is spent."""
