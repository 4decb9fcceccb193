"""What a command and all processes below it hold in memory at most, sampled; Linux alone.

    python benchmarks/memory.py qpipe pipeline=ptq model=onnx_file model.path=decoder.onnx …

prints the peaks of two sums: of proportional set sizes, where a page that several processes have mapped is counted
once, and of anonymous memory, which no file holds. Both in bytes, with the command's wall and processor seconds.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

INTERVAL_S = 0.25
_FIELDS = re.compile(r"^(Pss|Anonymous):\s*(\d+) kB", re.MULTILINE)


def tree(root: int) -> list[int]:
    """The process `root` and all below it."""
    children: dict[int, list[int]] = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            after_name = (place / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it ended
            continue
        children.setdefault(int(after_name[1]), []).append(int(place.name))
    found = [root]
    for process in found:
        found += children.get(process, ())
    return found


def held(root: int) -> dict[str, int]:
    """The sums over the processes of `root`, in bytes."""
    sums = {"Pss": 0, "Anonymous": 0}
    for process in tree(root):
        try:
            text = Path(f"/proc/{process}/smaps_rollup").read_text()
        except OSError:
            continue
        for name, amount in _FIELDS.findall(text):
            sums[name] += int(amount) * 1024
    return sums


def main() -> int:
    """Run the command; its exit status."""
    started = time.perf_counter()
    process = subprocess.Popen(sys.argv[1:])
    peaks = {"Pss": 0, "Anonymous": 0}
    while process.poll() is None:
        now = held(process.pid)
        peaks = {name: max(peaks[name], now[name]) for name in peaks}
        time.sleep(INTERVAL_S)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        json.dumps(
            {
                "peak_pss_bytes": peaks["Pss"],
                "peak_anonymous_bytes": peaks["Anonymous"],
                "wall_s": round(time.perf_counter() - started, 1),
                "cpu_s": round(used.ru_utime + used.ru_stime, 1),
            }
        )
    )
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
