"""The facts of a `record.json`, in the order in which a report tells them.

Read by the terminal and by the HTML page. A record may come from an older version, or from a run that was cut
short: what is missing is left out, never an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from qpipe.report import text

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """One evaluated step: its score, and what it lost against float (`drop`, in the metric's unit)."""

    node: str
    label: str
    score: float | None
    metric: str
    drop: float | None
    verdict: str
    duration_s: float | None
    original_duration_s: float | None
    best: bool
    baseline: bool
    cost: float | None = None
    """What running it costs, as a share of float."""
    choice: str = ""
    """What became of it where one was chosen of several, and by how much it was better than the best before it."""

    @property
    def time(self) -> str:
        """What it took; for a hit, what it took when it was computed."""
        if self.verdict == "hit" and self.original_duration_s is not None:
            return f"was {text.duration(self.original_duration_s)}"
        return text.duration(self.duration_s)


@dataclass(frozen=True)
class Distances:
    """How far apart compared values are: `counts[k]` of them k steps of their grid, the last that many and more."""

    counts: tuple[float, ...]
    largest: float | None

    @property
    def shares(self) -> tuple[float, ...]:
        """The counts as shares of all; () where nothing was compared."""
        total = sum(self.counts)
        return tuple(count / total for count in self.counts) if total else ()

    @property
    def sentence(self) -> str:
        """The exact ones, those within one step, and the largest distance."""
        if not self.shares:
            return "nothing compared"
        largest = "" if self.largest is None else f", largest {text.plural(int(self.largest), 'step')}"
        within = min(1.0, sum(self.shares[:2]))
        return f"{text.share(self.shares[0])} equal, {text.share(within)} within one grid step{largest}"


@dataclass(frozen=True)
class Parity:
    """How far the deployed model is from the simulated one: op by op on equal inputs, and end to end.

    `worst` are the units that differ, largest distance first: (value, operators, distances). `facts` are the other
    scores of the node, ready to print.
    """

    node: str
    agree: bool | None
    units: Distances
    end_to_end: Distances
    worst: tuple[tuple[str, str, Distances], ...]
    facts: tuple[tuple[str, str], ...]
    outputs: float | None
    """The largest difference of an output, as a share of its largest value."""

    @property
    def sentence(self) -> str:
        """Both comparisons in one sentence; the outputs' where no activation is quantized."""
        verdict = {True: "agrees; ", False: "does not agree; ", None: ""}[self.agree]
        if self.outputs is not None and not (self.units.shares or self.end_to_end.shares):
            return f"{verdict}no activation is quantized; the outputs differ by at most {self.outputs:.1e} (relative)"
        return f"{verdict}op by op {self.units.sentence}; end to end {self.end_to_end.sentence}"


@dataclass(frozen=True)
class Group:
    """Nodes of one stage that ended alike: how many, and the seconds they took together, now and when computed."""

    stage: str
    verdict: str
    count: int
    duration_s: float
    original_duration_s: float


def nodes(record: Record) -> dict[str, Mapping[str, Any]]:
    """The nodes of the record by name, in its order."""
    return {
        str(name): node for name, node in _mapping(record.get("nodes")).items() if isinstance(node, Mapping)
    }


def telling(nodes: Mapping[str, Mapping[str, Any]], limit: int) -> tuple[list[str], tuple[Group, ...]]:
    """(the names of the `limit` nodes that say most, in their order; the rest, grouped).

    What failed says more than what ran, that more than a hit; among equals, what took longest.
    """
    if len(nodes) <= limit:
        return list(nodes), ()
    ranked = sorted(nodes, key=lambda name: _weight(nodes[name]))
    shown = set(ranked[:limit])
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for name, node in nodes.items():
        if name not in shown:
            kind = (str(node.get("stage") or ""), str(node.get("verdict") or ""))
            groups.setdefault(kind, []).append(node)
    rest = [
        Group(*kind, len(found), _sum(found, "duration_s"), _sum(found, "original_duration_s"))
        for kind, found in sorted(groups.items())
    ]
    return [name for name in nodes if name in shown], tuple(rest)


_WEIGHTS = {"failed": 0, "skipped": 1, "ran": 2, "run": 2, "wait": 3, "hit": 4}


def _weight(node: Mapping[str, Any]) -> tuple[int, float]:
    took = real(node.get("original_duration_s")) or real(node.get("duration_s")) or 0.0
    return _WEIGHTS.get(str(node.get("verdict")), 5), -took


def _sum(found: Sequence[Mapping[str, Any]], name: str) -> float:
    return sum(real(node.get(name)) or 0.0 for node in found)


def steps(record: Record) -> tuple[Step, ...]:
    """The evaluated steps, float first, then in the record's order."""
    found = [_step(entry) for entry in record.get("ladder") or () if isinstance(entry, Mapping)]
    return tuple(sorted(found, key=lambda step: not step.baseline))


def _step(entry: Mapping[str, Any]) -> Step:
    node = text.clean(entry.get("node", ""))
    return Step(
        node=node,
        label=text.clean(entry.get("label") or node),
        score=real(entry.get("score")),
        metric=text.clean(entry.get("metric") or ""),
        drop=real(entry.get("drop")),
        verdict=text.clean(entry.get("verdict") or ""),
        duration_s=real(entry.get("duration_s")),
        original_duration_s=real(entry.get("original_duration_s")),
        best=bool(entry.get("best")),
        baseline=bool(entry.get("baseline")),
        cost=real(entry.get("cost")),
        choice=_choice(_mapping(entry.get("choice"))),
    )


def _choice(choice: Mapping[str, Any]) -> str:
    """The fate in words, with the gain on the held-out samples."""
    fate, metric, gain = (choice.get(name) for name in ("fate", "metric", "gain"))
    words = [text.clean(fate).replace("_", " ")] if fate else []
    if (gained := real(gain)) is not None:
        unit = " dB" if str(metric).endswith("_db") else " points" if metric in text.PERCENT_METRICS else ""
        words.append(text.change(-gained, text.clean(metric)) + unit)
    return ", ".join(words)


def goal_met(record: Record) -> bool | None:
    """Whether the goal was met; None where there was none, or where the run did not come that far."""
    met = _mapping(record.get("goal")).get("met")
    return None if met is None else bool(met)


def least(record: Record) -> float | None:
    """The score that the goal asks for; None where there is none."""
    goal = _mapping(record.get("goal"))
    baseline, allowed, asked = (real(goal.get(name)) for name in ("float", "allowed_drop", "min_score"))
    if asked is not None or baseline is None or allowed is None:
        return asked
    return baseline - allowed


def goal_sentence(record: Record) -> str | None:
    """Whether the goal was met and by how much, in one sentence; None where the record has no goal."""
    goal = _mapping(record.get("goal"))
    metric = text.clean(goal.get("metric") or "")
    if not metric or goal.get("scores", "") is None:  # no node was named whose score is to be within it
        return None
    baseline, allowed, least = (real(goal.get(name)) for name in ("float", "allowed_drop", "min_score"))
    best = _mapping(record.get("best"))
    reached = real(best.get("score"))
    limit = "" if allowed is None else f"{text.amount(allowed, metric)} allowed"
    limit = limit if least is None else f"at least {text.score(least, metric)} asked"
    if reached is None or baseline is None:
        return f"goal not decided: {metric}, {limit or 'no limit'}, but no step has a score"
    drop = baseline - reached
    label = next((step.label for step in steps(record) if step.best), best.get("node", ""))
    side = "below" if drop > 0 else "above"
    distance = f"{text.amount(abs(drop), metric)} {side} float" if drop else "equal to float"
    fact = f"{metric} {text.score(reached, metric)} with {text.clean(label)}"
    if least is None:
        fact += f", {distance}"
    met = goal_met(record)
    if met is None or (allowed is None and least is None):
        return f"best: {fact}"
    if met:
        return f"goal met: {fact} ({limit})"
    ships = real(goal.get("deployed"))
    wanted = least if least is not None else baseline - (allowed or 0.0)
    if ships is not None and ships < wanted <= reached:
        missing = f"{text.amount(wanted - ships, metric)} in onnxruntime"
        return f"goal missed by {missing}: {metric} {text.score(ships, metric)} there; simulated, {fact} ({limit})"
    short = least - reached if least is not None else drop - (allowed or 0.0)
    return f"goal missed by {text.amount(short, metric)}: {fact} ({limit})"


def totals_sentence(record: Record) -> str:
    """What ran, what came from the cache and what that saved."""
    totals = _mapping(record.get("totals"))
    ran, hit, failed, skipped = (
        int(real(totals.get(name)) or 0) for name in ("ran", "hit", "failed", "skipped")
    )
    sentence = f"{ran} ran, {hit} from the cache" + (f", {failed} failed" if failed else "")
    sentence += f", {skipped} skipped" if skipped else ""
    if (wall := wall_s(record)) is not None:
        sentence += f", in {text.duration(wall)}"
    if cpu := real(totals.get("cpu_s")):
        sentence += f" ({text.duration(cpu)} of processor time)"
    if saved := real(totals.get("saved_s")):
        sentence += f"; the cache saved {text.duration(saved)}"
    return sentence


def wall_s(record: Record) -> float | None:
    """Seconds from start to finish; both stamps are ISO 8601, or seconds since the epoch."""
    started, finished = _seconds(record.get("started")), _seconds(record.get("finished"))
    return None if started is None or finished is None else max(0.0, finished - started)


def failures(record: Record) -> list[tuple[str, str]]:
    """(node, error message) of each node that failed; the message may have several lines."""
    return [
        (name, error_of(node) or "failed without a message")
        for name, node in nodes(record).items()
        if node.get("verdict") == "failed"
    ]


def error_of(node: Mapping[str, Any]) -> str:
    """The message of a node's error, or "" where it has none."""
    error = node.get("error")
    if isinstance(error, Mapping):
        error = error.get("message") or error.get("type")
    return text.clean_lines(error).strip() if error else ""


def notes(record: Record) -> list[tuple[str, str]]:
    """(node, sentence), first one of each node, then each node's second, and so on; what several say once, by the
    first of them."""
    by_node: dict[str, list[str]] = {}
    said: set[str] = set()
    for name, node in nodes(record).items():
        by_node[name] = [note for note in map(text.clean, node.get("notes") or ()) if note not in said]
        said.update(by_node[name])
    longest = max(map(len, by_node.values()), default=0)
    turns = range(longest)
    return [(name, found[turn]) for turn in turns for name, found in by_node.items() if turn < len(found)]


def files(record: Record) -> list[tuple[str, str]]:
    """(node, absolute path) of each file that was exported."""
    return [
        (text.clean(node), text.clean(path))
        for node, paths in _mapping(record.get("files")).items()
        for path in ([paths] if isinstance(paths, str) else paths or ())
    ]


def edges(record: Record) -> list[tuple[str, str, str]]:
    """(source, target, port) between nodes that the record knows."""
    known = nodes(record)
    found = [tuple(map(str, edge)) for edge in record.get("edges") or () if edge and len(edge) == 3]
    return [(edge[0], edge[1], edge[2]) for edge in found if edge[0] in known and edge[1] in known]


def parities(record: Record) -> list[Parity]:
    """What the parity nodes measured, from their scores."""
    found = []
    for name, node in nodes(record).items():
        scores = _mapping(node.get("scores"))
        if node.get("stage") == "parity" and scores:
            found.append(_parity(name, scores))
    return found


def _parity(name: str, scores: Mapping[str, Any]) -> Parity:
    rows = _mappings(scores.get("units"))
    apart = [(_text_of(row, "value"), _text_of(row, "op_types"), _distances([row])) for row in rows]
    worst = sorted((unit for unit in apart if unit[2].largest), key=lambda unit: -(unit[2].largest or 0))
    agree = scores.get("agree")
    hidden = ("metric", "score", "agree")
    facts = tuple(
        (text.clean(key).replace("_", " "), fact) for key, fact in scalars(scores) if key not in hidden
    )
    end_to_end = _distances(_mappings(scores.get("end_to_end")))
    pairs = [(real(row.get("max_difference")), real(row.get("largest"))) for row in _mappings(scores.get("outputs"))]
    outputs = [apart / largest for apart, largest in pairs if apart is not None and largest]
    return Parity(
        name, agree if isinstance(agree, bool) else None, _distances(rows), end_to_end, tuple(worst), facts,
        max(outputs, default=None),
    )  # fmt: skip


def _distances(rows: Sequence[Mapping[str, Any]]) -> Distances:
    """The counts of all rows together."""
    counted = [counts if isinstance(counts := row.get("counts"), list | tuple) else () for row in rows]
    columns = zip_longest(*(map(real, counts) for counts in counted), fillvalue=None)
    counts = tuple(sum(count or 0.0 for count in column) for column in columns)
    largest = [value for row in rows if (value := real(row.get("largest"))) is not None]
    return Distances(counts, max(largest, default=None))


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list | tuple) else []


def _text_of(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name) or ""
    return text.clean(" ".join(map(str, value)) if isinstance(value, list | tuple) else value)


def scalars(scores: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The scalar entries of a node's scores, ready to print."""
    return [
        (str(name), text.number(value))
        for name, value in scores.items()
        if value is not None and not isinstance(value, Mapping | list | tuple)
    ]


def real(value: Any) -> float | None:
    """`value` as a finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # JSON has integers of any length
        return None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _seconds(stamp: Any) -> float | None:
    if not isinstance(stamp, str):
        return real(stamp)
    from datetime import datetime

    try:
        return datetime.fromisoformat(stamp).timestamp()
    except ValueError:
        return None
