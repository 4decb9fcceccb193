"""A disk that fails at any step of writing: what is there is whole, what is not is not, and nothing is left over."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qpipe.artifacts.artifact import Artifact, load, save
from qpipe.artifacts.kinds import Samples
from qpipe.cache.audit import verify
from qpipe.cache.store import Store
from qpipe.errors import CacheError
from qpipe.keys.hashing import digest

KEY = digest("key")
CALLS = ("open", "write", "fchmod", "fsync", "replace", "link", "mkdir", "utime")
"""What the store asks of the system when it writes."""


def value(seed: int = 0) -> Samples:
    rng = np.random.default_rng(seed)
    return Samples({"a": rng.standard_normal((10, 9000)), "b": rng.standard_normal((10, 3))})


def publish(store: Store, seed: int = 0) -> Artifact:
    """All that an action leaves: the blobs of its output, then its result."""
    artifact = save(value(seed), store)
    output = {"kind": artifact.kind, "digest": artifact.digest, "size_bytes": artifact.size_bytes}
    store.publish(KEY, {"outputs": {"output": output}})
    return artifact


class System:
    """Counts the calls of the store to the system, and lets one of them fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
        self.log: list[tuple[str, str]] = []
        self.fails: tuple[int, int] | None = None
        self.root = str(root)
        self.names: dict[int, str] = {}
        for name in CALLS:
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))
        close = os.close

        def forget(descriptor: int) -> None:
            self.names.pop(descriptor, None)  # its number may next be that of somebody else's file
            close(descriptor)

        monkeypatch.setattr(os, "close", forget)

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            target = str(arguments[1] if name in ("replace", "link") else arguments[0])
            if name == "open" and not arguments[1] & os.O_CREAT:
                found = function(*arguments, **more)  # reading does not fail here
                self.names[found] = target
                return found
            if isinstance(arguments[0], int):
                target = self.names.get(arguments[0], "")
            if not target.startswith(self.root):
                return function(*arguments, **more)
            self.log.append((name, target.removeprefix(self.root + "/")))
            if self.fails is not None and len(self.log) - 1 == self.fails[0]:
                raise OSError(self.fails[1], os.strerror(self.fails[1]))
            found = function(*arguments, **more)
            if name == "open":
                self.names[found] = target
            return found

        return call


def left_over(store: Store) -> list[Path]:
    return list((store.root / "tmp").iterdir()) if (store.root / "tmp").exists() else []


@pytest.fixture
def serial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blobs one after another, so that the steps have an order."""
    monkeypatch.setattr(
        "qpipe.artifacts.artifact._put_all", lambda buffers, store: [store.put(item) for item in buffers]
    )


@pytest.mark.usefixtures("serial")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
def test_an_error_at_any_step_leaves_only_whole_things(tmp_path: Path, code: int) -> None:
    """Every step of the first publication in turn fails once; then the same again, which must work."""
    with pytest.MonkeyPatch.context() as patch:
        system = System(patch, tmp_path / "whole")
        publish(Store(tmp_path / "whole"))
        steps = len(system.log)
    assert steps > 40
    refused = 0
    for step in range(steps):
        root = tmp_path / str(step)
        store = Store(root)
        with pytest.MonkeyPatch.context() as patch:
            system = System(patch, root)
            system.fails = (step, code)
            said = ""
            try:
                publish(store)
            except CacheError as error:
                refused, said = refused + 1, str(error)
            assert not said or str(root) in said
            assert not said or ("no room" in said) == (code in (errno.ENOSPC, errno.EDQUOT))
            assert len(system.log) > step, "the step was not reached"
        assert left_over(store) == []
        assert verify(Store(root)).problems == ()
        result = store.peek(KEY)
        assert result is None or store.complete(result) == []
        artifact = publish(store)
        assert np.array_equal(load(artifact, Store(root)).arrays["a"], value().arrays["a"])
        assert verify(Store(root)).problems == ()
        store.close()
    print(f"{steps} steps failed in turn; {refused} were refused, the others did not matter")
    assert refused > steps // 2


@pytest.mark.usefixtures("serial")
def test_everything_is_on_the_disk_before_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every file: written, flushed, moved, its folder flushed; and the result after all of its blobs."""
    system = System(monkeypatch, tmp_path)
    publish(Store(tmp_path))
    moves = [i for i, (name, _) in enumerate(system.log) if name in ("replace", "link")]
    assert len(moves) == 4  # two arrays, the root, the result
    for i in moves:
        target = system.log[i][1]
        before = [entry for entry in system.log[:i] if entry[1].startswith("tmp/")]
        assert [step for step, _ in before[-3:]] == ["write", "fchmod", "fsync"]
        assert len({place for _, place in before[-3:]}) == 1
        assert system.log[i + 1] == ("fsync", os.path.dirname(target))
        made = [place for step, place in system.log[:i] if step == "mkdir"]
        assert os.path.dirname(target) in made
        assert ("fsync", os.path.dirname(os.path.dirname(target))) in system.log[:i]
    assert [target.split("/")[0] for _, target in (system.log[i] for i in moves)] == ["blobs"] * 3 + ["actions"]
    for path in (*(tmp_path / "blobs").glob("*/*"), *(tmp_path / "actions").glob("*/*")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o444
