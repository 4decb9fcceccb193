"""The end of a sweep in the terminal: its trials, the best first, told apart by what differs between them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

from qpipe.report import facts, text
from qpipe.report.figures import PRICES, front, rank
from qpipe.report.importance import importance
from qpipe.report.terminal.table import GAP, table, wrap
from qpipe.report.text import clip

MANY = 25
"""Trials that are shown; `sweep.json` and `sweep.csv` have all."""
MANY_FAILURES = 8
MANY_CHOICES = 6
WIDEST = 40
"""Characters of one value of an override."""


class Trial(NamedTuple):
    """A trial's number, its overrides, and its record."""

    number: int
    overrides: Sequence[str]
    record: Mapping[str, Any]


def leaderboard(
    trials: Sequence[tuple[int, Sequence[str], Mapping[str, Any]]],
    folder: str,
    width: int,
    fancy: bool = False,
    aim: Mapping[str, Any] | None = None,
) -> list[str]:
    """Lines for the trials of one sweep, whose runs lie below `folder`: a column for each override that is not the same
    in all, the score, what is lost against float, a price where that differs, the goal, and what ran. Trials without a
    score come last, with the reason below the table. `aim` is what a search was for: `objectives` and `within`."""
    found = [Trial(*each) for each in trials]
    columns = varying([trial.overrides for trial in found])
    ranks = [_rank(trial, aim or {}) for trial in found]
    order = sorted(range(len(found)), key=lambda place: ([-each for each in ranks[place]], place))
    metrics = {str(_goal(trial).get("metric") or "score") for trial in found}
    one = metrics.pop() if len(metrics) == 1 else ""
    price = _price(found, aim or {})
    header = ("", "#", *columns, one or "score", "points" if one in text.PERCENT_METRICS else "change", *price)
    rows = [(*header, "goal", "ran", "cached")]
    best = next((place for place in order if reached(found[place].record) is not None), None)
    unbeaten = front([(reached(trial.record), _figures(trial).get(price[0])) for trial in found]) if price else []
    on_front = "◆" if fancy else "*"
    marks: dict[int | None, str] = {**dict.fromkeys(unbeaten, on_front), best: "▶" if fancy else ">"}
    for place in order[:MANY]:
        rows.append(_row(found[place], columns, marks.get(place, ""), one, price))
    first, end = len(columns) + 2, len(rows[0])
    right = (1, *range(first, first + 2 + len(price)), end - 2, end - 1)
    wide = max(len(columns) + 1, 2)
    lines = [line for block in table(rows, width, right=right, flexible=wide if columns else None) for line in block]
    rule = ("─" if fancy else "-") * max(map(len, lines))
    lines = ["", lines[0], rule, *lines[1:], rule]
    lines += [f"float{GAP}{text.score(*each)}" for each in _floats(found)]
    if len(found) > MANY:
        lines.append(f"{len(found) - MANY} more trials are in sweep.csv")
    if len(unbeaten) > 1:
        both = f"{one or 'score'} and {price[0]}"
        lines.append(f"{on_front} {len(unbeaten)} trials that no other one beats in {both} at once")
    lines += _importance(found, one, width)
    failed = [trial for trial in found if _failure(trial.record)]
    lines += [f"#{trial.number} failed: {clip(_failure(trial.record), width - 14)}" for trial in failed[:MANY_FAILURES]]
    if len(failed) > MANY_FAILURES:
        lines.append(f"and {len(failed) - MANY_FAILURES} more failed")
    return [*lines, _shared(found), f"in {folder}; `qpipe rerun {_name(folder, best, found)}` carries one out again"]


def figures_line(record: Mapping[str, Any]) -> str:
    """The figures of a trial in one line: "top1 97.85 %, size 0.17"."""
    metric = str((record.get("goal") or {}).get("metric") or "score")
    score, figures = reached(record), record.get("figures") or {}
    known = [(name, facts.real(figures.get(name))) for name in PRICES]
    shown = [f"{name} {_share(value)}" for name, value in known if value is not None]
    return ", ".join([str(record.get("status")) if score is None else f"{metric} {text.score(score, metric)}", *shown])


def _name(folder: str, best: int | None, found: Sequence[Trial]) -> str:
    trial = found[best or 0]
    return text.clean(trial.record.get("run_dir") or f"{folder}/{trial.number}")


def _share(value: float | None) -> str:
    return f"{value:.3g}" if value is not None and 0 < value < 0.1 else text.cost(value)


def _figures(trial: Trial) -> Mapping[str, Any]:
    return trial.record.get("figures") or {}


def _price(trials: Sequence[Trial], aim: Mapping[str, Any]) -> tuple[str, ...]:
    """The one figure that is shown beside the score: what was searched for, or one that differs; none where none
    does."""
    asked = [name for name in (*aim.get("objectives", ()), *aim.get("within", ())) if name in PRICES]
    for name in (*asked, *PRICES):
        known = {facts.real(_figures(trial).get(name)) for trial in trials} - {None}
        if len(known) > 1 or (known and name in asked):
            return (name,)
    return ()


def _rank(trial: Trial, aim: Mapping[str, Any]) -> tuple[float, ...]:
    """What is greater is better."""
    score = reached(trial.record)
    figures = {name: facts.real(value) for name, value in _figures(trial).items()} | {"score": score}
    objectives = aim.get("objectives") or ["score"]
    found = None if score is None else rank(str(objectives[0]), aim.get("within") or {}, figures)
    return found or (-math.inf,) * 3


def _importance(trials: Sequence[Trial], metric: str, width: int) -> list[str]:
    """Which choices mattered, in a sentence, where there are trials enough to say it."""
    scored = [(values(trial.overrides), score) for trial in trials if (score := reached(trial.record)) is not None]
    found = importance([given for given, _ in scored], [score for _, score in scored]) if metric else None
    if found is None:
        return []
    shares = [f"{each.key} {each.share:.2f} ± {each.error:.2f}" for each in found.shares[:MANY_CHOICES]]
    more = len(found.shares) - MANY_CHOICES
    said = (
        f"what mattered, by the share of the variance of {metric} over {found.trials} trials: {', '.join(shares)}"
        f"{f' and {more} more' if more > 0 else ''}; together {found.together:.2f}, the rest are interactions and noise"
    )
    return wrap(said, width)


def _row(trial: Trial, columns: Sequence[str], mark: str, metric: str, price: Sequence[str]) -> tuple[str, ...]:
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
        *(_share(facts.real(_figures(trial).get(each))) for each in price),
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
