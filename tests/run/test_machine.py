"""What a process may use: its affinity, its control group, and the number of threads that it was told."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from qpipe.language.spec import RunSpec
from qpipe.run.executor import thread_count
from qpipe.run.machine import cores, measured, quota_of


@pytest.mark.parametrize(
    ("own", "files", "found"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2.0),  # what is above counts
        ("0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "50000 100000"}, 0.5),
        ("0::/gone/in/a/container", {"cpu.max": "300000 100000"}, 3.0),
        ("1:cpu:/x", {"cpu/x/cpu.cfs_quota_us": "250000", "cpu/x/cpu.cfs_period_us": "100000"}, 2.5),
        ("4:cpu,cpuacct:/", {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, None),
        ("2:memory:/x", {"memory/x/cpu.max": "100000 100000"}, None),
        ("nonsense", {}, None),
        ("0::/", {"cpu.max": "nonsense"}, None),
    ],
)
def test_the_quota_of_a_control_group(tmp_path: Path, own: str, files: dict[str, str], found: float | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "own").write_text(own + "\n")
    assert quota_of(tmp_path / "own", tmp_path) == found


def test_a_system_without_control_groups_leaves_it_all(tmp_path: Path) -> None:
    assert quota_of(tmp_path / "nothing", tmp_path) is None


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_the_affinity_counts() -> None:
    program = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
    program += "from qpipe.run.machine import cores; print(cores())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


@pytest.mark.parametrize(
    ("said", "threads", "wanted"),
    [("1", None, 1), ("1,2", None, 1), ("", None, cores()), ("0", None, cores()), ("many", None, cores()), ("1", 3, 3)],
)
def test_threads_keep_to_what_openmp_was_told(
    monkeypatch: pytest.MonkeyPatch, said: str, threads: int | None, wanted: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert thread_count(RunSpec(workers=0, threads=threads)) == wanted


def test_threads_are_no_more_than_the_share_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    assert thread_count(RunSpec(workers=0)) == cores()
    assert thread_count(RunSpec(workers=cores())) == 1


@pytest.mark.parametrize(("said", "wanted"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_that_wait_sleep_unless_told_otherwise(said: str | None, wanted: str) -> None:
    program = "import os; from qpipe.run.machine import set_threads; set_threads(2);"
    program += "print(os.environ['OMP_WAIT_POLICY'], os.environ['OMP_NUM_THREADS'])"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if said is None else {"OMP_WAIT_POLICY": said}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [wanted, "2"]


def test_processor_time_of_processes_that_were_waited_for_counts() -> None:
    with measured() as figures:
        subprocess.run([sys.executable, "-c", "sum(range(10**7))"], check=True)
    assert figures["cpu_s"] > 0.05


def told(program: str, **environment: str) -> list[str]:
    """The words that a fresh process with `program` prints."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=own | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


FREED = """
import resource, sys
from qpipe.run.machine import keep_freed_memory
keep_freed_memory()
for time in range(4):
    if time == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    large = [bytearray(8 << 20) for _ in range(4)]
    del large
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() >> 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_memory_that_was_freed_is_used_again_unless_malloc_was_told_otherwise() -> None:
    (kept,), (left,) = told(FREED), told(FREED, MALLOC_TRIM_THRESHOLD_="131072")
    assert int(kept) < 8  # MB; what is asked for is 96
    assert int(left) > 80


LATE = """
import sys
from qpipe.run.machine import load_late
load_late()
import onnx_ir
print("sympy.core" in sys.modules)
print((onnx_ir.SymbolicDim("n") + 2).value, "sympy.core" in sys.modules)
import sympy
from sympy.functions import exp
print(sympy.__name__, exp is sympy.exp, hasattr(sympy, "nothing"))
"""


@pytest.mark.slow
def test_what_is_loaded_late_is_all_there_when_it_is_asked_for() -> None:
    assert told(LATE) == ["False", "n", "+", "2", "True", "sympy", "True", "False"]


def test_a_module_that_is_loaded_late_and_cannot_be_says_so_each_time(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import nothing_of_the_kind")
    program = f"""
import sys
from qpipe.run.machine import load_late
sys.path.insert(0, {str(tmp_path)!r})
load_late(("broken", "nowhere"))
import broken
for _ in range(2):
    try:
        broken.value
    except ImportError as error:
        print(error.name)
try:
    import nowhere
except ImportError as error:
    print(error.name)
"""
    assert told(program) == ["nothing_of_the_kind", "nothing_of_the_kind", "nowhere"]


AHEAD = """
import gc, sys
from qpipe.run import machine
machine.AHEAD = {"one": "decimal", "two": "nowhere_at_all", "three": "fractions"}
machine.load_ahead(("one", "two", "numpy"))
print("decimal" in sys.modules, "fractions" in sys.modules, gc.isenabled(), gc.get_freeze_count() > 1000)
before = gc.get_freeze_count()
machine.load_ahead(("one",))
print(gc.get_freeze_count() == before)
"""


def test_what_an_action_computes_with_is_loaded_before_it_and_never_looked_through() -> None:
    assert told(AHEAD) == ["True", "False", "True", "True", "True"]
