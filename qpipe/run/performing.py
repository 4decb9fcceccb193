"""An action as it runs: inputs out of the store, the stage's function called, its outputs into the store.

This is what a worker does, in whatever process. It publishes the sub-results of `ctx.memo` as it goes, so that a killed
action resumes; the action's own result goes back to the executor, which alone decides that it counts.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import platform
import re
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qpipe.artifacts.artifact import Artifact, Statistics, load, save
from qpipe.cache.store import Store
from qpipe.errors import ChangedError, DamagedError, QpipeError
from qpipe.keys import loaded
from qpipe.keys.hashing import digest
from qpipe.language.catalog import catalog
from qpipe.param import coerce
from qpipe.plan.walk import Action
from qpipe.stage import Context

_HELD = 1 << 28  # bytes; about what torch and onnxruntime take themselves
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes
Emit = Callable[[dict[str, Any]], None]
Request = dict[str, Any]
"""An Action as JSON, the form in which it travels to a worker."""


def request(action: Action, device: str) -> Request:
    """What a worker needs to know of `action`."""
    return {
        "node": action.node,
        "stage": action.stage,
        "key": action.key,
        "ingredients": dict(action.ingredients),
        "written": dict(action.written),
        "inputs": {
            port: [[artifact.kind, artifact.digest, artifact.size_bytes] for artifact in artifacts]
            for port, artifacts in action.inputs.items()
        },
        "device": device,
        "provenance": dict(action.provenance),
    }


OF_CODE = ("format", "stage", "version", "function", "code", "libraries")
"""What a sub-result shares of its action's ingredients: all but params and ports, which its own inputs stand for."""


class ActionContext(Context):
    """The Context of a running action: progress goes to `emit`, sub-results into the store."""

    def __init__(self, request: Request, store: Store, emit: Emit, threads: int) -> None:
        self.device = request["device"]
        self.threads = threads
        self.notes: list[str] = []
        self.parts: set[str] = set()
        self._request = request
        ingredients = request["ingredients"]
        self._code = {name: ingredients[name] for name in OF_CODE}
        self._store = store
        self._emit = emit
        self._last = 0.0
        self._functions: dict[str, Any] = {}
        self._loaded = loaded.count()

    def progress(self, done: int, total: int, what: str = "") -> None:
        now = time.monotonic()
        if now - self._last >= 0.1 or done >= total:
            self._last = now
            self._emit({"event": "progress", "done": done, "total": total, "what": what})

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)

    def memo(self, name: str, fn: Callable[..., Any], *inputs: Any) -> Any:
        key = digest("memo", self._code, name, _names(fn), list(inputs))
        code = getattr(fn, "__code__", None)
        if self._functions.setdefault(key, code) is not code:
            raise ValueError(
                f"ctx.memo: two functions share the name '{name}' and the inputs. Name them apart."
            )
        self.parts.add(key)
        check_code(self._request, self._store)
        found = self._store.result(key)
        if found is not None and not self._store.complete(found):
            try:
                value = _remembered(load(Artifact(**found["outputs"]["result"]), self._store))
                self._store.touch([key])
                return value
            except (DamagedError, KeyError, TypeError, AttributeError):
                self._store.forget(key)  # a damaged or made-up sub-result is a miss
        started = time.perf_counter()
        value = fn(*inputs)
        check_code(self._request, self._store)  # a function may import what it needs when it runs
        artifact = save(_to_remember(value), self._store)
        if not self.found_on_the_way():
            self._store.publish(
                key,
                {
                    "outputs": {"result": artifact_json(artifact)},
                    "ingredients": {**self._code, "memo": name},
                    "provenance": {"duration_s": time.perf_counter() - started},
                },
            )
            self._emit({"event": "published", "key": key})
        return _remembered(load(artifact, self._store))  # as it comes the next time

    def found_on_the_way(self) -> dict[str, str]:
        """{name: digest} of the first-party modules that were loaded since this action began and that its key does not
        hold: their names came from a param, a variable of the environment, a file."""
        since = loaded.loaded_since(self._loaded, self._store.index.memo("code"))
        if not since:
            return {}
        known = [_expected(self._request, code) for code in _codes(self._request["ingredients"])]
        if not all(known):  # a listing that is too long to be kept
            return {}
        return {name: made for name, made in since.items() if not any(name in names for names in known)}


def _names(fn: Callable[..., Any]) -> str:
    """What a function is called where it was written."""
    fn = getattr(fn, "func", fn)  # what functools.partial holds
    return f"{getattr(fn, '__module__', '')}:{getattr(fn, '__qualname__', '')}"


def _to_remember(value: Any) -> Statistics:
    """Arrays as arrays, all else as JSON; a value that is no dict stands alone under no name."""
    if not isinstance(value, dict):
        return Statistics({}, {"value": value})
    arrays = {
        name: item for name, item in value.items() if hasattr(item, "__array__") and hasattr(item, "dtype")
    }
    return Statistics(arrays, {"values": {name: item for name, item in value.items() if name not in arrays}})


def _remembered(value: Statistics) -> Any:
    if "value" in value.values:
        return value.values["value"]
    return {**value.arrays, **value.values["values"]}


