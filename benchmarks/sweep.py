"""What a sweep costs beside its actions: trials of four nodes whose results are all cached.

    python benchmarks/sweep.py [--trials 200] [--rounds 3] [--json FILE]

`qpipe -m` over one param, again and again with nothing to do, in a process of its own; CPU seconds, user and system,
start-up included, and the largest resident set. `a trial` is that of all trials less that of one, over their number.
`plain Hydra` is a Hydra app that composes the same jobs with Hydra's own launcher and sweeper, writes `.hydra/` for
each, and does nothing: what there is to beat.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

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
PIPELINE = """# @package _global_
stages:
  a: {uses: bench_number, value: 1}
  b: {uses: bench_add, scores: a, amount: 1}
  c: {uses: bench_add, scores: b, amount: 2}
  d: {uses: bench_add, scores: c, amount: 3}
goal: {metric: none, max_drop: null}
run: {workers: 0}
"""
APP = """
import sys
import hydra
from qpipe.cli.main import _register

_register()
hydra.main(version_base="1.3", config_path="pkg://qpipe.conf", config_name="config")(lambda config: None)()
"""
PLAIN = ("hydra/launcher=basic", "hydra/sweeper=basic")


def write_project(folder: Path) -> dict[str, str]:
    """The plug-in and the pipeline; the environment to run them in."""
    (folder / "bench_stages.py").write_text(STAGES)
    (folder / "app.py").write_text(APP)
    info = folder / "registered" / "bench-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bench\nVersion: 1.0\n")
    names = ("bench_number", "bench_add")
    (info / "entry_points.txt").write_text(
        "\n".join(["[qpipe.stages]", *(f"{name} = bench_stages:{name}" for name in names)]) + "\n"
    )
    (folder / "conf" / "pipeline").mkdir(parents=True)
    (folder / "conf" / "pipeline" / "bench.yaml").write_text(PIPELINE)
    path = os.pathsep.join([str(folder), str(folder / "registered"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "QPIPE_CACHE_DIR": str(folder / "cache")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment


def cost(folder: Path, environment: dict[str, str], program: list[str], trials: int) -> dict[str, float]:
    """CPU seconds of one sweep, and its largest resident set in bytes."""
    words = ["-m", "--config-dir", "conf", "pipeline=bench", "~model", "~data", f"stages.d.amount=range({trials})"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(
        [sys.executable, *program[:2], *words, *program[2:]], cwd=folder, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{program} ended with {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu_s": cpu_s, "peak_bytes": used.ru_maxrss * 1024.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    programs = {"qpipe": ["-m", "qpipe"], "plain Hydra": ["-u", "app.py", *PLAIN]}
    found: dict[str, dict[str, list[float]]] = {name: {} for name in programs}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = write_project(folder)
        cost(folder, environment, programs["qpipe"], arguments.trials)  # fills the cache, compiles the modules
        for _ in range(arguments.rounds):
            for program, command in programs.items():
                for count in (1, arguments.trials):
                    for figure, value in cost(folder, environment, command, count).items():
                        found[program].setdefault(f"{figure}_{count}", []).append(value)
    medians = {name: {key: statistics.median(each) for key, each in by.items()} for name, by in found.items()}
    for name, by in medians.items():
        one, many = by["cpu_s_1"], by[f"cpu_s_{arguments.trials}"]
        each = 1000 * (many - one) / max(arguments.trials - 1, 1)
        peak = by[f"peak_bytes_{arguments.trials}"] / 1e6
        figures = f"{many:6.1f} CPU s; one {one:4.2f}; a trial {each:5.1f} ms; {peak:.0f} MB"
        print(f"{name:12} {arguments.trials} trials {figures}")
    ratio = medians["qpipe"][f"cpu_s_{arguments.trials}"] / medians["plain Hydra"][f"cpu_s_{arguments.trials}"]
    print(f"qpipe over plain Hydra: {ratio:.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(medians, indent=1))


if __name__ == "__main__":
    main()
