"""The end of a sweep in the terminal: its trials, the best first, told apart by what differs between them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

from qpipe.report import facts, text
from qpipe.report.terminal.table import GAP, table
from qpipe.report.text import clip

MANY = 25
"""Trials that are shown; `sweep.json` has all."""
MANY_FAILURES = 8
WIDEST = 40
"""Characters of one value of an override."""


class Trial(NamedTuple):
    """A trial's number, its overrides, and its record."""

    number: int
    overrides: Sequence[str]
    record: Mapping[str, Any]


def leaderboard(
    trials: Sequence[tuple[int, Sequence[str], Mapping[str, Any]]], folder: str, width: int, fancy: bool = False
) -> list[str]:
    """Lines for the trials of one sweep, whose runs lie below `folder`: a column for each override that is not the same
    in all, the score, what is lost against float, the goal, and what ran. Trials without a score come last, with the
    reason below the table."""
    found = [Trial(*each) for each in trials]
    columns = varying([trial.overrides for trial in found])
    order = sorted(range(len(found)), key=lambda place: (-_ranked(found[place]), place))
    metrics = {str(_goal(trial).get("metric") or "score") for trial in found}
    one = metrics.pop() if len(metrics) == 1 else ""
    header = ("", "#", *columns, one or "score", "points" if one in text.PERCENT_METRICS else "change")
    rows = [(*header, "goal", "ran", "cached")]
    best = next((place for place in order if _ranked(found[place]) > -math.inf), None)
    for place in order[:MANY]:
        mark = "▶" if fancy else ">"
        rows.append(_row(found[place], columns, mark if place == best else "", one))
    right = (1, len(columns) + 2, len(columns) + 3, len(columns) + 5, len(columns) + 6)
    wide = max(len(columns) + 1, 2)
    lines = [line for block in table(rows, width, right=right, flexible=wide if columns else None) for line in block]
    rule = ("─" if fancy else "-") * max(map(len, lines))
    lines = ["", lines[0], rule, *lines[1:], rule]
    lines += [f"float{GAP}{text.score(*each)}" for each in _floats(found)]
    if len(found) > MANY:
        lines.append(f"{len(found) - MANY} more trials are in sweep.json")
    failed = [trial for trial in found if _failure(trial.record)]
    lines += [f"#{trial.number} failed: {clip(_failure(trial.record), width - 14)}" for trial in failed[:MANY_FAILURES]]
    if len(failed) > MANY_FAILURES:
        lines.append(f"and {len(failed) - MANY_FAILURES} more failed")
    return [*lines, _shared(found), f"in {folder}"]


def _row(trial: Trial, columns: Sequence[str], mark: str, metric: str) -> tuple[str, ...]:
    goal, totals = _goal(trial), trial.record.get("totals") or {}
    score, name = reached(trial.record), str(goal.get("metric") or "score")
    reference = facts.real(goal.get("float"))
    drop = None if score is None or reference is None else reference - score
    verdict = {True: "met", False: "missed"}.get(goal.get("met"), "")  # type: ignore[arg-type]  # None, too
    given = values(trial.overrides)
    shown = text.score(score, name) + ("" if metric else f" {name}")
    return (
        mark,
        str(trial.number),
        *(clip(given.get(key, ""), WIDEST) for key in columns),
        str(trial.record.get("status")) if score is None else shown,
        text.change(drop, name),
        verdict,
        str(totals.get("ran", "")),
        str(totals.get("hit", "")),
    )


def values(overrides: Sequence[str]) -> dict[str, str]:
    """{key: value} of overrides; of one that is given twice the last counts, as Hydra has it."""
    return {key: value for key, _, value in (each.partition("=") for each in overrides)}


def varying(overrides: Sequence[Sequence[str]]) -> list[str]:
    """The keys whose values differ, in the order in which they are given."""
    given = [values(each) for each in overrides]
    keys = dict.fromkeys(key for turn in zip_longest(*given) for key in turn if key is not None)
    return [key for key in keys if len({each.get(key) for each in given}) > 1]


def _goal(trial: Trial) -> Mapping[str, Any]:
    return trial.record.get("goal") or {}


def reached(record: Mapping[str, Any]) -> float | None:
    """What the goal is asked of; of no goal, the last that was scored."""
    goal = record.get("goal") or {}
    if goal.get("scores") is not None:
        return facts.real(goal.get("reached"))
    return next((step.score for step in reversed(facts.steps(record)) if step.score is not None), None)


def _ranked(trial: Trial) -> float:
    score = reached(trial.record)
    return -math.inf if score is None else score


def _floats(trials: Sequence[Trial]) -> list[tuple[float, str]]:
    """The float scores, each once."""
    found = [(facts.real(_goal(trial).get("float")), str(_goal(trial).get("metric") or "")) for trial in trials]
    return list(dict.fromkeys((score, metric) for score, metric in found if score is not None))


def _failure(record: Mapping[str, Any]) -> str:
    """The first node of a run that failed, and why; "" where none did."""
    nodes: Mapping[str, Mapping[str, Any]] = record.get("nodes") or {}
    failed = (f"{name}: {facts.error_of(node)}" for name, node in nodes.items() if node.get("error"))
    return next(failed, "").partition("\n")[0]


def _shared(trials: Sequence[Trial]) -> str:
    """How many results the trials are made of, and what would have run if each had computed its own."""
    nodes = [node for trial in trials for node in (trial.record.get("nodes") or {}).values() if node.get("key")]
    distinct = {node["key"]: facts.real(node.get("original_cpu_s")) or 0.0 for node in nodes}
    alone = sum(facts.real(node.get("original_cpu_s")) or 0.0 for node in nodes)
    saved = alone - sum(distinct.values())
    said = f"{len(trials)} trials, {len(nodes)} results, {len(distinct)} of them distinct"
    return f"{said}; sharing them saved {text.duration(saved)} of processor time" if saved >= 1 else said
