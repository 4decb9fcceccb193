"""What a person sees during a run: what will be done, how far it is, and at the end what came of it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from threading import RLock
from typing import IO, Protocol

from qpipe.report import text
from qpipe.report.terminal.activity import Activity
from qpipe.report.terminal.closing import closing_table
from qpipe.report.terminal.plain import PlainDisplay, is_terminal
from qpipe.report.terminal.table import table, wrap

__all__ = ["Row", "Terminal", "closing_table"]

STYLES = {"run": "blue", "ran": "blue", "wait": "yellow", "failed": "bold red", "hit": "green"}
QUIET_VERDICTS = frozenset({"not_needed", "disabled"})
PLAIN_INTERVAL_S = 10.0
LISTED = 60
"""A run of more nodes than this tells of those that take long or fail, and counts the others."""
LONG_S = 1.0
_COUNTED = {
    "hit": "cached",
    "run": "to run",
    "wait": "waiting for their inputs",
    "failed": "failed",
    "skipped": "skipped",
}


@dataclass(frozen=True)
class Row:
    """One node of the plan.

    `verdict` is hit, run, wait or not_needed; `expected_s` is what the node took before, if it ever ran.
    """

    node: str
    stage: str
    verdict: str
    reasons: tuple[str, ...] = ()
    expected_s: float | None = None


class Display(Protocol):
    """Where the lines and the bars go: `live.LiveDisplay`, or `PlainDisplay` for a log."""

    def line(self, line: str, style: str = "") -> None: ...
    def update(self, node: str, activity: Activity) -> None: ...
    def remove(self, node: str) -> None: ...
    def close(self) -> None: ...


class Terminal:
    """Shows a run on `stream` (default: standard error).

    `live` draws bars that move; by default where the stream is a terminal and this is not CI. Else plain
    lines, at most one every 10 s for each running node. Of a run of many nodes (LISTED) only those that take long or
    fail have a line, and every 10 s one says how far it is. `quiet` shows failures alone. Safe to call from several
    threads; use it as a context manager, or call `close`, so that an interrupt restores the terminal.
    """

    def __init__(
        self,
        stream: IO[str] | None = None,
        live: bool | None = None,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._live = (is_terminal(self._stream) and not os.environ.get("CI")) if live is None else live
        self._quiet = quiet
        self._clock = clock
        self._lock = RLock()
        self._plain = PlainDisplay(self._stream)
        self._display: Display = self._plain
        self._announced: dict[str, str] = {}
        self._pending: dict[str, float | None] = {}
        self._running: dict[str, Activity] = {}
        self._planned = self._done = self._failed = 0
        self._told = clock()

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def planned(self, rows: Sequence[Row], expected_s: float | None = None) -> None:
        """Say what will be done; call it once, before the first node starts. `expected_s` is what it takes in all."""
        with self._lock:
            self._announced = {row.node: row.verdict for row in rows}
            self._pending = {row.node: row.expected_s for row in rows if row.verdict in ("run", "wait")}
            self._planned = len(self._pending)
            if not self._quiet:
                left = self._left() if expected_s is None else expected_s
                for line, style in plan_lines(rows, self._plain.width, left):
                    self._plain.line(line, style)

    def started(self, node: str, stage: str) -> None:
        """The node begins to run."""
        with self._lock:
            self._planned = max(self._planned, self._done + len(self._pending) + (node not in self._pending))
            now = self._clock()
            activity = Activity(stage, now, self._pending.get(node), shown=now)
            self._pending.setdefault(node, None)
            self._running[node] = activity
            if self._quiet:
                return
            if self._live and self._display is self._plain:
                from qpipe.report.terminal.live import LiveDisplay

                self._display = LiveDisplay(self._stream, self._overall, self._clock)
            if self._many:
                return  # its bar comes with its first progress: most are over before one could be seen
            if not self._live:
                expected = "" if activity.expected_s is None else f" (~ {text.duration(activity.expected_s)})"
                self._display.line(f"start   {text.clean(node)}{expected}")
            self._display.update(node, activity)

    def progress(self, node: str, done: int, total: int, what: str = "") -> None:
        """The node has finished `done` of `total` steps and is at `what`."""
        with self._lock:
            activity = self._running.get(node)
            if activity is None or self._quiet:
                return
            activity.done, activity.total, activity.what = done, total, text.clean(what)
            self._display.update(node, activity)
            now = self._clock()
            if not self._live and now - activity.shown >= PLAIN_INTERVAL_S:
                activity.shown = now
                at = f"{done} of {total}" + (f", {activity.what}" if activity.what else "")
                self._display.line(f"        {text.clean(node)}: {at}{_prefixed('; ', self._left_text())}")

    def finished(self, node: str, verdict: str, duration_s: float, notes: Sequence[str] = ()) -> None:
        """The node is done: hit, ran, skipped or not_needed. A hit that was announced is not said twice."""
        with self._lock:
            self._end(node)
            silent = verdict in QUIET_VERDICTS or (verdict == "hit" and self._announced.get(node) == "hit")
            if self._quiet or silent:
                return
            if self._many and duration_s < LONG_S:
                self._tell_how_far()
                return
            took = "" if verdict in ("hit", "skipped") else f"  {text.duration(duration_s)}"
            self._display.line(f"{verdict:<6}  {text.clean(node)}{took}", STYLES.get(verdict, ""))
            for note in notes:
                self._indented(text.clean(note), "dim")

    def failed(self, node: str, message: str) -> None:
        """The node failed; `message` says why, in one line or several."""
        with self._lock:
            self._end(node)
            self._failed += 1
            if self._many and self._failed > LISTED:
                if self._failed == LISTED + 1:
                    self._display.line("More nodes fail; the report has them all.", STYLES["failed"])
                return
            first, *rest = text.clean_lines(message).strip().splitlines() or ["no message"]
            self._display.line(f"failed  {text.clean(node)}: {first.strip()}", STYLES["failed"])
            for line in rest:
                self._display.line(f"        {line}")

    def message(self, message: str) -> None:
        """Say something about the run as a whole."""
        with self._lock:
            if not self._quiet:
                for line in text.clean_lines(message).splitlines():
                    self._display.line(line)

    def show(self, record: Mapping[str, object], stream: IO[str] | None = None) -> None:
        """Print the closing table of `record` (on `stream`, default: this one); ends the live display."""
        self.close()
        out = PlainDisplay(self._stream if stream is None else stream)
        out.text(closing_table(record, out.width, fancy=out.fancy, colour=out.colour))

    def close(self) -> None:
        """Take the bars away and give the cursor back. Can be called more than once."""
        with self._lock:
            display, self._display = self._display, self._plain
            display.close()

    @property
    def _many(self) -> bool:
        return self._planned > LISTED

    def _tell_how_far(self) -> None:
        """A line every 10 s, where no bar says it."""
        if not self._live and self._clock() - self._told >= PLAIN_INTERVAL_S:
            self._told = self._clock()
            done, planned, left = self._overall()
            self._display.line(f"        {done} of {text.plural(planned, 'node')}{_prefixed('; ', left)}")

    def _end(self, node: str) -> None:
        self._running.pop(node, None)
        self._announced.setdefault(node, "")
        if node in self._pending:
            del self._pending[node]
            self._done += 1
        self._display.remove(node)

    def _indented(self, message: str, style: str) -> None:
        for line in wrap(message, self._plain.width - 8):
            self._display.line(f"        {line}", style)

    def _left(self) -> float | None:
        # copies, each made in one step: rich's thread asks too, and must not wait for our lock (LiveDisplay)
        return time_left_s(dict(self._pending), dict(self._running), self._clock())

    def _left_text(self) -> str:
        left = self._left()
        return "" if left is None else f"time left ~ {text.duration(max(1.0, round(left)))}"

    def _overall(self) -> tuple[int, int, str]:
        """(nodes done, nodes to do, time left) for the bar of the whole run."""
        return self._done, self._planned, self._left_text()


def plan_lines(rows: Sequence[Row], width: int, expected_s: float | None) -> Iterable[tuple[str, str]]:
    """(line, style): a summary, then one line per node; hits of a long plan are only counted."""
    idle = [row.node for row in rows if row.verdict in QUIET_VERDICTS]
    rows = [row for row in rows if row.verdict not in QUIET_VERDICTS]
    if not rows:
        return
    hits = sum(row.verdict == "hit" for row in rows)
    if hits == len(rows):
        yield f"{text.plural(hits, 'node')}, all cached", ""
        return
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in _COUNTED}
    parts = [f"{count} {_COUNTED[verdict]}" for verdict, count in counts.items() if count]
    about = "" if expected_s is None else f"; about {text.duration(max(1.0, round(expected_s)))}"
    yield f"{text.plural(len(rows), 'node')}: {', '.join(parts)}{about}", ""
    listed = [row for row in rows if row.verdict != "hit"][:LISTED] if len(rows) > LISTED else rows
    for row, lines in zip(listed, table(_cells(listed), width - 2, right=(3,), flexible=4), strict=True):
        for line in lines:
            yield f"  {line}", "dim" if row.verdict == "hit" else ""
    if len(rows) > LISTED and (hidden := len(rows) - hits - len(listed)) > 0:
        yield f"  and {hidden} more", ""
    if idle:
        for line in wrap(f"only if needed: {text.clean(', '.join(idle))}", width - 2, max_lines=3):
            yield f"  {line}", "dim"


def _cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    return [
        (
            row.verdict,
            text.clean(row.node),
            text.clean(row.stage) if row.stage != row.node else "",
            "" if row.expected_s is None or row.verdict == "hit" else f"~ {text.duration(row.expected_s)}",
            "" if row.verdict == "hit" else text.clean("; ".join(row.reasons)),
        )
        for row in rows
    ]


def time_left_s(
    pending: Mapping[str, float | None], running: Mapping[str, Activity], now: float
) -> float | None:
    """Seconds to go: what the nodes took before, shared by as many as run now; None if nothing is known."""
    left = [running[node].left_s(now) if node in running else expected for node, expected in pending.items()]
    known = [seconds for seconds in left if seconds is not None]
    return max(max(known), sum(known) / max(1, len(running))) if known else None


def _prefixed(prefix: str, rest: str) -> str:
    return prefix + rest if rest else ""
