from __future__ import annotations

import json
import pickle
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qpipe.cache.index import Index


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "index"


def filled(folder: Path, **values: Any) -> None:
    index = Index(folder)
    for key, value in values.items():
        index.set("kind", key, value)
    index.close()


def rows(folder: Path) -> list[tuple[Any, ...]]:
    with sqlite3.connect(folder / "cache.db") as connection:
        return connection.execute("SELECT key, mode, filename, value FROM Cache").fetchall()


def change(folder: Path, statement: str, *parameters: Any) -> None:
    connection = sqlite3.connect(folder / "cache.db")
    with connection:
        connection.execute(statement, parameters)
    connection.close()


def test_values_outlive_the_process_that_set_them(folder: Path) -> None:
    value = {"a": [1, 2.5, None, True, "ä"]}
    filled(folder, key=value)
    assert Index(folder).get("kind", "key") == value
    assert Index(folder).get("kind", "other") is None
    assert Index(folder).get("other", "key") is None


def test_what_is_set_is_seen_at_once_and_written_by_close(folder: Path) -> None:
    index = Index(folder)
    index.set("kind", "key", 1)
    assert index.get("kind", "key") == 1
    assert Index(folder).get("kind", "key") is None
    index.close()
    assert index.get("kind", "key") == 1
    index.set("kind", "key", 2)
    index.close()
    assert Index(folder).get("kind", "key") == 2


def test_a_memo_is_one_kind_of_an_index(folder: Path) -> None:
    index = Index(folder)
    memo = index.memo("file")
    memo.set("key", "value")
    assert memo.get("key") == index.get("file", "key") == "value"
    assert index.memo("code").get("key") is None


def test_an_index_that_is_only_asked_writes_nothing_when_closed(folder: Path) -> None:
    filled(folder, key=1)
    before = (folder / "cache.db").stat().st_mtime_ns, rows(folder)
    index = Index(folder)
    index.get("kind", "key")
    index.close()
    assert rows(folder) == before[1]


def test_text_alone_is_kept_and_nothing_beside_the_database(folder: Path) -> None:
    filled(folder, big="x" * 100_000, small=[1])
    assert all(
        mode == 1 and filename is None and type(value) is str for _, mode, filename, value in rows(folder)
    )
    assert {path.suffix for path in folder.iterdir()} <= {".db", ".db-wal", ".db-shm"}


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_planted_pickle_is_a_miss_and_is_not_run(folder: Path, tmp_path: Path) -> None:
    filled(folder, key=1, other=2)
    proof = tmp_path / "ran"
    payload = pickle.dumps(Bomb(proof))
    (folder / "payload.val").write_bytes(payload)
    plants: list[tuple[Any, ...]] = [(4, None, payload), (4, "payload.val", None), (2, "payload.val", None),
                                     (1, None, payload), (3, "../../etc/passwd", None)]  # fmt: skip
    for mode, filename, value in plants:
        change(
            folder,
            "UPDATE Cache SET mode = ?, filename = ?, value = ? WHERE key = 'kind key'",
            mode,
            filename,
            value,
        )
        index = Index(folder)
        assert index.get("kind", "key") is None
        assert index.get("kind", "other") == 2
        index.set("kind", "key", 3)
        index.close()
        assert Index(folder).get("kind", "key") == 3
    assert not proof.exists()
    pickle.loads(payload)
    assert proof.exists()  # the plant would have worked


def test_a_planted_file_name_removes_no_file(folder: Path, tmp_path: Path) -> None:
    filled(folder, key=1)
    victim = tmp_path / "victim"
    victim.write_text("here")
    change(folder, "UPDATE Cache SET filename = '../victim'")
    filled(folder, key=2)
    assert victim.read_text() == "here"
    assert Index(folder).get("kind", "key") == 2


def test_a_value_that_is_no_json_is_a_miss(folder: Path) -> None:
    filled(folder, key=1)
    change(folder, "UPDATE Cache SET value = 'not json'")
    assert Index(folder).get("kind", "key") is None


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE Cache SET value = replace(value, '17', '16') WHERE key = 'kind key'",
        "UPDATE Cache SET value = (SELECT value FROM Cache WHERE key = 'kind other') WHERE key = 'kind key'",
    ],
)
def test_a_row_that_is_not_as_it_was_written_is_a_miss(folder: Path, statement: str) -> None:
    filled(folder, key={"imports": 171717}, other={"imports": 3})
    assert Index(folder).get("kind", "key") == {"imports": 171717}
    change(folder, statement)
    assert Index(folder).get("kind", "key") is None


