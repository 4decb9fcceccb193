"""What may go from a store: results that are unreadable, too old or beyond its size; and blobs that no result needs.

Safe beside running processes: what one of them found, put or published stays until it ends (qpipe.cache.usage says
how), and so does what is pinned. Results go in the order of their last use, a hit or a publication; a blob goes with
the last result that needs it. Results go before their blobs: a cleanup that is killed leaves no result without them.

Where the file system has no locks, nobody can say who lives: blobs that were put within the last hour then stay.
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from qpipe.cache import disk
from qpipe.cache.pins import pinned
from qpipe.cache.store import Store
from qpipe.cache.usage import InUse, alone
from qpipe.errors import CacheError

GRACE_S = 3600.0
"""Without locks: longer than it takes from the first blob of an output to the publication of its result."""


@dataclass(frozen=True)
class Removed:
    """What a cleanup removed: how many results and blobs, and the bytes of these blobs; and the bytes that are left."""

    results: int = 0
    blobs: int = 0
    size_bytes: int = 0
    left_bytes: int = 0


@dataclass(frozen=True)
class Entry:
    """A result as a cleanup sees it: when it was used last (seconds since 1970), the size of its own file, the blobs it
    needs (digest -> bytes), its stage, and whether it is a sub-result."""

    used: float
    size_bytes: int
    blobs: Mapping[str, int]
    stage: str = "?"
    is_part: bool = False
    seconds: float = 0.0
    kinds: tuple[str, ...] = ()
    roots: tuple[tuple[str, str], ...] = ()
    identity: tuple[int, int, int] = (0, 0, 0)


def read_results(
    store: Store, known: Mapping[str, Entry] | None = None
) -> tuple[dict[str, Entry], list[str]]:
    """Every readable result, and the keys of what cannot be read; of `known` only what changed is read again."""
    found: dict[str, Entry] = {}
    unreadable: list[str] = []
    for key, status in store.results():
        identity = (status.st_ino, status.st_size, status.st_mtime_ns)  # a hit sets the time: it is read again then
        before = (known or {}).get(key)
        if before is not None and before.identity == identity:
            found[key] = before
        elif (result := store.peek(key)) is not None:
            found[key] = _entry(result, status.st_mtime, status.st_size, identity)
        else:
            unreadable.append(key)
    return found, unreadable


def _entry(result: Mapping[str, Any], used: float, size: int, identity: tuple[int, int, int]) -> Entry:
    ingredients, provenance = result.get("ingredients", {}), result.get("provenance", {})
    outputs = result["outputs"].values()
    return Entry(
        used,
        size,
        {sys.intern(digest): size for digest, size in result["blobs"].items()},  # shared by many results
        str(ingredients.get("stage", "?")),
        "memo" in ingredients,
        float(provenance.get("duration_s", 0.0)),
        tuple(output["kind"] for output in outputs),
        tuple((output["kind"], output["digest"]) for output in outputs),
        identity,
    )


def collect(
    store: Store,
    older_than_s: float | None = None,
    grace_s: float | None = None,
    *,
    max_bytes: int | None = None,
    drop: Collection[str] = (),
) -> Removed:
    """Remove from `store` what nothing refers to; the results under `drop`; those used last before `older_than_s`; and
    those used longest ago until what is left takes at most `max_bytes`. What a live process relies on, and what is
    pinned, stays in any case.

    `grace_s` spares blobs put within that time; None: as the file system demands. CacheError where the store is
    read-only or the disk refuses.
    """
    if store.readonly:
        raise CacheError(f"the cache {store.root} was opened read-only. Name another with cache.dir.")
    if not disk.is_folder(store.root.resolve()):
        return Removed()
    results, _ = read_results(store)  # the long part, while others go on
    have = dict(store.blobs())
    lacking = [key for key, entry in results.items() if not _is_here(entry, have)]
    # Blobs that a remote promises are not lost. It may answer slowly, so it is asked before everybody has to wait.
    lost = {key for key in lacking if store.complete({"blobs": results[key].blobs})}
    with alone(store.root) as in_use:
        return _collect(store, results, lost, in_use, older_than_s, grace_s, max_bytes, drop)


def _collect(
    store: Store,
    known: Mapping[str, Entry],
    lost: Collection[str],
    in_use: InUse,
    older_than_s: float | None,
    grace_s: float | None,
    max_bytes: int | None,
    drop: Collection[str],
) -> Removed:
    results, going = read_results(store, known)  # again, since others went on
    have = dict(store.blobs())
    kept = in_use.keys | pinned(store)
    # What lacks a blob is a miss, whoever relies on it.
    going += [key for key, entry in results.items() if key in lost and not _is_here(entry, have)]
    going += [key for key in drop if key in results and key not in kept]
    if older_than_s is not None:
        going += [key for key in results if key not in kept and store.age_s(key) > older_than_s]
    standing = {key: entry for key, entry in results.items() if key not in set(going)}
    if max_bytes is not None:
        movable = {key: entry for key, entry in standing.items() if key not in kept}
        for key in _least_recently_used(standing, movable, have, in_use.blobs, max_bytes):
            going.append(key)
            del standing[key]
    for key in dict.fromkeys(going):
        store.forget(key)
    needed = in_use.blobs.union(*(entry.blobs for entry in standing.values()))
    if grace_s is None:
        grace_s = 0.0 if in_use.certain else GRACE_S
    gone = [digest for digest in have if digest not in needed and store.discard(digest, grace_s)]
    freed = sum(have[digest] for digest in gone)
    _sweep_up(store)
    left = sum(have.values()) - freed + sum(entry.size_bytes for entry in standing.values())
    return Removed(len(dict.fromkeys(going)), len(gone), freed, left)


def _is_here(entry: Entry, have: Mapping[str, int]) -> bool:
    return all(have.get(digest) == size for digest, size in entry.blobs.items())


def _least_recently_used(
    standing: Mapping[str, Entry],
    movable: Mapping[str, Entry],
    have: Mapping[str, int],
    in_use: Collection[str],
    max_bytes: int,
) -> list[str]:
    """The keys that have to go, longest unused first, until blobs and results together take at most `max_bytes`."""
    needs = Counter(digest for entry in standing.values() for digest in entry.blobs)
    total = sum(have.get(digest, 0) for digest in needs.keys() | set(in_use))
    total += sum(entry.size_bytes for entry in standing.values())
    going = []
    for key, entry in sorted(movable.items(), key=lambda item: (item[1].used, item[0])):
        if total <= max_bytes:
            break
        going.append(key)
        total -= entry.size_bytes
        for digest in entry.blobs:
            needs[digest] -= 1
            if not needs[digest] and digest not in in_use:
                total -= have.get(digest, 0)
    return going


def _sweep_up(store: Store) -> None:
    if disk.is_folder(store.root / "tmp"):
        disk.remove_stale(store.root / "tmp")
    damaged = store.root / "damaged"
    if disk.is_folder(damaged):  # asked first: rmtree would wait for a pipe
        shutil.rmtree(damaged, ignore_errors=True)
    else:
        damaged.unlink(missing_ok=True)
