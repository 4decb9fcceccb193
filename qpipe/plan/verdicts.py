"""What a plan says of a node: how it ended, or what has to run, also as it travels to a worker."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from qpipe.artifacts.artifact import Artifact
from qpipe.language.graph import Source
from qpipe.plan.choice import Contest
from qpipe.stage import Resources

OF_STAGE = ("format", "version", "function", "code", "libraries")
"""The ingredients of a key that all nodes of a stage have in common; params and ports are the node's own."""

State = Literal["hit", "ran", "failed", "skipped", "not_needed", "run", "wait"]


@dataclasses.dataclass(frozen=True)
class Action:
    """What has to run: the node that asks, its key and what the key was made of, and the artifacts on its ports."""

    node: str
    stage: str
    key: str
    ingredients: Mapping[str, Any]
    written: Mapping[str, Any]
    inputs: Mapping[str, tuple[Artifact, ...]]
    reasons: tuple[str, ...]
    always: bool = False
    """What stands under the key does not count, and is replaced."""
    expected_s: float | None = None
    stamps: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """For each param that holds paths, `Keyring.stamp` of what lies there, taken after it was read for the key."""
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the result is to keep for `qpipe why`: the node, what made its inputs, and `Keyring.listings`."""
    resources: Resources = dataclasses.field(default_factory=Resources)
    expected_bytes: float | None = None
    """The most memory that it will take, by what ran before."""
    libraries: tuple[str, ...] = ()
    """Where the libraries lie that the graph names: an artifact may say that it needs one, never where that is."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a node ended. `result` is the action result behind it, `chosen` the model and the scores that a first_within
    settled on, `contest` how it came to that."""

    state: State
    outputs: Mapping[str, Artifact] = dataclasses.field(default_factory=dict)
    key: str | None = None
    reasons: tuple[str, ...] = ()
    result: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None
    ingredients: Mapping[str, Any] | None = None
    chosen: tuple[Source, Source] | None = None
    contest: Contest | None = None

    @property
    def good(self) -> bool:
        return self.state in ("hit", "ran")


def hit(
    key: str,
    result: Mapping[str, Any],
    state: State = "hit",
    reasons: tuple[str, ...] = (),
    ingredients: Mapping[str, Any] | None = None,
) -> Outcome:
    """The Outcome of a node whose action result is at hand."""
    outputs = {name: Artifact(**fields) for name, fields in result["outputs"].items()}
    return Outcome(state, outputs, key, reasons, result, ingredients=ingredients)


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
        "libraries": list(action.libraries),
        "provenance": dict(action.provenance),
    }


def artifact_json(artifact: Artifact) -> dict[str, Any]:
    """An Artifact as it stands in an action result."""
    return {"kind": artifact.kind, "digest": artifact.digest, "size_bytes": artifact.size_bytes}
