"""What a sweep leaves beside its trials: `sweep.json`, made of their records, so under every launcher."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qpipe.run.record import RECORD, json_text
from qpipe.writing import write_whole

SWEEP = "sweep.json"


@dataclasses.dataclass(frozen=True)
class Trial:
    """One job of a sweep: its number, what it overrode, and the folder that it leaves its record in."""

    number: int
    overrides: tuple[str, ...]
    folder: Path


@dataclasses.dataclass
class Swept:
    """What `sweep.json` in `folder` says: every distinct action once, and each trial, of all batches so far."""

    folder: Path
    actions: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    trials: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    batches: int = 0

    def add(self, trials: Sequence[tuple[Trial, Mapping[str, Any]]]) -> None:
        """Take a batch of trials in, each with its record, and write the file."""
        self.batches += 1
        for trial, record in trials:
            self.trials.append(_trial(trial, record))
            for name, node in record["nodes"].items():
                key = node["key"]
                if key is not None and (key not in self.actions or node["verdict"] == "ran"):
                    self.actions[key] = _action(name, node)
        text = json_text({"schema": 1, "actions": self.actions, "trials": self.trials})
        write_whole(self.folder / SWEEP, text)


def so_far(swept: Swept) -> list[Trial]:
    """The trials of all batches."""
    return [Trial(each["number"], tuple(each["overrides"]), Path(each["run_dir"])) for each in swept.trials]


def read(trials: Sequence[Trial]) -> list[tuple[Trial, dict[str, Any]]]:
    """Those of the trials that left a record, with it."""
    paths = [(trial, trial.folder / RECORD) for trial in trials]
    return [(trial, json.loads(path.read_text())) for trial, path in paths if path.exists()]


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
        "scores": {step["node"]: step["score"] for step in record["ladder"]},
        "keys": {name: node["key"] for name, node in nodes.items()},
    }
