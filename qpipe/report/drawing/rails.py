"""A pipeline as text: one line per node below what it needs, and a rail from each down to its last user."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qpipe.report import text
from qpipe.report.drawing.layout import topological
from qpipe.report.terminal.table import table

MARKS = {"hit": "=", "run": "+", "ran": "+", "wait": "?", "failed": "x", "skipped": "/", "disabled": "-"}
MOST_RAILS = 24
FANCY = {"node": "●", "rail": "│", "end": "┘", "start": "└", "tee_left": "├", "tee_right": "┤", "cross": "┼",
         "up": "┴", "line": "─"}  # fmt: skip
ASCII = {"node": "o", "rail": "|", "end": "'", "start": "'", "tee_left": "+", "tee_right": "+", "cross": "+",
         "up": "'", "line": "-"}  # fmt: skip


def graph_text(
    nodes: Mapping[str, Mapping[str, Any]],
    edges: Iterable[tuple[str, str, str]],
    *,
    width: int = 100,
    fancy: bool = False,
) -> str:
    """The pipeline in lines of at most `width` characters: rails, name, stage, verdict, what each port takes.

    Marks: = hit, + run, ? wait, x failed, / skipped, - disabled; a node that is only asked for lazily by
    `first_within` is named behind a "?" there. Errors: ValueError for a cycle.
    """
    inputs: dict[str, list[tuple[str, str]]] = {name: [] for name in nodes}
    for source, target, port in dict.fromkeys(edges):
        if source in inputs and target in inputs:
            inputs[target].append((port, source))
    order = reading_order(
        list(nodes), {name: [source for _, source in found] for name, found in inputs.items()}
    )
    rails = draw_rails(
        order, {name: [source for _, source in found] for name, found in inputs.items()}, fancy
    )
    rows = []
    for name, rail in zip(order, rails, strict=True):
        node = nodes[name]
        stage, verdict, label = (text.clean(node.get(key) or "") for key in ("stage", "verdict", "label"))
        rows.append((rail, MARKS.get(verdict, ""), text.clean(name), "" if stage == name else stage, verdict,
                     _needs(inputs[name], stage, label if label != name else "")))  # fmt: skip
    shown = [[row[column] for column in _used(rows)] for row in rows]
    last = len(shown[0]) - 1 if shown else None
    lines = table(shown, width, flexible=last, max_lines=1, ellipsis="…" if fancy else "...")
    return "".join(f"{text.clip(line, width)}\n" for row in lines for line in row)


def _used(rows: Sequence[Sequence[str]]) -> list[int]:
    return [column for column in range(len(rows[0])) if any(row[column] for row in rows)] if rows else []


def _needs(inputs: Sequence[tuple[str, str]], stage: str, label: str) -> str:
    ports: dict[str, list[str]] = {}
    for port, source in inputs:
        ports.setdefault(text.clean(port), []).append(text.clean(source))
    between = " ? " if stage == "first_within" else ", "
    needs = "; ".join(f"{port} {between.join(sources)}" for port, sources in ports.items())
    return f"{label}  {needs}".strip() if label else needs


def reading_order(names: Sequence[str], needs: Mapping[str, Sequence[str]]) -> list[str]:
    """Each node after what it needs, and that as late as possible, so that chains stay together."""
    topological(names, [(source, name) for name in names for source in needs[name]])
    used = {source for sources in needs.values() for source in sources}
    order: dict[str, None] = {}
    for last in [name for name in names if name not in used]:
        stack = [(last, iter(needs[last]))]
        while stack:
            name, rest = stack[-1]
            source = next((source for source in rest if source not in order), None)
            if source is None:
                order[name] = None
                stack.pop()
            else:
                stack.append((source, iter(needs[source])))
    return list(order)


def draw_rails(order: Sequence[str], needs: Mapping[str, Sequence[str]], fancy: bool) -> list[str]:
    """The rails beside each node of `order`; empty strings where there would be too many of them."""
    last = {source: name for name in order for source in needs[name]}
    open_: list[str | None] = []  # the node whose output runs down in each column
    drawn = []
    for name in order:
        taken = {column for column, source in enumerate(open_) if source in needs[name]}
        ending = {column for column in taken if last[open_[column] or ""] == name}
        own = min(ending, default=next((c for c, source in enumerate(open_) if source is None), len(open_)))
        open_ += [None] * (own + 1 - len(open_))
        drawn.append(_draw(open_, taken, ending, own, FANCY if fancy else ASCII))
        for column in ending:
            open_[column] = None
        open_[own] = name if name in last else None
        while open_ and open_[-1] is None:
            open_.pop()
    return drawn if max(map(len, drawn), default=0) <= 2 * MOST_RAILS else [""] * len(drawn)


def _draw(
    open_: Sequence[str | None], taken: set[int], ending: set[int], own: int, glyphs: Mapping[str, str]
) -> str:
    left, right = min(taken | {own}), max(taken | {own})
    cells = []
    for column, source in enumerate(open_):
        if column == own:
            cell = glyphs["node"]
        elif column in taken:
            side = "left" if column == left else "right" if column == right else ""
            if column in ending:
                cell = glyphs[{"left": "start", "right": "end", "": "up"}[side]]
            else:
                cell = glyphs[{"left": "tee_left", "right": "tee_right", "": "cross"}[side]]
        elif source is not None:
            cell = glyphs["rail"]
        else:
            cell = glyphs["line"] if left < column < right else " "
        cells.append(cell + (glyphs["line"] if left <= column < right else " "))
    return "".join(cells).rstrip()
