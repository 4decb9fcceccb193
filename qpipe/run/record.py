"""What a run leaves: record.json, config.yaml, and the files of its export nodes.

`record.json` is the one source of every report. Its schema is versioned; `SCHEMA` goes up when a field changes meaning.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from qpipe.artifacts.artifact import load
from qpipe.cache.store import Store
from qpipe.language import labels
from qpipe.language.graph import Source
from qpipe.language.spec import FirstWithin
from qpipe.numerics.metric_names import least_score
from qpipe.plan.verdicts import OF_STAGE, Outcome, artifact_json
from qpipe.plan.walk import Walk
from qpipe.writing import write_whole

SCHEMA = 2
RECORD = "record.json"
CONFIG = "config.yaml"


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """What a record says of the run itself; times are seconds since the epoch."""

    command: Sequence[str]
    folder: Path
    started: float
    finished: float = 0.0
    stopped: str = ""
    """What ended it before its time: "interrupted" by the person, "budget_spent", or nothing."""
    git: Mapping[str, Any] | None = None
    """`Checkout.found` of the working directory."""


Measured = Mapping[str, Mapping[str, Any]]
"""By the node that exported: the figures of `qpipe.run.deployment.deployments`."""


def build_record(
    walk: Walk, store: Store, info: RunInfo, files: Mapping[str, Sequence[str]], measured: Measured
) -> dict[str, Any]:
    """The record of one pipeline as its walk ended."""
    verdicts = walk.verdicts()
    goal = _goal(walk, measured)
    nodes = {name: _node(walk, name, outcome) for name, outcome in verdicts.items()}
    libraries: dict[str, str] = {}
    for outcome in verdicts.values():
        libraries |= (outcome.result or {}).get("ingredients", {}).get("libraries", {})
    return {
        "schema": SCHEMA,
        "qpipe": version("qpipe"),
        "command": list(info.command),
        "started": datetime.fromtimestamp(info.started, UTC).isoformat(),
        "finished": datetime.fromtimestamp(info.finished, UTC).isoformat(),
        "status": _status(verdicts, goal, info),
        "run_dir": str(info.folder),
        **({"git": dict(info.git)} if info.git else {}),
        "environment": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "libraries": dict(sorted(libraries.items())),
        },
        "goal": goal,
        "best": _best(walk),
        "figures": _figures(walk, goal, measured),
        "ladder": _ladder(walk, verdicts, goal["float"]),
        "nodes": nodes,
        "stages": _stages(verdicts),
        "listings": _listings(walk, verdicts),
        "edges": [list(edge) for edge in walk.graph.edges()],
        "files": {name: list(paths) for name, paths in files.items()},
        **({"measured": {name: dict(figures) for name, figures in measured.items()}} if measured else {}),
        "totals": _totals(verdicts),
    }


def _figures(walk: Walk, goal: Mapping[str, Any], measured: Measured) -> dict[str, float | None]:
    """What trials are compared by; None where the run does not know it. All but the score and the drop are shares of
    float's."""
    score, reference, cost = goal["reached"], goal["float"], _cost(walk)
    shipped: Mapping[str, Any] = next(iter(measured.values()), {})
    return {
        "score": score,
        "drop": None if score is None or reference is None else reference - score,
        "size": cost.get("size", shipped.get("size")),
        "cost": cost.get("cost"),
        "bitops": cost.get("bitops"),
        "latency": shipped.get("latency"),
    }


def _cost(walk: Walk) -> Mapping[str, Any]:
    """What a node of the stage `cost` says of the model that the goal is asked of; nothing where none looked at it."""
    source = walk.graph.resolved_refs.get(str(walk.graph.spec.goal.scores))
    outcome = walk.outcomes.get(source.node) if source else None
    if source and outcome and outcome.chosen and outcome.contest:
        models = [candidate.model.node for candidate in outcome.contest.node.candidates]
        wires = walk.graph.inputs[source.node].get(f"candidates[{models.index(outcome.chosen[0].node)}].cost")
        if wires:
            return walk.scores(wires[0]) or {}
    for name, found in reversed(walk.outcomes.items()):
        node = walk.graph.node(name)
        if not isinstance(node, FirstWithin) and node.stage.name == "cost" and found.good:
            return _own_scores(walk, name, found)
    return {}


def reached(folder: Path) -> float:
    """The score of the run that left its record in `folder`; nan where it has none, or left none."""
    try:
        goal = json.loads((folder / RECORD).read_text())["goal"]
    except FileNotFoundError:
        return math.nan
    return math.nan if goal["reached"] is None else float(goal["reached"])


