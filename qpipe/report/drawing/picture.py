"""A pipeline as a picture: SVG written here (no import, text stays text), PNG and PDF by matplotlib."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from qpipe.report import text
from qpipe.report.drawing.layout import Box, Layout, Line, layout
from qpipe.report.drawing.rails import graph_text

__all__ = ["colours", "draw_graph", "graph_text", "svg_graph"]

Nodes = Mapping[str, Mapping[str, Any]]
Edges = Iterable[tuple[str, str, str]]

_BLUE, _GREEN, _AMBER, _RED, _GREY = (
    ("#e3edfb", "#3b6fb6"), ("#e2f3e7", "#3a8f5c"), ("#fdf3d7", "#b98a16"), ("#fce3e0", "#c2453a"),
    ("#f1f2f4", "#9aa2ad"),
)  # fmt: skip
_COLOURS = {"hit": _GREEN, "run": _BLUE, "ran": _BLUE, "wait": _AMBER, "failed": _RED}
_IDLE = frozenset({"disabled", "not_needed", "skipped"})
INK, FAINT, EDGE = "#1d2430", "#5d6672", "#8791a0"
NAME_SIZE, STAGE_SIZE, ADVANCE = (
    12.0,
    10.0,
    0.602,
)  # of a monospaced letter, in ems: boxes fit without font metrics
LONGEST = 34
FONT = "ui-monospace, SFMono-Regular, Menlo, 'DejaVu Sans Mono', Consolas, monospace"
MOST_PIXELS = 30_000


def colours(verdict: str | None) -> tuple[str, str]:
    """(fill, stroke) for a verdict."""
    return _COLOURS.get(verdict or "", _GREY)


def draw_graph(nodes: Nodes, edges: Edges, path: str | Path) -> None:
    """Draws the pipeline from left to right into `path`: .svg, or what matplotlib writes (.png, .pdf).

    `nodes`: name -> {stage, verdict (or None), label}. Edges into a `first_within` are dashed: it asks for
    its candidates one at a time. Errors: ValueError for a cycle, or for a suffix that cannot be written.
    """
    path = Path(path)
    if path.suffix == ".svg":
        path.write_text(svg_graph(nodes, edges), encoding="utf-8")
    else:
        _draw_with_matplotlib(nodes, _layout(nodes, edges), path)


def svg_graph(nodes: Nodes, edges: Edges) -> str:
    """The picture as one <svg> element, with each node's facts as its tooltip."""
    plan = _layout(nodes, edges)
    width, height = f"{plan.width:.0f}", f"{plan.height:.0f}"
    size = f'width="{width}" height="{height}" style="min-width:{0.7 * plan.width:.0f}px"'
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {size} role="img" '
        f'aria-label="The pipeline as a graph" font-family="{FONT}">'
    )
    parts = [_svg_line(line) for line in plan.lines]
    parts += [_svg_box(name, nodes[name], box) for name, box in plan.boxes.items()]
    return "\n".join([opening, *parts, "</svg>"])


def _layout(nodes: Nodes, edges: Edges) -> Layout:
    sizes = {}
    for name, node in nodes.items():
        texts = _texts(name, node)
        letters = max(len(line) * size for line, size, _ in texts) * ADVANCE
        sizes[name] = (max(76.0, letters + 22), 14.0 + sum(size + 4 for _, size, _ in texts))
    lazy = frozenset(name for name, node in nodes.items() if node.get("stage") == "first_within")
    return layout(sizes, [(source, target) for source, target, _ in edges], lazy)


