"""Pipelines of toy stages, run in this process: no command line, no Hydra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from qpipe.cache.store import Store
from qpipe.language.spec import read_spec
from qpipe.plan.walk import Walk
from qpipe.run.sweep import Job, plan_jobs, run_jobs


class Quiet:
    """A watch that keeps what it is told."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.records: list[dict[str, Any]] = []
        self.failures: list[str] = []

    def started(self, node: str, stage: str) -> None: ...
    def progress(self, node: str, done: int, total: int, what: str) -> None: ...
    def finished(self, node: str, verdict: str, duration_s: float, notes: Sequence[str]) -> None: ...
    def planned_jobs(self, plans: Sequence[tuple[Job, Walk]]) -> None: ...

    def failed(self, node: str, message: str) -> None:
        self.failures.append(message)

    def message(self, text: str) -> None:
        self.messages.append(text)

    def ended_jobs(self, records: Sequence[tuple[Job, dict[str, Any]]]) -> None:
        self.records += [record for _, record in records]


def job(folder: Path, stages: Mapping[str, Any], name: str = "run", **rest: Any) -> Job:
    """A job of these nodes, its cache in `folder`/cache, its record in `folder`/`name`."""
    run = {"workers": 0, "threads": 1} | rest.pop("run", {})
    cache = {"dir": str(folder / "cache")} | rest.pop("cache", {})
    goal = rest.pop("goal", {"metric": "toy", "max_drop": 0.5})
    body = {"stages": stages, "goal": goal, "run": run, "cache": cache, **rest}
    return Job(read_spec(OmegaConf.create(body)), folder / name)


def carry_out(one: Job) -> tuple[int, Quiet]:
    """Run it against its cache: the exit status, and what the watch was told."""
    watch = Quiet()
    with Store(Path(str(one.spec.cache_dir))) as store:
        return run_jobs([one], store, watch, ["qpipe"]), watch


def keys(one: Job) -> dict[str, str]:
    """The key of every node whose result is in the cache."""
    with Store(Path(str(one.spec.cache_dir))) as store:
        (walk,) = plan_jobs([one], store)
        found = walk.verdicts()
    return {name: outcome.key for name, outcome in found.items() if outcome.state == "hit" and outcome.key}
