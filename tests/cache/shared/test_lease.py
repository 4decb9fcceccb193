"""Leases between machines; two roots stand for two machines, a folder for what they share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qpipe.cache.shared.lease import Leases
from qpipe.cache.shared.remote import Remote, RemoteOptions
from qpipe.keys.hashing import digest

KEY, OTHER = digest("key"), digest("another key")
LEASE_S = 0.8
Open = Callable[..., Leases]


@pytest.fixture
def leases(tmp_path: Path) -> Iterator[Open]:
    """Makes those of a new process on a machine; none is renewed any more when the test is over."""
    made: list[Leases] = []

    def make(machine: str, lease_s: float = LEASE_S) -> Leases:
        root = tmp_path / machine
        root.mkdir(exist_ok=True)
        made.append(Leases(Remote(RemoteOptions(f"file://{tmp_path}/share", lease_s=lease_s)), root))
        return made[-1]

    yield make
    for each in made:
        for key in (KEY, OTHER):
            each.release(key)


def wait_for(found: Leases, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found.acquire(KEY):
            return True
        time.sleep(0.02)
    return False


def place(tmp_path: Path) -> Path:
    return tmp_path / "share" / "leases" / KEY[:2] / f"{KEY}.json"


def test_one_machine_holds_a_lease_and_the_next_one_gets_it_when_it_is_free(leases: Open, tmp_path: Path) -> None:
    here, there = leases("a"), leases("b")
    assert here.acquire(KEY)
    assert not there.acquire(KEY)
    assert there.acquire(OTHER)
    here.release(KEY)
    assert not place(tmp_path).exists()
    assert wait_for(there, 10)
    here.release(KEY)  # not ours any more
    assert place(tmp_path).exists()


def test_a_holder_that_renews_is_never_taken_over(leases: Open) -> None:
    here, there = leases("a"), leases("b", lease_s=3.0)
    assert here.acquire(KEY)
    assert not wait_for(there, 5)
    here.release(KEY)


def test_a_holder_that_renews_no_more_is_taken_over(leases: Open, tmp_path: Path) -> None:
    place(tmp_path).parent.mkdir(parents=True)
    place(tmp_path).write_text('{"machine": "elsewhere", "run": "dead", "beat": 7}')
    there = leases("b")
    started = time.monotonic()
    assert not there.acquire(KEY)
    assert wait_for(there, 20)
    assert time.monotonic() - started >= LEASE_S
    there.release(KEY)
    assert not place(tmp_path).exists()


def test_a_dead_holder_of_this_machine_is_not_waited_for(leases: Open) -> None:
    """Whoever asks holds the lock of this machine, so no other process of it computes."""
    assert leases("a", lease_s=600).acquire(KEY)  # a process that was killed
    assert leases("a", lease_s=600).acquire(KEY)


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[1]", b"x" * 10_000, b"[" * 4000])
def test_rubbish_is_taken_over_like_a_dead_lease(leases: Open, tmp_path: Path, content: bytes) -> None:
    place(tmp_path).parent.mkdir(parents=True)
    place(tmp_path).write_bytes(content)
    there = leases("b", lease_s=0.3)
    assert not there.acquire(KEY)
    assert wait_for(there, 20)


def test_of_many_waiters_one_takes_a_dead_lease_over(leases: Open, tmp_path: Path) -> None:
    place(tmp_path).parent.mkdir(parents=True)
    place(tmp_path).write_text('{"machine": "elsewhere", "run": "dead", "beat": 7}')
    waiters = [leases(f"m{i}", lease_s=1.5) for i in range(5)]
    granted: list[int] = []

    def wait(number: int) -> None:
        deadline = time.monotonic() + 4
        while time.monotonic() < deadline and not granted:
            if waiters[number].acquire(KEY):
                granted.append(number)
            time.sleep(0.01)

    threads = [threading.Thread(target=wait, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(granted) == 1


def test_a_share_that_fails_does_not_stand_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    remote = Remote(RemoteOptions(f"file://{tmp_path}/nowhere/share"))
    assert Leases(remote, tmp_path / "a").acquire(KEY)
