from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest

from qpipe.artifacts.artifact import Artifact, load, save
from qpipe.artifacts.kinds import Samples, Scores
from qpipe.cache.store import Store, sealed
from qpipe.errors import CacheError, DamagedError
from qpipe.keys.hashing import digest, digest_bytes

KEY = digest("key")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def result_of(artifact: Artifact, **more: Any) -> dict[str, Any]:
    output = {"kind": artifact.kind, "digest": artifact.digest, "size_bytes": artifact.size_bytes}
    return {"outputs": {"output": output}, **more}


def blob_path(store: Store, name: str) -> Path:
    return store.root / "blobs" / name[:2] / name


def result_path(store: Store, key: str = KEY) -> Path:
    return store.root / "actions" / key[:2] / f"{key}.json"


def rewrite(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)


def audit(store: Store) -> tuple[int, int]:
    """Every blob matches its name, every result is readable and complete; how many of each."""
    blobs = list(store.blobs())
    for name, size in blobs:
        content = blob_path(store, name).read_bytes()
        assert (digest_bytes(content), len(content)) == (name, size)
    results = [store.result(key) for key in sorted(store.keys())]
    for result in results:
        assert result is not None
        assert store.complete(result) == []
    return len(blobs), len(results)


# blobs


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 3 << 20])
def test_what_is_put_is_opened_read_only_and_named_by_its_content(store: Store, size: int) -> None:
    content = random.Random(size).randbytes(size)
    name = store.put(content)
    view = store.open(name)
    assert name == digest_bytes(content)
    assert view == content
    assert view.readonly
    assert blob_path(store, name).stat().st_mode & 0o777 == 0o444
    assert list(store.blobs()) == [(name, size)]


def test_has_asks_for_the_name_and_the_size(store: Store) -> None:
    name = store.put(b"abc")
    assert store.has(name)
    assert store.has(name, 3)
    assert not store.has(name, 4)
    assert not store.has(digest_bytes(b"other"))


def test_a_blob_that_is_there_is_not_written_again_and_counts_as_new(store: Store) -> None:
    name = store.put(b"abc")
    path = blob_path(store, name)
    os.utime(path, (1, 1))
    before = path.stat()
    assert store.put(b"abc") == name
    assert path.stat().st_ino == before.st_ino
    assert time.time() - path.stat().st_mtime < 60


@pytest.mark.parametrize("came", [[b"whole"], [b"wh", b"ole"], [b"whale"], [b"who"], [b"whole", b"r"]])
def test_what_comes_in_pieces_is_kept_only_where_it_is_what_it_says(store: Store, came: list[bytes]) -> None:
    name, right = digest_bytes(b"whole"), b"".join(came) == b"whole"
    assert store.receive(name, 5, came) == right
    assert store.has(name) == right
    assert list((store.root / "tmp").iterdir()) == []


def test_making_or_asking_a_store_writes_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    assert store.result(KEY) is None
    assert not store.has(KEY)
    assert list(store.blobs()) == []
    assert list(store.keys()) == []
    with pytest.raises(DamagedError, match="missing"):
        store.open(KEY)
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_a_flipped_byte_is_found_moved_aside_and_healed(store: Store) -> None:
    content = bytes(100_000)
    name = store.put(content)
    rewrite(blob_path(store, name), content[:500] + b"\x01" + content[501:])
    with pytest.raises(DamagedError, match="does not match") as caught:
        Store(store.root).open(name)
    assert caught.value.digest == name
    assert not store.has(name)
    assert (store.root / "damaged" / name).exists()
    assert store.put(content) == name
    assert Store(store.root).open(name) == content


def test_a_damaged_blob_is_written_again_by_who_puts_the_same(store: Store) -> None:
    name = store.put(b"whole")
    rewrite(blob_path(store, name), b"whale")
    assert Store(store.root).put(b"whole") == name
    assert bytes(Store(store.root).open(name)) == b"whole"


def test_a_blob_cut_short_is_replaced_by_the_next_put(store: Store) -> None:
    name = store.put(b"whole")
    rewrite(blob_path(store, name), b"who")
    assert not store.has(name, 5)
    store.put(b"whole")
    assert bytes(Store(store.root).open(name)) == b"whole"