@pytest.mark.parametrize("damage", ["garbage", "cut", "settings", "table", "folder"])
def test_a_damaged_database_is_moved_aside_and_rebuilt(folder: Path, damage: str) -> None:
    filled(folder, **{f"key{i}": "x" * 200 for i in range(500)})
    database = folder / "cache.db"
    content = database.read_bytes()
    if damage == "garbage":
        database.write_bytes(b"this is no database at all" * 100)
    elif damage == "cut":
        database.write_bytes(content[:4096] + b"\xff" * (len(content) // 2))
    elif damage == "settings":
        change(folder, "INSERT INTO Settings VALUES ('disk_planted', 1)")
    elif damage == "table":
        change(folder, "DROP TABLE Cache")
        change(folder, "CREATE TABLE Cache (x)")
    else:
        database.unlink()
        database.mkdir()
    index = Index(folder)
    for i in range(500):
        assert index.get("kind", f"key{i}") in (None, "x" * 200)
    index.set("kind", "new", 1)
    assert index.get("kind", "new") == 1
    index.close()
    filled(folder, new=2)
    filled(folder, new=2)
    assert Index(folder).get("kind", "new") == (2 if damage != "folder" else None)


def test_a_locked_database_costs_little_time_and_no_results(folder: Path) -> None:
    filled(folder, key=1)
    connection = sqlite3.connect(folder / "cache.db", isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    started = time.monotonic()
    index = Index(folder)
    assert index.get("kind", "key") is None
    index.set("kind", "key", 2)
    assert index.get("kind", "key") == 2
    index.close()
    assert index.get("kind", "key") == 2
    assert time.monotonic() - started < 5
    connection.execute("ROLLBACK")
    connection.close()
    assert Index(folder).get("kind", "key") == 1


def test_a_database_locked_only_while_it_is_written_loses_nothing_else(folder: Path) -> None:
    filled(folder, key=1)
    index = Index(folder)
    index.set("kind", "new", 2)
    assert index.get("kind", "key") == 1
    connection = sqlite3.connect(folder / "cache.db", isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    index.close()
    connection.execute("ROLLBACK")
    connection.close()
    assert index.get("kind", "new") == 2
    assert Index(folder).get("kind", "key") == 1


def test_many_processes_may_write_at_once(folder: Path) -> None:
    program = """
import sys, pathlib
from qpipe.cache.index import Index
index = Index(pathlib.Path(sys.argv[1]))
for i in range(200):
    index.set(sys.argv[2], str(i), i)
index.close()
"""
    processes = [subprocess.Popen([sys.executable, "-c", program, folder, str(i)]) for i in range(4)]
    assert [process.wait() for process in processes] == [0, 0, 0, 0]
    index = Index(folder)
    kept = sum(index.get(str(i), "199") == 199 for i in range(4))
    assert kept >= 1  # one that found the database busy gave up; none failed
    assert all(index.get(str(i), "0") == (0 if index.get(str(i), "199") == 199 else None) for i in range(4))


def test_a_killed_writer_leaves_a_database_that_opens(folder: Path) -> None:
    program = """
import sys, pathlib
from qpipe.cache.index import Index
print("ready", flush=True)
while True:
    index = Index(pathlib.Path(sys.argv[1]))
    for i in range(300):
        index.set("kind", str(i), "x" * 300)
    index.close()
"""
    for pause_s in (0.01, 0.05, 0.1):
        with subprocess.Popen([sys.executable, "-c", program, folder], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(pause_s)
            writer.kill()
    filled(folder, key=1)
    assert Index(folder).get("kind", "key") == 1
    assert not folder.with_name("index.damaged").exists()


def test_a_read_only_index_lasts_as_long_as_the_process(folder: Path) -> None:
    index = Index(folder, readonly=True)
    index.set("kind", "key", 1)
    assert index.get("kind", "key") == 1
    assert index.get("kind", "other") is None
    index.close()
    assert not folder.exists()


def test_nothing_is_ever_evicted(folder: Path) -> None:
    filled(folder, **{f"key{i}": "x" * 100_000 for i in range(100)})
    index = Index(folder)
    assert all(index.get("kind", f"key{i}") is not None for i in range(100))
    with sqlite3.connect(folder / "cache.db") as connection:
        settings = dict(connection.execute("SELECT key, value FROM Settings").fetchall())
    assert (settings["eviction_policy"], settings["cull_limit"]) == ("none", 0)
    assert rows(folder)[0][3].endswith(json.dumps("x" * 100_000))
