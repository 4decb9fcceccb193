"""A copy of the tree in which tests run against a mutant, in processes forked from one that has the libraries loaded.

The project's environment imports qpipe from the original tree. So the copy has a thin environment of its own, behind
whose own folder comes the copy, then the packages of the project's; what tests start as `sys.executable` sees the same.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

from tests.mutants.mutant import BrokenMutantError, Mutant

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120.0
"""A mutant whose tests take longer than this is noticed: it hangs."""
_COPIED = ("qpipe", "stages", "conf", "tests", "pyproject.toml")
_LIBRARIES = (
    *("_pytest.assertion.rewrite", "hypothesis", "numpy", "scipy.optimize", "torch.fx", "onnx.reference", "onnx_ir"),
    *("onnxruntime", "hydra.utils", "hydra.compose", "networkx", "diskcache", "filelock", "safetensors.numpy"),
)
_PASSED, _FAILED = 0, 1
"""Exit statuses of pytest; that of a module that cannot be imported is another, and no sign of a test."""


class Workplace:
    """A copy of the tree, as a context: it is removed at the end."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mutants-")
        self.root = Path(self._folder.name) / "tree"
        self.root.mkdir()
        for name in _COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
            copy(ROOT / name, self.root / name)
        for name in ("stages", "conf"):  # packages of qpipe that lie beside it
            (self.root / "qpipe" / name).symlink_to(self.root / name)
        python = _thin_environment(Path(self._folder.name) / "venv", self.root)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        self._server = subprocess.Popen(
            [python, "-m", "tests.mutants.workplace"],
            cwd=self.root,
            env={name: value for name, value in environment.items() if name != "PYTHONPATH"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        imported = self._ask([])
        assert imported["places"] == [str(self.root / "qpipe"), str(self.root / "qpipe" / "stages")], imported

    def __enter__(self) -> Workplace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(10)
        self._folder.cleanup()

    def refuse_failing(self, tests: Sequence[str]) -> None:
        """Errors: BrokenMutantError where the tests do not all pass without any mutant."""
        status, output = self._run(tests, 10 * TIMEOUT_S, stop=False)
        if status != _PASSED:
            raise BrokenMutantError(f"without any mutant, these tests do not all pass:\n{output}")

    def notices(self, mutant: Mutant) -> bool:
        """Whether a test of the mutant's fails. Errors: BrokenMutantError for one that does not apply or run."""
        with self._changed(mutant):
            status, output = self._run(mutant.tests, TIMEOUT_S, stop=True)
        if status not in (_PASSED, _FAILED, None):
            raise BrokenMutantError(f"{mutant.name}: pytest ended with {status}:\n{output}")
        return status != _PASSED

    @contextlib.contextmanager
    def _changed(self, mutant: Mutant) -> Iterator[None]:
        file = self.root / mutant.file
        original, changed = file.read_text(encoding="utf-8"), mutant.applied(self.root)
        try:
            _write(file, changed)
            yield
        finally:
            _write(file, original)

    def _run(self, tests: Sequence[str], timeout_s: float, stop: bool) -> tuple[int | None, str]:
        options = ["-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:anyio", "-W", "ignore"]
        answer = self._ask([*options, *(["-x"] if stop else []), *tests], timeout_s)
        return answer["status"], answer["output"]

    def _ask(self, arguments: Sequence[str], timeout_s: float = TIMEOUT_S) -> dict[str, object]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps([arguments, timeout_s]) + "\n")
        self._server.stdin.flush()
        answer: dict[str, object] = json.loads(self._server.stdout.readline())
        return answer


def _write(file: Path, text: str) -> None:
    """Python takes a .pyc for its source where whole seconds and size agree: so none is left."""
    file.write_text(text, encoding="utf-8")
    Path(importlib.util.cache_from_source(str(file))).unlink(missing_ok=True)


def _thin_environment(folder: Path, tree: Path) -> str:
    """The python of a new environment in `folder`, which imports from `tree` before this process's packages."""
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    behind = [f"import site; site.addsitedir({path!r})" for path in site.getsitepackages()]
    (packages / "tree.pth").write_text("\n".join([str(tree), *behind]) + "\n")
    return str(folder / "bin" / "python")


def _serve() -> None:
    """The other side: arguments of pytest on standard input, its status and output on standard output."""
    for name in _LIBRARIES:
        importlib.import_module(name)
    for line in sys.stdin:
        arguments, timeout_s = json.loads(line)
        if arguments:
            status, output = _forked(arguments, timeout_s)
            answer: dict[str, object] = {"status": status, "output": output}
        else:
            answer = {"places": [_place("qpipe"), _place("qpipe.stages")]}
        print(json.dumps(answer), flush=True)


def _place(package: str) -> str | None:
    program = f"import {package} as package; print(*package.__path__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    return done.stdout.strip()


def _forked(arguments: Sequence[str], timeout_s: float) -> tuple[int | None, str]:
    """The status of pytest in a child, None where it took too long, and what it printed."""
    with tempfile.TemporaryFile() as output:
        pid = os.fork()
        if pid == 0:
            _be_child(arguments, output.fileno())
        deadline, ended, status = time.monotonic() + timeout_s, 0, 0
        while not ended and time.monotonic() < deadline:
            time.sleep(0.01)
            ended, status = os.waitpid(pid, os.WNOHANG)
        if not ended:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(status) if ended else None, output.read().decode(errors="replace")


def _be_child(arguments: Sequence[str], output: int) -> None:
    """Run pytest and end; what it starts is in its process group."""
    status = 70
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        import pytest

        status = int(pytest.main(list(arguments)))
    finally:
        sys.stdout.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
