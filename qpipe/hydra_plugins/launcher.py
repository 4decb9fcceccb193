"""Hydra's launcher `qpipe`: hands all jobs of a sweep over at once, so that they become one graph."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict


class QpipeLauncher(Launcher):  # type: ignore[misc]  # hydra ships no types that mypy reads here
    """Composes every job and gives the list to the task's `qpipe_sweep`."""

    def __init__(self, **_: Any) -> None:
        self._context: HydraContext | None = None
        self._config: DictConfig | None = None
        self._task: TaskFunction | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._context, self._task, self._config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        assert self._context is not None
        gc.enable()  # the command line switched it off for one config; of a thousand, each leaves megabytes of cycles
        jobs = []
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            config = self._context.config_loader.load_sweep_config(self._config, list(overrides))
            with open_dict(config):
                config.hydra.job.id = config.hydra.job.num = number
            HydraConfig.instance().set_config(config)
            folder = Path(str(config.hydra.sweep.dir)) / str(config.hydra.sweep.subdir)
            task_config = config.copy()
            with open_dict(task_config):
                del task_config["hydra"]
            jobs.append((task_config, folder.absolute(), tuple(filter_overrides(overrides))))
        self._task.qpipe_sweep(jobs)  # type: ignore[union-attr]
        done = JobReturn(status=JobStatus.COMPLETED)
        done.return_value = None
        return [done for _ in jobs]
