"""The moving part of the terminal: a bar per running node and one for all. Only this module imports rich."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from typing import IO, TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from qpipe.report import text

if TYPE_CHECKING:
    from qpipe.report.terminal.activity import Activity

Overall = Callable[[], tuple[int, int, str]]


class LiveDisplay:
    """Lines above, bars below; `overall` is asked at each redraw, so that the time left moves between events.

    The redraw runs in a thread of rich's that holds rich's lock: neither it nor `overall` may wait for a
    lock that the caller holds.
    """

    def __init__(self, stream: IO[str], overall: Overall, clock: Callable[[], float]) -> None:
        self._console = Console(file=stream, highlight=False, emoji=False)
        self._clock = clock
        self._tasks: dict[str, TaskID] = {}
        self._activities: dict[str, Activity] = {}
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            _Says(self._tail),
            console=self._console,
            transient=True,
            refresh_per_second=5,
        )
        self._overall = overall
        self._all = self._progress.add_task("all", total=None, node="")
        self._progress.start()
        atexit.register(self.close)

    def line(self, line: str, style: str = "") -> None:
        self._progress.print(Text(line, style=style), soft_wrap=True)

    def update(self, node: str, activity: Activity) -> None:
        if node not in self._tasks:
            self._tasks[node] = self._progress.add_task(
                text.clip(text.clean(node), 28), total=None, node=node
            )
        self._activities[node] = activity
        total = activity.total if activity.total > 0 else None
        self._progress.update(self._tasks[node], completed=activity.done, total=total)

    def remove(self, node: str) -> None:
        self._activities.pop(node, None)
        if (task := self._tasks.pop(node, None)) is not None:
            self._progress.remove_task(task)

    def close(self) -> None:
        atexit.unregister(self.close)
        self._progress.stop()

    def _tail(self, task: Task) -> str:
        """Behind the bar of the run: nodes and time left; behind a node's: the time so far and its steps."""
        if task.id == self._all:
            done, planned, left = self._overall()
            task.completed, task.total = done, planned
            return "  ".join(filter(None, (f"{done} of {text.plural(planned, 'node')}", left)))
        activity = self._activities.get(task.fields["node"])
        if activity is None:
            return ""
        steps = f"{activity.done} of {activity.total}" if activity.total > 0 else ""
        so_far = text.duration(round(self._clock() - activity.begun))
        return "  ".join(filter(None, (so_far, steps, activity.what)))


class _Says(ProgressColumn):
    """A column that asks a function for its text."""

    def __init__(self, say: Callable[[Task], str]) -> None:
        super().__init__()
        self._say = say

    def render(self, task: Task) -> Text:
        return Text(self._say(task), no_wrap=True, overflow="ellipsis")
