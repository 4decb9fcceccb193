"""A cache with a remote behind it, in process: what travels, what is verified, and what a bad remote costs.

Two stores on one remote stand for two machines.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qpipe.artifacts.artifact import Artifact, load, save
from qpipe.artifacts.kinds import Samples, Scores
from qpipe.cache.shared import remote
from qpipe.cache.shared.remote import Remote, RemoteOptions
from qpipe.cache.shared.signing import VARIABLE
from qpipe.cache.shared.tier import TieredStore, open_address
from qpipe.cache.store import Store, sealed
from qpipe.errors import ConfigError, DamagedError
from qpipe.keys.hashing import digest
from tests.s3_server import Server

INGREDIENTS: dict[str, Any] = {
    "format": 1,
    "stage": "toy",
    "version": 1,
    "code": "0" * 64,
    "libraries": {},
    "params": {},
    "ports": {},
}
SECRET = "a secret that both sides know"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    # As many tries as ever, a tenth of the pauses between them: this server does as it is told, it needs no time.
    monkeypatch.setattr(remote, "_PAUSES_S", tuple(pause_s / 10 for pause_s in remote._PAUSES_S))
    with Server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture(params=["file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a place that works."""
    if request.param == "s3":
        request.getfixturevalue("server")
        return "s3://bucket/team"
    return f"file://{tmp_path}/share"


@pytest.fixture
def share(tmp_path: Path) -> str:
    """The URL of a folder that machines share."""
    return f"file://{tmp_path}/share"


Open = Callable[..., TieredStore]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Open]:
    """Opens the cache of a machine by name, closed at the end."""
    stores = []

    def open_machine(name: str, url: str, **options: Any) -> TieredStore:
        remote = Remote(RemoteOptions(url, **{"timeout_s": 5.0, **options}))
        stores.append(TieredStore(tmp_path / name, remote))
        return stores[-1]

    yield open_machine
    for store in stores:
        store.close()


def ingredients(number: int) -> dict[str, Any]:
    return {**INGREDIENTS, "params": {"number": number}}


def key_of(number: int) -> str:
    return digest("action", ingredients(number))


def publish(store: Store, number: int, value: Any) -> dict[str, Any]:
    artifact = save(value, store)
    output = {"kind": artifact.kind, "digest": artifact.digest, "size_bytes": artifact.size_bytes}
    result = {
        "outputs": {"output": output},
        "ingredients": ingredients(number),
        "provenance": {"duration_s": 1.5, "cpu_s": 1.0},
        "notes": [],
    }
    return store.publish(key_of(number), result)


def settled(store: TieredStore) -> list[str]:
    """What there is to say at the end of a run, except that a busy machine took its time."""
    return [line for line in store.settle() if not line.startswith("Waited")]


def samples(seed: int, size: int = 30_000) -> Samples:
    generator = np.random.default_rng(seed)
    return Samples(
        {name: generator.normal(size=(size, 1)).astype(np.float32) for name in ("input", "mask", "other")}
    )


def read(store: Store, number: int) -> Any:
    result = store.result(key_of(number))
    assert result is not None
    assert store.complete(result) == []
    return load(Artifact(**result["outputs"]["output"]), store)


def test_what_one_machine_publishes_another_reads_and_reads_only_once(url: str, machine: Open) -> None:
    here, there = machine("a", url), machine("b", url)
    publish(here, 1, samples(1))
    here.settle()
    assert np.array_equal(read(there, 1).arrays["mask"], samples(1).arrays["mask"])
    assert settled(there) == []
    before = there.remote.requests.total()
    read(there, 1)
    assert there.remote.requests.total() == before == 5  # a result, a root, three arrays
    assert read(Store(there.root), 1).arrays["mask"].size == 30_000  # and without the remote


def test_a_plan_downloads_results_and_no_blob(url: str, machine: Open) -> None:
    here, there = machine("a", url), machine("b", url)
    publish(here, 1, samples(1))
    here.settle()
    result = there.result(key_of(1))
    assert result is not None
    assert there.complete(result) == []
    there.close()
    assert list(there.blobs()) == []
    assert there.remote.requests == {"read": 1}
    again = machine("b", url)
    result = again.result(key_of(1))
    assert result is not None
    assert again.complete(result) == []
    assert again.remote.requests.total() == 0  # the index remembers the promise


