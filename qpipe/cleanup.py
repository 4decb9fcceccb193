"""What may go from a store: results that are too old or unreadable, and the blobs that no result needs.

Safe beside running processes. A blob that was written, or asked to be written, within the grace period stays:
its result may not be published yet. Whoever loses a blob to a cleanup all the same finds it missing, and
computes it again.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from qpipe.store import Store

GRACE_S = 3600.0
"""Longer than it takes from the first blob of an output to the publication of its result."""


@dataclass(frozen=True)
class Removed:
    """What a cleanup removed: how many results and blobs, and the bytes of these blobs."""

    results: int
    blobs: int
    size_bytes: int


def collect(store: Store, older_than_s: float | None = None, grace_s: float = GRACE_S) -> Removed:
    """Remove from `store` what nothing refers to; with `older_than_s`, results published before that, too.

    CacheError where the store is read-only or the disk refuses.
    """
    results, needed = _sort_results(store, older_than_s)
    blobs = size_bytes = 0
    for digest, size in list(store.blobs()):
        if digest not in needed and store.discard(digest, grace_s):
            blobs, size_bytes = blobs + 1, size_bytes + size
    shutil.rmtree(store.root / "damaged", ignore_errors=True)
    return Removed(results, blobs, size_bytes)


def _sort_results(store: Store, older_than_s: float | None) -> tuple[int, set[str]]:
    """Forget what is unreadable, incomplete or too old; how many, and the blobs that the others need."""
    needed: set[str] = set()
    forgotten = 0
    for key in list(store.keys()):
        result = store.result(key)
        too_old = older_than_s is not None and store.age_s(key) > older_than_s
        if result is None or too_old or store.complete(result):
            store.forget(key)
            forgotten += 1
        else:
            needed.update(result["blobs"])
    return forgotten, needed
