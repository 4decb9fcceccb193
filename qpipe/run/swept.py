"""What a sweep leaves beside its trials, made of their records, so under every launcher: `sweep.json`, `sweep.csv`."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qpipe.run.record import RECORD, json_text
from qpipe.writing import write_whole

SWEEP = "sweep.json"
TABLE = "sweep.csv"


@dataclasses.dataclass(frozen=True)
class Trial:
    """One job of a sweep: its number, what it overrode, and the folder that it leaves its record in."""

    number: int
    overrides: tuple[str, ...]
    folder: Path


@dataclasses.dataclass
class Swept:
    """What `sweep.json` in `folder` says: every distinct action once, and each trial, of all batches so far;
    `sweep.csv` has a row for each trial: what it overrode, what came of it, and the command that carries it out
    again."""

    folder: Path
    actions: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    trials: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    batches: int = 0
    search: Mapping[str, Any] | None = None
    """What was searched for, where the trials are those of a search: `objectives` and `within`."""

    def add(self, trials: Sequence[tuple[Trial, Mapping[str, Any]]]) -> None:
        """Take a batch of trials in, each with its record, and write the files."""
        self.take(trials)
        self.write()

    def take(self, trials: Sequence[tuple[Trial, Mapping[str, Any]]]) -> None:
        """Take a batch of trials in, each with its record, in place of those with its number; `write` is to follow."""
        self.batches += 1
        numbers = {trial.number for trial, _ in trials}
        self.trials = [each for each in self.trials if each["number"] not in numbers]
        for trial, record in trials:
            self.trials.append(_trial(trial, record))
            for name, node in record["nodes"].items():
                key = node["key"]
                if key is not None and (key not in self.actions or node["verdict"] == "ran"):
                    self.actions[key] = _action(name, node)

    def write(self) -> None:
        """Write the files, the trials in the order of their numbers."""
        trials = sorted(self.trials, key=lambda each: int(each["number"]))
        aim = {} if self.search is None else {"search": dict(self.search)}
        text = json_text({"schema": 1, **aim, "actions": self.actions, "trials": trials})
        write_whole(self.folder / SWEEP, text)
        write_whole(self.folder / TABLE, _table(trials))


def so_far(swept: Swept) -> list[Trial]:
    """The trials of all batches."""
    return [Trial(each["number"], tuple(each["overrides"]), Path(each["run_dir"])) for each in swept.trials]


def read(trials: Sequence[Trial]) -> list[tuple[Trial, dict[str, Any]]]:
    """Those of the trials that left a record, with it."""
    paths = [(trial, trial.folder / RECORD) for trial in trials]
    return [(trial, json.loads(path.read_text())) for trial, path in paths if path.exists()]


def _table(trials: Sequence[Mapping[str, Any]]) -> str:
    """The trials as CSV."""
    given = [dict(word.partition("=")[::2] for word in each["overrides"]) for each in trials]
    keys = list(dict.fromkeys(key for each in given for key in each))
    known = (name for each in trials for name, found in each["figures"].items() if found is not None)
    figures = list(dict.fromkeys(known))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["number", *keys, "status", *figures, "cpu_s", "run_dir", "command"])
    for each, values in zip(trials, given, strict=True):
        found = [each["figures"].get(name) for name in figures]
        rest = [each["cpu_s"], each["run_dir"], shlex.join(each["command"])]
        table.writerow([each["number"], *(values.get(key, "") for key in keys), each["status"], *found, *rest])
    return text.getvalue()


def _action(name: str, node: Mapping[str, Any]) -> dict[str, Any]:
    cost = {"duration_s": node["original_duration_s"], "cpu_s": node["original_cpu_s"]}
    return {"node": name, "verdict": node["verdict"], **cost}


def _trial(trial: Trial, record: Mapping[str, Any]) -> dict[str, Any]:
    nodes = record["nodes"]
    read = {source for source, target, _ in record["edges"] if target in nodes}
    return {
        "number": trial.number,
        "overrides": list(trial.overrides),
        "run_dir": str(trial.folder),
        "status": record["status"],
        "leaves": [name for name in nodes if name not in read],
        "goal": record["goal"],
        "best": record["best"],
        "figures": record["figures"],
        "cpu_s": record["totals"]["cpu_s"],
        "command": record["command"],
        "scores": {step["node"]: step["score"] for step in record["ladder"]},
        "keys": {name: node["key"] for name, node in nodes.items()},
    }