def _texts(name: str, node: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """The lines in a node's box: (text, font size, colour)."""
    stage, verdict, label = (text.clean(node.get(key) or "") for key in ("stage", "verdict", "label"))
    below = " · ".join(filter(None, (stage if stage != name else "", verdict.replace("_", " "))))
    lines = [(text.clip(text.clean(name), LONGEST, "…"), NAME_SIZE, INK)]
    lines += [
        (text.clip(line, LONGEST + 6, "…"), STAGE_SIZE, FAINT)
        for line in (below, label if label != name else "")
        if line
    ]
    return lines


def _baselines(box: Box, texts: Sequence[tuple[str, float, str]]) -> list[float]:
    """The y of each line's baseline, the lines together in the middle of the box."""
    total = sum(size + 4 for _, size, _ in texts) - 4
    y, found = box.y - total / 2, []
    for _, size, _ in texts:
        found.append(y + size * 0.82)
        y += size + 4
    return found


def _idle(node: Mapping[str, Any]) -> bool:
    return node.get("verdict") in _IDLE


def _svg_box(name: str, node: Mapping[str, Any], box: Box) -> str:
    fill, stroke = colours(node.get("verdict"))
    dash = ' stroke-dasharray="4 3"' if _idle(node) else ""
    texts = _texts(name, node)
    facts = [name, *(f"{key}: {node[key]}" for key in ("stage", "verdict", "label") if node.get(key))]
    tip = "\n".join(escape(text.clean(fact)) for fact in facts)
    lines = "".join(
        f'<text x="{box.x:.1f}" y="{y:.1f}" font-size="{size:g}" fill="{colour}">{escape(line)}</text>'
        for (line, size, colour), y in zip(texts, _baselines(box, texts), strict=True)
    )
    corner = f'x="{box.x - box.width / 2:.1f}" y="{box.y - box.height / 2:.1f}"'
    shape = f'{corner} width="{box.width:.1f}" height="{box.height:.1f}" rx="6"'
    rectangle = f'<rect {shape} fill="{fill}" stroke="{stroke}"{dash}/>'
    return f'<g text-anchor="middle"><title>{tip}</title>{rectangle}{lines}</g>'


def _svg_line(line: Line) -> str:
    (x0, y0), (x1, y1) = line.start, line.end
    dash = ' stroke-dasharray="5 4"' if line.lazy else ""
    tip = x1 - 6 if line.arrow else x1
    if line.straight:
        path = f"M{x0:.1f} {y0:.1f}H{x1:.1f}"
    else:
        middle = (x0 + tip) / 2
        path = f"M{x0:.1f} {y0:.1f}C{middle:.1f} {y0:.1f} {middle:.1f} {y1:.1f} {tip:.1f} {y1:.1f}"
    drawn = f'<path d="{path}" fill="none" stroke="{EDGE}" stroke-width="1.3"{dash}/>'
    if line.arrow:
        drawn += f'<path d="M{x1:.1f} {y1:.1f}l-7 -3.5v7z" fill="{EDGE}"/>'
    return drawn


def _draw_with_matplotlib(nodes: Nodes, plan: Layout, path: Path) -> None:
    from matplotlib.figure import Figure

    inches = (plan.width / 72, plan.height / 72)
    figure = Figure(figsize=inches)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.set_xlim(0, plan.width)
    axes.set_ylim(plan.height, 0)
    for line in plan.lines:
        _add_line(axes, line)
    for name, box in plan.boxes.items():
        _add_box(axes, name, nodes[name], box)
    figure.savefig(path, dpi=min(160.0, MOST_PIXELS / max(inches)), facecolor="white")


def _add_line(axes: Any, line: Line) -> None:
    from matplotlib.patches import PathPatch, Polygon
    from matplotlib.path import Path as Curve

    (x0, y0), (x1, y1) = line.start, line.end
    tip = x1 - 6 if line.arrow else x1
    middle = (x0 + tip) / 2
    curve = Curve(
        [(x0, y0), (middle, y0), (middle, y1), (tip, y1)],
        [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4],
    )
    style = (0, (4, 3)) if line.lazy else "solid"
    axes.add_patch(PathPatch(curve, facecolor="none", edgecolor=EDGE, linewidth=1.3, linestyle=style))
    if line.arrow:
        corners = [(x1, y1), (x1 - 7, y1 - 3.5), (x1 - 7, y1 + 3.5)]
        axes.add_patch(Polygon(corners, facecolor=EDGE, edgecolor="none"))


def _add_box(axes: Any, name: str, node: Mapping[str, Any], box: Box) -> None:
    from matplotlib.patches import FancyBboxPatch

    fill, stroke = colours(node.get("verdict"))
    corner = (box.x - box.width / 2, box.y - box.height / 2)
    rounded = "round,pad=0,rounding_size=6"
    patch = FancyBboxPatch(
        corner, box.width, box.height, rounded, facecolor=fill, edgecolor=stroke, linewidth=1.0
    )
    patch.set_linestyle((0, (4, 3)) if _idle(node) else "solid")
    axes.add_patch(patch)
    texts = _texts(name, node)
    for (line, size, colour), y in zip(texts, _baselines(box, texts), strict=True):
        axes.text(box.x, y, line, size=size, color=colour, ha="center", va="baseline", family="monospace",
                  parse_math=False)  # fmt: skip
