"""What a trial gives back to whoever swept over it: the score that the goal asks for, and how the trial ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class Score(float):
    """The score of a trial, nan for none; `status` is the exit status that a run of its own would end with."""

    status: int

    def __new__(cls, value: float, status: int = 0) -> Score:
        score = super().__new__(cls, value)
        score.status = status
        return score

    def __reduce__(self) -> tuple[type[Score], tuple[float, int]]:
        return Score, (float(self), self.status)  # so that it comes back from a launcher's process


class NoScore(Exception):
    """A trial ended without a score, where a sweeper asked for one."""

    def __init__(self, overrides: str, status: int) -> None:
        super().__init__(overrides, status)
        self.overrides, self.status = overrides, status

    def __str__(self) -> str:
        return (
            f"the trial '{self.overrides}' has no score for the sweeper (exit status {self.status}). Its own lines say "
            "why it failed; where it did not, set goal.scores to a node that scores."
        )


class Returned(NamedTuple):
    """A trial that a launcher is through with: its exit status; where its config came back too, its number, overrides
    and folder; and the folder of the sweep."""

    status: int
    sweep: Path
    number: int = 0
    overrides: tuple[str, ...] = ()
    folder: Path | None = None


def returned(job: JobReturn, sweep: Path) -> Returned:
    """What a launcher gives back for a job, read."""
    value = job._return_value  # `return_value` would raise what the trial raised
    status = getattr(value, "status", 0 if job.status == JobStatus.COMPLETED else 1)
    if job.hydra_cfg is None:
        return Returned(status, sweep)
    hydra = job.hydra_cfg.hydra
    return Returned(status, sweep, int(hydra.job.num), tuple(job.overrides), Path(str(hydra.runtime.output_dir)))


@contextmanager
def watching() -> Iterator[list[Returned]]:
    """The trials that are launched within, whichever launcher it is, in whichever process."""
    found: list[Returned] = []
    plugins = Plugins.instance()
    instantiate = plugins.instantiate_launcher

    def watched(hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> Launcher:
        launcher = instantiate(hydra_context=hydra_context, task_function=task_function, config=config)
        launch, sweep = launcher.launch, Path(str(config.hydra.sweep.dir)).absolute()

        def noting(*rest: Any, **options: Any) -> Sequence[JobReturn]:
            returns: Sequence[JobReturn] = launch(*rest, **options)
            found.extend(returned(each, sweep) for each in returns)
            return returns

        launcher.launch = noting
        return launcher

    plugins.instantiate_launcher = watched
    try:
        yield found
    finally:
        plugins.instantiate_launcher = instantiate
