"""What a machine of the cluster is: whether it sees the cache, gives the keys that are given here, and what it has.

A program of its own (`python -m qpipe.run.cluster.survey`, JSON in and out), so that the worker's process imports
nothing of a person's.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qpipe.cache.store import Store
from qpipe.errors import ConfigError
from qpipe.language.catalog import catalog
from qpipe.language.spec import NodeSpec
from qpipe.plan.keyring import Keyring
from qpipe.plan.verdicts import OF_STAGE
from qpipe.run.machine import devices, memory_gb

_PATIENCE_S = 120.0

Question = dict[str, Any]
"""`root` of the cache, the `probe` that lies in it, the working `folder`, and for every stage by its name what its keys
are made of: the ingredients OF_STAGE."""


def ask(question: Question) -> dict[str, Any]:
    """The answer of a process in `folder`, where that is there: `host`, `sees` (the probe), `gpus`, `memory_gb`,
    `libraries` that have another version here ({name: version or null}), `stages` of other code or that are not there.
    `error` alone where there is none."""
    folder = question["folder"] if os.path.isdir(question["folder"]) else tempfile.gettempdir()
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=_PATIENCE_S,
    )
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["it says nothing"])[-1]}
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def survey(question: Question) -> dict[str, Any]:
    """As `ask`, in this process."""
    root = Path(question["root"])
    sees = Store(root).has(question["probe"])
    with tempfile.TemporaryDirectory() as scratch, Store(root if sees else Path(scratch)) as store:
        libraries, stages = _apart(question["stages"], Keyring(store))
    return {
        "host": socket.gethostname(),
        "sees": sees,
        "gpus": len(devices()),
        "memory_gb": memory_gb(),
        "libraries": libraries,
        "stages": stages,
    }


def _apart(asked: Mapping[str, Mapping[str, Any]], keyring: Keyring) -> tuple[dict[str, str | None], list[str]]:
    """What is another here."""
    libraries: dict[str, str | None] = {}
    stages = []
    for name, theirs in asked.items():
        try:
            stage = catalog().find(name, "stages")
            here = keyring.ingredients(NodeSpec(name, stage, {}, {}, {}), {})
        except ConfigError:
            stages.append(name)
            continue
        libraries |= {
            each: here["libraries"].get(each)
            for each in (*theirs["libraries"], *here["libraries"])
            if here["libraries"].get(each) != theirs["libraries"].get(each)
        }
        if any(here[each] != theirs[each] for each in OF_STAGE if each != "libraries"):
            stages.append(name)
    return libraries, stages


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())  # as where actions run
    answered, sys.stdout = sys.stdout, sys.stderr  # a stage's module may print
    print(json.dumps(survey(json.load(sys.stdin))), file=answered)
