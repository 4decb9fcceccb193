"""Mixed precision in the report: what an amp node's scores tell, and the chart of score against cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from qpipe.report import text
from qpipe.report.facts import Record, nodes, real
from qpipe.report.page.charts import TOP, WIDTH, ticks

HEIGHT, LEFT = 300, 90


@dataclass(frozen=True)
class Point:
    """A mix that was measured: its share of the costliest candidate's cost, its score, and the candidate's name where
    it is a uniform one."""

    share: float
    score: float
    name: str


@dataclass(frozen=True)
class Mix:
    """What one amp node found: the points by cost, the chosen one, and a row of cells for each group."""

    node: str
    metric: str
    cost: str
    of: str
    points: tuple[Point, ...]
    chosen: Point | None
    reference: float | None
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    sentence: str


def mixes(record: Record) -> list[Mix]:
    """What the amp nodes of a record found, from their scores."""
    return [
        _mix(name, node["scores"])
        for name, node in nodes(record).items()
        if node.get("stage") == "amp" and isinstance(node.get("scores"), Mapping) and node["scores"]
    ]


def _mix(node: str, scores: Mapping[str, Any]) -> Mix:
    metric, cost, of = (text.clean(scores.get(name) or "") for name in ("metric", "cost", "of"))
    uniform = _points(scores.get("uniform"))
    points = {(p.share, p.score): p for p in (*_points(scores.get("measured")), *uniform)}
    share, score = real(scores.get("share")), real(scores.get("score"))
    chosen = None if share is None or score is None else Point(share, score, "amp")
    groups = [row for row in scores.get("groups") or () if isinstance(row, Mapping)]
    names = [*("group", "tensors", "candidate", "share"), *sorted(k for k in (groups or [{}])[0] if _alone(k))]
    rows = tuple(tuple(_cell(name, row.get(name)) for name in names) for row in groups)
    said = ""
    if chosen is not None:
        said = (
            f"{text.score(chosen.score, metric)} for {text.share(chosen.share)} of the {cost} of {of}, "
            f"{text.size(real(scores.get('size_bytes')))} of weights, "
            f"{text.plural(int(real(scores.get('conversions')) or 0), 'conversion')} between bitwidths"
        )
    ordered = tuple(sorted(points.values(), key=lambda p: (p.share, p.score)))
    return Mix(
        node, metric, cost, of, ordered, chosen, real(scores.get("float")), tuple(names), rows, said
    )


def _alone(name: object) -> bool:
    return str(name).startswith("alone ")


def _cell(name: str, value: Any) -> str:
    number = real(value)
    if number is None:
        return text.clean("" if value is None else value)
    return text.share(number) if name == "share" else text.number(value)


def _points(rows: Any) -> list[Point]:
    found = []
    for row in rows if isinstance(rows, list | tuple) else ():
        if isinstance(row, Mapping):
            share, score = real(row.get("share")), real(row.get("score"))
            if share is not None and score is not None:
                found.append(Point(share, score, text.clean(row.get("candidate") or "")))
    return found


def mix_chart(mix: Mix) -> str:
    """Score over cost: a dot for each mix that was measured, the uniform candidates by name, the chosen one marked.

    "" where fewer than two mixes were measured.
    """
    points = [*mix.points, *([mix.chosen] if mix.chosen else [])]
    if len(mix.points) < 2:
        return ""
    across, up = _range([p.share for p in points]), _range([p.score for p in points])
    bottom = HEIGHT - 40

    def place(point: Point) -> tuple[float, float]:
        x = LEFT + (point.share - across[0]) / (across[1] - across[0]) * (WIDTH - LEFT - 80)
        return x, bottom - (point.score - up[0]) / (up[1] - up[0]) * (bottom - TOP)

    title = f"{mix.metric} against {mix.cost}, as a share of {mix.of}"
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    steps = ticks(*up)
    for value in steps:
        y = place(Point(across[0], value, ""))[1]
        label = escape(text.tick(value, mix.metric, step=steps[1] - steps[0]))
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - 80}"/>')
        parts.append(f'<text class="faint" x="{LEFT - 12}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for value in ticks(*across):
        x = place(Point(value, up[0], ""))[0]
        parts.append(
            f'<text class="faint" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{100 * value:g} %</text>'
        )
    middle = f'x="{(LEFT + WIDTH - 80) / 2:.0f}" y="{HEIGHT - 4}" text-anchor="middle"'
    parts.append(f'<text class="faint" {middle}>{escape(title)}</text>')
    parts += [_dot(point, *place(point), mix.metric, chosen=False) for point in mix.points]
    if mix.chosen:
        parts.append(_dot(mix.chosen, *place(mix.chosen), mix.metric, chosen=True))
    return "\n".join([*parts, "</svg>"])


def _dot(point: Point, x: float, y: float, metric: str, chosen: bool) -> str:
    kind = "best" if chosen else "baseline" if point.name else "plain"
    said = f"{text.share(point.share)}: {text.score(point.score, metric)}"
    shown = f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="{6 if chosen else 4.5}">'
    shown += f"<title>{escape(said)}</title></circle>"
    if point.name:
        strong = ' class="strong"' if chosen else ""
        shown += f'<text x="{x + 9:.1f}" y="{y + (16 if chosen else -7):.1f}"{strong}>{escape(point.name)}</text>'
    return shown


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.01 * abs(high) or 1.0
    return low - room, high + room