def test_a_promise_whose_blobs_did_not_come_is_no_local_result(share: str, machine: Open) -> None:
    here, there = machine("a", share), machine("b", share)
    publish(here, 1, samples(1))
    here.settle()
    assert there.result(key_of(1)) is not None
    there.settle()
    assert list(there.keys()) == []
    read(there, 1)
    there.settle()
    assert list(there.keys()) == [key_of(1)]


def test_nothing_is_uploaded_twice_and_blobs_come_before_results(server: Server, machine: Open) -> None:
    here = machine("a", "s3://bucket/team")
    publish(here, 1, samples(1))
    publish(here, 2, samples(1))
    here.settle()
    puts = [path for method, path in server.asked if method == "PUT"]
    assert len(puts) == len(set(puts)) + sum(puts.count(path) - 1 for path in set(puts) if "blobs" in path)
    for key in (key_of(1), key_of(2)):
        at = next(i for i, path in enumerate(puts) if key in path)
        stored = json.loads(next(body for path, body in server.objects.items() if key in path))
        assert {path.rpartition("/")[2] for path in puts[:at]} >= set(stored["result"]["blobs"])
    third = machine("c", "s3://bucket/team")
    server.asked.clear()
    publish(third, 3, samples(2))
    publish(third, 1, Scores({"score": 1.0}))
    third.settle()
    standing = json.loads(next(body for path, body in server.objects.items() if key_of(1) in path))
    assert standing["result"]["outputs"]["output"]["kind"] == "Samples"  # the first one stands


def test_a_blob_above_the_memory_limit_goes_through_its_file_in_parts(
    tmp_path: Path, moto: str, machine: Open
) -> None:
    big = Samples({"input": np.arange(5_000_000, dtype=np.float32).reshape(-1, 1)})
    here, there = machine("a", moto), machine("b", moto)
    publish(here, 1, big)
    assert settled(here) == []
    assert np.array_equal(read(there, 1).arrays["input"], big.arrays["input"])


def test_a_read_only_machine_writes_nothing(url: str, machine: Open, server: Server) -> None:
    here = machine("a", url, mode="read")
    publish(here, 1, samples(1))
    with _held(here, 2):
        pass
    assert settled(here) == []
    assert set(here.remote.requests) <= {"read"}
    assert not server.objects
    if url.startswith("file:"):
        assert not Path(url[7:]).exists()


class _held:
    """The lock of an action, as the executor takes it."""

    def __init__(self, store: TieredStore, number: int) -> None:
        self._lock = store.lock(key_of(number))

    def __enter__(self) -> None:
        self._lock.acquire(blocking=False)

    def __exit__(self, *exception: object) -> None:
        self._lock.release()


# a bad remote


def damage(server: Server, word: str, part: str) -> None:
    """From now on requests for paths with `part` in them are answered wrongly."""
    server.behaviour = lambda method, path: word if part in path and method in ("GET", "HEAD") else ""


@pytest.mark.parametrize("word", ["flip", "short", "endless", "gone", "cut", "hang", "broken", "denied"])
@pytest.mark.parametrize("part", ["/actions/", "/blobs/"])
def test_a_bad_answer_is_a_miss_and_never_an_error(
    server: Server, machine: Open, word: str, part: str
) -> None:
    here = machine("a", "s3://bucket/team")
    publish(here, 1, samples(1, size=300))
    here.settle()
    damage(server, word, part)
    server.sent = 0
    there = machine("b", "s3://bucket/team", timeout_s=1.0)
    started = time.monotonic()
    result = there.result(key_of(1))
    if part == "/actions/":
        assert result is None
    else:
        assert result is not None
        assert there.complete(result) == []  # promised
        root = result["outputs"]["output"]["digest"]
        with pytest.raises(DamagedError):
            there.open(root)
        there.doubt(root)
        assert root in there.complete(result)  # and no more
        assert not there.has(root)
    assert time.monotonic() - started < 20
    assert server.sent < 100 << 20  # 10 GB were offered
    assert sum(file.stat().st_size for file in there.root.rglob("tmp/*")) < 1 << 20
    if word in ("hang", "broken", "denied", "cut"):
        (line,) = there.news()
        assert "from here on the local cache alone is used" in line
        assert there.news() == []
    before = len(server.asked)
    again = publish(there, 1, samples(1, size=300))  # computed here
    server.behaviour = lambda method, path: ""
    there.settle()
    assert read(Store(there.root), 1).arrays["mask"].size == 300
    assert again["outputs"]
    if word in ("hang", "broken", "denied", "cut"):
        assert len(server.asked) == before  # given up means given up