def artifact_json(artifact: Artifact) -> dict[str, Any]:
    """An Artifact as it stands in an action result."""
    return {"kind": artifact.kind, "digest": artifact.digest, "size_bytes": artifact.size_bytes}


def perform(request: Request, store: Store, emit: Emit, threads: int) -> dict[str, Any]:
    """Run the action; its result: `outputs`, `notes`, `parts`, `ingredients`, `provenance`; `parts` are the keys of its
    sub-results. Raises what the stage raises."""
    try:
        return _perform(request, store, emit, threads)
    finally:
        free_memory()


def _perform(request: Request, store: Store, emit: Emit, threads: int) -> dict[str, Any]:
    stage = catalog()[request["stage"]]
    params = {
        name: coerce(value, stage.params[name].hint, f"stages.{request['node']}.{name}")
        for name, value in request["written"].items()
    }
    arguments: dict[str, Any] = dict(params)
    for name, artifacts in request["inputs"].items():
        values = [load(Artifact(*fields), store) for fields in artifacts]
        arguments[name] = values if stage.ports[name].many else values[0]
    check_code(request, store)
    context = ActionContext(request, store, emit, threads)
    if stage.takes_context:
        arguments["ctx"] = context
    with _measured() as figures:
        outputs = stage.unpack(stage.function(**arguments))
    check_code(request, store)
    also = context.found_on_the_way()
    saved = {name: artifact_json(save(value, store)) for name, value in outputs.items()}
    for name, kind in stage.outputs.items():
        if saved[name]["kind"] != kind:
            raise TypeError(
                f"stage '{stage.name}' says that its output '{name}' is a {kind}, and returned a {saved[name]['kind']}"
            )
    return {
        "outputs": saved,
        "notes": context.notes,
        "parts": sorted(context.parts),
        **({"also": also} if also else {}),
        "ingredients": request["ingredients"],
        "provenance": {
            **figures,
            "threads": threads,
            "device": request["device"],
            **surroundings(tuple(request["ingredients"]["libraries"])),
            "written": request["written"],
            **request.get("provenance", {}),
        },
    }


def check_code(request: Request, store: Store) -> None:
    """Hold the modules that run here against the key. ChangedError where they are others than were planned with."""
    for code in _codes(request["ingredients"]):
        expected = _expected(request, code)
        if changed := loaded.differing(code, expected, store.index.memo("code")):
            raise ChangedError(
                f"the code that ran is not what was planned with: {', '.join(changed)} was edited meanwhile, or "
                f"another file of that name comes first on the path. The result is not kept; run again."
            )


def _expected(request: Request, code: str) -> Mapping[str, str]:
    """{module: first digits of its digest} of a code digest; {} where no listing of it is kept."""
    return _modules(request.get("provenance", {}).get("listings", {}).get(code, ""))


@functools.lru_cache(64)
def _modules(text: str) -> Mapping[str, str]:
    return {name: digits for digits, name in (line.split("  ", 1) for line in text.splitlines())}


def _codes(ingredients: Mapping[str, Any]) -> list[str]:
    """The digests of code in the ingredients of a key: the stage's own, and those of factories."""
    factories = [
        value["code"]
        for value in ingredients["params"].values()
        if isinstance(value, Mapping) and "function" in value and "code" in value
    ]
    return [ingredients["code"], *factories]


def failure(error: BaseException) -> dict[str, Any]:
    """An exception as JSON: the sentence for the person, the exit status, and the traceback for the record."""
    ours = isinstance(error, QpipeError)
    lines = [line.rstrip() for line in str(error).strip().splitlines()]
    said = "\n".join(lines) if ours else (lines or [""])[0]  # ours may list many reasons, a line each
    text = "".join(traceback.format_exception(error))
    return {
        "event": "failed",
        "kind": type(error).__name__,
        "message": said if ours else f"{type(error).__name__}: {said}",
        "exit_code": getattr(error, "exit_code", 1),
        "traceback": text,
        **({"digest": error.digest} if isinstance(error, DamagedError) else {}),
    }


@contextlib.contextmanager
def _measured() -> Iterator[dict[str, float]]:
    """Wall and CPU seconds and, where the system tells (Linux), the peak memory of what runs inside."""
    _reset_peak()
    figures: dict[str, float] = {"started": time.time()}
    wall, cpu = time.perf_counter(), time.process_time()
    yield figures
    figures["duration_s"] = round(time.perf_counter() - wall, 6)
    figures["cpu_s"] = round(time.process_time() - cpu, 6)
    figures["peak_rss_bytes"] = _peak_rss_bytes()


def free_memory() -> None:
    """Give back what an action left behind: models hold on to themselves in circles, and malloc to what is freed.

    Only where more than 256 MB are held, since it takes 0.1 s.
    """
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT <= _HELD:
        return  # it never held as much, and this is the cheaper question
    with contextlib.suppress(OSError, AttributeError, IndexError, ValueError):  # Linux with glibc alone
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        if resident > _HELD:
            import ctypes  # rarely needed

            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)


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


def set_threads(threads: int) -> None:
    """Hold the numeric libraries of this process to `threads`; to be called before they are imported."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(threads)


def as_result(found: Mapping[str, Any]) -> dict[str, Any]:
    """An action result without the event name it travelled under."""
    return {name: value for name, value in found.items() if name != "event"}
