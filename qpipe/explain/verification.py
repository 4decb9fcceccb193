"""Compute again what the cache holds, and hold it against that, bit for bit.

Every node is computed in a process of its own, on the recorded number of threads and device, from the cached inputs.
What it makes goes to a room beside the cache that holds those inputs and nothing else: no sub-result of `ctx.memo` is
found there, so all are made anew, and nothing of the cache is ever overwritten.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qpipe.artifacts.artifact import Artifact, load, references
from qpipe.cache.store import Store
from qpipe.errors import QpipeError
from qpipe.explain.artifacts import first_difference
from qpipe.language.catalog import catalog
from qpipe.language.spec import NodeSpec, RunSpec
from qpipe.plan.verdicts import Action, request
from qpipe.plan.walk import Walk
from qpipe.run.executor import open_pool
from qpipe.run.machine import surroundings
from qpipe.run.workers import Pool

_PREFIX = "verify-"
_WAIT_S = 1.0


@dataclasses.dataclass(frozen=True)
class Repeat:
    """One computation: its seconds, what differs by output ({} where all is the same), and why it failed if it did."""

    duration_s: float | None
    digests: Mapping[str, str]
    differing: Mapping[str, str]
    error: str = ""

    @property
    def same(self) -> bool:
        return not self.differing and not self.error


@dataclasses.dataclass(frozen=True)
class Verified:
    """A node, its computations, and what is not here as it was when the cached result was made."""

    node: str
    stage: str
    outputs: tuple[str, ...]
    repeats: tuple[Repeat, ...]
    elsewhere: tuple[str, ...]

    @property
    def same(self) -> bool:
        return all(repeat.same for repeat in self.repeats)

    @property
    def agree(self) -> bool:
        """Whether the repeats made the same as one another."""
        made = [repeat.digests for repeat in self.repeats]
        return all(repeat.error == "" for repeat in self.repeats) and all(one == made[0] for one in made)


@dataclasses.dataclass(frozen=True)
class Cached:
    """A node whose result is in the cache, and all that it takes to compute it again."""

    label: str
    action: Action
    result: Mapping[str, Any]


def cached_nodes(walk: Walk, store: Store) -> tuple[list[Cached], list[str]]:
    """The nodes of a plan whose results are there, and the names of those that would have to run."""
    _settle_sources(walk, store)
    found, missing = [], []
    for name, outcome in walk.verdicts().items():
        node = walk.graph.node(name)
        if not isinstance(node, NodeSpec):
            continue
        if outcome.state == "hit" and outcome.key is not None and outcome.result is not None:
            action = Action(
                node=name,
                stage=node.stage.name,
                key=outcome.key,
                ingredients=outcome.result["ingredients"],
                written=node.written,
                inputs=walk.inputs(name),
                reasons=(),
                libraries=walk.libraries,
            )
            found.append(Cached(walk.label + name, action, outcome.result))
        elif outcome.state != "not_needed":
            missing.append(walk.label + name)
    return found, missing


def verify(
    nodes: Sequence[Cached], store: Store, repeat: int, workers: int, tell: Callable[[Verified], None]
) -> list[Verified]:
    """Compute every node `repeat` times, `workers` computations at once; `tell` hears of each node when it is done."""
    remove_rooms(store.root / "tmp")

    def check(node: Cached) -> Verified:
        repeats = tuple(_compute(node, store) for _ in range(repeat))
        verified = Verified(
            node.label, node.action.stage, tuple(node.result["outputs"]), repeats, elsewhere(node.result)
        )
        tell(verified)
        return verified

    with ThreadPoolExecutor(max(1, workers)) as threads:
        return list(threads.map(check, nodes))


def elsewhere(result: Mapping[str, Any]) -> tuple[str, ...]:
    """What of the surroundings of a result is different here; what it does not say is passed over."""
    here, there = surroundings(tuple(result["ingredients"]["libraries"])), result["provenance"]
    return tuple(
        f"{name.replace('_', ' ')}: {_plain(there[name])} then, {_plain(value)} here"
        for name, value in here.items()
        if name in there and there[name] != value
    )


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {found}" for name, found in value.items()) or "none for a device"
    return str(value)


def _settle_sources(walk: Walk, store: Store) -> None:
    """Let sources that always run pass for what they brought back last."""
    settled = True
    while settled:
        settled = False
        for name, action in list(walk.running.items()):
            always = catalog()[action.stage].always
            result = store.result(action.key) if always else None
            if result is not None and not store.complete(result):
                walk.finish(name, result, "hit")
                settled = True
        walk.advance()


def _compute(node: Cached, store: Store) -> Repeat:
    provenance = node.result["provenance"]
    options = RunSpec(workers=1, threads=int(provenance.get("threads", 1)))
    with _room(store.root / "tmp") as folder:
        room = Store(folder / "cache")
        try:
            for artifacts in node.action.inputs.values():
                for artifact in artifacts:
                    _lend(artifact, store, room)
        except QpipeError as error:
            return Repeat(None, {}, {}, str(error))
        pool = open_pool(room, options, folder / "log")
        try:
            pool.submit(request(node.action, str(provenance.get("device", "cpu"))))
            event = _ending(pool)
        finally:
            pool.close()
        if event["event"] == "failed":
            return Repeat(None, {}, {}, event["message"])
        return _judge(node.result["outputs"], event, store, room)


def _ending(pool: Pool) -> Mapping[str, Any]:
    """The event with which the only action of `pool` ends."""
    while True:
        for _, event in pool.events(_WAIT_S):
            if event["event"] in ("done", "failed"):
                return event


def _judge(cached: Mapping[str, Any], event: Mapping[str, Any], store: Store, room: Store) -> Repeat:
    made = {port: output["digest"] for port, output in event["outputs"].items()}
    differing = {}
    for port, output in cached.items():
        if made.get(port) != output["digest"]:
            try:
                before, now = load(Artifact(**output), store), load(Artifact(**event["outputs"][port]), room)
                differing[port] = first_difference(before, now)
            except QpipeError as error:
                differing[port] = f"it differs, and the cached one cannot be read: {error}"
    return Repeat(event["provenance"]["duration_s"], made, differing)


def _lend(artifact: Artifact, store: Store, room: Store) -> None:
    """Put an artifact of `store` into `room`: by a second name for each of its files, or by a copy."""
    root = store.open(artifact.digest)
    for digest in (artifact.digest, *references(root)):
        if room.has(digest):
            continue
        content = store.open(digest)  # verified, and fetched where it is kept elsewhere
        target = room.path(digest)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(store.path(digest), target)
        except OSError:  # another file system, or one without links
            room.put(content)


@contextlib.contextmanager
def _room(place: Path) -> Iterator[Path]:
    """A folder on the file system of the cache where that can be written, locked by its owner while it is used."""
    folder = place / f"{_PREFIX}{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    owner = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    finally:
        os.close(owner)
        shutil.rmtree(folder, ignore_errors=True)


def remove_rooms(place: Path) -> None:
    """Remove what killed processes left: rooms that nobody has locked."""
    for folder in place.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            owner = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(owner)
