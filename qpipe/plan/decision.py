"""Whether a node is a hit, or has to run and why: the one place that both a dry run and a real one ask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qpipe.artifacts.artifact import Artifact
from qpipe.cache.store import Store
from qpipe.keys.changes import differences
from qpipe.keys.hashing import digest
from qpipe.language.spec import NodeSpec
from qpipe.param import listed
from qpipe.plan.history import expected, previous_key, ran_before
from qpipe.plan.keyring import Keyring
from qpipe.plan.verdicts import Action, Outcome, hit
from qpipe.stage import Stage


def decide(
    node: NodeSpec, inputs: Mapping[str, tuple[Artifact, ...]], keyring: Keyring, store: Store
) -> Outcome | Action:
    """A hit as its Outcome, or the Action that has to run, with the reasons why."""
    ingredients = keyring.ingredients(node, inputs)
    key = digest("action", ingredients)
    result = None if node.stage.always else store.result(key)
    missing: list[str] = []
    stale: list[str] = []
    strange = result is not None and not fits(result, node.stage)
    if result is not None and not strange:
        missing, stale = store.complete(result), keyring.stale(result)
        if not missing and not stale:
            return hit(key, result, ingredients=ingredients)
    if node.stage.always:
        reasons: tuple[str, ...] = ("reads the outside world every time",)
    elif strange:
        reasons = ("what the cache holds under its key was made by no such stage",)
    elif stale:
        reasons = (f"code changed: module {listed(stale)}, which it loaded by a name made as it ran",)
    elif missing:
        reasons = (f"cached result lost {len(missing)} of its blobs",)
    else:
        before = ran_before(store, node.stage.name, node.name)
        reasons = () if key in before else _reasons_to_run(node, ingredients, keyring, store, bool(before))
    sizes = {port: sum(artifact.size_bytes for artifact in found) for port, found in inputs.items()}
    before_this = expected(store, node.stage.name, node.name, sizes, keyring.folder)
    return Action(
        node.name,
        node.stage.name,
        key,
        ingredients,
        node.written,
        inputs,
        reasons or ("result evicted",),
        node.stage.always or bool(stale),
        None if before_this is None else before_this.seconds,
        keyring.stamps(node),
        resources=node.resources,
        expected_bytes=None if before_this is None else before_this.peak_bytes,
    )


def fits(result: Mapping[str, Any], stage: Stage) -> bool:
    """Whether a result has the outputs of `stage`: whoever can write to the cache may have made it up."""
    return {name: output["kind"] for name, output in result["outputs"].items()} == dict(stage.outputs)


def _reasons_to_run(
    node: NodeSpec, ingredients: Mapping[str, Any], keyring: Keyring, store: Store, ran: bool
) -> tuple[str, ...]:
    """What differs from the nearest earlier result. `ran` tells of earlier ones, which may be gone."""
    key = previous_key(store, node.stage.name, node.name, ingredients, keyring.folder)
    previous = None if key is None else store.result(key)
    if previous is None:
        return ("its last result was of another key, and is gone from the cache" if ran else "never run",)
    kept = previous["provenance"].get("listings", {})
    return tuple(differences(previous["ingredients"], ingredients, kept, keyring.listings(ingredients)))