def _status(verdicts: Mapping[str, Outcome], goal: Mapping[str, Any], info: RunInfo) -> str:
    if info.stopped == "interrupted":
        return info.stopped
    if any(outcome.state == "failed" for outcome in verdicts.values()):
        return "failed"
    if info.stopped:
        return info.stopped
    return "goal_missed" if goal["met"] is False else "done"


def _node(walk: Walk, name: str, outcome: Outcome) -> dict[str, Any]:
    node = walk.graph.node(name)
    result = outcome.result or {}
    provenance = result.get("provenance", {})
    ran = outcome.state == "ran"
    written = {} if isinstance(node, FirstWithin) else dict(node.written)
    return {
        "stage": "first_within" if isinstance(node, FirstWithin) else node.stage.name,
        "verdict": outcome.state,
        "reasons": list(outcome.reasons),
        "key": outcome.key,
        "params": written,
        "counted": dict((outcome.ingredients or {}).get("params", {})),
        "inputs": _digests(walk, name),
        "outputs": {port: artifact_json(artifact) for port, artifact in outcome.outputs.items()},
        "duration_s": provenance.get("duration_s") if ran else 0.0,
        "cpu_s": provenance.get("cpu_s") if ran else 0.0,
        "original_duration_s": provenance.get("duration_s"),
        "original_cpu_s": provenance.get("cpu_s"),
        "peak_rss_bytes": provenance.get("peak_rss_bytes"),
        "chosen": {"model": outcome.chosen[0].node, "scores": outcome.chosen[1].node} if outcome.chosen else None,
        "scores": _own_scores(walk, name, outcome),
        "notes": list(result.get("notes", ())),
        "error": dict(outcome.error) if outcome.error else None,
    }


def _stages(verdicts: Mapping[str, Outcome]) -> dict[str, Any]:
    """What the keys of all nodes of a stage have in common, once: {stage: {format, version, function, …}}."""
    found: dict[str, Any] = {}
    for outcome in verdicts.values():
        if outcome.ingredients and outcome.ingredients["stage"] not in found:
            shared = {name: outcome.ingredients[name] for name in OF_STAGE}
            found[outcome.ingredients["stage"]] = shared
    return found


def _listings(walk: Walk, verdicts: Mapping[str, Outcome]) -> dict[str, str]:
    """What the digests in the keys are made of, once: {digest: a line for each module or file}."""
    found: dict[str, str] = {}
    for outcome in verdicts.values():
        if outcome.ingredients:
            found |= walk.listings(outcome.ingredients)
    return found


