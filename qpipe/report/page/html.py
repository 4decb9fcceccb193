"""report.html from a record: one file that loads nothing: which step won, and what each node did.

Everything in a record may come from outside (names, errors, paths), so every text is escaped on its way in.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from qpipe.report import facts, measured, text
from qpipe.report.drawing.picture import svg_graph
from qpipe.report.page.charts import parity_chart, ratio_chart, score_chart
from qpipe.report.page.mix import Mix, mix_chart, mixes
from qpipe.report.page.style import STYLE
from qpipe.writing import write_whole

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
LONG_TABLE = 50
WORST = 12
DRAWN = 300
"""Nodes of the largest pipeline that is drawn: a larger picture takes long to make and cannot be read."""
SHOWN = 300
"""Nodes that are shown one by one; of more, those that say most, and the rest in one row for each stage and verdict."""
FAILURES = 100
_STATUS = {
    "done": "done", "failed": "a node failed", "goal_missed": "goal missed", "interrupted": "interrupted",
}  # fmt: skip
_HEAD = ("node", "stage", "verdict", "took", "computed in", "memory", "why")


def write_report(record: Mapping[str, Any], path: str | Path) -> None:
    """Writes the page for `record` to `path`."""
    write_whole(Path(path), render(record))


def render(record: Mapping[str, Any]) -> str:
    """The page as text."""
    sections = (
        _summary(record),
        _section("Failed", _failures(record)),
        _section("Scores", _scores(record)),
        _section("As deployed", "".join(map(_measured, measured.measured(record)))),
        _section("Mixed precision", "".join(map(_mix, mixes(record)))),
        _section("Parity of simulation and deployment", "".join(map(_parity, facts.parities(record)))),
        _section("Pipeline", _graph(record)),
        _section("Nodes", _nodes(record)),
        _section("Notes", _notes(record)),
        _section("Files", _files(record)),
        _section("Environment", _environment(record)),
    )
    title = f"qpipe: {measured.verdict(record) or record.get('status', '')}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, sections))
        + "\n</body>\n</html>\n"
    )


def _text(value: object) -> str:
    return escape(text.clean(value))


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>" if content else ""


def _badge(kind: object, label: str = "") -> str:
    name = text.clean(kind)
    return (
        f'<span class="badge {escape(name)}">{_text(label or name.replace("_", " "))}</span>' if name else ""
    )


def _summary(record: Mapping[str, Any]) -> str:
    status = str(record.get("status", ""))
    goal = measured.verdict(record)
    command = record.get("command") or ""
    shown = command if isinstance(command, str) else " ".join(map(str, command))
    sentence = goal[:1].upper() + goal[1:] if goal else "A run of qpipe"
    started = str(record.get("started") or "")[:19].replace("T", " ")
    return (
        f'<header>\n<p class="faint">qpipe {_text(record.get("qpipe", ""))} · {_text(started)} '
        f"{_badge(status, _STATUS.get(status, status))}</p>\n<h1>{_text(sentence)}</h1>\n"
        f"<p><code>{_text(shown)}</code></p>\n{_cards(record)}\n</header>"
    )


def _cards(record: Mapping[str, Any]) -> str:
    steps, totals = facts.steps(record), record.get("totals") or {}
    cards = []
    if best := next((step for step in steps if step.best), None):
        cards.append((text.score(best.score, best.metric), f"best: {best.label}"))
    if base := next((step for step in steps if step.baseline), None):
        cards.append((text.score(base.score, base.metric), f"float, {base.metric}"))
    if best and base and best.drop is not None:
        cards.append((text.amount(best.drop, best.metric), "drop of the best"))
    if (wall := facts.wall_s(record)) is not None:
        cards.append(
            (
                text.duration(wall),
                f"this run, {text.duration(facts.real(totals.get('cpu_s')))} of processor time",
            )
        )
    cards.append((text.duration(facts.real(totals.get("saved_s"))), "saved by the cache"))
    counts = ", ".join(
        f"{totals.get(name)} {name}" for name in ("hit", "failed", "skipped") if totals.get(name)
    )
    cards.append((f"{totals.get('ran', 0)} ran", counts or "nothing from the cache"))
    shown = (
        f'<div class="card"><b>{_text(value)}</b><span>{_text(label)}</span></div>' for value, label in cards
    )
    return f'<div class="cards">{"".join(shown)}</div>'


def _failures(record: Mapping[str, Any]) -> str:
    failed = facts.failures(record)
    shown = "".join(
        f"<p><b>{_text(node)}</b></p><pre>{escape(message)}</pre>" for node, message in failed[:FAILURES]
    )
    return shown + (f"<p>and {len(failed) - FAILURES} more</p>" if len(failed) > FAILURES else "")


def _scores(record: Mapping[str, Any]) -> str:
    steps = facts.steps(record)
    if not steps:
        return ""
    rows = [
        (
            _text(step.label) + (" (best)" if step.best else ""),
            _text(text.score(step.score, step.metric)),
            "" if step.baseline else _text(text.change(step.drop, step.metric)),
            _text(text.cost(step.cost)),
            _text(step.choice),
            _badge(step.verdict),
            _text(step.time),
        )
        for step in steps
    ]
    metrics = sorted({step.metric for step in steps if step.metric})
    points = set(metrics) <= set(text.PERCENT_METRICS)
    named = _text(", ".join(metrics) or "score")
    head = ("step", named, "points" if points else "change", "cost", "held out", "verdict", "time")
    least = facts.least(record)
    best = [index for index, step in enumerate(steps) if step.best]
    return score_chart(steps, least) + _table(head, rows, right=(1, 2, 3, 6), best=best)


def _table(
    head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = (), best: Sequence[int] = ()
) -> str:
    """A table of cells that are HTML already."""
    marks = [' class="right"' if column in right else "" for column in range(len(head))]
    lines = ["".join(f"<th{mark}>{cell}</th>" for cell, mark in zip(head, marks, strict=True))]
    lines += [
        "".join(f"<td{mark}>{cell}</td>" for cell, mark in zip(row, marks, strict=True)) for row in rows
    ]
    opening = ['<tr class="best">' if index - 1 in best else "<tr>" for index in range(len(lines))]
    body = "\n".join(f"{tag}{line}</tr>" for tag, line in zip(opening, lines, strict=True))
    return f'<div class="scroll"><table>{body}</table></div>'


def _parity(parity: facts.Parity) -> str:
    charts = parity_chart(parity.units, "op by op, equal inputs") + parity_chart(
        parity.end_to_end, "end to end"
    )
    rows = [
        (f"<code>{_text(value)}</code>", _text(operators), _text(found.sentence))
        for value, operators, found in parity.worst[:WORST]
    ]
    worst = _table(("value", "operators", "distance, op by op"), rows) if rows else ""
    listed = _list([(name, _text(value)) for name, value in parity.facts])
    return f"<p>{_text(parity.node)}: {_text(parity.sentence)}.</p>\n{charts}{listed}{worst}"


def _measured(one: measured.Measured) -> str:
    if one.error:
        return f"<p>{_text(one.node)} is not measured: {_text(one.error)}</p>"
    listed = [(ratio.name, _text(ratio.sentence)) for ratio in one.ratios]
    listed += [("on integers", _text(one.on_integers))] if one.on_integers else []
    head = ("in float", "nodes", "form", "one of them", "why")
    rows = [
        (_text(row.op_type), f"{row.count:,}", _text(row.form), f"<code>{_text(row.example)}</code>", _text(row.why))
        for row in one.in_float[:LONG_TABLE]
    ]
    table = _table(head, rows, right=(1,)) if rows else ""
    return f"<p>{_text(one.node)}: {_text(one.conditions)}.</p>\n{ratio_chart(one.ratios)}{_list(listed)}{table}"


def _mix(mix: Mix) -> str:
    table = _table([_text(name) for name in mix.head], [[_text(cell) for cell in row] for row in mix.rows[:LONG_TABLE]])
    rest = len(mix.rows) - LONG_TABLE
    more = f'<p class="faint">and {rest} more groups; record.json has them all</p>' if rest > 0 else ""
    return f"<p>{_text(mix.node)}: {_text(mix.sentence)}.</p>\n{mix_chart(mix)}{table if mix.rows else ''}{more}"


def _graph(record: Mapping[str, Any]) -> str:
    edges = facts.edges(record)
    if not edges:
        return ""
    if (count := len(facts.nodes(record))) > DRAWN:
        hint = "qpipe graph FILE.svg draws them all the same."
        return f'<p class="faint">{count:,} nodes are too many for a picture; {hint}</p>'
    nodes = {
        name: {"stage": node.get("stage"), "verdict": node.get("verdict")}
        for name, node in facts.nodes(record).items()
    }
    try:
        drawn = svg_graph(nodes, edges)
    except ValueError as error:  # a record that was edited by hand
        return f'<p class="faint">{_text(error)}</p>'
    return f'<div class="scroll graph">{drawn}</div>'


def _nodes(record: Mapping[str, Any]) -> str:
    nodes = facts.nodes(record)
    if not nodes:
        return ""
    head = "".join(f"<span>{name}</span>" for name in _HEAD)
    shown, rest = facts.telling(nodes, SHOWN)
    return "\n".join(
        [
            f'<div class="columns head">{head}</div>',
            *(_node(name, nodes[name]) for name in shown),
            _folded(rest),
        ]
    )


def _folded(groups: Sequence[facts.Group]) -> str:
    """The nodes that are not shown one by one: a row for each stage and verdict."""
    if not groups:
        return ""
    total = sum(group.count for group in groups)
    rows = [
        (
            _text(group.stage),
            _badge(group.verdict),
            f"{group.count:,}",
            _text(text.duration(group.duration_s)),
            _text(text.duration(group.original_duration_s)),
        )
        for group in groups
    ]
    heading = f'<p class="faint">and {total:,} more nodes; record.json has a line for each</p>'
    return heading + _table(("stage", "verdict", "nodes", "took", "computed in"), rows, right=(2, 3, 4))


def _node(name: str, node: Mapping[str, Any]) -> str:
    failed = node.get("verdict") == "failed"
    error = facts.error_of(node)
    why = error.splitlines()[0] if error else "; ".join(map(str, node.get("reasons") or ()))
    cells = (
        f'<span class="name">{_text(name)}</span>',
        f"<span>{_text(node.get('stage') or '')}</span>",
        f"<span>{_badge(node.get('verdict') or '')}</span>",
        *(
            f"<span>{_text(shown)}</span>"
            for shown in (
                text.duration(facts.real(node.get("duration_s"))),
                text.duration(facts.real(node.get("original_duration_s"))),
                text.size(facts.real(node.get("peak_rss_bytes"))),
                text.clip(text.clean(why), 160, "…"),
            )
        ),
    )
    summary = f'<summary class="columns">{"".join(cells)}</summary>'
    opening = '<details class="node" open>' if failed else '<details class="node">'
    return f'{opening}{summary}<div class="body">{_details(node, error)}</div></details>'


def _details(node: Mapping[str, Any], error: str) -> str:
    """All that the record says of one node."""
    entries = [("key", f"<code>{_text(node['key'])}</code>")] if node.get("key") else []
    entries += [("why", _bullets(node.get("reasons") or ()))] if node.get("reasons") else []
    entries += [
        (f"param {name}", f"<code>{_text(_json(value))}</code>") for name, value in _items(node, "params")
    ]
    for port, digests in _items(node, "inputs"):
        found = digests if isinstance(digests, list | tuple) else [digests]
        entries.append((f"input {port}", "<br>".join(f"<code>{_text(digest)}</code>" for digest in found)))
    for port, output in _items(node, "outputs"):
        if isinstance(output, Mapping):
            kind, size = _text(output.get("kind", "")), text.size(facts.real(output.get("size_bytes")))
            entries.append(
                (f"output {port}", f"{kind}, {size} <code>{_text(output.get('digest', ''))}</code>")
            )
    if cpu := facts.real(node.get("cpu_s")):
        entries.append(("processor time", text.duration(cpu)))
    entries += [(name, _value(value)) for name, value in _items(node, "scores")]
    notes = _bullets(node.get("notes") or ())
    traceback = node["error"].get("traceback") if isinstance(node.get("error"), Mapping) else None
    said = "\n".join(filter(None, (error, text.clean_lines(traceback or ""))))
    return _list(entries) + notes + (f"<pre>{escape(said)}</pre>" if said else "")


def _items(node: Mapping[str, Any], name: str) -> list[tuple[str, Any]]:
    found = node.get(name)
    return [(str(key), value) for key, value in found.items()] if isinstance(found, Mapping) else []


def _value(value: Any) -> str:
    """A score of any shape: rows of equal mappings as a table, other structures as short JSON."""
    if isinstance(value, list) and value and all(isinstance(row, Mapping) and row for row in value):
        head = list(value[0])
        if all(list(row) == head for row in value):
            rows = [[_text(_json(row[name])) for name in head] for row in value[:LONG_TABLE]]
            more = (
                f'<p class="faint">and {len(value) - LONG_TABLE} more</p>' if len(value) > LONG_TABLE else ""
            )
            return _table([_text(name) for name in head], rows) + more
    return _text(text.clip(_json(value), 600, "…"))


def _json(value: Any) -> str:
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, ensure_ascii=False, default=str)
    return text.number(value)


def _list(entries: Sequence[tuple[str, str]]) -> str:
    shown = "".join(f"<dt>{_text(name)}</dt><dd>{value}</dd>" for name, value in entries)
    return f"<dl>{shown}</dl>" if shown else ""


def _bullets(sentences: Iterable[object]) -> str:
    shown = "".join(f"<li>{_text(sentence)}</li>" for sentence in sentences)
    return f"<ul>{shown}</ul>" if shown else ""


def _notes(record: Mapping[str, Any]) -> str:
    notes = facts.notes(record)
    more = [f"and {len(notes) - SHOWN} more"] if len(notes) > SHOWN else []
    return _bullets([*(f"{node}: {note}" for node, note in notes[:SHOWN]), *more])


def _files(record: Mapping[str, Any]) -> str:
    folder = str(record.get("run_dir") or "")
    shown = []
    for _, path in facts.files(record):
        inside = bool(folder) and path.startswith(folder.rstrip("/") + "/")
        link = (
            f'<a href="./{quote(os.path.relpath(path, folder))}">{_text(path)}</a>' if inside else _text(path)
        )
        shown.append(f"<li><code>{link}</code></li>")
    return f"<ul>{''.join(shown)}</ul>" if shown else ""


def _environment(record: Mapping[str, Any]) -> str:
    environment = record.get("environment") or {}
    entries = [(name, _text(value)) for name, value in environment.items() if not isinstance(value, Mapping)]
    entries += [(name, _text(version)) for name, version in (environment.get("libraries") or {}).items()]
    git = record.get("git")
    if isinstance(git, Mapping) and git.get("commit"):
        dirty = ", with changes that were not committed" if git.get("dirty") is True else ""
        entries.append(("git commit", f"<code>{_text(git['commit'])}</code>{dirty}"))
    entries += [("run folder", f"<code>{_text(record['run_dir'])}</code>")] if record.get("run_dir") else []
    return _list(entries)
