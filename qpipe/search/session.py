"""One sitting of a search: what the study asks for becomes jobs, what comes of them is told to the study and written
to the files of the sweep."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from qpipe.errors import ConfigError
from qpipe.report.figures import rank
from qpipe.run.sweep import Job
from qpipe.run.swept import Swept, Trial, read
from qpipe.search.study import Study

WRITTEN_S = 5.0
"""The files of the sweep are written at most so often, and at the end."""
STOPPED = ("interrupted", "budget_spent")
"""A trial that ended so is not over: it is asked for again when the search goes on."""


class Numbered(Protocol):
    """A trial that was composed."""

    @property
    def number(self) -> int: ...


class Session:
    """Iterate over it for the jobs; `tell` it of each."""

    def __init__(
        self,
        study: Study,
        swept: Swept,
        trials: Iterator[Numbered],
        make: Callable[[Any], Job],
        say: Callable[[str], None],
    ) -> None:
        """`make` makes the job of a trial, or raises ConfigError: then the trial has failed, and `say` is told why."""
        self._study, self._swept, self._make, self._say = study, swept, make, say
        self._trials = trials
        self._asked: dict[int, tuple[float, int]] = {}
        self._best: tuple[float, ...] | None = None
        self._written = time.monotonic()
        self.refused = 0
        """The exit status of the trials that no job could be made of."""
        if known := read([Trial(*each) for each in study.done()]):
            swept.take(known)
            for _, record in known:
                self._is_best(record["figures"])

    def __iter__(self) -> Iterator[Job]:
        for trial in self._trials:
            self._asked[trial.number] = (math.nan, 1)
            try:
                job = self._make(trial)
            except ConfigError as error:
                self._say(f"qpipe: {error}")
                self.refused = error.exit_code
                self._study.tell(trial.number, None)
                continue
            yield dataclasses.replace(job, number=trial.number, swept=self._swept)

    def tell(self, job: Job, record: Mapping[str, Any] | None) -> bool:
        """What came of a job; whether it is the best so far. Errors: ConfigError where the study cannot judge by it."""
        number = job.number or 0
        if record is None:
            self._study.tell(number, None)
            return False
        self._swept.take([(Trial(number, job.overrides, job.folder), record)])
        if time.monotonic() - self._written > WRITTEN_S:
            self._swept.write()
            self._written = time.monotonic()
        figures, status = record["figures"], record["status"]
        self._asked[number] = (math.nan if figures["score"] is None else figures["score"], int(status == "failed"))
        if status in STOPPED:
            return False
        self._study.tell(number, None if status == "failed" else figures, job.folder)
        return status != "failed" and self._is_best(figures)

    def close(self) -> None:
        """Write the files of the sweep; others may go on with the study."""
        self._study.close()
        if self._swept.trials:
            self._swept.write()

    @property
    def scores(self) -> list[tuple[float, int]]:
        """The score of each trial that was asked for, nan for none, and the exit status that it ends with."""
        return list(self._asked.values())

    def _is_best(self, figures: Mapping[str, float | None]) -> bool:
        found = rank(self._study.options.objectives[0], self._study.options.within, figures)
        best = found is not None and (self._best is None or found > self._best)
        self._best = found if best else self._best
        return best
