"""The machine under an action: time, memory, threads, libraries, and what no key holds but may decide the last bits."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib.abc
import importlib.machinery
import math
import os
import platform
import re
import resource
import sys
import threading
import time
import types
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qpipe.param import uncollected
from qpipe.stage import Resources

_HELD = 1 << 28  # bytes
_KEPT_BLOCK = 1 << 25  # bytes; the most that every glibc takes
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h

_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes


@contextlib.contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Wall and CPU seconds and, where the system tells (Linux), the peak memory of what runs inside."""
    _reset_peak()
    figures: dict[str, float] = {"started": time.time()}
    wall, cpu = time.perf_counter(), _cpu_s()
    yield figures
    figures["duration_s"] = round(time.perf_counter() - wall, 6)
    figures["cpu_s"] = round(_cpu_s() - cpu, 6)
    figures["peak_rss_bytes"] = _peak_rss_bytes()


def _cpu_s() -> float:
    """Seconds of processor time of this process and of those that it has waited for."""
    waited = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + waited.ru_utime + waited.ru_stime


def cores() -> int:
    """How many processors this process may use, by its affinity and by the quota of its control group."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = quota_of(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return found if quota is None else max(1, min(found, math.ceil(quota)))


def quota_of(own: Path, root: Path) -> float | None:
    """The processors that the control groups named in the file `own`, mounted at `root`, and those above them leave
    to a process; None where they leave it all.

    Source: cpu.max of version 2, cpu.cfs_quota_us and cpu.cfs_period_us of version 1 (Linux, cgroups)."""
    return min((found for folder in _groups(own, root, "cpu") for found in _limit(folder)), default=None)


def _groups(own: Path, root: Path, kind: str) -> Iterator[Path]:
    """The folders of the control groups of a process that may bound what it has of `kind`."""
    with contextlib.suppress(OSError, ValueError):
        for line in own.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds and kind not in kinds.split(","):
                continue
            base = root / kinds if kinds else root
            for folder in [base / path.lstrip("/"), *(base / path.lstrip("/")).parents]:
                if folder == base.parent:
                    break
                yield folder


def _limit(folder: Path) -> list[float]:
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with contextlib.suppress(OSError, ValueError):  # it has none, or "max"
            quota, period = map(int, " ".join((folder / name).read_text() for name in names).split())
            if quota > 0 and period > 0:
                return [quota / period]
    return []


def memory_gb() -> float:
    """10^9 bytes of memory that this process and others of its control group may use."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = memory_limit(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return min(whole, limit or whole) / 1e9


def memory_limit(own: Path, root: Path) -> int | None:
    """The bytes that the control groups named in the file `own`, mounted at `root`, and those above them leave to a
    process; None where they leave it all.

    Source: memory.max of version 2, memory.limit_in_bytes of version 1 (Linux, cgroups)."""
    found = []
    for folder in _groups(own, root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):  # it has none, or "max"
                found.append(int((folder / name).read_text()))
    return min(found, default=None)


def devices() -> tuple[str, ...]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; of NVIDIA's only."""
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    if said is not None:
        return tuple(name for each in said.split(",") if (name := each.strip()) not in ("", "-1"))
    cards = Path("/proc/driver/nvidia/gpus")
    with contextlib.suppress(OSError):
        return tuple(str(number) for number, _ in enumerate(cards.iterdir()))
    return ()


@dataclasses.dataclass(frozen=True)
class Share:
    """What one action holds."""

    cpus: int
    devices: tuple[str, ...]
    memory_gb: float


class Room:
    """What the actions that run at a time share: threads, GPUs, 10^9 bytes of memory (None: all of the machine's)."""

    def __init__(self, cpus: int, devices: Sequence[str], memory: float | None = None) -> None:
        self.cpus, self.devices, self.memory_gb = cpus, tuple(devices), memory_gb() if memory is None else memory
        self._taken: list[Share] = []

    def lacking(self, needs: Resources) -> dict[str, float]:
        """Of each resource that would not do though nothing else ran, what there is."""
        there: dict[str, float] = {"cpus": self.cpus, "gpus": len(self.devices), "memory_gb": self.memory_gb}
        return {name: value for name, value in there.items() if (getattr(needs, name) or 0) > value}

    def fits(self, needs: Resources) -> bool:
        """Whether it can begin now. By itself anything can: what it took elsewhere, or before, need not hold here."""
        return not self._taken or (
            sum(share.cpus for share in self._taken) + (needs.cpus or 1) <= self.cpus
            and len(self._free_devices()) >= (needs.gpus or 0)
            and sum(share.memory_gb for share in self._taken) + (needs.memory_gb or 0) <= self.memory_gb
        )

    def take(self, needs: Resources) -> Share:
        """What the action holds until it is given back."""
        share = Share(needs.cpus or 1, self._free_devices()[: needs.gpus or 0], needs.memory_gb or 0.0)
        self._taken.append(share)
        return share

    def give(self, share: Share) -> None:
        """It is over."""
        self._taken.remove(share)

    def _free_devices(self) -> tuple[str, ...]:
        taken = {device for share in self._taken for device in share.devices}
        return tuple(device for device in self.devices if device not in taken)