def test_a_blob_is_verified_once_in_a_process(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    name = store.put(b"x" * 1000)
    store.open(name)

    def refuse(*arguments: object) -> str:
        raise AssertionError("hashed again")

    monkeypatch.setattr("qpipe.cache.store.digest_bytes", refuse)
    assert store.open(name) == b"x" * 1000


def test_a_file_put_in_the_place_of_a_verified_one_is_verified_anew(store: Store) -> None:
    name = store.put(b"x" * 1000)
    store.open(name)
    other = blob_path(store, name).with_name("other")
    other.write_bytes(b"y" * 1000)
    os.replace(other, blob_path(store, name))
    with pytest.raises(DamagedError, match="does not match"):
        store.open(name)


@pytest.mark.parametrize("size", [0, 999, 1001])
def test_a_verified_file_of_another_size_is_verified_anew(store: Store, size: int) -> None:
    name = store.put(b"x" * 1000)
    store.open(name)
    inode = blob_path(store, name).stat().st_ino
    rewrite(blob_path(store, name), b"x" * size)
    assert blob_path(store, name).stat().st_ino == inode
    with pytest.raises(DamagedError, match="does not match"):
        store.open(name)


@pytest.mark.parametrize(
    "name", ["", "../../etc/passwd", "A" * 64, "a" * 63, "a" * 63 + "/", "a" * 64 + "\n"]
)
def test_a_name_that_is_no_digest_never_reaches_the_disk(store: Store, name: str) -> None:
    for ask in (store.open, store.has, store.result, store.forget, store.lock):
        with pytest.raises(ValueError, match="not a digest"):
            ask(name)


# results


def test_a_published_result_comes_back_with_the_blobs_it_needs(store: Store) -> None:
    artifact = save(Samples({"x": np.ones((2, 2))}), store)
    published = store.publish(KEY, result_of(artifact, provenance={"duration_s": 1.5, "note": "äöü"}))
    result = Store(store.root).result(KEY)
    assert result == published
    assert result["provenance"] == {"duration_s": 1.5, "note": "äöü"}
    assert len(result["blobs"]) == 2
    assert sum(result["blobs"].values()) == artifact.size_bytes
    assert store.complete(result) == []
    assert list(store.keys()) == [KEY]
    assert audit(store) == (2, 1)


def test_a_lost_blob_makes_a_result_incomplete_and_a_new_one_takes_its_place(store: Store) -> None:
    first = store.publish(KEY, result_of(save(Scores({"score": 1.0}), store)))
    lost = next(iter(first["blobs"]))
    blob_path(store, lost).unlink()
    assert store.complete(first) == [lost]
    second = store.publish(KEY, result_of(save(Scores({"score": 2.0}), store)))
    assert store.result(KEY) == second != first


def test_the_first_to_publish_wins(store: Store) -> None:
    first = store.publish(KEY, result_of(save(Scores({"score": 1.0}), store)))
    assert store.publish(KEY, result_of(save(Scores({"score": 2.0}), store))) == first
    assert store.result(KEY) == first


def test_a_result_without_its_blobs_is_not_published(store: Store) -> None:
    artifact = save(Samples({"x": np.ones((2, 2))}), store)
    for name, _ in list(store.blobs()):
        if name != artifact.digest:
            blob_path(store, name).unlink()
    with pytest.raises(DamagedError, match="missing"):
        store.publish(KEY, result_of(artifact))
    with pytest.raises(DamagedError, match="missing"):
        store.publish(KEY, result_of(Artifact("Scores", digest("nowhere"), 1)))
    with pytest.raises(DamagedError, match="not the root"):
        store.publish(KEY, result_of(Artifact("Scores", store.put(b"no root"), 1)))
    assert store.result(KEY) is None


def test_a_forgotten_result_is_a_miss_and_its_blobs_stay(store: Store) -> None:
    published = store.publish(KEY, result_of(save(Scores({"score": 1.0}), store)))
    store.forget(KEY)
    store.forget(KEY)
    assert store.result(KEY) is None
    assert store.complete(published) == []


def _tampered(change: Any) -> Any:
    def apply(content: bytes) -> bytes:
        record = json.loads(content)
        change(record["result"])
        sealed_too = json.loads(sealed(KEY, record["result"]))  # whoever tampers can seal as well
        return json.dumps(sealed_too).encode()

    return apply


@pytest.mark.parametrize(
    "change",
    [
        lambda content: b"",
        lambda content: content[:-10],
        lambda content: b"null",
        lambda content: b"[1, 2]",
        lambda content: b'{"result": 1, "seal": 2}',
        lambda content: b"[" * 100_000,
        lambda content: b"\x80\x04\x95",
        lambda content: content.replace(b"1.5", b"1.6"),
        lambda content: content.replace(b"Scores", b"Models"),
        _tampered(lambda result: result.pop("outputs")),
        _tampered(lambda result: result.pop("blobs")),
        _tampered(lambda result: result.update(blobs=[])),
        _tampered(lambda result: result.update(outputs={"output": None})),
        _tampered(lambda result: result["outputs"]["output"].update(kind="Pickle")),
        _tampered(lambda result: result["outputs"]["output"].update(kind=["Scores"])),
        _tampered(lambda result: result["outputs"]["output"].update(digest="../../etc/passwd")),
        _tampered(lambda result: result["outputs"]["output"].update(digest="a" * 64)),
        _tampered(lambda result: result["outputs"]["output"].update(size_bytes=-1)),
        _tampered(lambda result: result["outputs"]["output"].update(size_bytes=1e308)),
        _tampered(lambda result: result["outputs"].update({"../climb": result["outputs"]["output"]})),
        _tampered(lambda result: result["blobs"].update({"../../etc/passwd": 1})),
        _tampered(lambda result: result["blobs"].update({"a" * 64: 1 << 80})),
        _tampered(lambda result: result["blobs"].update({"a" * 64: True})),
    ],
)
def test_a_result_that_was_tampered_with_is_a_miss_and_said_so(
    store: Store, caplog: pytest.LogCaptureFixture, change: Any
) -> None:
    published = store.publish(KEY, result_of(save(Scores({"score": 1.0}), store), duration_s=1.5))
    path = result_path(store)
    rewrite(path, change(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert store.result(KEY) is None
    assert "passed over" in caplog.text
    assert store.publish(KEY, result_of(save(Scores({"score": 1.0}), store), duration_s=1.5)) == published
    assert store.result(KEY) == published


def test_a_result_under_another_key_is_a_miss(store: Store) -> None:
    store.publish(KEY, result_of(save(Scores({"score": 1.0}), store)))
    other = digest("other")
    result_path(store, other).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(result_path(store), result_path(store, other))
    assert store.result(other) is None


def test_a_result_of_absurd_size_is_not_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.publish(KEY, result_of(save(Scores({"score": 1.0}), store)))
    monkeypatch.setattr("qpipe.cache.store.RESULT_LIMIT", 10)
    assert store.result(KEY) is None


# death, company, locks

_WRITER = """
import sys, random, pathlib, os
from qpipe.cache.store import Store
from qpipe.artifacts.artifact import save
from qpipe.artifacts.kinds import Files
from qpipe.keys.hashing import digest
store, start = Store(pathlib.Path(sys.argv[1])), int(sys.argv[2])
print("ready", flush=True)
for i in range(start, start + 100_000):
    artifact = save(Files({"a": random.Random(i).randbytes(200_000), "b": b"shared"}), store)
    output = {"kind": artifact.kind, "digest": artifact.digest, "size_bytes": artifact.size_bytes}
    store.publish(digest(i % 50), {"outputs": {"output": output}, "writer": os.getpid()})
"""


def test_a_killed_writer_leaves_only_whole_things(store: Store) -> None:
    chance = random.Random(0)
    for round_number in range(6):
        writers = [
            subprocess.Popen([sys.executable, "-c", _WRITER, store.root, str(1000 * (2 * round_number + i))],
                             stdout=subprocess.PIPE)
            for i in range(2)
        ]  # fmt: skip
        for writer in writers:
            assert writer.stdout is not None
            writer.stdout.readline()
        time.sleep(chance.uniform(0.02, 0.25))
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
            assert writer.stdout is not None
            writer.stdout.close()
    blobs, results = audit(store)
    assert blobs > 0
    assert results > 0


def test_what_a_killed_writer_left_unfinished_is_removed_by_the_next(store: Store) -> None:
    store.put(b"x")
    folder = store.root / "tmp"
    for name, age_s in (("dead", 3600), ("young", 0), ("alive", 3600)):
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, (time.time() - age_s, time.time() - age_s))
    program = (
        "import fcntl, sys, time\nfile = open(sys.argv[1])\nfcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, folder / "alive"], stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        Store(store.root).put(b"y")
        assert {path.name for path in folder.iterdir()} == {"young", "alive"}
        holder.kill()
    Store(store.root).put(b"z")
    assert {path.name for path in folder.iterdir()} == {"young"}


def test_two_processes_that_publish_one_key_agree_on_one_result(store: Store) -> None:
    program = """
import sys, pathlib, json
from qpipe.cache.store import Store
from qpipe.artifacts.artifact import save
from qpipe.artifacts.kinds import Scores
store = Store(pathlib.Path(sys.argv[1]))
artifact = save(Scores({"score": float(sys.argv[2])}), store)
output = {"kind": artifact.kind, "digest": artifact.digest, "size_bytes": artifact.size_bytes}
print("ready", flush=True); sys.stdin.readline()
print(json.dumps([store.publish(key, {"outputs": {"output": output}}) for key in sys.argv[3:]]))
"""
    keys = [digest(i) for i in range(20)]
    processes = [
        subprocess.Popen([sys.executable, "-c", program, store.root, str(i), *keys],
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for i in range(3)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [json.loads(process.communicate()[0]) for process in processes]
    assert answers[0] == answers[1] == answers[2] == [store.result(key) for key in keys]
    assert audit(store)[1] == len(keys)


def test_a_lock_is_held_by_one_and_freed_by_its_holders_death(store: Store) -> None:
    program = """
import sys, pathlib, time
from qpipe.cache.store import Store
lock = Store(pathlib.Path(sys.argv[1])).lock(sys.argv[2])
lock.acquire(); print("held", flush=True); time.sleep(60)
"""
    lock = store.lock(KEY)
    with subprocess.Popen([sys.executable, "-c", program, store.root, KEY], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(filelock.Timeout):
            lock.acquire(blocking=False)
        holder.kill()
    with lock.acquire(timeout=5):
        assert lock.is_locked
    with store.lock(digest("other")), store.lock(KEY):
        pass


# disks that refuse


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, mounted for the test."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_one_clear_sentence_and_leaves_nothing_behind(small_disk: Path) -> None:
    store = Store(small_disk / "cache")
    kept = store.put(b"small")
    with pytest.raises(CacheError, match=r"has no room left for 2,000,000 bytes.*cache gc") as caught:
        store.put(bytes(2_000_000))
    assert str(store.root) in str(caught.value)
    assert list((store.root / "tmp").iterdir()) == []
    assert bytes(store.open(kept)) == b"small"
    name = store.put(b"there is room for this")
    assert bytes(store.open(name)) == b"there is room for this"


def test_a_full_disk_leaves_no_half_result(small_disk: Path) -> None:
    store = Store(small_disk / "cache")
    artifact = save(Scores({"score": 1.0}), store)
    with pytest.raises(CacheError, match="no room left"):
        store.publish(KEY, result_of(artifact, log="x" * 2_000_000))
    assert store.result(KEY) is None
    assert audit(store) == (1, 0)
    store.publish(KEY, result_of(artifact))
    assert audit(store) == (1, 1)


def test_a_read_only_disk_serves_hits_and_refuses_writes_in_one_sentence(small_disk: Path) -> None:
    with Store(small_disk / "cache") as store:
        artifact = save(Scores({"score": 1.0}), store)
        published = store.publish(KEY, result_of(artifact))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with Store(small_disk / "cache") as store:
        assert store.result(KEY) == published
        assert load(artifact, store) == Scores({"score": 1.0})
        assert save(Scores({"score": 1.0}), store) == artifact  # nothing to write
        for attempt in (lambda: store.put(b"new"), lambda: store.forget(KEY)):
            with pytest.raises(
                CacheError, match=r"cannot be written \(Read-only file system\).*QPIPE_CACHE_DIR"
            ):
                attempt()
        store.index.set("kind", "key", 1)
        assert store.index.get("kind", "key") == 1


def test_a_folder_of_somebody_else_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(CacheError, match="cannot be written"):
        Store(tmp_path / "cache").put(b"x")
    with pytest.raises(CacheError, match="cannot be written"):
        Store(tmp_path / "cache" / "below").lock(KEY)


def test_a_read_only_store_reads_and_never_writes(store: Store) -> None:
    artifact = save(Scores({"score": 1.0}), store)
    published = store.publish(KEY, result_of(artifact))
    damaged = store.put(b"damaged")
    rewrite(blob_path(store, damaged), b"DAMAGED")
    before = sorted((str(path), path.stat().st_mtime_ns) for path in store.root.rglob("*"))
    with Store(store.root, readonly=True) as reader:
        assert reader.result(KEY) == published
        assert load(artifact, reader) == Scores({"score": 1.0})
        assert save(Scores({"score": 1.0}), reader) == artifact
        with pytest.raises(DamagedError):
            reader.open(damaged)
        for attempt in (lambda: reader.put(b"new"), lambda: reader.forget(KEY), lambda: reader.lock(KEY)):
            with pytest.raises(CacheError, match="opened read-only"):
                attempt()
        with pytest.raises(CacheError, match="opened read-only"):
            reader.publish(digest("other"), result_of(artifact))
        reader.index.set("kind", "key", 1)
    assert sorted((str(path), path.stat().st_mtime_ns) for path in store.root.rglob("*")) == before


def test_processes_that_make_the_same_folders_at_once_do_not_get_in_each_others_way(tmp_path: Path) -> None:
    program = """
import sys, pathlib
from qpipe.cache.store import Store
for i in range(150):
    sys.stdin.readline()
    Store(pathlib.Path(sys.argv[1]) / str(i)).put(sys.argv[2].encode())
    print("done", flush=True)
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", program, tmp_path, str(i)],
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]  # fmt: skip
    for _ in range(150):
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "done\n"
    assert [process.wait() for process in processes] == [0, 0]
    assert all(len(list(Store(folder).blobs())) == 2 for folder in tmp_path.iterdir())
    assert not list(tmp_path.glob("*/damaged"))
