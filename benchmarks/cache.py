"""What caching costs: pipelines of 10 to 10,000 nodes that do next to nothing, cold and again with nothing to do.

    python benchmarks/cache.py [--sizes 10 100 1000 10000] [--rounds 3] [--limit 120] [--only qpipe doit …]
                               [--peers FOLDER] [--json FILE]

Two shapes: a chain (each node adds a number to the result of the one before) and a fan-out (each adds one to the result
of the first). Each tool runs as its users run it, in a process of its own, the tools taking turns; figures are medians
of CPU seconds, user and system, start-up and children included. `cold, a node` is a cold run less a no-op run, and of
that what is spent in the system; `flushes` are the calls of fsync a node, counted in one more cold run of qpipe's.

`bare` is a Hydra app that composes the same config as qpipe and does nothing: `beyond bare` is what qpipe's no-op run
takes more, or less, since qpipe lets Hydra compose once and by libyaml. `bare-quick` is that app composing as qpipe
does: `own` is what qpipe takes beyond it, its reading, hashing, looking up and reporting. qpipe runs its actions in its
own process (`run.workers=0`), as joblib and doit do; DVC and Snakemake start a process for each. All run from compiled
modules, as what is installed does (PYTHONDONTWRITEBYTECODE is not passed on), and once before they are timed.

The peers are joblib.Memory, doit, DVC and Snakemake: `pip install doit joblib dvc snakemake`, into this environment or
into another, whose `bin` is named by `--peers`. Who is not installed, or takes longer than `--limit` seconds for one
run, is skipped from that size on, and the table says so. TMPDIR says where the pipelines and caches lie: on a disk that
others write to at the same time, flushing costs several times as much. What a tool remembers is moved aside before a
cold run, and removed when all is measured: where ext4 has no journal, a file that is made within a minute or so of
many others' removal takes up to 0.5 ms of searching among their inodes. With all peers it takes about half an hour.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHAPES = ("chain", "fan-out")
STAGES = """
from __future__ import annotations
from qpipe.stage import Scores, stage

@stage(version=1)
def bench_number(*, value: int = 1) -> Scores:
    return Scores({"score": value})

@stage(version=1)
def bench_add(scores: Scores, *, amount: int = 1) -> Scores:
    return Scores({"score": scores.values["score"] + amount})
"""
JOBLIB = """
import sys
from joblib import Memory
from bench_functions import add, number

memory = Memory(".cache", verbose=0)
number, add = memory.cache(number), memory.cache(add)
shape, nodes = sys.argv[1], int(sys.argv[2])
first = last = number(1)
for i in range(1, nodes):
    last = add(last if shape == "chain" else first, i)
"""
FUNCTIONS = """
def number(value):
    return value

def add(score, amount):
    return score + amount
"""
DODO = """
from pathlib import Path
shape, nodes = {shape!r}, {nodes}

def write(i, source):
    Path(f"n{{i}}.txt").write_text(str(i + (int(Path(source).read_text()) if source else 1)))

def task_bench():
    for i in range(nodes):
        source = None if i == 0 else f"n{{i - 1 if shape == 'chain' else 0}}.txt"
        yield {{"name": str(i), "actions": [(write, [i, source])], "targets": [f"n{{i}}.txt"],
               "file_dep": [source] if source else [], "uptodate": [True]}}
"""
SNAKEFILE = """
nodes = {nodes}

rule all:
    input: {goal}

rule first:
    output: "n0.txt"
    shell: "echo 1 > {{output}}"

rule add:
    input: lambda wildcards: f"n{{{source}}}.txt"
    output: "n{{i}}.txt"
    wildcard_constraints: i="[1-9][0-9]*"
    shell: "expr $(cat {{input}}) + {{wildcards.i}} > {{output}}"
"""


COUNTER = """
import os, runpy, sys
flush, counted = os.fsync, open("flushes", "wb", buffering=0)
os.fsync = lambda descriptor: (counted.write(b"."), flush(descriptor))[1]
runpy.run_module("qpipe", run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True)
class Tool:
    """A tool on one pipeline: its command, and the folders that it remembers things in."""

    name: str
    command: list[str]
    folder: Path
    memory: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


