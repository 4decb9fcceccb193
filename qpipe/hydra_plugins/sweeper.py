"""Hydra's sweeper `qpipe`: its own one, for a launcher that composes all jobs before the first begins; with a
`sampler` a search, which asks for the next trial by what those before it came to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.qpipe.launcher import QpipeLauncher

GRID: Mapping[str, Any] = {"max_batch_size": None, "params": None}
SEARCH: Mapping[str, Any] = {
    "sampler": None,
    "max_trials": None,
    "budget_s": None,
    "objectives": ["score"],
    "within": {},
    "conditions": {},
    "seed": 0,
}
"""The options and what they are where nobody says otherwise: those of Hydra's own sweeper, and those of a search
(`qpipe.search.study.SearchOptions`)."""


class QpipeSweeper(Sweeper):  # type: ignore[misc]  # hydra ships no types that mypy reads here
    """With the launcher `qpipe` every job is composed once, all of them before any runs, so that one bad value refuses
    the whole grid; its jobs are one graph whatever `max_batch_size` says. With any other launcher, Hydra's own."""

    def __init__(
        self, max_batch_size: int | None = None, params: Mapping[str, str] | None = None, **search: Any
    ) -> None:
        self._given = (max_batch_size, params)
        self._search = {**SEARCH, **search}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        # Here, not above: when Hydra looks for plug-ins, it loads its own ones anew.
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

        self._own = BasicSweeper(*self._given)
        self._own.setup(hydra_context=hydra_context, task_function=task_function, config=config)
        self._task = task_function
        if isinstance(self._own.launcher, QpipeLauncher):
            self._own.max_batch_size = None
            self._own.validate_batch_is_legal = _composed_later

    def sweep(self, arguments: list[str]) -> Any:
        """Every combination of what is listed; with a `sampler`, those that it chooses."""
        if self._search["sampler"] is None:
            return self._own.sweep(arguments)
        from hydra_plugins.qpipe.searching import search

        return search(self._own, self._task, {key: _plain(value) for key, value in self._search.items()}, arguments)


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _composed_later(batch: Sequence[Sequence[str]]) -> None:
    """The launcher composes all jobs before any runs: that is when a mistake is found."""
