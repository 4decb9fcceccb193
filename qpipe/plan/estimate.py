"""What a plan will cost: how many actions may run, how long that takes by what they took before, what the cache saves.

A node in `wait` counts as one that runs: its inputs are not known yet, and it may still turn out to be a hit. So every
figure here is an upper bound, except for nodes that never ran, whose time is not known at all.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Mapping, Sequence

from qpipe.keys.hashing import digest
from qpipe.language.spec import FirstWithin
from qpipe.plan.verdicts import Outcome
from qpipe.plan.walk import Walk


@dataclasses.dataclass(frozen=True)
class Task:
    """An action that will run, or may: its label, its seconds (None: not known), and the tasks it waits for."""

    label: str
    expected_s: float | None
    needs: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds, by what the nodes took before; None where nothing is known of any of them.

    `compute_s` is the sum over all that may run, `wall_s` what it takes on the given number of workers, `longest_s` the
    longest chain of nodes that wait for one another (`longest`); `unknown` are the nodes that no figure holds;
    `saved_s` is what the hits took when they were computed.
    """

    compute_s: float | None
    wall_s: float | None
    longest_s: float | None
    longest: tuple[str, ...]
    unknown: tuple[str, ...]
    saved_s: float


@dataclasses.dataclass(frozen=True)
class Misses:
    """The nodes that run for certain, and those that may run besides: they wait for inputs, or are candidates that a
    first_within has not come to yet. Nodes that are one action count once."""

    certain: tuple[str, ...]
    possible: tuple[str, ...]


def estimate(walks: Sequence[Walk], workers: int) -> Estimate:
    """The Estimate of all `walks` together; an action that several of them need counts once."""
    tasks: dict[str, Task] = {}
    saved: dict[str, float] = {}
    for walk in walks:
        verdicts = walk.verdicts()
        names = identities(walk, verdicts)
        for name, outcome in verdicts.items():
            if outcome.state == "hit" and outcome.key is not None and outcome.result is not None:
                saved[outcome.key] = outcome.result["provenance"]["duration_s"]
            elif outcome.state in ("run", "wait") and names[name] not in tasks:
                tasks[names[name]] = _task(walk, name, verdicts, names)
    known = [task.expected_s for task in tasks.values() if task.expected_s is not None]
    unknown = tuple(task.label for task in tasks.values() if task.expected_s is None)
    if not known or not any(known):
        return Estimate(None, None, None, (), unknown, sum(saved.values()))
    rest = remaining_s(tasks)
    longest = _longest(tasks, rest)
    wall = makespan_s(tasks, rest, max(1, workers))
    longest_s = max(rest.values())
    return Estimate(sum(known), wall, longest_s, longest, unknown, sum(saved.values()))


def misses(walks: Sequence[Walk]) -> Misses:
    """What is not in the cache, of all `walks` together."""
    certain: dict[str, str] = {}
    possible: dict[str, str] = {}
    for walk in walks:
        verdicts = walk.verdicts()
        names = identities(walk, verdicts)
        pending = _candidates(walk, verdicts)
        for name, outcome in verdicts.items():
            if isinstance(walk.graph.node(name), FirstWithin):
                continue
            if outcome.state == "run":
                certain[names[name]] = walk.label + name
            elif outcome.state == "wait" or (outcome.state == "not_needed" and name in pending):
                possible[names[name]] = walk.label + name
    return Misses(
        tuple(certain.values()), tuple(label for name, label in possible.items() if name not in certain)
    )


def identities(walk: Walk, verdicts: Mapping[str, Outcome]) -> dict[str, str]:
    """A name for what every enabled node will do: its key, or, while its inputs are not known, a digest of all that its
    key will be made of. Nodes with the same name, in whatever walk, are one action."""
    names: dict[str, str] = {}
    for name in walk.graph.order:
        node, outcome = walk.graph.node(name), verdicts[name]
        if outcome.key is not None:
            names[name] = outcome.key
            continue
        wired = {
            port: [
                verdicts[source.node].outputs[source.output].digest
                if verdicts[source.node].good
                else f"{names[source.node]}.{source.output}"
                for source in sources
            ]
            for port, sources in walk.graph.inputs[name].items()
        }
        own: object = node.max_drop if isinstance(node, FirstWithin) else walk.unwired(node)
        names[name] = digest("identity", own, wired)
    return names


def remaining_s(tasks: Mapping[str, Task]) -> dict[str, float]:
    """For every task the seconds of the longest chain that begins with it."""
    after: dict[str, list[str]] = {name: [] for name in tasks}
    for name, task in tasks.items():
        for need in task.needs:
            after[need].append(name)
    rest: dict[str, float] = {}
    for name in reversed(_ordered(tasks, after)):
        own = tasks[name].expected_s or 0.0
        rest[name] = own + max((rest[one] for one in after[name]), default=0.0)
    return rest


def makespan_s(tasks: Mapping[str, Task], rest: Mapping[str, float], workers: int) -> float:
    """Seconds until all `tasks` are done by `workers` that always take the one with the longest chain behind it."""
    waiting = {name: len(task.needs) for name, task in tasks.items()}
    after: dict[str, list[str]] = {name: [] for name in tasks}
    for name, task in tasks.items():
        for need in task.needs:
            after[need].append(name)
    ready = [(-rest[name], name) for name, count in waiting.items() if not count]
    heapq.heapify(ready)
    running: list[tuple[float, str]] = []
    now = 0.0
    while ready or running:
        while ready and len(running) < workers:
            name = heapq.heappop(ready)[1]
            heapq.heappush(running, (now + (tasks[name].expected_s or 0.0), name))
        now, ended = heapq.heappop(running)
        for name in after[ended]:
            waiting[name] -= 1
            if not waiting[name]:
                heapq.heappush(ready, (-rest[name], name))
    return now


def _task(walk: Walk, name: str, verdicts: Mapping[str, Outcome], names: Mapping[str, str]) -> Task:
    needs = {
        names[source.node]
        for sources in walk.graph.inputs[name].values()
        for source in sources
        if verdicts[source.node].state in ("run", "wait")
    }
    return Task(walk.label + name, walk.expected_s(name), frozenset(needs))


def _candidates(walk: Walk, verdicts: Mapping[str, Outcome]) -> set[str]:
    """All that lies before a first_within that has not chosen yet."""
    found: set[str] = set()
    stack = [
        name
        for name, outcome in verdicts.items()
        if outcome.state == "wait" and isinstance(walk.graph.node(name), FirstWithin)
    ]
    while stack:
        for sources in walk.graph.inputs[stack.pop()].values():
            new = {source.node for source in sources} - found
            found |= new
            stack += new
    return found


def _ordered(tasks: Mapping[str, Task], after: Mapping[str, Iterable[str]]) -> list[str]:
    waiting = {name: len(task.needs) for name, task in tasks.items()}
    order = [name for name, count in waiting.items() if not count]
    for name in order:  # grows meanwhile
        for one in after[name]:
            waiting[one] -= 1
            if not waiting[one]:
                order.append(one)
    return order


def _longest(tasks: Mapping[str, Task], rest: Mapping[str, float]) -> tuple[str, ...]:
    """The labels along the longest chain, without those that take no time."""
    after: dict[str, list[str]] = {}
    for name, task in tasks.items():
        for need in task.needs:
            after.setdefault(need, []).append(name)
    path: list[str] = []
    here = [name for name, task in tasks.items() if not task.needs]
    while here:
        best = max(here, key=lambda name: rest[name])
        if not rest[best]:
            break
        if tasks[best].expected_s:
            path.append(tasks[best].label)
        here = after.get(best, [])
    return tuple(path)
