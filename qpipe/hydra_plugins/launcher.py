"""Hydra's launcher `qpipe`: hands all jobs of a sweep over at once, so that they become one graph."""

from __future__ import annotations

import gc
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobRuntime, JobStatus, filter_overrides
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write


class Trial(NamedTuple):
    """One job of a sweep, composed. While it is being looked at, `${hydra:…}` is of this job."""

    number: int
    config: DictConfig
    folder: Path
    overrides: tuple[str, ...]


class Asking(Protocol):
    """What a search is asked for."""

    def ask(self) -> tuple[int, Sequence[str]] | None:
        """The number of the next job and its overrides; None where there is no other."""


class QpipeLauncher(Launcher):  # type: ignore[misc]  # hydra ships no types that mypy reads here
    """Composes every job and gives them to the task's `qpipe_sweep`; runs a task without one as Hydra's own does."""

    def __init__(self, **_: Any) -> None:
        pass

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """What each job gave back, in order."""
        sweep = getattr(self.task_function, "qpipe_sweep", None)
        if sweep is None:
            return self._plainly(job_overrides, initial_job_idx)
        count = len(job_overrides)
        jobs = enumerate(job_overrides, initial_job_idx)
        return self._carry_out(jobs, lambda trials, folder: sweep(trials, count, folder), job_overrides)

    def search(self, study: Asking) -> list[JobReturn]:
        """As `launch`, of the jobs that `study` asks for, each while those before it may be under way."""
        jobs = iter(study.ask, None)
        return self._carry_out(jobs, lambda trials, folder: self.task_function.qpipe_search(trials, study, folder))

    def check(self, job_overrides: Sequence[Sequence[str]]) -> None:
        """Compose the jobs and have the task look at them; none is carried out."""
        before = Singleton.get_state()
        try:
            for overrides in job_overrides:
                config, folder = self._composed(0, list(overrides))
                with open_dict(config):
                    del config["hydra"]
                self.task_function.qpipe_check(Trial(0, config, folder, tuple(filter_overrides(overrides))))
        finally:
            Singleton.set_state(before)

    def _carry_out(
        self,
        jobs: Iterable[tuple[int, Sequence[str]]],
        task: Callable[[Iterator[Trial], Path], Sequence[float]],
        known: Sequence[Sequence[str]] = (),
    ) -> list[JobReturn]:
        """Give the jobs, composed as they are asked for, to `task`: what each gave back. Those that are `known`
        beforehand give something back even where they are not asked for."""
        gc.enable()  # the command line switched it off for one config; of a thousand, each leaves megabytes of cycles
        before = Singleton.get_state()
        returns: list[JobReturn] = []
        told = bool(self.config.hydra.callbacks)
        kept: list[bytes] = []

        def trials() -> Iterator[Trial]:
            for number, overrides in jobs:
                config, folder = self._composed(number, list(overrides))
                returns.append(self._return(config))
                if told:
                    kept.append(pickle.dumps(config))
                    self.hydra_context.callbacks.on_job_start(config=config, task_function=self.task_function)
                with open_dict(config):
                    del config["hydra"]
                _leave(config, folder)
                yield Trial(number, config, folder, tuple(filter_overrides(overrides)))

        try:
            scores = task(trials(), Path(str(self.config.hydra.sweep.dir)).absolute())
        finally:
            Singleton.set_state(before)
        returns += [JobReturn(overrides=list(each)) for each in known[len(returns) :]]  # behind a refused one
        for job, score in zip(returns, scores, strict=True):
            job.return_value, job.status = score, JobStatus.COMPLETED
        for job, config in zip(returns, kept, strict=False):
            self.hydra_context.callbacks.on_job_end(config=pickle.loads(config), job_return=job)
        return returns

    def _plainly(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        # Here, not above: when Hydra looks for plug-ins, it loads its own ones anew.
        from hydra._internal.core_plugins.basic_launcher import BasicLauncher

        own = BasicLauncher()
        own.setup(hydra_context=self.hydra_context, task_function=self.task_function, config=self.config)
        returns: Sequence[JobReturn] = own.launch(job_overrides, initial_job_idx)
        return returns

    def _composed(self, number: int, overrides: list[str]) -> tuple[DictConfig, Path]:
        """The config of a job, with Hydra told of it as Hydra does, and the job's folder."""
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        HydraConfig.instance().set_config(config)  # `${hydra:…}` in the names of the folders
        folder = (Path(str(config.hydra.sweep.dir)) / str(config.hydra.sweep.subdir)).absolute()
        for told in (config, HydraConfig.instance().cfg):
            with read_write(told.hydra.runtime), open_dict(told.hydra.runtime):
                told.hydra.runtime.output_dir = str(folder)
        return config, folder

    def _return(self, config: DictConfig) -> JobReturn:
        """What is known of a job before it runs. Not its config: of a thousand they would fill the memory."""
        task = OmegaConf.to_container(config.hydra.overrides.task)
        return JobReturn(overrides=task, working_dir=os.getcwd(), task_name=JobRuntime.instance().get("name"))


def _leave(config: DictConfig, folder: Path) -> None:
    """`.hydra/` with the three files that Hydra leaves for every job."""
    hydra = HydraConfig.instance().cfg
    if hydra is None or hydra.hydra.output_subdir is None:
        return
    place = folder / str(hydra.hydra.output_subdir)
    place.mkdir(parents=True, exist_ok=True)
    for name, part in (("config", config), ("hydra", hydra), ("overrides", hydra.hydra.overrides.task)):
        OmegaConf.save(part, place / f"{name}.yaml")
