"""The commands that explain: what a node's key is made of and why it changed, how two runs differ."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qpipe.errors import ConfigError, InputError
from qpipe.explain.causes import Present, Recorded, Results, Side, Step, explain, sentences
from qpipe.explain.past_runs import find_record, read_record
from qpipe.explain.runs_apart import RunDifference, difference
from qpipe.explain.verification import Verified, cached_nodes, verify
from qpipe.keys.changes import Change, short
from qpipe.param import listed, nearest
from qpipe.plan.history import rebuild
from qpipe.plan.verdicts import Outcome
from qpipe.plan.walk import Walk
from qpipe.report import text
from qpipe.report.terminal.plain import PlainDisplay
from qpipe.report.terminal.table import table
from qpipe.report.text import duration, plural
from qpipe.run.executor import worker_count
from qpipe.run.record import json_text
from qpipe.run.stores import open_store
from qpipe.run.sweep import Job, plan_jobs

NEAREST = "its nearest earlier result"
NAMED_ROOTS = 6
LISTED_CHANGES = 60


def why(jobs: Sequence[Job], name: str, against: str | None = None) -> int:
    """Say what the verdict of one node is made of: what changed in its key since its nearest earlier result, or since
    the run `against`, up to the roots, and the key's ingredients."""
    with open_store(jobs[0].spec) as store:
        rebuild(store)
        then: Side = Results(store, str(Path.cwd()))
        since = NEAREST
        if against is not None:
            path = find_record(against, "why")
            then, since = Recorded(read_record(path, "why")), str(path.parent)
        for walk in plan_jobs(jobs, store):
            print("\n".join(why_lines(walk, name, then, since)))
    return 0


def why_lines(walk: Walk, name: str, then: Side, since: str) -> Iterator[str]:
    """The answer of `qpipe why`, line by line. Errors: ConfigError for a node that there is not."""
    nodes = walk.graph.spec.nodes
    if name not in nodes:
        raise ConfigError(f"why: no node '{name}'.{nearest(name, nodes)} Nodes: {listed(nodes)}.")
    if name in walk.graph.disabled:
        yield f"{walk.label}{name}: disabled"
        return
    outcome = walk.verdicts()[name]
    steps = explain(Present(walk), then, name)
    yield f"{walk.label}{name}: {outcome.state}"
    yield from (f"  {line}" for line in _because(outcome, steps, since))
    found = [row for step in steps for row in change_rows(step)]
    if found:
        yield ""
        rows = [("node", "what changed", "was", "is"), *found[:LISTED_CHANGES]]
        yield from (f"  {line}" for block in table(rows, 150, flexible=1) for line in block)
        if len(found) > LISTED_CHANGES:
            yield f"  and {len(found) - LISTED_CHANGES} more, of nodes farther up"
    yield ""
    yield from _key_lines(outcome, steps)


def _because(outcome: Outcome, steps: Sequence[Step], since: str) -> Iterator[str]:
    first = steps[0]
    when = ""
    if first.then is not None and first.then.started is not None:
        when = f" ({datetime.fromtimestamp(first.then.started, UTC):%Y-%m-%d %H:%M:%S} UTC)"
    told = sentences(steps)
    if outcome.state == "not_needed":
        yield from outcome.reasons
    if first.then is None:
        gone = "no earlier result is in the cache: nothing to compare with"
        yield gone if since == NEAREST else f"not in {since}"
        return
    yield f"compared with {since}{when}:"
    for line in told[:NAMED_ROOTS]:
        yield f"  {line}"
    if len(told) > NAMED_ROOTS:
        yield f"  and for {len(told) - NAMED_ROOTS} more reasons, in the table"
    if not told:
        same = "nothing in its key changed"
        reasons = "; ".join(outcome.reasons) if outcome.state in ("run", "skipped") else ""
        yield f"  {same}{'; it runs because: ' + reasons if reasons else ''}"


def change_rows(step: Step) -> Iterator[tuple[str, str, str, str]]:
    """(node, what changed, was, is) for every ingredient that differs, and for the parts behind a digest."""
    node = step.now.node
    if step.remark:
        yield node, step.remark, "", ""
    for change in step.changes:
        was, now = change.before, change.after
        yield node, change.label, "-" if was is None else _value(change, was), _value(change, now)
        yield from (("", f"  {what}", before, after) for what, before, after in change.parts)


