"""The index: what can be computed again from the files, kept in diskcache so that it need not be.

Stat and code memos, durations, the last keys of a node. Nothing here is ever needed: a database that is
locked, damaged, read-only or gone costs time, not results. Four traps of diskcache are closed here: it
unpickles what it reads (CVE-2025-69872), removes the files that a row names, evicts beyond 1 GiB, and waits
60 s for a lock.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sqlite3
import time
from collections import Counter
from pathlib import Path
from typing import Any

import diskcache

from qpipe.keys.hashing import digest_bytes

Json = Any
_LOG = logging.getLogger(__name__)
_TIMEOUT_S = 0.2  # how long a locked database is waited for
_PASSING = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_NOMEM,
}
_MANY = 32  # after so many single looks at a kind all of it is read at once: 25 µs a look, 2 µs a row
_READ_KIND = (
    "SELECT key, value FROM Cache WHERE raw = 1 AND key >= ? AND key < ? AND mode = ? AND filename IS NULL"
)
_WRITE = """INSERT INTO Cache (key, raw, store_time, access_time, size, mode, filename, value)
VALUES (?, 1, ?, ?, 0, ?, NULL, ?) ON CONFLICT (key, raw) DO UPDATE SET
store_time = excluded.store_time, access_time = excluded.access_time, expire_time = NULL, tag = NULL,
size = excluded.size, mode = excluded.mode, filename = excluded.filename, value = excluded.value"""
"""As diskcache's own `set`, for many rows: one by one they take 80 µs each."""
_SETTINGS = {"eviction_policy": "none", "size_limit": 1 << 60, "cull_limit": 0, "sqlite_synchronous": 0}


class TextDisk(diskcache.Disk):  # type: ignore[misc]  # diskcache has no types
    """Text keys and text values inside the database: no pickle either way, no files beside it."""

    def put(self, key: object) -> tuple[str, bool]:
        return _text(key), True

    def get(self, key: object, raw: object) -> str:
        return _text(key)

    def store(self, value: object, read: bool, key: object = None) -> tuple[int, int, None, str]:
        return 0, diskcache.core.MODE_RAW, None, _text(value)

    def fetch(self, mode: object, filename: object, value: object, read: bool) -> str | None:
        """The text of a row; None, so a miss, for a row that this class did not write."""
        if mode == diskcache.core.MODE_RAW and filename is None and type(value) is str:
            return value
        _LOG.warning("the index holds a row that qpipe did not write; it is passed over")
        return None

    def remove(self, file_path: object) -> None:
        """Nothing: no row of ours has a file, and a row of somebody else's may name any."""


def _text(value: object) -> str:
    if type(value) is not str:
        raise TypeError(f"the index keeps text, got {type(value).__qualname__}")
    return value


class IndexMemo:
    """The values of one kind in an index, as a `qpipe.keys.hashing.Memo`."""

    def __init__(self, index: Index, kind: str) -> None:
        self._index = index
        self._kind = kind

    def get(self, key: str) -> Json | None:
        return self._index.get(self._kind, key)

    def set(self, key: str, value: Json) -> None:
        self._index.set(self._kind, key, value)