def asked_threads() -> int | None:
    """The number of threads that OMP_NUM_THREADS asks for; None where it says nothing of use."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else None


def keep_freed_memory() -> None:
    """Let malloc keep up to 256 MB that were freed, in blocks of up to 32 MB each: the next layer asks for as much.

    By itself glibc gives them back to the system at once, which then makes and clears them anew page by page: a quarter
    of the processor time of a simulation. Where its user has set it otherwise, and elsewhere, nothing is done."""
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):  # Linux with glibc alone
        import ctypes  # rarely needed

        library = ctypes.CDLL(None)
        if library.mallopt(_MMAP_THRESHOLD, _KEPT_BLOCK):  # else it has the other at work that follows from it
            library.mallopt(_TRIM_THRESHOLD, _HELD)


def free_memory() -> None:
    """Give back what an action left behind: models hold on to themselves in circles, and malloc to what is freed.

    Only where 256 MB more are held than at the least since it was done last, since it takes 0.1 s.
    """
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT <= _HELD:
        return  # it never held as much, and this is the cheaper question
    resident = _resident_bytes() or 0
    if resident > _left[0] + _HELD:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # Linux with glibc alone
            import ctypes  # rarely needed

            ctypes.CDLL(None).malloc_trim(0)
        _left[0] = _resident_bytes() or 0
    else:
        _left[0] = min(_left[0], resident)


_left = [0]
"""The fewest bytes that were resident since memory was last freed."""


def _resident_bytes() -> int | None:
    """None where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return None


def _reset_peak() -> None:
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "wb", buffering=0) as marks:
        marks.write(b"5")


def _peak_rss_bytes() -> int:
    with contextlib.suppress(OSError):
        with open("/proc/self/status", "rb", buffering=0) as status:
            found = re.search(rb"^VmHWM:\s*(\d+)", status.read(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT


@functools.cache
def processor() -> str:
    """What the processor calls itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@functools.cache
def _instruction_set() -> str:
    """The vector extensions that decide the last bits, as far as the processor names them."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                flags = line.split(":", 1)[1].split()
                return " ".join(flag for flag in flags if flag in _EXTENSIONS) or platform.machine()
    return platform.processor() or platform.machine()


@functools.cache
def surroundings(libraries: tuple[str, ...]) -> dict[str, Any]:
    """What no key holds and what can still decide the last bits: the machine, Python, the builds of the libraries."""
    return {
        "machine": platform.machine(),
        "instruction_set": _instruction_set(),
        "python": platform.python_version(),
        "builds": _builds(libraries),
    }


def _builds(libraries: tuple[str, ...]) -> dict[str, str]:
    """The versions of those libraries that are builds for a device: the key has the version alone."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in libraries:
        with contextlib.suppress(PackageNotFoundError):
            if "+" in (whole := version(name)):
                found[name] = whole
    return found


_EXTENSIONS = frozenset(
    {"avx", "avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "sve", "i8mm"}
)


LATE = ("sympy", "onnx_ir._symbolic_shapes")
"""What onnx_ir imports for arithmetic with sizes, which has no place here: a fifth of what a worker takes to begin."""


def load_late(names: tuple[str, ...] = LATE) -> None:
    """Let this process load the modules `names` not when they are imported, but when something in them is asked for.

    importlib's LazyLoader is no way: before Python 3.12 it loads as soon as a module is imported by name."""
    sys.meta_path.insert(0, _Late(names))


AHEAD = {"torch": "torch", "onnx-ir": "onnx_ir", "onnxruntime": "onnxruntime"}
"""Distributions whose import takes longer than many an action does, and what is imported of them."""


def load_ahead(libraries: Iterable[str]) -> None:
    """Import those of `AHEAD` among the distributions `libraries` that are not loaded yet, and never look for garbage
    in what is loaded then: of an action itself, what it computes is measured, and nothing else."""
    missing = [name for each, name in AHEAD.items() if each in libraries and name not in sys.modules]
    if not missing:
        return
    gc.collect()  # of the little that there is
    with uncollected():
        for name in missing:
            with contextlib.suppress(Exception):  # the action that needs it says why it cannot be imported
                importlib.import_module(name)
        gc.freeze()


class _Late(importlib.abc.MetaPathFinder):
    """Finds the modules where the finders behind it do, and puts off what their loaders do."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name not in self._names:
            return None
        finders = sys.meta_path[sys.meta_path.index(self) + 1 :]
        found = (finder.find_spec(name, path, target) for finder in finders)
        spec = next((each for each in found if each is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _LateLoader(spec.loader)
        return spec


class Before(importlib.abc.Loader):
    """A loader that leaves to the one behind it what a subclass does not do."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        made: types.ModuleType | None = self._loader.create_module(spec)
        return made


class _LateLoader(Before):
    def exec_module(self, module: types.ModuleType) -> None:
        own, lock, begun = vars(module), threading.RLock(), list[bool]()
        place = {name: own.pop(name) for name in ("__path__",) if name in own}  # an import from inside asks for that

        def load(attribute: str) -> Any:
            with lock:  # who comes meanwhile waits, but for the module itself and what it imports
                if not begun:
                    begun.append(True)
                    own.update(place)
                    try:
                        self._loader.exec_module(module)
                    except BaseException:  # whoever asks next is told the same
                        begun.clear()
                        raise
                    if own.get("__getattr__") is load:
                        del own["__getattr__"]
            if attribute not in own and own.get("__getattr__", load) is not load:
                return own["__getattr__"](attribute)
            if attribute not in own:
                raise AttributeError(f"module {module.__name__!r} has no attribute {attribute!r}")
            return own[attribute]

        own["__getattr__"] = load


def set_threads(threads: int) -> None:
    """Hold the numeric libraries of this process to `threads`; to be called before they are imported.

    Threads of OpenMP that wait sleep instead of turning, unless OMP_WAIT_POLICY says otherwise: where several runs
    share the cores, turning takes most of them."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(threads)