def test_damage_in_the_remote_is_healed_by_whoever_computes_again(server: Server, machine: Open) -> None:
    here = machine("a", "s3://bucket/team")
    result = publish(here, 1, samples(1, size=300))
    here.settle()
    victim = max(result["blobs"])
    (path,) = [path for path in server.objects if victim in path]
    server.objects[path] = b"rot"
    there = machine("b", "s3://bucket/team")
    with pytest.raises(DamagedError) as caught:
        read(there, 1)
    there.doubt(caught.value.digest)
    promised = there.result(key_of(1))
    assert promised is not None
    assert there.complete(promised) == [caught.value.digest] == [victim]
    publish(there, 1, samples(1, size=300))
    there.settle()
    assert read(machine("c", "s3://bucket/team"), 1).arrays["input"].size == 300


def test_a_remote_that_damages_everything_is_given_up_after_three_blobs(
    server: Server, machine: Open
) -> None:
    here, there = machine("a", "s3://bucket/team"), machine("b", "s3://bucket/team")
    for number in range(6):
        publish(here, number, Scores({"score": float(number)}))
    here.settle()
    damage(server, "flip", "/blobs/")
    results = [there.result(key_of(number)) for number in range(6)]
    rounds = 0
    for result in results:
        assert result is not None
        if there.complete(result):
            break
        with pytest.raises(DamagedError):
            there.open(result["outputs"]["output"]["digest"])
        there.doubt(result["outputs"]["output"]["digest"])
        rounds += 1
    assert rounds == 3
    assert all(result and there.complete(result) for result in results)
    assert "damaged blobs" in there.news()[0]


def test_one_missing_blob_shows_which_others_are_missing(server: Server, machine: Open) -> None:
    here, there = machine("a", "s3://bucket/team"), machine("b", "s3://bucket/team")
    for number in range(6):
        publish(here, number, Scores({"score": float(number)}))
    here.settle()
    results = [there.result(key_of(number)) for number in range(6)]
    roots = [result["outputs"]["output"]["digest"] for result in results if result]
    for path in [path for path in server.objects if any(root in path for root in roots[:5])]:
        del server.objects[path]  # a rule of the bucket that removes old objects
    with pytest.raises(DamagedError):
        there.open(roots[0])
    there.doubt(roots[0])
    assert [bool(result and there.complete(result)) for result in results] == [True] * 5 + [False]
    assert there.remote.readable


@pytest.mark.parametrize(("content", "lost"), [(b"", True), (None, False)])
def test_a_promised_blob_of_another_size_is_missing(
    share: str, machine: Open, tmp_path: Path, content: bytes | None, lost: bool
) -> None:
    here = machine("a", share)
    result = publish(here, 1, samples(1))
    here.settle()
    name = max(result["blobs"], key=result["blobs"].get)
    here.discard(name, 0)
    if content is not None:
        remote = tmp_path / "share" / "blobs" / name[:2] / name
        remote.chmod(0o644)
        remote.write_bytes(content)
    again = machine("a", share)
    assert again.complete(result) == ([name] if lost else [])


