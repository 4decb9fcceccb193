"""The lock of an action, in this process; tests/cache/test_store.py and tests/crash hold it across processes."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import filelock
import pytest

from qpipe.cache.lock import Lock


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "one.lock")


def test_it_is_held_once_and_free_afterwards(path: str) -> None:
    one, two = Lock(path), Lock(path)
    with one.acquire():
        assert one.is_locked
        with pytest.raises(filelock.Timeout):
            two.acquire(blocking=False)
        with pytest.raises(filelock.Timeout):
            two.acquire(timeout=0.1)
    assert not one.is_locked
    with two.acquire(blocking=False):
        assert two.is_locked


def test_it_excludes_filelock_and_is_excluded_by_it(path: str) -> None:
    with filelock.FileLock(path), pytest.raises(filelock.Timeout):
        Lock(path).acquire(blocking=False)
    with Lock(path), pytest.raises(filelock.Timeout):
        filelock.FileLock(path).acquire(blocking=False)


def test_one_waits_for_another(path: str) -> None:
    one, order = Lock(path), []
    one.acquire()

    def wait() -> None:
        with Lock(path):
            order.append("second")

    waiter = threading.Thread(target=wait)
    waiter.start()
    time.sleep(0.15)
    order.append("first")
    one.release()
    waiter.join(5)
    assert order == ["first", "second"]


def test_a_removed_file_is_no_lock_any_more(path: str) -> None:
    one, two, three = Lock(path), Lock(path), Lock(path)
    one.acquire()
    os.unlink(path)
    two.acquire(blocking=False)  # another file: whoever removed the first has decided that it holds nothing
    with pytest.raises(filelock.Timeout):
        three.acquire(blocking=False)
    one.release()
    with pytest.raises(filelock.Timeout):
        three.acquire(blocking=False)


def test_a_forgotten_lock_is_free(path: str) -> None:
    Lock(path).acquire()
    with Lock(path).acquire(blocking=False) as held:
        assert held.is_locked


def test_a_lock_through_a_link_or_on_a_folder_is_refused(path: str, tmp_path: Path) -> None:
    os.symlink(tmp_path / "elsewhere", path)
    with pytest.raises(OSError, match="symbolic links"):
        Lock(path).acquire()
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(IsADirectoryError):
        Lock(str(tmp_path)).acquire()


def test_no_descriptor_is_left_open(path: str) -> None:
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(50):
        with Lock(path), pytest.raises(filelock.Timeout):
            Lock(path).acquire(blocking=False)
    assert set(os.listdir("/proc/self/fd")) <= before  # those of tests before may have been closed meanwhile