def ingredients_of(record: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """What the key of a node was made of, as `record` has it; None where its inputs were not known, or where the
    record is of schema 1."""
    node = record["nodes"][name]
    shared = record.get("stages", {}).get(node["stage"])
    if shared is None or node["key"] is None:
        return None
    ports = {port: [made] if isinstance(made, str) else made for port, made in node["inputs"].items()}
    return {**shared, "stage": node["stage"], "params": node["counted"], "ports": ports}


def _digests(walk: Walk, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for port, sources in walk.graph.inputs[name].items():
        digests = [
            walk.outcomes[source.node].outputs[source.output].digest
            for source in sources
            if source.node in walk.outcomes and walk.outcomes[source.node].good
        ]
        if digests:
            found[port] = digests[0] if len(digests) == 1 else digests
    return found


def _own_scores(walk: Walk, name: str, outcome: Outcome) -> dict[str, Any]:
    for output, artifact in outcome.outputs.items():
        if artifact.kind == "Scores":
            return walk.scores(Source(name, output)) or {}
    return {}


def _score_of(walk: Walk, source: Source | None) -> float | None:
    values = walk.scores(source) if source else None
    return None if values is None else values.get("score")


def _goal(walk: Walk, measured: Measured) -> dict[str, Any]:
    """The goal, and whether it is met; None where it was not asked for or not reached."""
    goal, refs = walk.graph.spec.goal, walk.graph.resolved_refs
    reference = _score_of(walk, refs.get(str(goal.reference)))
    reached = _score_of(walk, refs.get(str(goal.scores)))
    least = None if reference is None else least_score(goal.metric, reference, goal.max_drop, goal.min_score)
    deployed = _score_of(walk, refs.get(str(goal.deployed)))
    ships = reached if deployed is None or reached is None else min(reached, deployed)
    limits = _limits(walk, measured)
    met = None if ships is None or least is None else ships >= least
    judged = [None if found is None else found <= limit for limit, found in limits.values()]
    if not limits or (goal.scores is not None and not goal.free):
        judged.append(met)
    return {
        "metric": goal.metric,
        "float": reference,
        "allowed_drop": None if goal.absolute is not None else goal.max_drop,
        "min_score": goal.absolute,
        "reached": reached,
        "deployed": deployed,
        "met": False if False in judged else None if None in judged else True,
        "reference": str(goal.reference) if goal.reference else None,
        "scores": str(goal.scores) if goal.scores else None,
        **({"score_met": met, "limits": {name: row._asdict() for name, row in limits.items()}} if limits else {}),
    }


class Limit(NamedTuple):
    """What a goal asks of a figure of the exported files, and the largest of them; None where one was not measured."""

    limit: float
    found: float | None


def _limits(walk: Walk, measured: Measured) -> dict[str, Limit]:
    """By the name of the figure, what the goal asks of the exported files."""
    goal = walk.graph.spec.goal
    asked = {"latency": goal.max_latency, "size": goal.max_size, "size_bytes": goal.max_size_bytes}
    found = {}
    for name, limit in asked.items():
        values = [measured.get(node, {}).get(name, math.nan) for node in walk.graph.exporters]
        if limit is not None:
            found[name] = Limit(limit, None if any(map(math.isnan, values)) else max(values))
    return found


def _best(walk: Walk) -> dict[str, Any]:
    goal = walk.graph.spec.goal
    source = walk.graph.resolved_refs.get(str(goal.scores))
    if source is None:
        return {"node": None, "score": None}
    outcome = walk.outcomes.get(source.node)
    node = outcome.chosen[0].node if outcome and outcome.chosen else source.node
    return {"node": node, "score": _score_of(walk, source)}


def _ladder(walk: Walk, verdicts: Mapping[str, Outcome], reference: float | None) -> list[dict[str, Any]]:
    """The steps of the closing table, in the pipeline's order, each against the float score."""
    spec = walk.graph.spec
    best = walk.graph.resolved_refs.get(str(spec.goal.scores))
    chosen = walk.outcomes.get(best.node) if best else None
    winner = chosen.chosen[1].node if chosen and chosen.chosen else best.node if best else None
    steps: list[dict[str, Any]] = []
    choices = _choices(walk)
    repeated = _repeated(walk, choices)
    settled = {name: outcome.chosen[1].node for name, outcome in walk.outcomes.items() if outcome.chosen}
    for name, label in labels.steps(walk.graph, settled).items():
        if name not in verdicts or name in repeated:  # disabled, or said by another row
            continue
        values = _own_scores(walk, name, verdicts[name])
        score, metric = values.get("score"), values.get("metric", spec.goal.metric)
        provenance = (verdicts[name].result or {}).get("provenance", {})
        steps.append(
            {
                "node": name,
                "label": label,
                "score": score,
                "metric": metric,
                "drop": None if score is None or reference is None else reference - score,
                "verdict": verdicts[name].state,
                "duration_s": provenance.get("duration_s") if verdicts[name].state == "ran" else 0.0,
                "original_duration_s": provenance.get("duration_s"),
                "best": name == winner,
                "baseline": name in spec.baselines,
                **choices.get(name, {}),
            }
        )
    return steps


def _choices(walk: Walk) -> dict[str, dict[str, Any]]:
    """By the node that scored a candidate: its `cost`, and its `choice`, the fate that it had, with what it had more
    than the best before it. Where several chose among them, the one that the goal is asked of counts."""
    goal = walk.graph.resolved_refs.get(str(walk.graph.spec.goal.scores))
    found: dict[str, dict[str, Any]] = {}
    for name in sorted(walk.outcomes, key=lambda name: goal is None or name != goal.node):
        contest, wires = walk.outcomes[name].contest, walk.graph.inputs[name]
        for place in sorted(contest.scores) if contest else ():
            entry = found.setdefault(wires[f"candidates[{place}].scores"][0].node, {})
            if contest and place in contest.costs:
                entry.setdefault("cost", contest.costs[place])
            if contest and place in contest.fates:
                gain = contest.gained.get(place)
                told = {} if gain is None else {"metric": gain.metric, "gain": gain.amount, "noise": gain.noise}
                entry.setdefault("choice", {"fate": contest.fates[place], **told})
    return found


def _repeated(walk: Walk, candidates: Collection[str]) -> set[str]:
    """The rows that score the very model of another one: baselines that are some step's, and candidates whose technique
    found nothing to do, after the first."""
    spec = walk.graph.spec
    found = {name: _digests(walk, name).get("model") for name in spec.ladder if name in walk.outcomes}
    scored = {name: str(model) for name, model in found.items() if model is not None}
    reference = walk.graph.resolved_refs.get(str(spec.goal.reference))
    baselines = set(spec.baselines) - ({reference.node} if reference else set())
    first: dict[str, str] = {}
    for name in (name for name in scored if name in candidates):
        first.setdefault(scored[name], name)
    again = {name for name in candidates if name in scored and first[scored[name]] != name}
    return again | {name for name in baselines if name in scored and scored[name] in first}


def _totals(verdicts: Mapping[str, Outcome]) -> dict[str, Any]:
    """Counts, seconds of processor time spent, and seconds of computing that hits stood in for."""
    states = [outcome.state for outcome in verdicts.values()]
    spent = saved = 0.0
    seen: set[str] = set()
    for outcome in verdicts.values():
        if outcome.key is None or outcome.result is None or outcome.key in seen:
            continue
        seen.add(outcome.key)
        provenance = outcome.result["provenance"]
        if outcome.state == "ran":
            spent += provenance.get("cpu_s", 0.0)
        elif outcome.state == "hit":
            saved += provenance["duration_s"]
    counts = {name: states.count(name) for name in ("ran", "hit", "failed", "skipped", "not_needed")}
    return {**counts, "saved_s": round(saved, 3), "cpu_s": round(spent, 3)}


def write_files(walk: Walk, store: Store, folder: Path) -> dict[str, list[str]]:
    """Put the Files that the targets made below `folder`/NODE; {node: paths}. All of them or none."""
    written: dict[str, list[str]] = {}
    try:
        for name in walk.graph.targets:
            outcome = walk.outcomes.get(name)
            for artifact in outcome.outputs.values() if outcome else ():
                if artifact.kind == "Files":
                    files = load(artifact, store)
                    written[name] = [str(folder / name / relative) for relative in files.contents]
                    files.write(folder / name)
    except BaseException:
        take_back(folder, written)
        raise
    return written


def take_back(folder: Path, files: Mapping[str, Sequence[str]]) -> None:
    """Remove what a run wrote to its folder, and the folders that are empty then."""
    paths = [Path(path) for paths in files.values() for path in paths]
    for path in (*paths, folder / RECORD, folder / CONFIG):
        with suppress(OSError):
            path.unlink()
    for place in sorted({place for path in paths for place in path.parents if folder in place.parents}, reverse=True):
        with suppress(OSError):
            place.rmdir()


def write_record(record: Mapping[str, Any], folder: Path) -> None:
    """`record.json`. Flushed where something ran: no later run can tell what that took, or why it failed. A run of hits
    alone is made again by its command, and a flush would take it a tenth longer."""
    folder.mkdir(parents=True, exist_ok=True)
    ran = any(node.get("verdict") in ("ran", "failed") for node in record["nodes"].values())
    write_whole(folder / RECORD, json_text(record), flush=ran)


def write_config(resolved: Mapping[str, Any], folder: Path) -> None:
    """`config.yaml`: the config without interpolations, to run again."""
    import yaml  # loaded by Hydra anyway; a record that is read needs none

    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # the one in C is ten times as fast
    text = yaml.dump(dict(resolved), Dumper=dumper, sort_keys=False, allow_unicode=True)
    write_whole(folder / CONFIG, text)


def json_text(value: Mapping[str, Any]) -> str:
    """`value` as JSON that every reader takes: null for nan and infinity, which a score may be.

    A line for each entry, and for each entry of an entry: a node's facts are one line, for `grep` and `diff`.
    """
    try:
        return _lines(value)
    except (ValueError, TypeError):  # a nan, or a mapping that is no dict: rare, so not looked for beforehand
        return _lines(_finite(value))


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
"""With an indent json would go through its encoder in Python, which takes ten times as long."""


def _lines(value: Mapping[str, Any]) -> str:
    entries = [f" {_encode(name)}: {_block(item)}" for name, item in value.items()]
    return "{\n" + ",\n".join(entries) + "\n}\n"


def _block(value: Any) -> str:
    if isinstance(value, dict) and value:
        return "{\n  " + ",\n  ".join(f"{_encode(str(k))}: {_encode(v)}" for k, v in value.items()) + "\n }"
    if isinstance(value, list | tuple) and value:
        return "[\n  " + ",\n  ".join(map(_encode, value)) + "\n ]"
    return _encode(value)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
