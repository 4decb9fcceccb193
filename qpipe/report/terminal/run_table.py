"""Runs side by side: what they were asked for where that differs, what they scored, what they took."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from qpipe.report import facts, text
from qpipe.report.terminal.leaderboard import reached, values, varying
from qpipe.report.terminal.table import table
from qpipe.report.text import clip

WIDEST = 40


class Run(NamedTuple):
    """A run as it is shown: the name of its folder, and its record."""

    name: str
    record: Mapping[str, Any]

    @property
    def given(self) -> dict[str, str]:
        """{key: value} of the overrides of its command."""
        words = [str(word) for word in self.record.get("command") or ()]
        gone = [f"{word.partition('=')[0]}=" for word in words if word.startswith("~")]  # Hydra adds `null` in a sweep
        return values([*gone, *(word for word in words if "=" in word and not word.startswith("~"))])

    @property
    def score(self) -> float | None:
        """What the goal is asked of; of no goal, the last that was scored."""
        return reached(self.record)

    @property
    def drop(self) -> float | None:
        """Float's score less its own."""
        reference = facts.real((self.record.get("goal") or {}).get("float"))
        return None if self.score is None or reference is None else reference - self.score

    @property
    def cpu_s(self) -> float | None:
        """Processor time that it spent itself."""
        return facts.real((self.record.get("totals") or {}).get("cpu_s"))

    @property
    def metric(self) -> str:
        """What its score is measured in."""
        return str((self.record.get("goal") or {}).get("metric") or "")


ORDERS: Mapping[str, Callable[[Run], Any]] = {
    "started": lambda run: str(run.record.get("started")),
    "score": lambda run: -math.inf if run.score is None else run.score,
    "drop": lambda run: -math.inf if run.drop is None else -run.drop,
    "cpu": lambda run: -(run.cpu_s or 0.0),
    "name": lambda run: run.name,
}
"""What runs can be sorted by, the largest first: the newest, the best, the quickest."""


def ordered(runs: Sequence[Run], by: str) -> list[Run]:
    """`runs` by one of `ORDERS`, or by the override of that name, as numbers where they are."""

    def override(run: Run) -> tuple[bool, float, str]:
        value = run.given.get(by, "")
        try:
            return True, float(value), value
        except ValueError:
            return False, 0.0, value

    if by in ORDERS:
        return sorted(runs, key=ORDERS[by], reverse=by != "name")
    return sorted(runs, key=override)


def chosen(run: Run, wanted: Mapping[str, str]) -> bool:
    """Whether the run has all the values `wanted`, by the name of an override, or of status, metric or name."""
    own = {"status": str(run.record.get("status")), "metric": run.metric, "name": run.name, **run.given}
    return all(own.get(key) == value for key, value in wanted.items())


def run_table(runs: Sequence[Run]) -> list[str]:
    """Lines for `runs`, in their order: a column for each override that is not the same in all; as wide
    as they have to be, since names of runs are there to be copied."""
    if not runs:
        return ["no runs"]
    columns = varying([[f"{key}={value}" for key, value in run.given.items()] for run in runs])
    rows: list[tuple[str, ...]] = [("run", *columns, "status", "score", "metric", "change", "cpu")]
    for run in runs:
        rows.append(
            (
                run.name,
                *(clip(run.given.get(key, ""), WIDEST) for key in columns),
                str(run.record.get("status")).replace("_", " "),
                text.score(run.score, run.metric),
                run.metric,
                text.change(run.drop, run.metric),
                "" if run.cpu_s is None else text.duration(run.cpu_s),
            )
        )
    right = [len(columns) + 2, len(columns) + 4, len(columns) + 5]
    return [line.rstrip() for block in table(rows, 1, right=right) for line in block]


def run_json(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The same as JSON values."""
    return [
        {
            "run": run.name,
            "started": run.record.get("started"),
            "overrides": run.given,
            "status": run.record.get("status"),
            "metric": run.metric,
            "score": run.score,
            "drop": run.drop,
            "cpu_s": run.cpu_s,
        }
        for run in runs
    ]
