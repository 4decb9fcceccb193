"""A plug-in with toy stages, written to a folder: what the engine's tests run through the real command line.

Stages: `number` makes Scores from a param, `add` adds a param to what comes in, `total` sums many, `read` reads a file,
`boom` does what it says. Every call appends a line to the file named by $TOY_LOG. `add` may take its time, in ticks of
$TOY_TICK_S seconds, 0.1 where that is not set.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from qpipe.language.catalog import catalog
from tests.nursery import Nursery

SOURCE = '''
from __future__ import annotations
import os, time
from pathlib import Path
from typing import Annotated
from qpipe.errors import InputError
from qpipe.stage import NULL, Context, Files, Range, Scores, stage
import toy_formula

def called(name):
    with open(os.environ["TOY_LOG"], "a") as log:
        log.write(name + "\\n")

@stage(version=1)
def number(*, value: Annotated[float, Range(ge=-1000, le=1000)] = 1.0) -> Scores:
    called("number")
    return Scores({"score": value, "metric": "toy"})

def tick(i):
    called("tick")
    time.sleep(float(os.environ.get("TOY_TICK_S", "0.1")))
    return i

@stage(version=1)
def add(scores: Scores, *, amount: int = 1, seconds: float = 0.0, ctx: Context = NULL) -> Scores:
    """Adds."""
    called("add")
    for i in range(int(seconds * 10)):
        ctx.memo("tick", tick, i)
        ctx.progress(i + 1, int(seconds * 10), "ticks")
    return Scores({"score": toy_formula.add(scores.values["score"], amount), "metric": "toy"})

@stage(version=1)
def total(scores: list[Scores]) -> Scores:
    called("total")
    return Scores({"score": sum(one.values["score"] for one in scores), "metric": "toy"})

@stage(version=1)
def sign(scores: Scores) -> Scores:
    called("sign")
    return Scores({"score": 1.0 if scores.values["score"] > 0 else -1.0, "metric": "toy"})

@stage(version=1)
def read(*, path: Path) -> Scores:
    called("read")
    return Scores({"score": float(path.read_text()), "metric": "toy"})

@stage(version=1)
def boom(scores: Scores, *, how: str = "raise") -> Scores:
    called("boom")
    if how == "kill":
        os.kill(os.getpid(), 9)
    raise RuntimeError("it went wrong")

def no_zero(params):
    if params["limit"] == 0:
        raise ValueError("a limit of 0 refuses everything.")

@stage(version=1, check=no_zero)
def refuse(scores: Scores, *, limit: float = 1.0) -> Scores:
    called("refuse")
    if scores.values["score"] > limit:
        raise InputError(f"the score is above {limit}.")
    return scores

@stage(version=1, not_after={"cle": "pruned channels cannot be told"}, not_before={"bnf": "pruning comes last"})
def prune(model: "Network") -> "Network":
    return model

@stage(version=1)
def handed(model: "Model", networks: list["Network"]) -> Scores:
    names = [type(each).__name__ for each in (model, *networks)]
    return Scores({"score": float(len(model.layers())), "metric": "toy", "types": names})

@stage(version=1)
def files(scores: Scores) -> Files:
    called("files")
    return Files({"score.txt": str(scores.values["score"]).encode()})
'''

FORMULA = "def add(a, b):\n    return a + b\n"
STAGES = ("number", "add", "total", "sign", "read", "boom", "refuse", "files", "prune", "handed")


class Toy:
    """The plug-in in `folder`, and the command line beside it, forked from a `nursery` where there is one."""

    def __init__(self, folder: Path, nursery: Nursery | None = None) -> None:
        self.folder = folder
        self._nursery = nursery
        self.log = folder / "calls.log"
        plug_in = folder / "plugin"
        plug_in.mkdir(parents=True)
        info = (
            folder / "registered" / "toy-1.0.dist-info"
        )  # elsewhere: a folder of distributions counts as installed
        info.mkdir(parents=True)
        (plug_in / "toy_stages.py").write_text(SOURCE)
        self.formula = plug_in / "toy_formula.py"
        self.formula.write_text(FORMULA)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
        lines = "".join(f"toy_{name} = toy_stages:{name}\n" for name in STAGES)
        (info / "entry_points.txt").write_text("[qpipe.stages]\n" + lines)
        (folder / "conf" / "pipeline").mkdir(parents=True)
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(plug_in), str(info.parent)]),
            "TOY_LOG": str(self.log),
            "QPIPE_CACHE_DIR": str(folder / "cache"),
        }

    def pipeline(self, stages: Mapping[str, Any], **rest: Any) -> None:
        """Make `stages` the pipeline `toy`; no model, no data."""
        body = {"stages": stages, "goal": {"metric": "toy", "max_drop": 0.5}, **rest}
        text = "# @package _global_\n" + json.dumps(body)
        (self.folder / "conf" / "pipeline" / "toy.yaml").write_text(text)

    def command(self, *arguments: str) -> list[str]:
        words = arguments if arguments else ("run",)
        if words[0] in ("diff", "runs"):  # compose no config
            return [sys.executable, "-m", "qpipe", *words]
        subject = [] if words[0] not in ("why", "verify", "graph", "cache") else list(words[1:2])
        command, rest = [words[0], *subject], list(words[1 + len(subject) :])
        return [
            sys.executable,
            "-m",
            "qpipe",
            *command,
            "--config-dir",
            str(self.folder / "conf"),
            "pipeline=toy",
            "~model",
            "~data",
            *rest,
        ]

    def run(
        self, *arguments: str, cwd: Path | None = None, timeout: float = 120, fresh: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Run the command line to its end; `fresh`: in an interpreter that has imported nothing yet."""
        if self._nursery is not None and not fresh:
            words = self.command(*arguments)[3:]
            return self._nursery.run(cwd or self.folder, words, self.environment, timeout)
        return subprocess.run(
            self.command(*arguments),
            env=self.environment,
            cwd=cwd or self.folder,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def calls(self) -> list[str]:
        """The stages that were called since the last look."""
        found = self.log.read_text().split() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return found

    def record(self) -> dict[str, Any]:
        """The record of the last run."""
        paths = sorted(
            (self.folder / "outputs").glob("*/*/record.json"), key=lambda path: path.stat().st_mtime_ns
        )
        found: dict[str, Any] = json.loads(paths[-1].read_text())
        return found


@contextlib.contextmanager
def in_this_process(toy: Toy) -> Iterator[Toy]:
    """`catalog()` knows the stages of `toy` until the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(toy.folder / "plugin")
        patch.syspath_prepend(toy.folder / "registered")
        patch.setenv("TOY_LOG", str(toy.log))
        catalog.cache_clear()
        yield toy
    catalog.cache_clear()
    for name in ("toy_stages", "toy_formula"):
        sys.modules.pop(name, None)
