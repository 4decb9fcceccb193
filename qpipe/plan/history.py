"""What ran before: the last results of a node, the one that a new one is held against, and how long it will take.

Kept in the index, since it only explains and estimates. A cache that was imported or lost its index tells it again
from its results (`rebuild`). One cache serves many projects, whose nodes have the same names: what ran in the same
working directory counts before the rest, and of several results the one that differs least.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from qpipe.cache.store import Store
from qpipe.keys.changes import changes
from qpipe.keys.hashing import is_digest

_HISTORY = "results"
_BUILT = "built"
_KEPT = 8
"""So many results of a node are remembered."""
_LOOKED_AT = 4
"""So many of them are read to find the one that differs least."""
_LARGEST_RATIO = 100.0
"""Beyond it, sizes say nothing about time."""

Sizes = Mapping[str, int]
"""Bytes on each port."""


class Entry(NamedTuple):
    """A result: its key, the working directory that it ran in (None where nobody knows), its seconds, the bytes on its
    ports, and the most memory that its process took, 0 where nobody knows."""

    key: str
    folder: str | None
    duration_s: float
    sizes: Sizes
    peak_bytes: int = 0


class Expected(NamedTuple):
    """What an action will take: seconds, and at most so many bytes of memory, None where nobody knows."""

    seconds: float
    peak_bytes: float | None


def remember(store: Store, key: str, result: Mapping[str, Any], folder: str | None = None) -> None:
    """`result`, under `key`, is the last of its node, and of its stage; it ran in `folder`."""
    stage, provenance = result["ingredients"]["stage"], result["provenance"]
    sizes = provenance.get("sizes")
    peak = int(provenance.get("peak_rss_bytes") or 0)
    entry = Entry(key, folder, provenance["duration_s"], sizes if isinstance(sizes, Mapping) else {}, peak)
    names = [stage] if provenance.get("node") is None else [stage, f"{stage}/{provenance['node']}"]
    for name in names:
        older = [each for each in _entries(store, name) if (each.key, each.folder) != (key, folder)]
        store.index.set(_HISTORY, name, [list(each) for each in (entry, *older)][:_KEPT])


def previous_key(
    store: Store, stage: str, node: str, ingredients: Mapping[str, Any] | None, folder: str
) -> str | None:
    """The key of the result that `node`, a use of `stage`, is held against: of those that are there and ran in
    `folder`, else anywhere, the one whose ingredients differ least from these, the last of equals. None where no
    result is there."""
    entries = _entries(store, f"{stage}/{node}")
    own = [entry for entry in entries if entry.folder == folder]
    best: tuple[int, str] | None = None
    for group in (own, [entry for entry in entries if entry.folder != folder]):
        for entry in group[:_LOOKED_AT]:
            result = store.result(entry.key)
            if result is None or "stage" not in result["ingredients"]:
                continue
            apart = len(changes(result["ingredients"], ingredients)) if ingredients and len(group) > 1 else 0
            if best is None or apart < best[0]:
                best = (apart, entry.key)
        if best is not None:
            break
    return None if best is None else best[1]


def ran_before(store: Store, stage: str, node: str) -> set[str]:
    """The keys of the last results of `node`, whether or not they are still there."""
    return {entry.key for entry in _entries(store, f"{stage}/{node}")}


def expected_s(store: Store, stage: str, node: str, sizes: Sizes, folder: str) -> float | None:
    """Seconds that `node` will take with `sizes` on its ports, by what it took before in `folder`, else anywhere, else
    by what nodes of its stage took: of the result whose sizes are nearest, times the ratio of the sizes where both are
    known. None if none ever ran.

    They outlive the result itself: what a cleanup removed is what will run again.
    """
    found = expected(store, stage, node, sizes, folder)
    return None if found is None else found.seconds


def expected(store: Store, stage: str, node: str, sizes: Sizes, folder: str) -> Expected | None:
    """As `expected_s`, with the memory by the same result: of a larger one before as it was, since what is not the
    node's own (Python, libraries) does not shrink."""
    for name in (f"{stage}/{node}", stage):
        entries = _entries(store, name)
        if not entries:
            continue
        ranked = sorted(entries, key=lambda entry: (entry.folder != folder, abs(math.log(_ratio(sizes, entry.sizes)))))
        nearest = ranked[0]
        ratio = min(_LARGEST_RATIO, max(1 / _LARGEST_RATIO, _ratio(sizes, nearest.sizes)))
        return Expected(nearest.duration_s * ratio, nearest.peak_bytes * max(1.0, ratio) or None)
    return None


def _ratio(sizes: Sizes, before: Sizes) -> float:
    """How many times as much there is to do: a stage goes through its model for each of its samples."""
    both = [name for name in sizes if sizes[name] > 0 and before.get(name, 0) > 0]
    return math.prod(sizes[name] / before[name] for name in both)


def _entries(store: Store, name: str) -> list[Entry]:
    found = store.index.get(_HISTORY, name)
    return list(_read(found)) if isinstance(found, list) else []


def _read(rows: list[Any]) -> Iterator[Entry]:
    """What `remember` wrote; a row of anything else is passed over."""
    for row in rows:
        if not isinstance(row, list) or len(row) not in (len(Entry._fields) - 1, len(Entry._fields)):
            continue  # the first versions knew nothing of memory
        key, folder, duration_s, sizes, peak = row if len(row) == len(Entry._fields) else (*row, 0)
        whole = isinstance(duration_s, int | float) and duration_s >= 0 and isinstance(sizes, dict)
        if is_digest(key) and whole and all(type(size) is int for size in sizes.values()):
            known = peak if type(peak) is int and peak > 0 else 0
            yield Entry(key, folder if isinstance(folder, str) else None, float(duration_s), sizes, known)


def rebuild(store: Store, again: bool = False) -> None:
    """Fill an index that has no history from the results that are there, the last of each node standing first.

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
        stage, node = result["ingredients"]["stage"], result["provenance"].get("node")
        if key not in ran_before(store, stage, str(node)):  # else it is known where it ran
            remember(store, key, result)
    if not store.readonly:
        store.index.set(_HISTORY, _BUILT, True)