@pytest.mark.parametrize(
    "endpoint",
    ["http://127.0.0.1:1", "http://no-such-host.invalid"],  # refused; no such name
)
def test_an_endpoint_that_is_not_there_is_said_once(
    endpoint: str, monkeypatch: pytest.MonkeyPatch, server: Server, machine: Open
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    here = machine("a", "s3://bucket/team", timeout_s=1.0)
    publish(here, 1, samples(1, size=10))
    told = here.settle()
    assert len([line for line in told if "cannot be used" in line]) == 1
    assert read(here, 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.environment["AWS_ENDPOINT_URL"])
    here.close()
    later = machine("a", "s3://bucket/team")
    assert settled(later) == []  # the next run sends what this one could not
    assert read(machine("b", "s3://bucket/team"), 1).arrays["mask"].size == 10


def test_a_remote_that_refuses_to_be_written_is_still_read(server: Server, machine: Open) -> None:
    here = machine("a", "s3://bucket/team")
    publish(here, 1, samples(1, size=10))
    here.settle()
    server.behaviour = lambda method, path: "denied" if method == "PUT" else ""
    there = machine("b", "s3://bucket/team")
    publish(there, 2, samples(2, size=10))
    assert any("refuses to be written" in line for line in there.settle())
    assert read(there, 1).arrays["mask"].size == 10


def test_a_share_that_is_not_mounted_is_not_made_up(tmp_path: Path, machine: Open) -> None:
    here = machine("a", f"file://{tmp_path}/mnt/share")
    publish(here, 1, samples(1, size=10))
    assert any("is not there" in line for line in here.settle())
    assert not (tmp_path / "mnt").exists()


def test_strange_files_on_a_share_are_misses(tmp_path: Path, machine: Open) -> None:
    share = f"file://{tmp_path}/share"
    here, there = machine("a", share), machine("b", share, timeout_s=1.0)
    for number in range(3):
        publish(here, number, samples(number, size=10))
    here.settle()
    places = [tmp_path / "share" / "actions" / key_of(n)[:2] / f"{key_of(n)}.json" for n in range(3)]
    for place in places:
        place.unlink()
    os.mkfifo(places[0])
    places[1].symlink_to("/etc/passwd")
    places[2].mkdir()
    assert [there.result(key_of(number)) for number in range(3)] == [None] * 3


# results that somebody made up


def place_of(share: str, number: int) -> Path:
    """Where a result lies on a share."""
    key = key_of(number)
    return Path(share.removeprefix("file://")) / "actions" / key[:2] / f"{key}.json"


def tamper(share: str, number: int, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a remote result, and seal it again: who can write there can do that."""
    envelope = json.loads(place_of(share, number).read_bytes())
    change(envelope["result"])
    place_of(share, number).write_bytes(sealed(key_of(number), envelope["result"]))


def _blob_that_climbs(result: dict[str, Any]) -> None:
    result["blobs"]["../../../../etc/passwd"] = 5


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a path as a digest": _blob_that_climbs,
    "a huge blob": lambda result: result["blobs"].update({"0" * 64: 1 << 80}),
    "another action": lambda result: result["ingredients"].update(version=2),
    "no provenance": lambda result: result.pop("provenance"),
    "no duration": lambda result: result["provenance"].pop("duration_s"),
    "a duration that is text": lambda result: result["provenance"].update(duration_s="long"),
    "a field too many": lambda result: result["outputs"]["output"].update(path="/etc/passwd"),
    "no outputs": lambda result: result.pop("outputs"),
    "an output of no kind": lambda result: result["outputs"]["output"].update(kind="Pickle"),
    "notes that are none": lambda result: result.update(notes=[1]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_made_up_result_is_a_miss_and_is_replaced(share: str, machine: Open, name: str) -> None:
    here = machine("a", share)
    publish(here, 1, samples(1, size=10))
    here.settle()
    tamper(share, 1, CHANGES[name])
    there = machine("b", share)
    assert there.result(key_of(1)) is None
    publish(there, 1, samples(1, size=10))
    there.settle()
    assert read(machine("c", share), 1).arrays["mask"].size == 10


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x04pickle", b"[" * 100_000, b"null", b"{}", b'{"result":{}}']
)
def test_rubbish_under_a_key_is_a_miss(share: str, machine: Open, content: bytes) -> None:
    place_of(share, 1).parent.mkdir(parents=True)
    place_of(share, 1).write_bytes(content)
    assert machine("a", share).result(key_of(1)) is None


def test_a_result_under_the_key_of_another_is_a_miss(share: str, machine: Open) -> None:
    here = machine("a", share)
    publish(here, 1, samples(1, size=10))
    here.settle()
    place_of(share, 2).parent.mkdir(exist_ok=True)
    place_of(share, 2).write_bytes(place_of(share, 1).read_bytes())
    assert machine("b", share).result(key_of(2)) is None


# signatures


def test_with_a_secret_only_results_signed_with_it_count(
    share: str, machine: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    publish(unsigned := machine("a", share), 1, samples(1, size=10))
    publish(unsigned, 3, samples(3, size=10))
    unsigned.settle()
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    signed = machine("b", share, secret_file=str(tmp_path / "secret"))
    assert signed.result(key_of(1)) is None
    assert signed.news() == []
    assert signed.result(key_of(3)) is None
    publish(signed, 2, samples(2, size=10))
    told = settled(signed)
    assert told == [f"Not signed with this secret, and so misses: 2 results of the remote cache {share}."]
    assert signed.settle() == []
    monkeypatch.setenv(VARIABLE, SECRET)
    assert read(machine("c", share), 2).arrays["mask"].size == 10
    monkeypatch.setenv(VARIABLE, SECRET + "?")
    assert machine("d", share).result(key_of(2)) is None
    monkeypatch.delenv(VARIABLE)
    assert machine("e", share).result(key_of(2)) is not None  # no secret, no claim
    monkeypatch.setenv(VARIABLE, SECRET + "?")
    assert machine("e", share).result(key_of(2)) is None  # what the index remembers is checked too


def test_the_secret_is_in_nothing_that_is_written(
    share: str, machine: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "secret").write_text(SECRET)
    here = machine("a", share, secret_file=str(tmp_path / "secret"))
    publish(here, 1, samples(1, size=10))
    here.close()
    assert SECRET not in json.dumps(here.address()) + repr(here.__dict__) + caplog.text
    written = [
        file for folder in (here.root, tmp_path / "share") for file in folder.rglob("*") if file.is_file()
    ]
    assert written
    assert not any(SECRET.encode() in file.read_bytes() for file in written)


@pytest.mark.parametrize(("content", "said"), [(None, "cannot be read"), ("short", "5 bytes")])
def test_a_secret_that_cannot_serve_is_refused(
    tmp_path: Path, machine: Open, content: str | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "secret").write_text(content)
    with pytest.raises(ConfigError, match=said):
        machine("a", f"file://{tmp_path}/share", secret_file=str(tmp_path / "secret"))


# workers


def test_a_worker_reads_from_the_remote_and_never_writes_there(
    url: str, machine: Open, server: Server
) -> None:
    here, there = machine("a", url), machine("b", url)
    publish(here, 1, samples(1))
    here.settle()
    assert there.result(key_of(1)) is not None
    server.asked.clear()
    worker = open_address(json.loads(json.dumps(there.address())))
    assert read(worker, 1).arrays["mask"].size == 30_000
    publish(worker, 2, samples(2))  # a sub-result
    worker.settle()
    assert {method for method, _ in server.asked} <= {"GET", "HEAD"}
    there.share(key_of(2))
    there.settle()
    assert read(machine("c", url), 2).arrays["mask"].size == 30_000
    worker.close()


def test_memory_serves_within_one_process(machine: Open) -> None:
    here, there = machine("a", "memory://test_tier"), machine("b", "memory://test_tier")
    publish(here, 1, samples(1))
    assert settled(here) == []
    assert read(there, 1).arrays["mask"].size == 30_000


def test_what_could_not_be_sent_is_said_once_although_a_run_settles_twice(
    machine: Open, tmp_path: Path
) -> None:
    store = machine("a", f"file://{tmp_path}/mnt/share")
    for number in (1, 2):
        publish(store, number, samples(number, size=10))
    told = [*store.settle(), *store.settle()]
    assert sum("2 results not in the remote cache yet" in line for line in told) == 1


@pytest.mark.parametrize("way", ["ro", "full"])
def test_a_share_that_is_full_or_mounted_read_only_is_still_read(
    machine: Open, tmp_path: Path, way: str
) -> None:
    share = tmp_path / "share"
    share.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(share)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        publish(here := machine("a", str(share)), 1, samples(1, size=10))
        here.settle()
        if way == "ro":
            subprocess.run(["mount", "-o", "remount,ro", str(share)], check=True)
        else:
            with suppress(OSError), open(share / "filling", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        there = machine("b", str(share))
        publish(there, 2, samples(2, size=10))
        (said,) = [line for line in there.settle() if "refuses to be written" in line]
        assert ("Read-only file system" if way == "ro" else "No space left") in said
        assert read(there, 1).arrays["mask"].size == 10
    finally:
        subprocess.run(["umount", "-l", str(share)], check=True)
