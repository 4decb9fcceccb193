"""How two runs differ, by their records: nodes, keys and what they were made of, outputs, scores, config, cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qpipe.explain.causes import Recorded, compare

_COST = ("verdict", "duration_s", "original_duration_s", "cpu_s", "original_cpu_s")


@dataclasses.dataclass(frozen=True)
class NodeDifference:
    """A node of both runs whose key, outputs or scores differ: its two keys, the ingredients that differ (a sentence
    each), and whether the outputs do."""

    node: str
    stage: str
    keys: tuple[str | None, str | None]
    changes: tuple[str, ...]
    own: bool
    outputs_differ: bool


@dataclasses.dataclass(frozen=True)
class ScoreDifference:
    """A node's two scores, None where a run has none."""

    node: str
    metric: str
    scores: tuple[float | None, float | None]


@dataclasses.dataclass(frozen=True)
class RunDifference:
    """Two runs, left and right. Pairs are (left, right)."""

    runs: tuple[str, str]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    nodes: tuple[NodeDifference, ...]
    scores: tuple[ScoreDifference, ...]
    config: Mapping[str, tuple[Any, Any]]
    environment: Mapping[str, tuple[Any, Any]]
    costs: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]]
    totals: tuple[Mapping[str, Any], Mapping[str, Any]]

    @property
    def same(self) -> bool:
        """Whether both made the same: the same nodes, keys, outputs and scores. Time, hits, the machine, and options
        that no key holds may differ."""
        scores = any(found.scores[0] != found.scores[1] for found in self.scores)
        return not (any(self.only) or self.nodes or scores)


def difference(paths: tuple[Path, Path], left: Mapping[str, Any], right: Mapping[str, Any]) -> RunDifference:
    """The difference of the runs whose records lie at `paths`; their configs are read from beside them."""
    before, after = left["nodes"], right["nodes"]
    both = [name for name in before if name in after]
    sides = Recorded(left), Recorded(right)
    found = [_node(name, sides, before[name], after[name]) for name in both]
    configs = [_flat(read_config(path.parent)) for path in paths]
    environments = [_flat(record.get("environment", {})) for record in (left, right)]
    return RunDifference(
        (str(paths[0].parent), str(paths[1].parent)),
        (
            tuple(name for name in before if name not in after),
            tuple(name for name in after if name not in before),
        ),
        tuple(node for node in found if node),
        tuple(_scores(before, after)),
        _differing(*configs),
        _differing(*environments),
        {name: (_cost(before[name]), _cost(after[name])) for name in both},
        (left.get("totals", {}), right.get("totals", {})),
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved config of a run; {} where it is gone."""
    import yaml

    try:
        found = yaml.load(
            (folder / "config.yaml").read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        )
    except (OSError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _node(
    name: str, sides: tuple[Recorded, Recorded], before: Mapping[str, Any], after: Mapping[str, Any]
) -> NodeDifference | None:
    keys = (before.get("key"), after.get("key"))
    outputs = [
        {port: made["digest"] for port, made in node.get("outputs", {}).items()} for node in (before, after)
    ]
    outputs_differ = outputs[0] != outputs[1] and all(outputs)
    if keys[0] == keys[1] and not outputs_differ:
        return None
    was, now = sides[0].at(name), sides[1].at(name)
    assert was is not None  # both sides have the node
    assert now is not None
    step = compare(now, was)
    said = tuple(change.sentence for change in step.changes) or ((step.remark,) if step.remark else ())
    if None in keys and keys[0] != keys[1]:
        said = (f"{before['verdict']} on the left, {after['verdict']} on the right",)
    return NodeDifference(name, str(after["stage"]), keys, said, bool(step.own), outputs_differ)


def _scores(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[ScoreDifference]:
    """The nodes with a score on either side, in the order of the right run, then what is only in the left."""
    found = []
    for name in [*after, *(name for name in before if name not in after)]:
        values = [nodes.get(name, {}).get("scores", {}) for nodes in (before, after)]
        scores = tuple(value.get("score") for value in values)
        if any(isinstance(score, int | float) for score in scores):
            metric = str(values[1].get("metric") or values[0].get("metric") or "")
            found.append(ScoreDifference(name, metric, (scores[0], scores[1])))
    return found


def _cost(node: Mapping[str, Any]) -> dict[str, Any]:
    return {name: node.get(name) for name in _COST}


def _differing(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {
        name: (left.get(name), right.get(name))
        for name in sorted({*left, *right})
        if left.get(name) != right.get(name)
    }


def _flat(config: Any, address: str = "") -> dict[str, Any]:
    """{address: value} of the leaves; lists are leaves."""
    found: dict[str, Any] = {}
    pending = [(address, config)]
    while pending:
        here, value = pending.pop()
        if isinstance(value, Mapping) and (value or not here):
            pending += [(f"{here}.{name}" if here else str(name), inner) for name, inner in value.items()]
        else:
            found[here] = value
    return found
