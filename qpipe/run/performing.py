"""An action as it runs: inputs out of the store, the stage's function called, its outputs into the store.

This is what a worker does, in whatever process. It publishes the sub-results of `ctx.memo` as it goes, so that a killed
action resumes; the action's own result goes back to the executor, which alone decides that it counts.
"""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qpipe.artifacts.artifact import Artifact, load, save, with_face
from qpipe.cache.store import Store
from qpipe.errors import DamagedError, QpipeError
from qpipe.language.catalog import catalog
from qpipe.param import LIBRARIES, absolute, coerce, of_its_type
from qpipe.plan.verdicts import Request, artifact_json
from qpipe.run.context import ActionContext, Emit, check_code
from qpipe.run.isolation import Isolation
from qpipe.run.machine import free_memory, measured, surroundings
from qpipe.stage import REQUIRED, Stage


def perform(
    request: Request, store: Store, emit: Emit, threads: int, isolation: Isolation | None = None
) -> dict[str, Any]:
    """Run the action; its result: `outputs`, `notes`, `parts`, `ingredients`, `provenance`; `parts` are the keys of its
    sub-results. Raises what the stage raises."""
    try:
        with (isolation or Isolation()).of(request["key"]):
            if request.get("libraries"):
                os.environ[LIBRARIES] = "\n".join(request["libraries"])
            return _perform(request, store, emit, threads)
    finally:
        free_memory()


def _perform(request: Request, store: Store, emit: Emit, threads: int) -> dict[str, Any]:
    stage = catalog()[request["stage"]]
    arguments = _arguments(stage, request, store)
    check_code(request, store)
    context = ActionContext(request, store, emit, threads)
    if stage.takes_context:
        arguments["ctx"] = context
    with context.apart(), measured() as figures:
        outputs = stage.unpack(stage.function(**arguments))
    check_code(request, store)
    also = context.found_on_the_way()
    return {
        "outputs": _saved(stage, outputs, store),
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


def _arguments(stage: Stage, request: Request, store: Store) -> dict[str, Any]:
    """What the stage's function is called with, but for its context: params as it declares them, and its inputs."""
    arguments = {
        name: absolute(coerce(value, stage.params[name].hint, f"stages.{request['node']}.{name}"))
        for name, value in request["written"].items()
    }
    for name, param in stage.params.items():
        if name not in arguments and param.default is not REQUIRED:
            arguments[name] = absolute(of_its_type(param.default, param.hint))
    for name, artifacts in request["inputs"].items():
        values, port = [load(Artifact(*fields), store) for fields in artifacts], stage.ports[name]
        if port.face:
            values = [with_face(value) for value in values]
        arguments[name] = values if port.many else values[0]
    return arguments


def _saved(stage: Stage, outputs: Mapping[str, Any], store: Store) -> dict[str, Any]:
    """The outputs in the store, as JSON. Raises TypeError where one is not of the kind that the stage declares."""
    saved = {name: artifact_json(save(value, store)) for name, value in outputs.items()}
    for name, kind in stage.outputs.items():
        if saved[name]["kind"] != kind:
            raise TypeError(
                f"stage '{stage.name}' says that its output '{name}' is a {kind}, and returned a {saved[name]['kind']}"
            )
    return saved


def failure(error: BaseException) -> dict[str, Any]:
    """An exception as JSON: the sentence for the person, the exit status, and the traceback for the record. A sentence
    of ours says what to do; of any other exception the second line says where it was raised."""
    ours = isinstance(error, QpipeError)
    lines = [line.rstrip() for line in str(error).strip().splitlines()]
    said = "\n".join(lines) if ours else (lines or [""])[0]  # ours may list many reasons, a line each
    place = "" if ours else _place(error)
    text = "".join(traceback.format_exception(error))
    return {
        "event": "failed",
        "kind": type(error).__name__,
        "message": said if ours else f"{type(error).__name__}: {said}{place}",
        "exit_code": getattr(error, "exit_code", 1),
        "traceback": text,
        **({"digest": error.digest} if isinstance(error, DamagedError) else {}),
    }


def _place(error: BaseException) -> str:
    """Where it was raised: the last frame of the person's own code, else the last of ours, else nothing."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith(_ours())]
    own = [frame for frame in frames if frame not in ours and not frame.filename.startswith(("<", *_installed()))]
    if not (own or ours):
        return ""
    frame = (own or ours)[-1]
    file = Path(frame.filename)
    shown = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
    return f"\nat {shown}:{frame.lineno}, in {frame.name}: {frame.line or ''}".rstrip(": ")


@functools.cache
def _ours() -> tuple[str, ...]:
    """Where qpipe and its stages lie."""
    found = (sys.modules[name].__file__ for name in ("qpipe", "qpipe.stages") if name in sys.modules)
    return tuple(os.path.join(os.path.dirname(file), "") for file in found if file)


@functools.cache
def _installed() -> tuple[str, ...]:
    """Where the libraries and Python's own modules lie."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    return tuple({os.path.join(sysconfig.get_path(name), "") for name in names})


def as_result(found: Mapping[str, Any]) -> dict[str, Any]:
    """An action result without the event name it travelled under."""
    return {name: value for name, value in found.items() if name != "event"}
