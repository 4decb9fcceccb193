"""Hydra's sweeper `qpipe`: its own one, for a launcher that composes all jobs before the first begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.types import Override

from hydra_plugins.qpipe.launcher import QpipeLauncher  # first: it has Hydra load its plugins

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper  # isort: skip


class QpipeSweeper(BasicSweeper):  # type: ignore[misc]  # hydra ships no types that mypy reads here
    """With the launcher `qpipe` every job is composed once, all of them before any runs, so that one bad value refuses
    the whole grid; its jobs are one graph whatever `max_batch_size` says. With any other launcher, Hydra's own."""

    def split_arguments(self, overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
        """The overrides of every job, in batches."""
        size = None if self._composes() else max_batch_size
        found: list[list[list[str]]] = BasicSweeper.split_arguments(overrides, size)
        return found

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Compose every job, where the launcher would not find a mistake before jobs run."""
        if not self._composes():
            super().validate_batch_is_legal(batch)

    def _composes(self) -> Any:
        return isinstance(self.launcher, QpipeLauncher)
