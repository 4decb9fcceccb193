"""What ships, measured: each exported file against the float model that it was made of, in a process of its own
(`qpipe.deployed.measurement`).

In no key: it happens when all is made, and says how fast this machine is. What was measured is remembered in the index,
by what was measured and on what machine, so that a run of hits neither measures nor loads anything for it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from qpipe.artifacts.artifact import Artifact
from qpipe.cache.store import Store
from qpipe.keys.hashing import digest
from qpipe.language.spec import RunSpec
from qpipe.param import LIBRARIES
from qpipe.plan.verdicts import Outcome
from qpipe.plan.walk import Walk
from qpipe.run.executor import View
from qpipe.run.machine import cores, processor
from qpipe.run.workers import cause

FORMAT = 1
"""Goes up with whatever changes what the figures mean: what was measured before does not count then."""
_MEASURED = "measured"

Figures = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is measured: the files of an export, the float model behind them, samples where there are any; and the
    version of onnxruntime that the export had."""

    node: str
    exported: Artifact
    float_model: Artifact
    data: Artifact | None
    onnxruntime: str


def deployments(walk: Walk, store: Store, options: RunSpec, view: View) -> dict[str, Figures]:
    """By the node that exported, what `qpipe.deployed.measurement.measure` found, the ratios to float (`latency`,
    `size`, `memory`) and on what machine; `error` alone where it could not be measured. Sizes alone where `run.measure`
    is off and the goal asks for one. `run.expect=cached` measures nothing that was not measured before."""
    goal = walk.graph.spec.goal
    if not (options.measure or goal.max_size is not None or goal.max_size_bytes is not None):
        return {}
    found = {one.node: _figures(one, walk, store, options, view) for one in _subjects(walk)}
    return {node: figures for node, figures in found.items() if figures is not None}


def _subjects(walk: Walk) -> Iterator[Subject]:
    for name in walk.graph.exporters:
        outcome, model = walk.outcomes.get(name), walk.graph.inputs[name].get("model")
        if outcome is None or not outcome.good or not model:
            continue
        source = walk.origin(model[0])
        (files,) = outcome.outputs.values()
        version = (outcome.ingredients or {}).get("libraries", {}).get("onnxruntime", "")
        yield Subject(name, files, walk.outcomes[source.node].outputs[source.output], _samples(walk), version)


def _samples(walk: Walk) -> Artifact | None:
    """Those that the goal's score is taken on, else any that were loaded."""
    goal, found = walk.graph.spec.goal, list[Outcome]()
    for ref in (goal.deployed, goal.scores):
        if (source := walk.graph.resolved_refs.get(str(ref))) is not None:
            inputs = walk.graph.inputs[walk.maker(source).node].values()
            found += [walk.outcomes[each.node] for sources in inputs for each in sources if each.node in walk.outcomes]
    outputs = (each for outcome in (*found, *walk.outcomes.values()) for each in outcome.outputs.values())
    return next((each for each in outputs if each.kind == "Samples"), None)


def _figures(one: Subject, walk: Walk, store: Store, options: RunSpec, view: View) -> Figures | None:
    """What is remembered of it, else what is measured now, and remembered then; what fails is not."""
    machine = {"processor": processor(), "cores": cores(), "onnxruntime": one.onnxruntime, "threads": options.threads}
    subject = [each.digest for each in (one.exported, one.float_model, one.data) if each]
    key = digest(_MEASURED, FORMAT, subject, machine, options.measure)
    known = store.index.get(_MEASURED, key)
    if isinstance(known, dict) or options.expect == "cached":
        return known
    label, started = f"{walk.label}measure {one.node}", time.perf_counter()
    view.started(label, "measure")
    said = _ask(_request(one, store, options), walk.libraries, label, view)
    if "error" in said:
        view.finished(label, "skipped", 0.0, [])
        view.message(f"{walk.label}{one.node} is not measured: {said['error']}")
        return said
    view.finished(label, "ran", time.perf_counter() - started, [])
    figures = with_ratios(said["found"]) | machine | {"real_samples": one.data is not None}
    store.index.set(_MEASURED, key, figures)
    return figures


def with_ratios(found: Figures) -> Figures:
    """The figures with those that have one of float beside them, divided by it."""
    pairs = {"latency": "latency_s", "size": "size_bytes", "memory": "peak_bytes"}
    known = {ratio: name for ratio, name in pairs.items() if found.get(f"float_{name}")}
    return found | {ratio: found[name] / found[f"float_{name}"] for ratio, name in known.items()}


def _request(one: Subject, store: Store, options: RunSpec) -> dict[str, Any]:
    """As `qpipe.deployed.measurement` takes it."""
    artifacts = {"exported": one.exported, "float": one.float_model, "data": one.data}
    return {
        **{name: each and [each.kind, each.digest, each.size_bytes] for name, each in artifacts.items()},
        "store": store.address(),
        "threads": options.threads,
        "timed": options.measure,
    }


def _ask(request: dict[str, Any], libraries: Sequence[str], label: str, view: View) -> dict[str, Any]:
    """The last line that the process says, `found` or `error`; its progress goes to `view`."""
    command = [sys.executable, "-m", "qpipe.deployed.measurement"]
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=os.environ | {LIBRARIES: "\n".join(libraries)}, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return {"error": f"no process can be started: {error.strerror or error}"}
    assert process.stdin is not None
    assert process.stdout is not None
    said: dict[str, Any] = {}
    try:
        with suppress(BrokenPipeError):  # it died at once; its status says how
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.close()
        for line in process.stdout:
            with suppress(ValueError):  # a library of custom operators may print, too
                said = json.loads(line)
                if "progress" in said:
                    view.progress(label, *said["progress"])
        status = process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has begun
            process.wait()
        process.stdout.close()
    return said if "found" in said or "error" in said else {"error": f"its process {cause(status)}"}
