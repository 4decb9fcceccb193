"""The commands behind `qpipe`, each a function from jobs (one, or all of a sweep) to an exit status."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpipe.cli.manual import OPTIONS
from qpipe.cli.words import take_options
from qpipe.errors import ConfigError, QpipeError
from qpipe.explain.past_runs import LAST, OUTPUTS, find_record, read_record, records
from qpipe.language.catalog import catalog, plain
from qpipe.language.spec import FirstWithin
from qpipe.param import describe
from qpipe.plan.estimate import Estimate, estimate
from qpipe.plan.history import rebuild
from qpipe.plan.verdicts import Outcome
from qpipe.plan.walk import Walk
from qpipe.report.terminal.leaderboard import figures_line, leaderboard
from qpipe.report.terminal.plain import PlainDisplay
from qpipe.report.terminal.table import table, wrap
from qpipe.report.terminal.terminal import Row, Terminal
from qpipe.report.text import duration, plural
from qpipe.run.executor import worker_count
from qpipe.run.stores import open_store
from qpipe.run.sweep import NOT_CACHED, Job, plan_jobs, refusal, run_jobs
from qpipe.run.swept import Trial
from qpipe.stage import REQUIRED

if TYPE_CHECKING:
    from qpipe.search.session import Session


class Screen(Terminal):
    """A Terminal that is shown plans and records of jobs."""

    def __enter__(self) -> Screen:
        return self

    def planned_jobs(self, plans: Sequence[tuple[Job, Walk]]) -> None:
        shown = [row for _, walk in plans for row in rows(walk)]
        wall_s = None
        if any(row.verdict in ("run", "wait") for row in shown):
            workers = worker_count(plans[0][0].spec.run)
            wall_s = estimate([walk for _, walk in plans], workers).wall_s
        self.planned(shown, wall_s)
        budget_s = plans[0][0].spec.run.budget_s
        if wall_s is not None and budget_s is not None and wall_s > budget_s:
            self.message(
                f"run.budget_s={budget_s:g} will not do: this takes about {duration(wall_s)}. What is done by then "
                f"is kept."
            )

    def ended_jobs(self, records: Sequence[tuple[Job, dict[str, Any]]]) -> None:
        self.close()
        refused: QpipeError | None = None
        for job, record in records:
            try:
                _write_report(record, job.folder)
            except QpipeError as error:  # a disk that is full: what is known is shown all the same
                refused = refused or error
        if len(records) == 1 and records[0][0].swept is None:
            self.show(records[0][1], sys.stdout)
        else:
            swept = records[0][0].swept
            print("\n".join(sweep_table(records, swept.folder if swept else records[0][0].folder.parent)))
        if refused is not None:
            raise refused


def run(jobs: Sequence[Job] | Session, command: Sequence[str] = ()) -> int:
    """Carry the pipelines out, show how it goes, leave a record of each, which says `command` before the overrides."""
    if not isinstance(jobs, Sequence):
        return search(jobs, command)
    with open_store(jobs[0].spec) as store, Screen() as screen:
        return run_jobs(jobs, store, screen, ["qpipe", *command, *jobs[0].overrides])


def search(session: Session, command: Sequence[str] = ()) -> int:
    """Carry out what a search asks for, as `run` does; a line for each trial that ran, and for each that is the
    best."""
    from qpipe.search.stream import run_stream

    jobs = iter(session)
    if (first := next(jobs, None)) is None:
        return 0
    with open_store(first.spec) as store, Screen() as screen:

        def tell(job: Job, record: Mapping[str, Any] | None) -> None:
            best = session.tell(job, record)
            if record is None:
                return
            _write_report(record, job.folder)
            if best or record["totals"]["ran"]:
                screen.message(f"{job.label}{figures_line(record)}{', the best so far' if best else ''}")

        words = ["qpipe", *command, *first.overrides]
        return run_stream(itertools.chain([first], jobs), tell, store, screen, words)


def plan(jobs: Sequence[Job]) -> int:
    """Say what would run, what the cache has, why, and what it costs. Writes nothing but the index."""
    options = jobs[0].spec.run
    with open_store(jobs[0].spec) as store:
        rebuild(store)
        walks = plan_jobs(jobs, store)
        costs = estimate(walks, worker_count(options))
        screen = Terminal(sys.stdout, live=False)
        screen.planned([row for walk in walks for row in rows(walk)], costs.wall_s)
        for line in cost_lines(costs, worker_count(options)):
            screen.message(line)
        if (refused := refusal(walks, options)) is None:
            return 0
    print(refused, file=sys.stderr)  # where refusals go: the plan itself may be on its way to /dev/null
    return NOT_CACHED


def cost_lines(costs: Estimate, workers: int) -> list[str]:
    """The Estimate in sentences."""
    lines = []
    if costs.compute_s is not None:
        side_by_side = f", {duration(costs.wall_s)} on {plural(workers, 'worker')}" if workers > 1 else ""
        lines.append(f"at most {duration(costs.compute_s)} of computing{side_by_side}")
        if len(costs.longest) > 1:
            way = costs.longest if len(costs.longest) <= 8 else (*costs.longest[:4], "…", *costs.longest[-3:])
            lines.append(f"the longest way takes {duration(costs.longest_s)}: {' -> '.join(way)}")
    if costs.unknown:
        more = len(costs.unknown) - 8
        named = ", ".join(costs.unknown[:8]) + (f" and {more} more" if more > 0 else "")
        lines.append(f"never run, so without an estimate: {named}")
    if costs.saved_s >= 0.001:
        lines.append(f"the cache saves {duration(costs.saved_s)}")
    return [f"  {line}" for line in lines]


def rows(walk: Walk) -> list[Row]:
    """The plan's lines for one walk, in the order of the config."""
    return [_row(walk, name, outcome) for name, outcome in walk.verdicts().items()]


