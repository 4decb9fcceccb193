from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from qpipe.artifacts.artifact import Artifact, load, save
from qpipe.artifacts.kinds import Samples, Scores
from qpipe.cache.cleanup import Removed, collect
from qpipe.cache.store import Store
from qpipe.errors import CacheError
from qpipe.keys.hashing import digest


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def publish(store: Store, key: str, artifact: Artifact) -> None:
    output = {"kind": artifact.kind, "digest": artifact.digest, "size_bytes": artifact.size_bytes}
    store.publish(digest(key), {"outputs": {"output": output}})


def result_bytes(store: Store) -> int:
    return sum(status.st_size for _, status in store.results())


def age(store: Store, seconds: float) -> None:
    """Make everything in the store look that much older."""
    for path in store.root.rglob("*"):
        if path.is_file():
            then = path.stat().st_mtime - seconds
            os.utime(path, (then, then))


def test_what_a_result_needs_stays_and_the_rest_goes(store: Store) -> None:
    kept = save(Samples({"x": np.ones((2, 2))}, np.zeros(2)), store)
    publish(store, "kept", kept)
    lost = save(Samples({"x": np.zeros((3, 3))}, np.zeros(2 + 1)), store)
    assert collect(store).blobs == 0  # its process lives and may publish a result of them
    store.close()
    removed = collect(store)
    assert (removed.results, removed.blobs, removed.size_bytes) == (0, 3, lost.size_bytes)
    assert len(load(kept, store)) == 2
    again = collect(store)
    assert (again.results, again.blobs, again.left_bytes) == (0, 0, removed.left_bytes)
    assert again.left_bytes == kept.size_bytes + result_bytes(store)


def test_what_a_live_process_put_stays_however_old_until_it_closes(store: Store) -> None:
    artifact = save(Scores({"score": 1.0}), store)
    age(store, 7200)
    assert collect(Store(store.root)).blobs == 0
    store.close()
    assert save(Scores({"score": 1.0}), store) == artifact  # put again, nothing written: it is relied on again
    assert collect(Store(store.root)).blobs == 0
    publish(store, "key", artifact)
    store.close()
    assert collect(store) == Removed(0, 0, 0, sum(size for _, size in store.blobs()) + result_bytes(store))


def test_old_results_go_when_asked_and_shared_blobs_stay(store: Store) -> None:
    weight = np.ones(10)
    publish(store, "old", save(Samples({"x": weight}), store))
    age(store, 100_000)
    new = save(Samples({"renamed": weight}), store)
    publish(store, "new", new)
    assert store.age_s(digest("old")) > 99_000
    store.close()
    removed = collect(store, older_than_s=86_400)
    assert (removed.results, removed.blobs) == (1, 1)  # the old root; the tensor is the new one's, too
    assert list(store.keys()) == [digest("new")]
    assert len(load(new, store)) == 10


def test_damaged_and_incomplete_results_go(store: Store) -> None:
    for name in ("whole", "unreadable", "incomplete"):
        publish(store, name, save(Scores({"name": name}), store))
    unreadable = store.root / "actions" / digest("unreadable")[:2] / f"{digest('unreadable')}.json"
    unreadable.chmod(0o644)
    unreadable.write_text("{")
    result = store.result(digest("incomplete"))
    assert result is not None
    for name in result["blobs"]:
        (store.root / "blobs" / name[:2] / name).unlink()
    age(store, 7200)
    assert collect(store).results == 2
    assert list(store.keys()) == [digest("whole")]


def test_a_read_only_store_is_not_cleaned(store: Store) -> None:
    save(Scores({"score": 1.0}), store)
    age(store, time.time() - 10)
    with pytest.raises(CacheError, match="read-only"):
        collect(Store(store.root, readonly=True))
    assert len(list(store.blobs())) == 1


def test_an_empty_store_is_clean(store: Store) -> None:
    assert collect(store).blobs == 0
    assert not store.root.exists()