def write_qpipe(folder: Path, shape: str, nodes: int, _: Path) -> Tool:
    _write_stages(folder)
    environment = {
        "PYTHONPATH": os.pathsep.join([str(folder / "plugin"), str(folder / "registered")]),
        "QPIPE_CACHE_DIR": str(folder / "cache"),
    }
    command = [sys.executable, "-m", "qpipe", *_overrides(folder, shape, nodes)]
    return Tool("qpipe", command, folder, ("cache", "outputs"), environment)


def write_bare(folder: Path, shape: str, nodes: int, _: Path) -> Tool:
    from cached_run import write_bare_app

    return Tool(
        "bare", [*write_bare_app(folder), *_overrides(folder / "own", shape, nodes)], folder, ("outputs",)
    )


def write_bare_quick(folder: Path, shape: str, nodes: int, programs: Path) -> Tool:
    """The bare app, composing as qpipe does."""
    bare = write_bare(folder, shape, nodes, programs)
    app = Path(bare.command[1])
    quick = (
        "import gc\ngc.disable()\nfrom qpipe.cli.compose import quick_hydra\nwith quick_hydra():\n    main()\n"
    )
    app.write_text(app.read_text().replace("\nmain()\n", "\n" + quick))
    return Tool("bare-quick", bare.command, folder, bare.memory)


def _write_stages(folder: Path) -> None:
    (folder / "plugin").mkdir(parents=True)
    (folder / "plugin" / "bench_stages.py").write_text(STAGES)
    info = folder / "registered" / "bench-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bench\nVersion: 1.0\n")
    points = "".join(f"{name} = bench_stages:{name}\n" for name in ("bench_number", "bench_add"))
    (info / "entry_points.txt").write_text("[qpipe.stages]\n" + points)


def _overrides(folder: Path, shape: str, nodes: int) -> list[str]:
    """Write the pipeline; the arguments that choose it."""
    lines = ["# @package _global_", "goal: {metric: bench, max_drop: 0.5}", "stages:"]
    lines += ["  n0: {uses: bench_number, value: 1}"]
    for i in range(1, nodes):
        source = i - 1 if shape == "chain" else 0
        lines.append(f"  n{i}: {{uses: bench_add, scores: n{source}, amount: {i}}}")
    target = folder / "conf" / "pipeline" / "bench.yaml"
    target.parent.mkdir(parents=True)
    target.write_text("\n".join(lines) + "\n")
    return ["--config-dir", str(folder / "conf"), "pipeline=bench", "~model", "~data", "run.workers=0"]


def write_joblib(folder: Path, shape: str, nodes: int, programs: Path) -> Tool:
    (folder / "run.py").write_text(JOBLIB)
    (folder / "bench_functions.py").write_text(FUNCTIONS)
    return Tool("joblib", [_python(programs, "joblib"), "run.py", shape, str(nodes)], folder, (".cache",))


def write_doit(folder: Path, shape: str, nodes: int, programs: Path) -> Tool:
    (folder / "dodo.py").write_text(DODO.format(shape=shape, nodes=nodes))
    return Tool("doit", [_python(programs, "doit"), "-m", "doit", "-v0"], folder, ("*.txt", ".doit.db*"))


def write_dvc(folder: Path, shape: str, nodes: int, programs: Path) -> Tool:
    program = _program(programs, "dvc")
    stages = {"n0": {"cmd": "echo 1 > n0.txt", "outs": ["n0.txt"]}}
    for i in range(1, nodes):
        source = f"n{i - 1 if shape == 'chain' else 0}.txt"
        command = f"expr $(cat {source}) + {i} > n{i}.txt"
        stages[f"n{i}"] = {"cmd": command, "deps": [source], "outs": [f"n{i}.txt"]}
    (folder / "dvc.yaml").write_text(json.dumps({"stages": stages}, indent=1))
    quiet = {"DVC_NO_ANALYTICS": "1"}
    subprocess.run([program, "init", "--no-scm", "-q"], cwd=folder, check=True, env=os.environ | quiet)
    return Tool(
        "dvc", [program, "repro", "-q"], folder, ("*.txt", "dvc.lock", ".dvc/cache", ".dvc/tmp"), quiet
    )


