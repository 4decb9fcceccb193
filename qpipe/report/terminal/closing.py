"""The end of a run in the terminal: scores against float, the goal, the cost, the files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qpipe.report import facts, text
from qpipe.report.measured import Measured, measured, verdict
from qpipe.report.terminal.table import paint, table, wrap

MANY_NOTES = 5
MANY_FAILURES = 20
MANY_IN_FLOAT = 4
INDENT = "  "
_STYLES = {"failed": "red", "skipped": "dim", "not_needed": "dim"}


def closing_table(
    record: Mapping[str, Any], width: int = 80, *, fancy: bool = False, colour: bool = False
) -> str:
    """The closing page for `record`, in lines of at most `width` characters (paths are never cut).

    `fancy` allows characters beyond ASCII, `colour` a terminal's colour codes.
    """
    sections = [
        list(_ladder(record, width, fancy, colour)),
        list(_verdict(record, width, colour)),
        list(_failures(record, width, colour)),
        *(list(_listed(_title(one), _figures(one), width, colour)) for one in measured(record)),
        list(_listed("notes", _few_notes(record), width, colour)),
        list(_listed("parity", [(p.node, p.sentence) for p in facts.parities(record)], width, colour)),
        list(_files(record, colour)),
    ]
    return "\n" + "\n\n".join("\n".join(section) for section in sections if section) + "\n"


def _ladder(record: Mapping[str, Any], width: int, fancy: bool, colour: bool) -> Iterator[str]:
    steps = facts.steps(record)
    if not steps:
        return
    metrics = {step.metric for step in steps if step.metric}
    one = metrics.pop() if len(metrics) == 1 else ""
    points = one in text.PERCENT_METRICS
    change = "points" if points else "change"
    header: tuple[str, ...] = ("", "step", one or "score", change, "cost", "held out", "", "time")
    best = "▶" if fancy else ">"
    rows = [header] + [
        (
            best if step.best else "",
            step.label,
            text.score(step.score, step.metric) + ("" if one else f" {step.metric}"),
            "" if step.baseline else text.change(step.drop, step.metric),
            text.cost(step.cost),
            step.choice,
            step.verdict.replace("_", " "),
            step.time,
        )
        for step in steps
    ]
    told = [column for column in range(len(header)) if column not in (4, 5) or any(row[column] for row in rows[1:])]
    rows = [tuple(row[column] for column in told) for row in rows]
    right = [place for place, column in enumerate(told) if column in (2, 3, 4, 7)]
    lines = table(rows, width - len(INDENT), right=right, flexible=1, ellipsis="…" if fancy else "...")
    rule = ("─" if fancy else "-") * max(len(line) for row in lines for line in row)
    yield INDENT + paint(lines[0][0], "bold", colour)
    yield INDENT + paint(rule, "dim", colour)
    for step, row in zip(steps, lines[1:], strict=True):
        style = _STYLES.get(step.verdict, "bold" if step.best else "")
        yield from (INDENT + paint(line, style, colour) for line in row)


def _verdict(record: Mapping[str, Any], width: int, colour: bool) -> Iterator[str]:
    goal = verdict(record)
    if goal:
        met = facts.goal_met(record)
        style = "" if met is None else "bold green" if met else "bold yellow"
        for line in wrap(goal, width - len(INDENT)):
            yield INDENT + paint(line, style, colour)
    for line in wrap(facts.totals_sentence(record), width - len(INDENT)):
        yield INDENT + line


def _failures(record: Mapping[str, Any], width: int, colour: bool) -> Iterator[str]:
    found = facts.failures(record)
    failed = [(node, _short(message)) for node, message in found]
    if (more := len(failed) - MANY_FAILURES) > 0:
        failed = [*failed[:MANY_FAILURES], ("", f"and {more} more in report.html")]
    yield from _listed("failed", failed, width, colour, "red")
    folder = text.clean(record.get("run_dir") or "").rstrip("/")
    if folder and any(_raised_at(message) for _, message in found):
        yield f"{INDENT * 2}the whole traceback: {folder}/report.html"


def _short(message: str) -> str:
    """The first line of an error, and where it was raised."""
    place = _raised_at(message)
    return message.splitlines()[0] + (f" ({place})" if place else "")


def _raised_at(message: str) -> str:
    """The line that says where an exception was raised; "" for an error that says what to do instead."""
    return next((line for line in message.splitlines()[1:2] if line.startswith("at ")), "")


def _few_notes(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    notes = facts.notes(record)
    if len(notes) <= MANY_NOTES:
        return notes
    return [*notes[:MANY_NOTES], ("", f"and {len(notes) - MANY_NOTES} more in report.html")]


def _listed(
    title: str, entries: Sequence[tuple[str, str]], width: int, colour: bool, style: str = "bold"
) -> Iterator[str]:
    """A heading and its entries, "node: sentence", each over at most three lines."""
    if not entries:
        return
    yield from (INDENT + paint(line, style, colour) for line in wrap(title, width - len(INDENT)))
    for node, sentence in entries:
        first, *rest = wrap(text.clean(f"{node}: {sentence}" if node else sentence), width - 6, max_lines=3)
        yield f"{INDENT * 2}{first}"
        yield from (f"{INDENT * 3}{line}" for line in rest)


def _title(one: Measured) -> str:
    return f"{one.node} as deployed" + (f" ({one.conditions})" if one.conditions else "")


def _figures(one: Measured) -> list[tuple[str, str]]:
    """What it takes beside float, what runs on integers, and what most does not."""
    found = [(ratio.name, ratio.sentence) for ratio in one.ratios]
    found += [("on integers", one.on_integers)] if one.on_integers else []
    found += [("in float", group.sentence) for group in one.in_float[:MANY_IN_FLOAT]]
    more = len(one.in_float) - MANY_IN_FLOAT
    found += [("", f"and {text.plural(more, 'more form')} in report.html")] if more > 0 else []
    return found + ([("not measured", one.error)] if one.error else [])


def _files(record: Mapping[str, Any], colour: bool) -> Iterator[str]:
    files = facts.files(record)
    folder = text.clean(record.get("run_dir") or "")
    if not files and not folder:
        return
    yield INDENT + paint("files", "bold", colour)
    yield from (f"{INDENT * 2}{path}" for _, path in files)
    if folder:
        yield f"{INDENT * 2}{folder.rstrip('/')}/"
