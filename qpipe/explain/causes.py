"""Why a node runs: which ingredient of its key changed, and, for an input, what changed above it, up to the roots.

Two sides are held against each other: how things are (a walk through the cache as it is now), and how they were (the
last result of the node and, by their keys, the results that made its inputs; or the record of a run).
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, Protocol

from qpipe.cache.store import Store
from qpipe.keys.changes import Change, changes
from qpipe.language.spec import FirstWithin
from qpipe.plan.history import previous_key
from qpipe.plan.walk import Walk
from qpipe.run.record import ingredients_of

NAMED = 6
"""So many nodes are named in a sentence."""

Wire = tuple[str, str | None]
"""What made an input: a node, and the key it had where that is known."""


@dataclasses.dataclass(frozen=True)
class Made:
    """A node as one side has it. In `ingredients["ports"]`, None stands for an input that is not known yet."""

    node: str
    stage: str
    state: str
    key: str | None = None
    ingredients: Mapping[str, Any] | None = None
    listings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    wires: Mapping[str, Sequence[Wire]] = dataclasses.field(default_factory=dict)
    reasons: tuple[str, ...] = ()
    started: float | None = None


class Side(Protocol):
    """How things are, or were."""

    def at(
        self, node: str, stage: str, key: str | None, like: Mapping[str, Any] | None = None
    ) -> Made | None:
        """`node`, a use of `stage`, under `key` if that is given, else as it was when its ingredients were nearest to
        `like`; None where this side knows nothing of it."""


class Present:
    """One pipeline and the cache as they are."""

    def __init__(self, walk: Walk) -> None:
        self._walk = walk
        self._verdicts = walk.verdicts()

    def at(
        self, node: str, stage: str = "", key: str | None = None, like: Mapping[str, Any] | None = None
    ) -> Made | None:
        outcome = self._verdicts.get(node)
        if outcome is None:
            return None
        spec = self._walk.graph.node(node)
        inputs = self._walk.graph.inputs[node]
        wires = {
            port: [(self._walk.maker(source).node, None) for source in sources]
            for port, sources in inputs.items()
            if sources
        }
        ports = {port: self._digests(port, node) for port in wires}
        if isinstance(spec, FirstWithin):
            own: dict[str, Any] = {"stage": "first_within", "params": {"max_drop": spec.max_drop}}
            return Made(
                node, "first_within", outcome.state, None, {**own, "ports": ports}, {}, wires, outcome.reasons
            )
        ingredients = outcome.ingredients or {**self._walk.unwired(spec), "ports": ports}
        return Made(
            node,
            spec.stage.name,
            outcome.state,
            outcome.key,
            ingredients,
            self._walk.listings(ingredients),
            wires,
            outcome.reasons,
        )

    def _digests(self, port: str, node: str) -> list[str] | None:
        found = []
        for source in self._walk.graph.inputs[node][port]:
            outcome = self._verdicts[source.node]
            if not outcome.good:
                return None
            found.append(outcome.outputs[source.output].digest)
        return found


class Results:
    """What the cache holds from before, in `folder` first: of a node its nearest result, of what made an input the very
    result that did."""

    def __init__(self, store: Store, folder: str) -> None:
        self._store = store
        self._folder = folder

    def at(
        self, node: str, stage: str, key: str | None, like: Mapping[str, Any] | None = None
    ) -> Made | None:
        key = key or previous_key(self._store, stage, node, like, self._folder)
        result = self._store.result(key) if key else None
        if result is None or "stage" not in result["ingredients"]:
            return None
        provenance = result["provenance"]
        return Made(
            node,
            result["ingredients"]["stage"],
            "ran",
            key,
            result["ingredients"],
            provenance.get("listings", {}),
            {port: [tuple(wire) for wire in wires] for port, wires in provenance.get("makers", {}).items()},
            (),
            provenance.get("started"),
        )


class Recorded:
    """What the record of a run says."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self._record = record
        self._wires: dict[str, dict[str, list[Wire]]] = {}
        for source, target, port in record.get("edges", ()):
            node = self._maker(source, port)
            key = record["nodes"].get(node, {}).get("key")
            self._wires.setdefault(target, {}).setdefault(port, []).append((node, key))

    def at(
        self, node: str, stage: str = "", key: str | None = None, like: Mapping[str, Any] | None = None
    ) -> Made | None:
        found = self._record["nodes"].get(node)
        if found is None:
            return None
        return Made(
            node,
            found["stage"],
            found["verdict"],
            found.get("key"),
            ingredients_of(self._record, node),
            self._record.get("listings", {}),
            self._wires.get(node, {}),
            tuple(found.get("reasons", ())),
        )

    def _maker(self, node: str, port: str) -> str:
        """`node`, or what it chose where it is a first_within."""
        while chosen := self._record["nodes"].get(node, {}).get("chosen"):
            node = chosen["scores" if "scores" in port else "model"]
        return node


