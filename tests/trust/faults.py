"""Faults from outside: a process that kills itself at its n-th system call, in code that knows nothing of it.

Counted are the calls through which anything of a run gets onto the disk: files opened, written, flushed, linked,
renamed, removed, locked, and every statement that SQLite executes. The kill comes right before the n-th, which is right
after the one before; `torn` lets the n-th call, where it is a write, write half of its bytes first.
"""

from __future__ import annotations

import builtins
import fcntl
import io
import os
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CALLS = ("open", "write", "fsync", "fchmod", "link", "replace", "rename", "unlink", "mkdir", "rmdir", "utime")


class _Counter:
    def __init__(self, at: int, torn: bool, log: str) -> None:
        self.at, self.torn, self.log = at, torn, log
        self.count = 0

    def step(self, name: str, detail: object = "") -> bool:
        """Count one call; dies where it is the n-th. Whether it is to be torn."""
        self.count += 1
        if self.log:
            _note(self.log, f"{self.count} {name} {detail}\n")
        if self.count == self.at:
            if self.torn and name == "write":
                return True
            os.kill(os.getpid(), signal.SIGKILL)
        return False


_real_open, _real_write, _real_close = os.open, os.write, os.close


def _note(path: str, line: str) -> None:
    descriptor = _real_open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    _real_write(descriptor, line.encode())
    _real_close(descriptor)


def arm(at: int = 0, torn: bool = False, log: str = "", clock_s: float = 0.0) -> None:
    """Let this process die at its `at`-th call (0: never); `log` is a file that gets a line for every call.

    With `clock_s`, all is left as it is but the clock, which goes wrong by so many seconds.
    """
    if clock_s:
        _set_clock(clock_s)
        return
    counter = _Counter(at, torn, log)
    for name in CALLS:
        setattr(os, name, _counted(getattr(os, name), name, counter))
    fcntl.flock = _counted(fcntl.flock, "flock", counter)

    real_open = io.open

    def opened(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        if set(mode) & set("wax+"):
            counter.step("open", file)
        return real_open(file, mode, *rest, **named)

    builtins.open = io.open = opened
    real_connect = sqlite3.connect

    class Connection(sqlite3.Connection):
        def execute(self, *arguments: Any) -> Any:
            counter.step("sqlite", str(arguments[0])[:40].strip())
            return super().execute(*arguments)

    def connect(*arguments: Any, **named: Any) -> Any:
        counter.step("connect", arguments[0])
        return real_connect(*arguments, factory=Connection, **named)

    sqlite3.connect = connect


def _set_clock(seconds: float) -> None:
    real, real_ns = time.time, time.time_ns
    time.time = lambda: real() + seconds
    time.time_ns = lambda: real_ns() + int(seconds * 1e9)


def _counted(function: Callable[..., Any], name: str, counter: _Counter) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        if counter.step(name, Path(str(arguments[0])).name[:20]):
            content = memoryview(arguments[1])
            function(arguments[0], content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)

    return call
