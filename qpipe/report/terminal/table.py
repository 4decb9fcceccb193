"""A table in plain text, fitted to a width. Our own, because importing rich would slow a fully cached run."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from qpipe.report.text import clip

GAP = "  "
_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "blue": "34"}


def paint(text: str, style: str, colour: bool) -> str:
    """`text` in a terminal's own colours: `style` is one or more of bold, dim, red, green, yellow, blue."""
    if not colour or not style or not text:
        return text
    return f"\x1b[{';'.join(_CODES[name] for name in style.split())}m{text}\x1b[0m"


def table(
    rows: Sequence[Sequence[str]],
    width: int,
    *,
    right: Sequence[int] = (),
    flexible: int | None = None,
    max_lines: int = 3,
    ellipsis: str = "...",
) -> list[list[str]]:
    """`rows` as aligned lines of at most `width` characters; result[i] holds the lines of rows[i].

    Columns in `right` are aligned to the right. Where the table is too wide, the `flexible` column is wrapped
    to what is left for it, over at most `max_lines` lines.
    """
    if not rows:
        return []
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    if flexible is not None:
        excess = sum(widths) + len(GAP) * (len(widths) - 1) - width
        floor = min(widths[flexible], 12)
        widths[flexible] = max(floor, widths[flexible] - max(0, excess))
    return [_row(row, widths, right, flexible, max_lines, ellipsis) for row in rows]


def _row(
    row: Sequence[str],
    widths: Sequence[int],
    right: Sequence[int],
    flexible: int | None,
    max_lines: int,
    ellipsis: str,
) -> list[str]:
    parts = [[cell] for cell in row]
    if flexible is not None and len(row[flexible]) > widths[flexible]:
        parts[flexible] = wrap(row[flexible], widths[flexible], max_lines, ellipsis)
    lines = []
    for index in range(max(map(len, parts))):
        cells = [part[index] if index < len(part) else "" for part in parts]
        aligned = [
            cell.rjust(size) if column in right else cell.ljust(size)
            for column, (cell, size) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append(GAP.join(aligned).rstrip())
    return lines


def wrap(text: str, width: int, max_lines: int | None = None, ellipsis: str = "...") -> list[str]:
    """`text` in lines of at most `width` characters (at least 8), at most `max_lines` of them."""
    if max_lines == 1:
        return [clip(text, max(8, width), ellipsis)]
    lines = textwrap.wrap(text, max(8, width), max_lines=max_lines, placeholder=f" {ellipsis}")
    return lines or [""]