@dataclasses.dataclass(frozen=True)
class Step:
    """One node on the way up: how it is, how it was, and what differs. `remark` is said where there is nothing to
    compare; `below` is the node, and its port, through which this one was reached."""

    now: Made
    then: Made | None
    changes: tuple[Change, ...]
    remark: str = ""
    below: tuple[str, str] | None = None

    @property
    def own(self) -> tuple[Change, ...]:
        """The changes that are no inputs."""
        return tuple(change for change in self.changes if change.group != "input")

    @property
    def is_root(self) -> bool:
        """Whether the search ends here with an answer."""
        return bool(self.own or self.remark)


def explain(now: Present | Recorded, then: Side, node: str) -> list[Step]:
    """The node's own step, then those of everything upstream that changed, nearest first; each node once."""
    start = now.at(node)
    if start is None:
        return []
    steps: list[Step] = []
    pending: deque[tuple[Made, Made | None, tuple[str, str] | None, bool]] = deque()
    pending.append((start, then.at(node, start.stage, None, start.ingredients), None, False))
    seen = {node}
    while pending:
        made, before, below, certain = pending.popleft()
        step = compare(made, before, below, certain)
        rewired = _rewired(made, before, step.changes, now)
        if rewired:
            step = dataclasses.replace(step, remark=" and ".join(rewired.values()))
        if step.changes or step.remark or not steps:
            steps.append(step)
        for change in step.changes:
            if change.group != "input" or (change.name in rewired and len(made.wires[change.name]) == 1):
                continue
            for wire, old, was, comes in _pairs(change, made, before):
                source = now.at(wire[0]) if wire[0] else None
                if source is None or source.node in seen or (was is not None and was == comes):
                    continue
                seen.add(source.node)
                key = old[1] if old[0] else None
                earlier = then.at(old[0] or source.node, source.stage, key, source.ingredients)
                pending.append((source, earlier, (made.node, change.name), comes is not None))
    return steps


def _pairs(
    change: Change, now: Made, then: Made | None
) -> Iterator[tuple[tuple[str | None, str | None], tuple[str | None, str | None], str | None, str | None]]:
    """For each wire of a changed port: it, that of before which it is held against, and their two digests. Where the
    port takes many, wires of one node belong together; one that came or went is told by `_rewired`."""
    wires, past = now.wires.get(change.name, ()), then.wires.get(change.name, ()) if then else ()
    before, after = list(change.before or ()), list(change.after or ())
    none: tuple[str | None, str | None] = (None, None)
    if max(len(wires), len(past)) < 2 or not past:
        for wire, old, was, comes in zip_longest(wires, past, before, after):
            yield wire or none, old or none, was, comes
        return
    left = list(zip_longest(past, before))
    for wire, comes in zip_longest(wires, after[: len(wires)]):
        found = next((pair for pair in left if pair[0] and pair[0][0] == wire[0]), None)
        if found is not None:
            left.remove(found)
            yield wire, found[0], found[1], comes


