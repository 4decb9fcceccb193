"""A file is there whole or not at all, whatever the system refuses on the way."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qpipe.errors import QpipeError
from qpipe.writing import beside, write_whole


@contextmanager
def files_end_after(size_bytes: int) -> Iterator[None]:
    """As if the disk were full then: the system refuses what goes on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def refusing(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("content", ["ä\ud800", b"bytes", memoryview(b"bytes")])
def test_text_and_bytes_take_the_place_of_what_was_there(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "file"
    path.write_text("before, and longer than what comes")
    write_whole(path, content)
    wanted = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else bytes(content)
    assert path.read_bytes() == wanted
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_what_the_system_refuses_leaves_all_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    if step != "write":
        monkeypatch.setattr(os, step, refusing)
    with (
        files_end_after(1 << 16),
        pytest.raises(QpipeError, match=r"cannot be written: .*Make room there") as told,
    ):
        write_whole(path, b"x" * ((1 << 17) if step == "write" else 10), flush=True)
    assert str(path) in str(told.value)
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(QpipeError, match="No such file or directory"):
        write_whole(tmp_path / "none" / "file", "text")


def test_what_is_flushed_is_on_the_disk_before_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    for name in ("fsync", "replace"):
        done = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, done=done: (steps.append(name), done(*a)))
    write_whole(tmp_path / "file", "text")
    assert steps == ["replace"]
    write_whole(tmp_path / "file", "text", flush=True)
    assert steps == ["replace", "fsync", "replace"]


def test_two_that_write_the_same_file_do_not_write_into_each_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with beside(path) as first, beside(path) as second:
        first.write(b"one")
        second.write(b"two and more")
    assert path.read_bytes() == b"one"  # the last to be moved
    assert os.listdir(tmp_path) == ["file"]


def test_a_name_may_be_as_long_as_any(tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 127)
    write_whole(path, "text")
    assert path.read_text() == "text"
