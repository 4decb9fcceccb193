"""Whether a store holds what it says: every blob against its name, every result against its blobs.

What is wrong is moved aside (into damaged/), so that it is a miss and is made again. Others may use the store
meanwhile; what they remove or add while this reads is no damage.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpipe.artifacts.artifact import references, root_kind
from qpipe.cache import disk
from qpipe.cache.store import Store
from qpipe.errors import CacheError, DamagedError
from qpipe.keys.hashing import is_digest


@dataclass(frozen=True)
class Verified:
    """What a verification read, and a sentence for each thing that was not as it should be."""

    blobs: int
    results: int
    problems: tuple[str, ...]


def verify(store: Store) -> Verified:
    """Read everything; what is wrong is moved aside."""
    problems = [f"{path} is no file of the cache; moved aside" for path in _strays(store)]
    blobs = results = 0
    for digest, _ in list(store.blobs()):
        blobs += 1
        try:
            store.open(digest)
        except CacheError as error:
            if not isinstance(error.__cause__, FileNotFoundError):  # a cleanup may have taken it just now
                problems.append(str(error))
    for key in list(store.keys()):
        results += 1
        if (problem := _disagreement(store, key)) is not None:
            problems.append(f"result {key}: {problem}; it will be made again when asked for")
    return Verified(blobs, results, tuple(problems))


def _strays(store: Store) -> Iterator[Path]:
    """What no cache wrote among blobs and results, after it was moved aside: links, pipes, files under other names."""
    for kind, suffix in (("blobs", ""), ("actions", ".json")):
        folder = store.root / kind
        for shelf in sorted(folder.iterdir()) if disk.is_folder(folder) else ():
            if not disk.is_folder(shelf):
                if disk.set_aside(shelf, store.root):
                    yield shelf
                continue
            for path in sorted(shelf.iterdir()):
                name = path.name.removesuffix(suffix)
                ours = path.name == name + suffix and is_digest(name) and name[:2] == shelf.name
                if (ours and disk.is_file(path)) or not os.path.lexists(path):
                    continue
                if disk.set_aside(path, store.root):
                    yield path


def _disagreement(store: Store, key: str) -> str | None:
    """Why the result under `key` cannot be used, after it was taken away; None where it can, or is gone by now."""
    path = store.root / "actions" / key[:2] / f"{key}.json"
    with contextlib.suppress(FileNotFoundError):
        identity = path.lstat().st_ino
        result = store.peek(key)
        problem = "it is not what was published" if result is None else contradiction(store, result)
        if problem is None or path.lstat().st_ino != identity:
            return None
        disk.set_aside(path, store.root)
        return problem
    return None


def contradiction(store: Store, result: Mapping[str, Any]) -> str | None:
    """What in a result does not agree with the blobs it names; None where all does."""
    if missing := store.complete(dict(result)):
        return f"{len(missing)} of its blobs are missing, first {missing[0]}"
    named: dict[str, int] = {}
    try:
        for port, output in result["outputs"].items():
            root = store.open(output["digest"])
            parts = references(root)
            if output["kind"] != (kind := root_kind(root)):
                return f"its output '{port}' is a {kind}, not a {output['kind']}"
            named |= {output["digest"]: root.nbytes, **parts}
            if output["size_bytes"] != root.nbytes + sum(parts.values()):
                return f"its output '{port}' is not of the size it says"
    except DamagedError as error:
        return str(error).rstrip(".")
    return None if named == dict(result["blobs"]) else "it names other blobs than its outputs consist of"
