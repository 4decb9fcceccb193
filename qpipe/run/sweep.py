"""Many pipelines, one graph: the jobs of a sweep are planned against one cache and share every action they have in
common. A single run is a sweep of one.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from qpipe.cache.cleanup import collect
from qpipe.cache.store import Store
from qpipe.errors import CacheError, ConfigError, DamagedError, InputError, QpipeError
from qpipe.language.graph import build_graph
from qpipe.language.labels import check_labels
from qpipe.language.spec import PipelineSpec, RunSpec
from qpipe.plan.estimate import misses
from qpipe.plan.keyring import Keyring
from qpipe.plan.walk import Walk
from qpipe.run.checkout import Checkout
from qpipe.run.deployment import deployments
from qpipe.run.executor import View, execute, exit_code, forget, open_pool
from qpipe.run.record import (
    Measured,
    RunInfo,
    build_record,
    take_back,
    write_config,
    write_files,
    write_record,
)
from qpipe.run.swept import Swept, Trial

GOAL_MISSED = 3
NOT_CACHED = 4
BUDGET_SPENT = 5
INTERRUPTED = 130
HEAL_ROUNDS = 3
"""How often a run plans anew because of one and the same damaged blob, before it gives up."""


class Watch(View, Protocol):
    """A View that also hears of the plan before, and of the records after."""

    def planned_jobs(self, plans: Sequence[tuple[Job, Walk]]) -> None: ...
    def ended_jobs(self, records: Sequence[tuple[Job, dict[str, Any]]]) -> None: ...


@dataclasses.dataclass(frozen=True)
class Job:
    """One pipeline: its spec, the folder it leaves its record in, and how it was asked for; of a sweep its number, and
    what the sweep leaves."""

    spec: PipelineSpec
    folder: Path
    overrides: tuple[str, ...] = ()
    label: str = ""
    number: int | None = None
    swept: Swept | None = None


def plan_jobs(jobs: Sequence[Job], store: Store) -> list[Walk]:
    """A walk for every job, as far as the cache carries it. Errors: ConfigError, with the job it is in."""
    keyring = Keyring(store)
    return [plan_job(job, keyring, store) for job in jobs]


def plan_job(job: Job, keyring: Keyring, store: Store) -> Walk:
    """A walk for one job, as far as the cache carries it. Errors: ConfigError, with the job it is in."""
    try:
        check_labels(job.spec)
        walk = Walk(build_graph(job.spec), keyring, store, job.label)
        walk.advance()
        walk.refuse_missing()
    except ConfigError as error:
        raise ConfigError(f"{job.label}{error}") from error
    return walk


def run_jobs(jobs: Sequence[Job], store: Store, watch: Watch, command: Sequence[str]) -> int:
    """Carry all jobs out and write their records; the exit status of the worst.

    A blob that turns out damaged when it is read is moved aside by the store, all others of this run are looked at,
    and all is planned anew: what made them runs again. CacheError where a blob comes back damaged again and again.
    """
    info, checkout = RunInfo(command, jobs[0].folder, time.time()), Checkout(Path.cwd())
    with store.using():  # whatever it finds or makes stays until it ends
        status = _run_healing(jobs, store, watch, info, checkout)
    keep_within(store, jobs[0].spec.cache_max_bytes, watch)
    return status


def keep_within(store: Store, max_bytes: int | None, watch: View) -> None:
    """Remove what was not used for longest where the cache is above its limit; a refusal does not fail the run."""
    if max_bytes is None:
        return
    try:
        removed = collect(store, max_bytes=max_bytes)
    except CacheError as error:
        watch.message(f"cache.max_size is not kept: {error}")
        return
    if removed.results:
        watch.message(
            f"cache.max_size: {removed.results} results that were not used for longest went, "
            f"{removed.size_bytes / 1e6:,.1f} MB; {removed.left_bytes / 1e6:,.1f} MB are left."
        )


def _run_healing(jobs: Sequence[Job], store: Store, watch: Watch, info: RunInfo, checkout: Checkout) -> int:
    budget_s = jobs[0].spec.run.budget_s
    deadline = None if budget_s is None else time.monotonic() + budget_s
    told = False
    walks: list[Walk] = []
    damaged: Counter[str] = Counter()
    while max(damaged.values(), default=0) < HEAL_ROUNDS:
        try:
            with store.looking():
                walks = plan_jobs(jobs, store)
            _tell(store.news(), watch)
            if not told:
                watch.planned_jobs(list(zip(jobs, walks, strict=True)))
                told = True
            return _carry_out(jobs, walks, store, watch, info, checkout, deadline)
        except DamagedError as error:
            watch.message(f"The cache is damaged: {error} What made it runs again.")
            damaged[error.digest] += 1
            store.doubt(error.digest)
            _tell(store.news(), watch)
            forget(walks, store, error.digest)
    raise CacheError(f"The cache at {store.root} stays damaged after {HEAL_ROUNDS} attempts. Check the disk.")


def _tell(lines: Sequence[str], watch: Watch) -> None:
    for line in lines:
        watch.message(line)


def _carry_out(
    jobs: Sequence[Job],
    walks: Sequence[Walk],
    store: Store,
    watch: Watch,
    info: RunInfo,
    checkout: Checkout,
    deadline: float | None,
) -> int:
    if (refused := refusal(walks, jobs[0].spec.run)) is not None:
        watch.message(refused)
        return NOT_CACHED
    stopped = ""
    if any(walk.running for walk in walks):
        checkout.ask()
        stopped = _run(jobs, walks, store, watch, deadline)
    _tell(store.settle(), watch)
    found, stopped = _measure(jobs, walks, store, watch, stopped, deadline)
    info = dataclasses.replace(info, stopped=stopped, git=checkout.found())
    status = _conclude(jobs, walks, store, watch, info, found)
    _tell(store.settle(), watch)  # what the records were the first to read
    return status


def refusal(walks: Sequence[Walk], options: RunSpec) -> str | None:
    """Why `run.expect` or `run.max_misses` forbids to carry the plan out, if they do.

    What waits for its inputs counts as a miss, and so do the candidates that a first_within may still come to: then
    a run that is let through cannot run more than it was allowed to.
    """
    allowed = 0 if options.expect == "cached" else options.max_misses
    if allowed is None:
        return None
    found = misses(walks)
    count = len(found.certain) + len(found.possible)
    if count <= allowed:
        return None
    said = "run.expect=cached" if options.expect == "cached" else f"run.max_misses={allowed}"
    maybe = f", {len(found.possible)} of them only if their inputs change" if found.possible else ""
    named = [*found.certain, *found.possible]
    names = ", ".join(named[:8]) + (f" and {count - 8} more" if count > 8 else "")
    nodes = "1 node" if count == 1 else f"{count} nodes"
    return f"{said}: {nodes} would run{maybe}: {names}. Nothing was run; `qpipe plan` says why."


def _run(
    jobs: Sequence[Job], walks: Sequence[Walk], store: Store, watch: Watch, deadline: float | None
) -> str:
    """Run what the walks lack; what stopped it ("interrupted" or "budget_spent"), or ""."""
    log = jobs[0].folder / "workers.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    options = jobs[0].spec.run
    pool = open_pool(store, options, log)
    gc.freeze()
    gc.enable()  # the command line switched it off; what runs in this process may leave large cycles
    try:
        if not execute(walks, store, options, pool, watch, deadline):
            left = len({action.key for walk in walks for action in walk.running.values()})
            watch.message(
                f"run.budget_s={options.budget_s:g} is spent; {left} actions that could have begun did not. What was "
                f"finished is in the cache; the same command goes on from there."
            )
            return "budget_spent"
    except KeyboardInterrupt:
        watch.message("Interrupted. What was finished is in the cache; the same command goes on from there.")
        return "interrupted"
    finally:
        pool.close()
        with suppress(OSError):
            if log.stat().st_size == 0:
                log.unlink()
    return ""


def _measure(
    jobs: Sequence[Job], walks: Sequence[Walk], store: Store, watch: Watch, stopped: str, deadline: float | None
) -> tuple[list[Measured], str]:
    """What each job exported, as it runs in onnxruntime, and what stopped the run; nothing where its time is over."""
    found: list[Measured] = []
    try:
        for job, walk in zip(jobs, walks, strict=True):
            if stopped or (deadline is not None and time.monotonic() >= deadline):
                break
            found.append(deployments(walk, store, job.spec.run, watch))
    except KeyboardInterrupt:
        watch.message("Interrupted. All is made and in the cache; the same command measures what is not measured yet.")
        stopped = "interrupted"
    return found + [{}] * (len(jobs) - len(found)), stopped


def hits(walks: Sequence[Walk]) -> set[str]:
    """The keys of the results that the walks took from the cache."""
    outcomes = [outcome for walk in walks for outcome in walk.outcomes.values()]
    return {outcome.key for outcome in outcomes if outcome.state == "hit" and outcome.key}


def _conclude(
    jobs: Sequence[Job],
    walks: Sequence[Walk],
    store: Store,
    watch: Watch,
    info: RunInfo,
    measured: Sequence[Measured],
) -> int:
    """Write and show the records. A run, not a trial, whose input was refused leaves none: its lines said it all."""
    store.touch(hits(walks))
    status = INTERRUPTED if info.stopped == "interrupted" else exit_code(walks)
    if status == InputError.exit_code and jobs[0].number is None:
        return status
    kept = []
    for job, walk, found in zip(jobs, walks, measured, strict=True):
        command = [*info.command[: len(info.command) - len(jobs[0].overrides)], *job.overrides]
        own = dataclasses.replace(info, command=command, folder=job.folder, finished=time.time())
        try:
            kept.append((job, walk, leave(job, walk, store, own, found)))
        except CacheError:  # what it reads is damaged, and is made again
            raise
        except (QpipeError, OSError) as error:  # a disk that is full: the other trials have theirs all the same
            watch.message(f"qpipe: {job.label}{unwritten(error)} {NO_RECORD}")
            status = status or QpipeError.exit_code
    records = [(job, record) for job, _, record in kept]
    if jobs[0].swept is not None and kept:
        try:
            jobs[0].swept.add([(Trial(job.number or 0, job.overrides, job.folder), record) for job, record in records])
        except QpipeError as error:
            watch.message(str(error))
            status = status or QpipeError.exit_code
    if kept:
        watch.ended_jobs(records)
    if status == 0 and info.stopped:
        return BUDGET_SPENT
    if status == 0 and any(record["goal"]["met"] is False for _, record in records):
        return GOAL_MISSED
    return status


NO_RECORD = "No record of the run was left; what it made is in the cache, and the same command writes it."


def leave(job: Job, walk: Walk, store: Store, info: RunInfo, measured: Measured) -> dict[str, Any]:
    """Write what the run leaves, and give its record; all of it is there or nothing."""
    files: dict[str, list[str]] = {}
    try:
        files = write_files(walk, store, job.folder)
        record = build_record(walk, store, info, files, measured)
        write_record(record, job.folder)
        write_config(job.spec.resolved, job.folder)
    except BaseException:
        take_back(job.folder, files)
        raise
    return record


def unwritten(error: Exception) -> str:
    """Why a record could not be left, and the way out."""
    if isinstance(error, OSError):
        return f"'{error.filename}' cannot be written: {error.strerror or error}. Make room, or choose another folder."
    return str(error)
