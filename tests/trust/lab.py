"""A second toy plug-in, for the tests that break things: stages with several blobs, sub-results and pauses."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qpipe.cache.store import Store
from qpipe.keys.hashing import digest_file, is_digest
from tests.nursery import MARK, Child, Nursery, marked
from tests.toy import Toy

SOURCE = '''
from __future__ import annotations
import os, time
from pathlib import Path
import numpy as np
from qpipe.stage import NULL, Context, Factory, Files, Scores, Statistics, stage
import lab_formula

def called(name):
    """One write of one line, so that writers side by side do not tear it."""
    log = os.open(os.environ["TOY_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(log, (name + "\\n").encode())
    os.close(log)

@stage(version=1)
def make(*, value: float = 1.0, rows: int = 3, pause_s: float = 0.0) -> Statistics:
    called(f"make-{value}")
    time.sleep(pause_s)
    arrays = {f"row{i}": np.arange(8 + i, dtype=np.float64) * value for i in range(rows)}
    return Statistics(arrays, {"value": value})

def layer(row, factor, i, pause_s):
    called(f"layer-{factor}-{i}")
    time.sleep(pause_s)
    return {"row": lab_formula.mix(row, factor + i)}

@stage(version=1)
def mix(parts: list[Statistics], *, factor: float = 1.0, layers: int = 2, pause_s: float = 0.0,
        fail_after: int = -1, ctx: Context = NULL) -> Statistics:
    called(f"mix-{factor}")
    row = sum(part.arrays["row0"] for part in parts)
    made = {}
    for i in range(layers):
        if i == fail_after:
            raise RuntimeError("it went wrong half-way")
        row = ctx.memo(f"layer{i}", layer, np.asarray(row), factor, i, pause_s)["row"]
        ctx.progress(i + 1, layers, "layers")
        made[f"row{i}"] = row
    return Statistics({"row0": np.asarray(row), **{f"layer{i}": row for i, row in enumerate(made.values())}}, {})

@stage(version=1)
def score(part: Statistics) -> Scores:
    called("score")
    return Scores({"score": float(part.arrays["row0"].sum()), "metric": "toy"})

@stage(version=1)
def sign(part: Statistics) -> Statistics:
    called("sign")
    return Statistics({"row0": np.sign(part.arrays["row0"])}, {})

@stage(version=1)
def gate(*, value: float = 1.0) -> Scores:
    """Waits as long as the file $LAB_GATE is there."""
    called("gate")
    while os.path.exists(os.environ["LAB_GATE"]):
        time.sleep(0.01)
    return Scores({"score": value, "metric": "toy"})

@stage(version=1, always=True)
def outside() -> Scores:
    """What the file $LAB_OUTSIDE holds now."""
    called("outside")
    return Scores({"score": float(Path(os.environ["LAB_OUTSIDE"]).read_text()), "metric": "toy"})

@stage(version=1)
def folder(*, path: Path) -> Scores:
    called("folder")
    found = sorted(str(file.relative_to(path)) + file.read_text() for file in path.rglob("*") if file.is_file())
    return Scores({"score": float(len(found)), "metric": "toy", "found": found})

@stage(version=1)
def factory(*, function: Factory) -> Scores:
    called("factory")
    from qpipe.param import load_factory
    return Scores({"score": float(load_factory(function)()), "metric": "toy"})

@stage(version=1)
def functions(*, functions: list[Factory]) -> Scores:
    called("functions")
    from qpipe.param import load_factory
    return Scores({"score": float(sum(load_factory(each)() for each in functions)) + 1, "metric": "toy"})

@stage(version=1)
def files(scores: Scores) -> Files:
    called("files")
    return Files({"score.txt": repr(scores.values["score"]).encode()})
'''

FORMULA = "def mix(row, factor):\n    return row * factor + 1\n"
STAGES = ("make", "mix", "score", "sign", "gate", "outside", "folder", "factory", "functions", "files")


class Lab(Toy):
    """The toy plug-in, the lab's beside it, and runs that are forked from a nursery."""

    def __init__(self, folder: Path, nursery: Nursery) -> None:
        super().__init__(folder, nursery)
        self.nursery = nursery
        self.mark = uuid.uuid4().hex
        self.cache = folder / "cache"
        self.gate = folder / "gate"
        self.outside = folder / "outside.txt"
        self.environment |= {MARK: self.mark, "LAB_GATE": str(self.gate), "LAB_OUTSIDE": str(self.outside)}
        self.source = folder / "plugin" / "lab_stages.py"
        self.source.write_text(SOURCE)
        self.lab_formula = folder / "plugin" / "lab_formula.py"
        self.lab_formula.write_text(FORMULA)
        with open(folder / "registered" / "toy-1.0.dist-info" / "entry_points.txt", "a") as points:
            points.write("".join(f"lab_{name} = lab_stages:{name}\n" for name in STAGES))
        self._runs = 0

    def begin(
        self,
        stages: Mapping[str, Any],
        *,
        workers: int = 0,
        cache: Path | None = None,
        fault: Mapping[str, Any] | None = None,
        folder: str | None = None,
        **run: Any,
    ) -> Child:
        """Fork a run of a pipeline, without Hydra; its record goes to outputs/`folder`."""
        self._runs += 1
        config = {
            "stages": stages,
            "run": {"workers": workers, "threads": 1, **run},
            "folder": f"outputs/{folder or self._runs}",
            "cache": {"dir": str(cache or self.cache)},
        }
        return self.nursery.start(self.folder, environment=self.environment, config=config, fault=fault)

    def finish(self, stages: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        """Run a pipeline to its good end; its record."""
        child = self.begin(stages, folder="finished", **options)
        assert child.wait() == 0, child.text()
        return self.record_of("finished")

    def record_of(self, folder: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "outputs" / folder / "record.json").read_text())
        return found

    def words(self, *arguments: str) -> Child:
        """Fork a run of the whole command line."""
        return self.nursery.start(
            self.folder, environment=self.environment, words=self.command(*arguments)[3:]
        )

    def survivors(self) -> list[int]:
        """The worker processes of this lab that still live (a fork shows the environment of its parent)."""
        return marked(self.mark)

    def seen(self) -> list[str]:
        """What was called since the last `calls`; to be asked while runs go on, which `calls` would rob of a line."""
        return self.log.read_text().split() if self.log.exists() else []

    def clear(self, cache: Path | None = None) -> None:
        """Remove a cache and every record."""
        shutil.rmtree(cache or self.cache, ignore_errors=True)
        shutil.rmtree(self.folder / "outputs", ignore_errors=True)
        for path in self.folder.glob("child-*.txt"):
            path.unlink()


