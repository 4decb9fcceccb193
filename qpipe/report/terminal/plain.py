"""The terminal without moving parts: plain lines, for a log, a pipe, or a run that needs no bars."""

from __future__ import annotations

import os
import shutil
from typing import IO, TYPE_CHECKING

from qpipe.report.terminal.table import paint

if TYPE_CHECKING:
    from qpipe.report.terminal.activity import Activity


class PlainDisplay:
    """Lines on a stream, one write each; characters that it cannot encode become question marks."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self.fancy = is_terminal(stream) and _encodes(stream, "─✓…")
        plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
        self.colour = is_terminal(stream) and not plain
        columns = shutil.get_terminal_size((100, 24)).columns if is_terminal(stream) else 100
        self.width = max(40, min(columns, 160))

    def line(self, line: str, style: str = "") -> None:
        self.text(paint(line, style, self.colour) + "\n")

    def text(self, content: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        try:
            self._stream.write(content.encode(encoding, "replace").decode(encoding))
            self._stream.flush()
        except (
            BrokenPipeError,
            ValueError,
        ):  # the reader is gone (`| head`): the run is worth more than this
            return

    def update(self, node: str, activity: Activity) -> None:
        return

    def remove(self, node: str) -> None:
        return

    def close(self) -> None:
        return


def is_terminal(stream: IO[str]) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):  # a closed stream, or a stand-in that is no file
        return False


def _encodes(stream: IO[str], characters: str) -> bool:
    try:
        characters.encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
