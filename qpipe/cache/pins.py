"""Pins: results that no cleanup takes, with all their blobs, until they are unpinned.

A file per pin, pins/<name>.json, {"label": what the person named, "keys": [...]}; its name is the digest of the keys,
so that whoever names the same results again finds the same pin.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from qpipe.artifacts.kinds import canonical_json
from qpipe.cache import disk
from qpipe.cache.store import Store
from qpipe.cache.usage import alone
from qpipe.errors import CacheError
from qpipe.keys.hashing import digest, is_digest

_LOG = logging.getLogger(__name__)
_LIMIT = 64 << 20  # bytes


def pin(store: Store, keys: Collection[str], label: str) -> None:
    """Keep the results under `keys` from every cleanup. CacheError where one of them is not (or no longer) there."""
    with alone(store.root):
        for key in sorted(keys):
            result = store.peek(key)
            if result is None or store.complete(result):
                raise CacheError(f"{label}: the result {key[:16]} is not in the cache any more. Run it again first.")
        content = canonical_json({"label": label, "keys": sorted(set(keys))})
        store.write(str(_path(store, keys)), memoryview(content), disk.move)


def unpin(store: Store, keys: Collection[str]) -> bool:
    """Take the pin of exactly these results away; whether there was one."""
    try:
        _path(store, keys).unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise CacheError(f"the pins in {store.root} cannot be changed ({error.strerror or error}).") from error
    return True


def pins(store: Store) -> Iterator[tuple[str, frozenset[str]]]:
    """Every pin: its label and its keys. What `pin` did not write is passed over; logged."""
    folder = store.root / "pins"
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name) if disk.is_folder(folder) else ():
        try:
            found = json.loads(disk.read_small(entry.path, _LIMIT))
            label, keys = found["label"], frozenset(found["keys"])
            if type(label) is not str or not all(is_digest(key) for key in keys):
                raise ValueError("it does not name results")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            _LOG.warning("the pin %s is passed over: %s", entry.path, error)
            continue
        yield label, keys


def pinned(store: Store) -> frozenset[str]:
    """The keys of all pins."""
    return frozenset(key for _, keys in pins(store) for key in keys)


def _path(store: Store, keys: Collection[str]) -> Path:
    return store.root / "pins" / f"{digest('pin', sorted(set(keys)))}.json"