def outputs(record: Mapping[str, Any]) -> dict[str, Any]:
    """{node: {port: digest}} of a record: what two runs have to agree in."""
    return {
        name: {port: made["digest"] for port, made in node["outputs"].items()}
        for name, node in record["nodes"].items()
    }


def half_written(cache: Path) -> list[str]:
    """The files in blobs/ that are not what their name says, and those in actions/ that are no results."""
    bad = [str(path) for path in cache.glob("blobs/*/*") if digest_file(path) != path.name]
    store = Store(cache, readonly=True)
    for path in cache.glob("actions/*/*"):
        key = path.name.removesuffix(".json")
        if not is_digest(key) or store.result(key) is None:
            bad.append(str(path))
    return bad


def incomplete(cache: Path) -> list[str]:
    """The keys whose results lack a blob."""
    store = Store(cache, readonly=True)
    found = ((key, store.result(key)) for key in list(store.keys()))
    return [key for key, result in found if result is not None and store.complete(result)]


def blobs(cache: Path) -> Sequence[Path]:
    return sorted(cache.glob("blobs/*/*"))


def flip(path: Path, at: float = 0.5) -> None:
    """Turn one bit of a file, at a share of its length."""
    content = bytearray(path.read_bytes())
    if content:
        content[min(int(len(content) * at), len(content) - 1)] ^= 1
    overwrite(path, bytes(content))


def overwrite(path: Path, content: bytes) -> None:
    """Put other bytes into a read-only file, in its place."""
    os.chmod(path, 0o644)
    path.write_bytes(content)
    os.chmod(path, 0o444)
