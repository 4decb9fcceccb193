"""What ran before: the last result of a node, and how long a node or a stage took.

Kept in the index, since it only explains and estimates. A cache that was imported or lost its index tells it again
from its results (`rebuild`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qpipe.cache.store import Store
from qpipe.keys.hashing import is_digest

_HISTORY = "history"
_DURATION = "duration"
_BUILT = "built"


def remember(store: Store, key: str, result: Mapping[str, Any]) -> None:
    """`result`, under `key`, is the last of its node."""
    stage, node = result["ingredients"]["stage"], result["provenance"].get("node")
    duration_s = result["provenance"]["duration_s"]
    store.index.set(_DURATION, stage, duration_s)
    if node is not None:
        store.index.set(_HISTORY, f"{stage}/{node}", key)
        store.index.set(_DURATION, f"{stage}/{node}", duration_s)


def previous_result(store: Store, stage: str, node: str) -> dict[str, Any] | None:
    """The action result that `node`, a use of `stage`, had last; None where there is none any more."""
    key = previous_key(store, stage, node)
    return None if key is None else store.result(key)


def previous_key(store: Store, stage: str, node: str) -> str | None:
    """The key of that result, whether or not it is still there."""
    key = store.index.get(_HISTORY, f"{stage}/{node}")
    return key if is_digest(key) else None


def expected_s(store: Store, stage: str, node: str) -> float | None:
    """Seconds that `node` took when it ran last, else those of the last node of the same stage; None if none ever ran.

    They outlive the result itself: what a cleanup removed is what will run again.
    """
    for name in (f"{stage}/{node}", stage):
        found = store.index.get(_DURATION, name)
        if isinstance(found, int | float) and found >= 0:
            return float(found)
    return None


def rebuild(store: Store, again: bool = False) -> None:
    """Fill an index that has no history from the results that are there, the last of each node standing.

    Reads every result once; after that only `again` reads them anew, for results that came from elsewhere.
    """
    if store.index.get(_HISTORY, _BUILT) and not again:
        return
    found: list[tuple[float, str, dict[str, Any]]] = []
    for key in list(store.keys()):
        result = store.result(key)
        if result is not None and "stage" in result["ingredients"] and "memo" not in result["ingredients"]:
            found.append((result["provenance"].get("started", 0.0), key, result))
    for _, key, result in sorted(found, key=lambda item: item[:2]):
        remember(store, key, result)
    if not store.readonly:
        store.index.set(_HISTORY, _BUILT, True)