class Index:
    """JSON values by kind and key. What is set stays in memory until `close` writes it in one transaction.

    No method raises for the database's sake: without one, the index lasts as long as the process.
    """

    def __init__(self, folder: Path, readonly: bool = False) -> None:
        self._folder = folder
        self._usable = not readonly  # diskcache writes when it opens
        self._cache: Any = None
        self._pending: dict[str, Json] = {}
        self._looks = Counter[str]()
        self._known: dict[str, dict[str, Any]] = {}

    def get(self, kind: str, key: str) -> Json | None:
        """The value set last, or None where there is none."""
        name = f"{kind} {key}"
        if name in self._pending:
            return self._pending[name]
        cache = self._database()
        if cache is None:
            return None
        try:
            text = self._look(cache, kind, name)
            return None if text is None else _unsealed(name, text)
        except Exception as error:  # a damaged database can fail in any way
            self._give_up(error)
            return None

    def set(self, kind: str, key: str, value: Json) -> None:
        """Remember `value`."""
        self._pending[f"{kind} {key}"] = value

    def memo(self, kind: str) -> IndexMemo:
        """The values of one kind."""
        return IndexMemo(self, kind)

    def close(self) -> None:
        """Write what was set. The index may be used again afterwards."""
        cache = self._database() if self._pending else self._cache
        if cache is None:
            return
        try:
            with cache.transact() if self._pending else contextlib.nullcontext():
                now, mode = time.time(), diskcache.core.MODE_RAW
                rows = ((name, now, now, mode, _sealed(name, value)) for name, value in self._pending.items())
                cache._con.executemany(_WRITE, rows)
            cache.close()
            self._pending, self._cache, self._known = {}, None, {}
        except Exception as error:  # as above
            self._give_up(error)

    def _look(self, cache: Any, kind: str, name: str) -> str | None:
        """The text of one row; of a kind that is looked at often, from all of it, read at once."""
        if kind not in self._known:
            self._looks[kind] += 1
            if self._looks[kind] <= _MANY:
                text: str | None = cache.get(name)
                return text
            between = (f"{kind} ", f"{kind}!", diskcache.core.MODE_RAW)
            self._known[kind] = dict(cache._con.execute(_READ_KIND, between))
        found = self._known[kind].get(name)
        return found if type(found) is str else None

    def _database(self) -> Any:
        """The open database; None where there is none to be had, now or later."""
        if self._cache is None and self._usable:
            try:
                self._cache = _open(self._folder)
            except Exception as error:  # as above
                self._give_up(error)
        return self._cache

    def _give_up(self, error: Exception) -> None:
        """Go on without the database; a damaged one makes room for the next process's."""
        _LOG.info("the index in %s is not used: %s: %s", self._folder, type(error).__name__, error)
        self._cache, self._usable = None, False
        if not _is_passing(error):
            _set_aside(self._folder)


_encode = json.JSONEncoder(separators=(",", ":")).encode
_SEAL_LENGTH = 16


def _sealed(name: str, value: Json) -> str:
    """The text of a row, behind the first digits of a digest: SQLite does not notice a bit that turns in a value, and
    a list of imports that lost one would hide every later edit of that module."""
    text = _encode(value)
    return digest_bytes(f"{name} {text}".encode())[:_SEAL_LENGTH] + text


def _unsealed(name: str, row: str) -> Json:
    """The value of a row. ValueError where it is not as it was written."""
    text = row[_SEAL_LENGTH:]
    if digest_bytes(f"{name} {text}".encode())[:_SEAL_LENGTH] != row[:_SEAL_LENGTH]:
        raise ValueError(f"the row {name!r} does not match its seal")
    return json.loads(text)


def _open(folder: Path) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    _probe(folder)
    return diskcache.Cache(str(folder), timeout=_TIMEOUT_S, disk=TextDisk, **_SETTINGS)


def _probe(folder: Path) -> None:
    """sqlite3.Error where the database cannot be written within the timeout: diskcache itself waits 60 s."""
    with contextlib.closing(
        sqlite3.connect(folder / diskcache.core.DBNAME, timeout=_TIMEOUT_S, isolation_level=None)
    ) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")


def _is_passing(error: Exception) -> bool:
    """Whether `error` says nothing about the database itself: it is busy, or the disk refuses."""
    if isinstance(error, sqlite3.OperationalError):
        return error.sqlite_errorcode & 0xFF in _PASSING
    return isinstance(error, diskcache.Timeout | OSError)


def _set_aside(folder: Path) -> None:
    """Move a damaged database out of the way, in the place of the one moved before."""
    aside = folder.with_name(f"{folder.name}.damaged")
    with contextlib.suppress(OSError):
        if aside.is_dir() and not aside.is_symlink():  # asked first: rmtree would wait for a pipe
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)
        os.rename(folder, aside)
        _LOG.warning("the index in %s was damaged; it was moved to %s and will be rebuilt", folder, aside)
