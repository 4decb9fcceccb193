"""What a disk, a clock or a neighbour does to a cache: the next run is right, and what was damaged is made again."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qpipe.cache.store import Store
from tests.crash.test_kills import pipeline
from tests.trust.lab import Lab, blobs, flip, half_written, incomplete, outputs, overwrite

Damage = Callable[[Path, random.Random], None]


def truncate(path: Path, rng: random.Random) -> None:
    overwrite(path, path.read_bytes()[: int(path.stat().st_size * rng.random())])


def turn_a_bit(path: Path, rng: random.Random) -> None:
    flip(path, rng.random())


def turn_bits(path: Path, rng: random.Random) -> None:
    for _ in range(40):
        flip(path, rng.random())


def delete(path: Path, rng: random.Random) -> None:
    path.unlink()


def scribble(path: Path, rng: random.Random) -> None:
    overwrite(path, rng.randbytes(rng.randrange(1, 400)))


DAMAGES = (truncate, turn_a_bit, delete, scribble)


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_blobs_and_results_are_misses_and_heal(
    lab: Lab, crash_report: Counter[str], damage: Damage
) -> None:
    """A run of another variant reads what the first one made; then the first one is asked for again."""
    first, second = pipeline(0.0), pipeline(0.0, factor=5.0)
    right = outputs(lab.finish(first))
    right_second = outputs(lab.finish(second, cache=lab.folder / "other"))
    rng = random.Random(damage.__name__)
    for i in range(8):
        lab.clear()
        lab.finish(first)
        files = [*blobs(lab.cache), *sorted(lab.cache.glob("actions/*/*.json"))]
        for path in rng.sample(files, rng.randrange(1, len(files))):
            damage(path, rng)
        where = f"{damage.__name__}, trial {i}"
        assert outputs(lab.finish(second)) == right_second, where
        crash_report["damaged"] += 1
        store = Store(lab.cache)
        for digest, _ in list(store.blobs()):
            try:
                store.open(digest)
            except Exception as error:  # what no run read so far is found by whoever looks
                assert type(error).__name__ == "DamagedError"  # noqa: PT017
        store.close()
        record = lab.finish(first)
        assert outputs(record) == right, where
        assert outputs(lab.finish(second)) == right_second, where
        bad = [path for path in half_written(lab.cache) if "/blobs/" in path]
        assert bad == [], where
        keys = {node["key"] for node in record["nodes"].values()}  # lost sub-results are made when asked for
        assert not keys & set(incomplete(lab.cache)), where
        crash_report["healed"] += 1


def _index(lab: Lab) -> Path:
    return lab.cache / "index" / "cache.db"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path, rng: path.unlink(),
        lambda path, rng: path.write_bytes(b""),
        lambda path, rng: path.write_bytes(path.read_bytes()[:5000]),
        lambda path, rng: path.write_bytes(b"not a database" * 500),
        lambda path, rng: path.write_bytes(path.read_bytes()[:100] + rng.randbytes(path.stat().st_size - 100)),
        lambda path, rng: turn_bits(path, rng),
    ],
    ids=["deleted", "empty", "cut", "other", "garbage", "bits"],
)  # fmt: skip
def test_a_damaged_index_costs_time_and_nothing_else(
    lab: Lab, crash_report: Counter[str], spoil: Callable[[Path, random.Random], object]
) -> None:
    right = outputs(lab.finish(pipeline(0.0)))
    rng = random.Random(1)
    for _ in range(2):
        for path in lab.cache.glob("index/cache.db-*"):
            path.unlink()
        spoil(_index(lab), rng)
        lab.calls()
        record = lab.finish(pipeline(0.0))
        assert outputs(record) == right
        assert lab.calls() == []
        crash_report["index damaged"] += 1
        lab.finish(pipeline(0.0, factor=rng.random()))  # has something to write down
    with sqlite3.connect(_index(lab)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_an_index_that_another_process_holds_is_not_waited_for(lab: Lab) -> None:
    right = outputs(lab.finish(pipeline(0.0)))
    lab.calls()
    with sqlite3.connect(_index(lab), isolation_level=None) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        started = time.monotonic()
        assert outputs(lab.finish(pipeline(0.0))) == right
        assert lab.calls() == []
        assert outputs(lab.finish(pipeline(0.0, factor=7.0)))["m"] == right["m"]
        assert time.monotonic() - started < 10
        connection.execute("ROLLBACK")
    assert half_written(lab.cache) == []


@pytest.mark.parametrize("clock_s", [-1e9, -86400.0, -3.0, 3.0, 86400.0, 1e9])
def test_a_clock_that_was_set_changes_no_verdict(
    lab: Lab, crash_report: Counter[str], clock_s: float
) -> None:
    """Its time goes wrong for a run, then is right again: in files written, memos and locks."""
    number = lab.folder / "number.txt"
    number.write_text("5")
    stages = {**pipeline(0.0), "r": {"uses": "toy_read", "path": "number.txt"}}
    right = outputs(lab.finish(stages, cache=lab.folder / "other"))
    fault = {"clock_s": clock_s}
    lab.calls()
    for wrong in (fault, None, fault, None):
        assert outputs(lab.finish(stages, fault=wrong)) == right
    calls = Counter(lab.calls())
    assert max(calls.values()) == 1, calls
    for text, wrong in (("6", fault), ("7", None), ("8", fault)):
        number.write_text(text)
        made = outputs(lab.finish(stages, fault=wrong))
        assert made["r"] != right["r"]
        assert lab.calls() == ["read"]
    number.write_text("5")
    assert outputs(lab.finish(stages)) == right
    assert half_written(lab.cache) + incomplete(lab.cache) == []
    crash_report["clock set"] += 1


@pytest.fixture
def small_disk(lab: Lab) -> Iterator[Path]:
    """A tmpfs whose size can be changed; skipped where mounting is not permitted."""
    folder = lab.folder / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_at_many_moments(lab: Lab, small_disk: Path, crash_report: Counter[str]) -> None:
    right = outputs(lab.finish(pipeline(0.0)))
    failed = 0
    for pages in (1, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 64):
        cache = small_disk / "cache"
        subprocess.run(["mount", "-o", f"remount,size={pages * 4}k", str(small_disk)], check=True)
        child = lab.begin(pipeline(0.0), cache=cache)
        if child.wait() != 0:
            failed += 1
            told = [line for line in child.text().splitlines() if line.startswith("qpipe: ")]
            assert len(told) == 1, child.text()
            assert "has no room left" in told[0]
            assert "Traceback" not in child.text()
        assert half_written(cache) + incomplete(cache) == []
        assert not list(cache.glob("tmp/*"))
        crash_report["disk full"] += 1
        subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
        assert outputs(lab.finish(pipeline(0.0), cache=cache)) == right
        lab.clear(cache)
    assert failed >= 5


def test_four_writers_at_once_run_every_action_once(lab: Lab, crash_report: Counter[str]) -> None:
    variants = [pipeline(factor=float(factor)) for factor in (3, 3, 4, 5)]
    right = [outputs(lab.finish(stages, cache=lab.folder / f"other{i}")) for i, stages in enumerate(variants)]
    for i in range(4):
        lab.clear()
        lab.calls()
        runs = [lab.begin(stages, folder=f"w{i}") for i, stages in enumerate(variants)]
        assert [child.wait() for child in runs] == [0, 0, 0, 0], [child.text() for child in runs]
        assert [outputs(lab.record_of(f"w{i}")) for i in range(4)] == right
        calls = Counter(lab.calls())
        actions = {name: count for name, count in calls.items() if name.startswith(("make", "mix"))}
        assert set(actions.values()) == {1}, f"round {i}: {calls}"
        assert half_written(lab.cache) + incomplete(lab.cache) == []
        crash_report["four writers"] += 1


def test_four_writers_while_blobs_and_results_disappear(lab: Lab, crash_report: Counter[str]) -> None:
    """A neighbour that deletes what it likes, and gc beside it, cost work, never a wrong result or a failure."""
    variants = [pipeline(0.01, factor=float(factor)) for factor in (3, 4, 5, 6)]
    right = [outputs(lab.finish(stages, cache=lab.folder / f"other{i}")) for i, stages in enumerate(variants)]
    rng = random.Random("neighbour")
    for _ in range(3):
        lab.clear()
        runs = [lab.begin(stages, folder=f"w{i}") for i, stages in enumerate(variants)]
        end = time.monotonic() + 0.6
        while time.monotonic() < end:
            for path in [*blobs(lab.cache), *lab.cache.glob("actions/*/*.json")]:
                if rng.random() < 0.02:
                    path.unlink(missing_ok=True)
                    crash_report["disappeared"] += 1
            time.sleep(0.02)
        assert [child.wait() for child in runs] == [0, 0, 0, 0], [child.text() for child in runs]
        assert [outputs(lab.record_of(f"w{i}")) for i in range(4)] == right
        assert half_written(lab.cache) == []


def test_gc_in_a_loop_beside_runs(lab: Lab, crash_report: Counter[str]) -> None:
    right = outputs(lab.finish(pipeline(0.0), cache=lab.folder / "other"))
    lab.pipeline(pipeline(0.03))
    for i in range(3):
        lab.clear()
        lab.calls()
        runs = [lab.begin(pipeline(0.03), folder=f"g{i}") for i in range(2)]
        done = 0
        while any(_lives(child.pid) for child in runs):
            sweep = lab.words("cache", "gc")
            assert sweep.wait() == 0, sweep.text()
            done += 1
        assert [child.wait() for child in runs] == [0, 0], [child.text() for child in runs]
        assert all(
            {k: v for k, v in outputs(lab.record_of(f"g{i}")).items() if k in ("s", "f")}
            == {k: v for k, v in right.items() if k in ("s", "f")}
            for i in range(2)
        )
        calls = Counter(lab.calls())
        assert max(calls.values()) == 1, f"round {i}: {calls}"
        assert done >= 1
        crash_report["gc beside runs"] += done


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
