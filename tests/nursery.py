"""Runs of qpipe that cost 0.1 s instead of 0.6: real processes, forked from a parent that has imported everything.

`Nursery` starts the parent; `start` forks a child that runs a command line, or a pipeline given as a mapping without
Hydra. A child is a process like any other: it has its own pid, can be killed, and spawns real workers.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[1]
MARK = "QPIPE_TEST_MARK"
Order = dict[str, Any]


class Child:
    """A forked run. `status` is the exit status, or minus the signal that ended it."""

    def __init__(self, nursery: Nursery, pid: int, output: Path) -> None:
        self._nursery = nursery
        self.pid = pid
        self._output = output
        self.status: int | None = None

    def kill(self) -> None:
        """SIGKILL, unless it has been waited for."""
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout_s: float = 60.0) -> int:
        """Its status; AssertionError, with what it printed, where it takes longer than `timeout_s`."""
        if self.status is None:
            self.status = self._nursery.ask({"wait": self.pid, "timeout_s": timeout_s})["status"]
        if self.status is None:
            self.kill()
            raise AssertionError(f"a run hangs: {self.text()}")
        return self.status

    def text(self) -> str:
        """What it printed, standard output and standard error together."""
        return self._output.read_text(errors="replace") if self._output.exists() else ""


class Nursery:
    """The parent. Its children find `path` on Python's path and have `environment` besides its own."""

    def __init__(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.nursery"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._count = 0
        self._said = tempfile.TemporaryDirectory(prefix="qpipe-nursery-")
        assert self.ask({"hello": True}) == {"hello": True}

    def __enter__(self) -> Nursery:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._said.cleanup()

    def ask(self, question: Order) -> Order:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer: Order = json.loads(self._process.stdout.readline())
        return answer

    def start(
        self,
        folder: Path,
        *,
        environment: Mapping[str, str],
        words: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
        fault: Mapping[str, Any] | None = None,
    ) -> Child:
        """Fork a run in `folder`: of the command line `words`, or of the composed `config`.

        `fault` is given to `tests.trust.faults.arm` in the child before anything else happens.
        """
        self._count += 1
        output = folder / f"child-{self._count}.txt"
        order = {
            "folder": str(folder),
            "output": str(output),
            "errors": str(output),
            "environment": dict(environment),
            "words": list(words),
            "config": config,
            "fault": fault,
        }
        return Child(self, self.ask({"start": order})["pid"], output)

    def run(
        self, folder: Path, words: Sequence[str], environment: Mapping[str, str], timeout_s: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        """What `python -m qpipe` with these words does in `folder`, to its end; nothing but its own is left there.

        Unlike a fresh interpreter it ends without `atexit`, and what `_warm_up` imports is there from the beginning.
        """
        self._count += 1
        output, errors = (Path(self._said.name) / f"{name}-{self._count}" for name in ("output", "errors"))
        order = {
            "folder": str(folder),
            "output": str(output),
            "errors": str(errors),
            "environment": dict(environment),
            "words": list(words),
            "config": None,
            "fault": None,
        }
        status = Child(self, self.ask({"start": order})["pid"], errors).wait(timeout_s)
        said = [path.read_text() for path in (output, errors)]
        for path in (output, errors):
            path.unlink()
        return subprocess.CompletedProcess(["qpipe", *words], status, *said)


def marked(mark: str) -> list[int]:
    """The pids of the living processes whose environment holds `MARK`=`mark`."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            environment = Path(entry.path, "environ").read_bytes().split(b"\0")
            state = Path(entry.path, "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # it ended meanwhile
            continue
        if wanted in environment and state != "Z":
            found.append(int(entry.name))
    return found


def _serve() -> None:
    """The parent's side: orders on standard input, answers on standard output."""
    _warm_up()
    for line in sys.stdin:
        order = json.loads(line)
        if "start" in order:
            pid = os.fork()
            if pid == 0:
                _be_child(order["start"])
            answer: Order = {"pid": pid}
        elif "wait" in order:
            answer = {"status": _await(order["wait"], order["timeout_s"])}
        else:
            answer = order
        print(json.dumps(answer), flush=True)


def _warm_up() -> None:
    import importlib

    engine = ("cli.main", "cli.run_commands", "run.sweep", "cache.cleanup", "keys.code")
    for name in (*engine, "report.terminal.terminal", "report.page.html"):
        importlib.import_module(f"qpipe.{name}")
    for name in ("diskcache", "filelock", "networkx", "numpy", "safetensors.numpy", "yaml", "platformdirs"):
        importlib.import_module(name)
    from qpipe.language.catalog import catalog

    list(catalog().values())
    catalog.cache_clear()
    gc.collect()
    gc.freeze()  # no child looks through what is here, which would copy its pages


def _await(pid: int, timeout_s: float) -> int | None:
    started = now = time.monotonic()
    while now - started < timeout_s:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(min(max((now - started) / 50, 0.001), 0.02))  # in 2 % of its time, and the CPU has others to serve
        now = time.monotonic()
    return None


def _be_child(order: Order) -> None:
    """Run what is ordered and end; standard input and output are those of the run from here on."""
    status = 70
    try:
        empty = os.open(os.devnull, os.O_RDONLY)
        output, errors = (
            os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) for name in ("output", "errors")
        )
        for old, new in ((empty, 0), (output, 1), (errors, 2)):
            os.dup2(old, new)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        os.chdir(order["folder"])
        os.environ.clear()
        os.environ.update(order["environment"])
        parts = order["environment"].get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:1] = [order["folder"], *filter(None, parts)]
        if order["fault"]:
            from tests.trust.faults import arm

            arm(**order["fault"])
        status = run_config(order["config"]) if order["config"] is not None else _run_words(order["words"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _run_words(words: Sequence[str]) -> int:
    from qpipe.cli.main import run

    gc.disable()  # as `main` does
    sys.argv = ["qpipe", *words]
    return run(words)


def run_config(config: Mapping[str, Any]) -> int:
    """What `qpipe` does with a composed config, without Hydra; the record is left in `config["folder"]`."""
    from omegaconf import OmegaConf

    from qpipe.cli.run_commands import run
    from qpipe.errors import QpipeError
    from qpipe.language.spec import read_spec
    from qpipe.run.sweep import Job

    plain = {"goal": {"metric": "toy", "max_drop": 0.5}, **config}
    folder = Path(plain.pop("folder", "outputs/run"))
    try:
        return run([Job(read_spec(OmegaConf.create(plain)), folder.absolute())])
    except QpipeError as error:
        print(f"qpipe: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    _serve()