def _value(change: Change, value: Any) -> str:
    if change.group == "input":
        if value is None:
            return "not known yet"
        return ", ".join(str(made)[:12] for made in value)
    if change.group == "code":
        return str(value)[:12]
    return "-" if value is None and change.group == "library" else short(value)


def _key_lines(outcome: Outcome, steps: Sequence[Step]) -> Iterator[str]:
    """All that the key is made of, as the key holds it."""
    ingredients = steps[0].now.ingredients or {}
    if outcome.key:
        yield f"  key       {outcome.key}"
    for group, values in ingredients.items():
        if isinstance(values, Mapping):
            for name, value in values.items():
                said = "not known yet" if group == "ports" and value is None else json.dumps(value)
                yield f"  {group:9} {name} = {said}"
        else:
            yield f"  {group:9} {values}"
    for port, made in outcome.outputs.items():
        yield f"  output    {port} = {made.kind} {made.digest}"


def diff(arguments: Sequence[str]) -> int:
    """Say how two runs differ; 0 where both made the same, 1 where not."""
    wanted = [word for word in arguments if not word.startswith("--")]
    unknown = [word for word in arguments if word.startswith("--") and word != "--json"]
    if unknown or len(wanted) != 2:
        raise ConfigError(
            f"diff: takes two runs, got {' '.join(arguments) or 'none'}. Say `qpipe diff last~1 last`."
        )
    paths = find_record(wanted[0], "diff"), find_record(wanted[1], "diff")
    left, right = (read_record(path, "diff") for path in paths)
    found = difference(paths, left, right)
    if "--json" in arguments:
        print(json_text({"schema": 1, "same": found.same, **dataclasses.asdict(found)}))
    else:
        PlainDisplay(sys.stdout).text("\n".join(diff_lines(found)) + "\n")
    return 0 if found.same else 1


def diff_lines(found: RunDifference) -> Iterator[str]:
    """A RunDifference as sections of aligned lines; what does not differ is left out."""
    for label, run, totals in zip(("left", "right"), found.runs, found.totals, strict=True):
        spent = f"{totals.get('ran', 0)} ran, {totals.get('hit', 0)} from the cache"
        yield f"{label:<5}  {run}  ({spent}, {duration(totals.get('cpu_s'))} of processor time)"
    for label, names in zip(("left", "right"), found.only, strict=True):
        if names:
            yield f"\n  only on the {label}: {', '.join(names)}"
    if found.nodes:
        rows = [("node", "stage", "key", "what differs")]
        for node in found.nodes:
            keys = " -> ".join("-" if key is None else key[:12] for key in node.keys)
            if node.keys[0] == node.keys[1]:
                keys = f"{(node.keys[0] or '-')[:12]} (same)"
            said = "; ".join(node.changes) or "the outputs, under the same key: see `qpipe verify`"
            rows.append((node.node, node.stage if node.stage != node.node else "", keys, said))
        yield from _section(rows, flexible=3)
    yield from _score_lines(found)
    for title, values in (("config", found.config), ("environment", found.environment)):
        rows2 = [
            (name, *("-" if value is None else short(value) for value in pair)) for name, pair in values.items()
        ]
        if rows2:
            yield from _section([(title, "left", "right"), *rows2])
    yield from _cost_lines(found)
    yield ""
    yield "  the same nodes, keys, outputs and scores" if found.same else f"  {_summary(found)}"


def _score_lines(found: RunDifference) -> Iterator[str]:
    rows = [("score", "left", "right", "change")]
    for entry in found.scores:
        left, right = entry.scores
        change = "" if left is None or right is None else text.change(left - right, entry.metric)
        rows.append((entry.node, text.score(left, entry.metric), text.score(right, entry.metric), change))
    if len(rows) > 1:
        yield from _section(rows, right=(1, 2, 3))


def _cost_lines(found: RunDifference) -> Iterator[str]:
    rows = [("time", "left", "right")]
    for name, pair in found.costs.items():
        if any(cost["verdict"] in ("ran", "failed") for cost in pair):
            rows.append((name, _cost_cell(pair[0]), _cost_cell(pair[1])))
    if len(rows) > 1:
        yield from _section(rows)


def _cost_cell(cost: Mapping[str, Any]) -> str:
    verdict = str(cost["verdict"]).replace("_", " ")
    if verdict == "hit":
        return f"hit (was {duration(cost['original_duration_s'])})"
    return f"{verdict} {duration(cost['duration_s'])}" if verdict == "ran" else verdict


