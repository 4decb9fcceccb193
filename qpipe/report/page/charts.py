"""The charts of the report as inline SVG, in the page's own colours: scores by step, parity, and what ships."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from qpipe.report import text
from qpipe.report.facts import Distances, Step
from qpipe.report.measured import Ratio

ROW, TOP, WIDTH, LABELS, VALUES = 30, 26, 900, 190, 170
PLOT = WIDTH - LABELS - VALUES
SMALLEST_SHARE = 1e-6


def score_chart(steps: Sequence[Step], limit: float | None) -> str:
    """One row per step: a dot at its score, and the distance to float; what is at least `limit`, the goal, is shaded.

    "" where fewer than two steps have a score.
    """
    known = [step for step in steps if step.score is not None]
    if len(known) < 2:
        return ""
    reference = next((step.score for step in known if step.baseline), None)
    low, high = _range([value for value in (*(step.score for step in known), limit) if value is not None])
    scale = PLOT / (high - low)
    height = TOP + ROW * len(steps) + 30
    parts = [_open(height, "Score of each step against float")]
    if limit is not None:
        x = LABELS + (limit - low) * scale
        place = f'x="{x:.1f}" y="{TOP}" width="{LABELS + PLOT - x:.1f}" height="{ROW * len(steps)}"'
        parts.append(f'<rect class="allowed" {place}/>')
        parts.append(f'<text class="faint" x="{x:.1f}" y="{TOP - 9}" text-anchor="middle">goal</text>')
    parts += _axis(low, high, scale, TOP + ROW * len(steps), known[0].metric)
    origin = LABELS + ((high if reference is None else reference) - low) * scale
    if reference is not None:
        parts.append(f'<path class="float" d="M{origin:.1f} {TOP}v{ROW * len(steps)}"/>')
    for index, step in enumerate(steps):
        at = None if step.score is None else LABELS + (step.score - low) * scale
        parts.append(_step(step, at, origin, TOP + ROW * (index + 0.5)))
    return "\n".join([*parts, "</svg>"])


def _open(height: float, title: str) -> str:
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The axis: all values, with room on both sides."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.01 * abs(high) or 1.0
    return low - room, high + room


def _axis(low: float, high: float, scale: float, bottom: float, metric: str) -> list[str]:
    parts = []
    for value in ticks(low, high):
        x = LABELS + (value - low) * scale
        label = escape(text.tick(value, metric, step=ticks(low, high)[1] - ticks(low, high)[0]))
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{bottom}"/>')
        parts.append(f'<text class="faint" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{label}</text>')
    return parts


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """At least two round numbers (1, 2 or 5 times a power of ten apart) within [low, high], about `count`."""
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) <= count)
    first = math.ceil(low / step - 1e-9)
    found = [index * step for index in range(first, first + count + 1) if index * step <= high + 1e-9 * step]
    return found if len(found) > 1 else [low, high]


def _step(step: Step, x: float | None, origin: float, y: float) -> str:
    label = escape(text.clip(step.label, 26, "…"))
    name = f'<text x="{LABELS - 14}" y="{y + 4:.1f}" text-anchor="end"{_strong(step.best)}>{label}</text>'
    if x is None:
        said = escape(step.verdict.replace("_", " ") or "no score")
        return f'{name}<text class="faint" x="{LABELS + PLOT + 14}" y="{y + 4:.1f}">{said}</text>'
    kind = "best" if step.best else "baseline" if step.baseline else "plain"
    facts = escape(f"{step.label}: {text.score(step.score, step.metric)}")
    value = escape(text.score(step.score, step.metric))
    lost = "" if step.baseline else f"{text.change(step.drop, step.metric)}"
    place = f'cx="{x:.1f}" cy="{y:.1f}" r="{6 if step.best else 4.5}"'
    return (
        f'{name}<path class="stem" d="M{origin:.1f} {y:.1f}H{x:.1f}"/>'
        f'<circle class="dot {kind}" {place}><title>{facts}</title></circle>'
        f'<text x="{LABELS + PLOT + 14}" y="{y + 4:.1f}"{_strong(step.best)}>{value}</text>'
        f'<text class="faint" x="{WIDTH}" y="{y + 4:.1f}" text-anchor="end">{escape(lost)}</text>'
    )


def _strong(best: bool) -> str:
    return ' class="strong"' if best else ""


def parity_chart(distances: Distances, title: str) -> str:
    """One bar per number of grid steps; its length is the logarithm of the share, so that rare ones show."""
    shares = distances.shares
    if not shares:
        return ""
    height = TOP + ROW * len(shares) + 8
    parts = [_open(height, f"{title}: share of values by distance in grid steps")]
    heading = f"{escape(title)}: share of the values (logarithmic)"
    parts.append(f'<text class="faint" x="{LABELS}" y="{TOP - 9}">{heading}</text>')
    for steps, share in enumerate(shares):
        y = TOP + ROW * steps
        name = "equal" if steps == 0 else text.plural(steps, "step")
        name += " or more" if steps and steps == len(shares) - 1 else ""
        parts.append(f'<text x="{LABELS - 14}" y="{y + 19}" text-anchor="end">{name}</text>')
        if share:
            length = PLOT * max(0.0, 1 - math.log10(share) / math.log10(SMALLEST_SHARE))
            kind = "near" if steps < 2 else "far"
            place = f'x="{LABELS}" y="{y + 5}" width="{max(2.0, length):.1f}" height="{ROW - 10}" rx="2"'
            parts.append(f'<rect class="{kind}" {place}/>')
        parts.append(f'<text x="{LABELS + PLOT + 14}" y="{y + 19}">{text.share(share)}</text>')
    return "\n".join([*parts, "</svg>"])


def ratio_chart(ratios: Sequence[Ratio]) -> str:
    """One bar per figure, as a share of what float takes; a dashed line is float, a mark the goal's limit."""
    if not ratios:
        return ""
    scale = PLOT / max(1.1, *(1.05 * max(ratio.value, ratio.limit or 0.0) for ratio in ratios))
    bottom = TOP + ROW * len(ratios)
    parts = [_open(bottom + 8, "What ships as a share of what float takes")]
    parts.append(f'<path class="float" d="M{LABELS + scale:.1f} {TOP}V{bottom}"/>')
    parts.append(f'<text class="faint" x="{LABELS + scale:.1f}" y="{TOP - 9}" text-anchor="middle">float</text>')
    for index, ratio in enumerate(ratios):
        y = TOP + ROW * index
        kind = "far" if ratio.value > (ratio.limit or 1.0) else "near"
        place = f'x="{LABELS}" y="{y + 5}" width="{max(2.0, ratio.value * scale):.1f}" height="{ROW - 10}" rx="2"'
        parts.append(f'<text x="{LABELS - 14}" y="{y + 19}" text-anchor="end">{escape(ratio.name)}</text>')
        parts.append(f'<rect class="{kind}" {place}><title>{escape(ratio.sentence)}</title></rect>')
        parts.append(f'<text x="{LABELS + PLOT + 14}" y="{y + 19}">{ratio.value:.2f} of float</text>')
        if ratio.limit is not None:
            parts.append(f'<path class="stem" d="M{LABELS + ratio.limit * scale:.1f} {y + 1}v{ROW - 2}"/>')
    return "\n".join([*parts, "</svg>"])