def _rewired(
    made: Made, then: Made | None, found: Sequence[Change], now: Present | Recorded
) -> dict[str, str]:
    """Port -> what is said of it, where other nodes are wired to it than before, or the same in another order. A single
    node that is there no more was renamed, and is followed instead."""
    said: dict[str, str] = {}
    for change in found:
        wires = [wire[0] for wire in made.wires.get(change.name, ())]
        past = [wire[0] for wire in then.wires.get(change.name, ())] if then else []
        many = max(len(wires), len(past)) > 1
        if change.group == "input" and past and wires != past and (many or now.at(past[0]) is not None):
            said[change.name] = f"takes its input '{change.name}' from {', '.join(wires)} instead of {', '.join(past)}"
    return said


def compare(
    now: Made, then: Made | None, below: tuple[str, str] | None = None, certain: bool = False
) -> Step:
    """What differs between a node as it is and as it was; `certain` says that its output does."""
    if then is None:
        gone = "has no earlier result in the cache" if below is None else "has no earlier result to compare with"
        return Step(now, None, (), gone, below)
    if now.stage == "first_within" and then.stage != "first_within":
        return Step(now, then, _all_inputs(now), "", below)  # it has not chosen yet: what it waits for is told
    if now.ingredients is None or then.ingredients is None:
        if now.key is not None and now.key == then.key:
            return Step(now, then, (), "", below)
        return Step(now, then, (), "changed, but the record does not say what its key was made of", below)
    found = tuple(changes(then.ingredients, now.ingredients, then.listings, now.listings))
    if now.stage != then.stage:
        wired = Change("stage", "", f"{then.stage} ({then.node})", f"{now.stage} ({now.node})")
        return Step(now, then, (wired,), "", below)
    remark = "" if found or below is None else _unexplained(now, certain)
    return Step(now, then, found, remark, below)


def _all_inputs(now: Made) -> tuple[Change, ...]:
    ports = (now.ingredients or {}).get("ports", {})
    return tuple(Change("input", port, None, None) for port, digests in ports.items() if digests is None)


def _unexplained(now: Made, certain: bool) -> str:
    """Why a node whose key is the same makes something else, or may."""
    if now.state in ("hit", "ran") and certain:
        return "made something else under the same key (see `qpipe verify`)"
    return f"runs: {'; '.join(now.reasons)}" if now.state == "run" else ""


def sentences(steps: Sequence[Step]) -> list[str]:
    """For every root one sentence: the way from the first step to it, and what changed there. Of roots where the same
    changed (an edited module that many stages reach), one."""
    below = {step.now.node: step.below for step in steps}
    roots: dict[str, list[Step]] = {}
    for step in steps:
        if step.is_root:
            roots.setdefault(step.remark or "; ".join(change.sentence for change in step.own), []).append(step)
    found = []
    for what, (first, *others) in roots.items():
        also = f" (so in {_names(others)})" if others else ""
        if first.below is None:
            found.append(f"because {'it ' if first.remark else ''}{what}{also}")
            continue
        way, port = _way(first.now.node, below)
        if len(way) > NAMED:
            way = [*way[: NAMED - 2], f"{len(way) - NAMED + 1} more", way[-1]]
        through = f" (by way of {' <- '.join(way)})" if way else ""
        said = what if first.remark else f"{_verb(first.now.state)} with {what}"
        found.append(f"because its input '{port}' changed{through}, because {first.now.node} {said}{also}")
    return found


def _names(steps: Sequence[Step]) -> str:
    names = [step.now.node for step in steps]
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _way(node: str, below: Mapping[str, tuple[str, str] | None]) -> tuple[list[str], str]:
    """The nodes between `node` and the first, nearest to the first last, and the port of the first they lead to."""
    way: list[str] = []
    port = ""
    here = below[node]
    while here is not None:
        name, port = here
        way.append(name)
        here = below[name]
    return way[:-1][::-1], port


def _verb(state: str) -> str:
    return {"run": "runs", "wait": "waits to run", "failed": "failed", "skipped": "is skipped"}.get(state, "ran")