def _row(walk: Walk, name: str, outcome: Outcome) -> Row:
    node = walk.graph.node(name)
    if isinstance(node, FirstWithin):
        return Row(walk.label + name, "first_within", outcome.state, outcome.reasons)
    expected = None
    if outcome.state in ("run", "wait"):
        expected = walk.expected_s(name)
    return Row(walk.label + name, node.stage.name, outcome.state, outcome.reasons, expected)


def graph(jobs: Sequence[Job], file: str | None) -> int:
    """Print the pipeline with its verdicts, or draw it to an .svg or .png file."""
    from qpipe.report.drawing.picture import draw_graph, graph_text

    with open_store(jobs[0].spec) as store:
        walk = plan_jobs(jobs[:1], store)[0]
        nodes = {
            row.node: {"stage": row.stage, "verdict": row.verdict, "label": row.node}
            for row in rows(walk)
        }
    edges = [(source, target, port) for source, target, port in walk.graph.edges()]
    if file is None:
        display = PlainDisplay(sys.stdout)
        print(graph_text(nodes, edges, width=display.width, fancy=display.fancy))
        return 0
    if Path(file).suffix not in (".svg", ".png"):
        raise ConfigError(f"graph: draws to .svg or .png, got '{file}'. Give the file one of these endings.")
    draw_graph(nodes, edges, Path(file))
    print(f"drawn to {file}")
    return 0


def show_stages(arguments: Sequence[str]) -> str:
    """The list of stages, or one with its ports and params: types, defaults, and what each means."""
    if not arguments:
        lines = table([(name, stage.summary) for name, stage in catalog().items()], 110, flexible=1)
        return "\n".join(line for block in lines for line in block)
    stage = catalog().find(arguments[0], "stages")
    found = [
        ("port", port.name, port.kind + (" (optional)" if port.optional else ""), "")
        for port in stage.ports.values()
    ]
    for param in stage.params.values():
        default = "required" if param.default is REQUIRED else json.dumps(plain(param.default))
        found.append(("param", param.name, describe(param.hint), str(stage.config.get(param.name, default))))
    found += [("output", name, kind, "") for name, kind in stage.outputs.items()]
    shown = [f"{stage.name}: {stage.summary}", ""]
    for row, cells in zip(found, table(found, 110, flexible=2), strict=True):
        shown += cells
        if row[0] != "output":
            shown += [f"{8 * ' '}{line}" for line in wrap(stage.meaning(row[1]), 102) if line]
    return "\n".join(shown)


def show_report(arguments: Sequence[str]) -> str:
    """The closing table of a run again; without a folder, of the last run below outputs/."""
    from qpipe.report.terminal.closing import closing_table

    path = find_record(arguments[0] if arguments else LAST, "report")
    record = read_record(path, "report")
    display = PlainDisplay(sys.stdout)
    closing = closing_table(record, display.width, fancy=display.fancy, colour=display.colour)
    return closing + f"\nthe whole report: {_write_report(record, path.parent)}"


def show_runs(arguments: Sequence[str]) -> str:
    """All runs and trials below a folder, side by side. Errors: ConfigError for words that are none."""
    from qpipe.report.terminal.run_table import Run, chosen, ordered, run_json, run_table

    wanted: list[str] = []
    options, rest = take_options(arguments, OPTIONS["runs"], {"--where": wanted})
    for word in [*rest[1:], *(each for each in rest[:1] if each.startswith("-"))]:
        raise ConfigError(f"runs: takes one folder, got '{word}'. `qpipe runs --help` says what else.")
    for word in wanted:
        if "=" not in word:
            raise ConfigError(f"runs: --where takes KEY=VALUE, got '{word}'.")
    folder = Path(rest[0]) if rest else OUTPUTS
    if rest and not folder.is_dir():
        raise ConfigError(f"runs: there is no folder '{folder}'.")
    found, unread = [], 0
    for path in records(folder):
        try:
            found.append(Run(str(path.parent.relative_to(folder)), read_record(path, "runs")))
        except ConfigError:
            unread += 1
    wishes = dict(word.split("=", 1) for word in wanted)
    runs = ordered([run for run in found if chosen(run, wishes)], options.get("--sort", "started"))
    if "--json" in options:
        return json.dumps(run_json(runs), indent=1)
    lines = run_table(runs)
    return "\n".join([*lines, *([f"{plural(unread, 'record')} could not be read"] if unread else [])])


def _write_report(record: Mapping[str, Any], folder: Path) -> Path:
    from qpipe.report.page.html import write_report

    path = folder / "report.html"
    if folder.is_dir():
        write_report(record, path)
    return path


def sweep_table(
    records: Sequence[tuple[Job | Trial, Mapping[str, Any]]], folder: Path, aim: Mapping[str, Any] | None = None
) -> list[str]:
    """The trials of a sweep, the best first, by what they have different; `aim` is what a search was for."""
    trials = [(trial.number or 0, trial.overrides, record) for trial, record in records]
    display = PlainDisplay(sys.stdout)
    return leaderboard(trials, str(folder), display.width, display.fancy, aim)