def write_snakemake(folder: Path, shape: str, nodes: int, programs: Path) -> Tool:
    goal = f'"n{nodes - 1}.txt"' if shape == "chain" else 'expand("n{i}.txt", i=range(nodes))'
    source = "int(wildcards.i) - 1" if shape == "chain" else "0"
    (folder / "Snakefile").write_text(SNAKEFILE.format(nodes=nodes, goal=goal, source=source))
    command = [_program(programs, "snakemake"), "--cores", "1", "--quiet", "rules", "progress"]
    return Tool("snakemake", command, folder, ("*.txt", ".snakemake"))


WRITERS: dict[str, Callable[[Path, str, int, Path], Tool]] = {
    "bare": write_bare,
    "bare-quick": write_bare_quick,
    "qpipe": write_qpipe,
    "joblib": write_joblib,
    "doit": write_doit,
    "dvc": write_dvc,
    "snakemake": write_snakemake,
}


class Missing(Exception):
    """A peer is not installed."""


def _python(programs: Path, module: str) -> str:
    """A Python that has `module`."""
    for python in (sys.executable, str(programs / "python")):
        if Path(python).exists():
            found = subprocess.run([python, "-c", f"import {module}"], capture_output=True)
            if found.returncode == 0:
                return python
    raise Missing(f"not installed: pip install {module}")


def _program(programs: Path, name: str) -> str:
    folders = [Path(sys.executable).parent, programs]
    for folder in folders:
        if (folder / name).exists():
            return str(folder / name)
    if found := shutil.which(name):
        return found
    raise Missing(f"not installed: pip install {name}")


@dataclass(frozen=True)
class Cost:
    user_s: float
    system_s: float
    wall_s: float

    @property
    def cpu_s(self) -> float:
        return self.user_s + self.system_s


def run(tool: Tool, limit_s: float) -> Cost:
    """One run of the tool. TimeoutError after `limit_s`; RuntimeError with its last words where it fails."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | tool.environment
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            tool.command, cwd=tool.folder, env=environment, stdout=said, stderr=said, start_new_session=True
        )
        try:
            status = process.wait(None if limit_s == math.inf else limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise TimeoutError(f"more than {limit_s:g} s") from None
        wall_s, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        if status:
            said.seek(0)
            words = said.read().decode(errors="replace").strip().splitlines() or [""]
            raise RuntimeError(f"failed ({status}): {words[-1][:100]}")
    return Cost(after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime, wall_s)


def forget(tool: Tool) -> None:
    """Move all that the tool remembers aside, so that the next run is cold."""
    aside = Path(tempfile.mkdtemp(prefix="aside-", dir=tool.folder.parent))
    for pattern in tool.memory:
        for path in tool.folder.glob(pattern):
            target = aside / path.relative_to(tool.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)


def flushes(tool: Tool) -> int:
    """How often a cold run of qpipe's calls fsync."""
    forget(tool)
    counted = dataclasses.replace(tool, command=[tool.command[0], "-c", COUNTER, *tool.command[3:]])
    run(counted, math.inf)
    return (tool.folder / "flushes").stat().st_size


def measure(tools: Sequence[Tool], rounds: int, limit_s: float) -> dict[str, dict[str, Any]]:
    """{tool: its cold and its no-op costs, or why it was skipped}; in each round every tool has its turn, and in one
    before them, which does not count."""
    found: dict[str, dict[str, Any]] = {tool.name: {"cold": [], "noop": []} for tool in tools}
    for phase in ("cold", "noop"):
        for number in range(-1 if phase == "cold" else 0, rounds):
            for tool in tools:
                if "skipped" in found[tool.name]:
                    continue
                try:
                    if phase == "cold":
                        forget(tool)
                    cost = run(tool, limit_s)
                    if number >= 0:
                        found[tool.name][phase].append(cost)
                except (TimeoutError, RuntimeError) as error:
                    found[tool.name]["skipped"] = f"{phase} run: {error}"
    for tool in tools:
        if tool.name == "qpipe" and "skipped" not in found["qpipe"]:
            found["qpipe"]["flushes"] = flushes(tool)
    return found


