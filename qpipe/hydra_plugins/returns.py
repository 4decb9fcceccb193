"""What a trial gives back to whoever swept over it: the score that the goal asks for, and how the trial ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus


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


@contextmanager
def watching() -> Iterator[list[int]]:
    """The exit statuses of the trials that are launched within, whichever launcher it is, in whichever process."""
    found: list[int] = []
    plugins = Plugins.instance()
    instantiate = plugins.instantiate_launcher

    def watched(*rest: Any, **options: Any) -> Any:
        launcher = instantiate(*rest, **options)
        launch = launcher.launch

        def noting(*rest: Any, **options: Any) -> Any:
            returns = launch(*rest, **options)
            for each in returns:
                value = each._return_value  # `return_value` would raise what the trial raised
                if isinstance(value, Score | NoScore):
                    found.append(value.status)
                elif each.status != JobStatus.COMPLETED:
                    found.append(1)
            return returns

        launcher.launch = noting
        return launcher

    plugins.instantiate_launcher = watched
    try:
        yield found
    finally:
        plugins.instantiate_launcher = instantiate
