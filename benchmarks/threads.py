"""Several runs at once on one machine: whether they spend the processor on work or on waiting for each other.

    python benchmarks/threads.py [--runs 4] [--json FILE] [overrides …]

Cold runs of `pipeline=ptq`, each with its own cache, begun together: in the process of the run (`run.workers=0`) and
in worker processes, each with the threads that qpipe takes by itself and with OMP_NUM_THREADS=1. Printed are the
processor seconds of all of them and the seconds until the last had ended; the ratio is over one thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def together(count: int, overrides: list[str], threads: int | None, folder: Path) -> tuple[float, float]:
    """Processor seconds of `count` runs at once, their workers with them, and seconds."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    before, started = _spent(), time.perf_counter()
    runs = []
    for number in range(count):
        place = folder / str(number)
        place.mkdir(parents=True)
        command = [sys.executable, "-m", "qpipe", "pipeline=ptq", *overrides, f"cache.dir={place / 'cache'}"]
        runs.append(subprocess.Popen(command, cwd=place, env=environment, stdout=-3, stderr=-3))
    for run in runs:
        if run.wait() not in (0, 3):
            raise SystemExit(f"a run ended with {run.returncode}")
    return _spent() - before, time.perf_counter() - started


def _spent() -> float:
    waited = resource.getrusage(resource.RUSAGE_CHILDREN)
    return waited.ru_utime + waited.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--json", type=Path)
    arguments, overrides = parser.parse_known_args()
    rows = []
    for workers in ("0", "null"):
        found = {}
        for threads in (1, None):
            with tempfile.TemporaryDirectory() as folder:
                more = [*overrides, f"run.workers={workers}", "run.measure=false"]
                found[threads] = together(arguments.runs, more, threads, Path(folder))
        ratio = found[None][0] / found[1][0]
        rows.append({"workers": workers, "one": found[1], "own": found[None], "ratio": ratio})
        print(
            f"run.workers={workers}: {found[None][0]:.1f} CPU s in {found[None][1]:.1f} s, with OMP_NUM_THREADS=1 "
            f"{found[1][0]:.1f} in {found[1][1]:.1f}: {ratio:.2f}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