def _section(
    rows: Sequence[Sequence[str]], right: Sequence[int] = (), flexible: int | None = None
) -> Iterator[str]:
    yield ""
    for block in table(rows, 150, right=right, flexible=flexible):
        yield from (f"  {line}" for line in block)


def _summary(found: RunDifference) -> str:
    parts = []
    if any(found.only):
        parts.append(f"{plural(sum(map(len, found.only)), 'node')} in one run only")
    keys = sum(node.keys[0] != node.keys[1] for node in found.nodes)
    outputs = sum(node.outputs_differ for node in found.nodes)
    scores = sum(entry.scores[0] != entry.scores[1] for entry in found.scores)
    parts += [
        f"{count} {'differs' if count == 1 else 'differ'} in {what}"
        for count, what in ((keys, "key"), (outputs, "output"), (scores, "score"))
        if count
    ]
    return "; ".join(parts)


def verify_nodes(jobs: Sequence[Job], name: str, repeat: int) -> int:
    """Compute `name`, or all nodes, again and say what is reproducible; 1 where anything is not."""
    display = PlainDisplay(sys.stdout)
    with open_store(jobs[0].spec) as store, store.using():
        found, missing = [], []
        for walk in plan_jobs(jobs, store):
            nodes = walk.graph.spec.nodes
            if name != "all" and name not in nodes:
                raise ConfigError(f"verify: no node '{name}'.{nearest(name, nodes)} Nodes: all, {listed(nodes)}.")
            cached, not_cached = cached_nodes(walk, store)
            found += [node for node in cached if name in ("all", node.action.node)]
            missing += [label for label in not_cached if name in ("all", label.removeprefix(walk.label))]
        chosen = list({node.action.key: node for node in found}.values())
        if not chosen:
            raise InputError(
                f"verify: the result of {listed(missing) if missing else repr(name)} is not in the cache, so there is "
                f"nothing to compare with. Run `qpipe` first."
            )
        times = "once" if repeat == 1 else f"{repeat} times"
        display.line(f"{plural(len(chosen), 'node')}, each computed {times} in a process of its own")
        width = max(len(node.label) for node in chosen)

        def tell(verified: Verified) -> None:
            for line in verified_lines(verified, width):
                display.line(line, "" if verified.same else "bold red")

        reports = verify(chosen, store, repeat, worker_count(jobs[0].spec.run), tell)
    for line in _verify_summary(reports, missing):
        display.line(line)
    return 0 if all(report.same for report in reports) else 1


def verified_lines(verified: Verified, width: int) -> Iterator[str]:
    """One node: what is the same, what differs and by how much, what is not here as it was."""
    failed = next((repeat.error for repeat in verified.repeats if repeat.error), "")
    verdict = "failed" if failed else "same" if verified.same else "differs"
    took = ", ".join(duration(repeat.duration_s) for repeat in verified.repeats)
    ports = ", ".join(verified.outputs) if verified.same else ""
    yield f"{verdict:<7}  {verified.node:<{width}}  {ports}{'  ' if ports else ''}{took}".rstrip()
    if failed:
        yield f"         {failed}"
    for port in verified.outputs if not failed else ():
        differing = [(i, one.differing[port]) for i, one in enumerate(verified.repeats, 1) if port in one.differing]
        if not differing:
            if not verified.same:
                yield f"         {port}: the same"
        else:
            yield f"         {port}: {differing[0][1]} (repeat {differing[0][0]} of {len(verified.repeats)})"
    if not verified.same and not failed and len(verified.repeats) > 1:
        yield (
            "         the repeats agree with one another: the cached result was made otherwise"
            if verified.agree
            else "         the repeats differ from one another: the stage is not reproducible"
        )
    if verified.elsewhere and not verified.same:
        yield from (f"         {line}" for line in verified.elsewhere)


def _verify_summary(reports: Sequence[Verified], missing: Sequence[str]) -> Iterator[str]:
    """How many are reproducible, what was not looked at, and whether this machine is another one."""
    good = sum(report.same for report in reports)
    bad = [report.node for report in reports if not report.same]
    yield f"{good} of {plural(len(reports), 'node')} reproducible{': not ' + ', '.join(bad) if bad else ''}"
    if missing:
        yield f"not in the cache, so not looked at: {', '.join(missing)}"
    moved = sorted({line for report in reports for line in report.elsewhere})
    if moved:
        yield f"not as it was when the results were made: {'; '.join(moved)}"