def rows_of(shape: str, nodes: int, found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for name, costs in found.items():
        row: dict[str, Any] = {"shape": shape, "nodes": nodes, "tool": name}
        for phase in ("cold", "noop"):
            if costs[phase] and "skipped" not in costs:
                for figure in ("cpu_s", "user_s", "system_s", "wall_s"):
                    figures = [getattr(cost, figure) for cost in costs[phase]]
                    row[f"{phase}_{figure}"] = statistics.median(figures)
        if "skipped" in costs:
            row["skipped"] = costs["skipped"]
        else:
            for figure in ("cpu", "system"):
                beyond_s = row[f"cold_{figure}_s"] - row[f"noop_{figure}_s"]
                row[f"cold_{figure}_ms_per_node"] = 1000 * beyond_s / nodes
        if "flushes" in costs:
            row["flushes_per_node"] = costs["flushes"] / nodes
        rows.append(row)
    for row in rows:
        for other in rows if row["tool"] == "qpipe" else ():
            if other["tool"] in REFERENCES and "skipped" not in row and "skipped" not in other:
                row[REFERENCES[other["tool"]]] = row["noop_cpu_s"] - other["noop_cpu_s"]
    return rows


REFERENCES = {"bare": "beyond_bare_s", "bare-quick": "own_s"}
"""What qpipe's no-op run is compared with, and the name of the difference."""


def shown(row: dict[str, Any]) -> str:
    """One line of the table."""
    start = f"{row['shape']:8} {row['nodes']:>6}  {row['tool']:10}"
    if "skipped" in row:
        return f"{start}  skipped: {row['skipped']}"
    line = f"{start}{row['noop_cpu_s']:>9.2f} s{row['cold_cpu_s']:>10.2f} s"
    line += f"{row['cold_cpu_ms_per_node']:>11.2f} ms{row['cold_system_ms_per_node']:>10.2f} ms"
    if row["tool"] == "qpipe":
        line += f"{row['flushes_per_node']:>9.2f}"
        for name in REFERENCES.values():
            line += f"{row[name]:>+11.2f} s" if name in row else ""
    return line


HEAD = (
    f"{'shape':8} {'nodes':>6}  {'tool':10}{'no-op':>11}{'cold':>12}{'cold, a node':>14}{'of it system':>13}"
    f"{'flushes':>9}{'beyond bare':>13}{'own':>13}"
)


def compare(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The rows of the table, printed as they come."""
    rows: list[dict[str, Any]] = []
    given_up: dict[tuple[str, str], str] = {}
    print(HEAD)
    for nodes in arguments.sizes:
        for shape in arguments.shapes:
            tools, skipped = [], {}
            for name in arguments.only or WRITERS:
                place = folder / f"{name}-{shape}-{nodes}"
                place.mkdir()
                try:
                    if reason := given_up.get((name, shape)):
                        raise Missing(reason)
                    tools.append(WRITERS[name](place, shape, nodes, arguments.peers))
                except Missing as error:
                    skipped[name] = {"cold": [], "noop": [], "skipped": str(error)}
            measured = measure(tools, arguments.rounds, arguments.limit) | skipped
            new = rows_of(shape, nodes, measured)
            for row in new:
                if "skipped" in row and (row["tool"], shape) not in given_up:
                    known = row["skipped"].startswith("not installed")
                    given_up[row["tool"], shape] = row["skipped"] + ("" if known else f", at {nodes:,} nodes")
                print(shown(row), flush=True)
            rows += new
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 100, 1000, 10_000])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument("--only", nargs="+", choices=list(WRITERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one run of one tool")
    parser.add_argument(
        "--peers", type=Path, default=Path(sys.executable).parent, help="bin of their environment"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rows = compare(arguments, Path(name))
    if arguments.json:
        facts = {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cores": os.cpu_count(),
        }
        arguments.json.write_text(json.dumps({**facts, "rounds": arguments.rounds, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
