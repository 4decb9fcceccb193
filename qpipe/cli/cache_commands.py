"""`qpipe cache …`: what the cache holds, what it takes, what goes, what stays, and how it travels."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from qpipe.artifacts.artifact import references
from qpipe.cache.cleanup import Entry, collect, read_results
from qpipe.cache.pins import pin, pinned, pins, unpin
from qpipe.cache.store import Store
from qpipe.errors import CacheError, ConfigError, DamagedError
from qpipe.keys.hashing import is_digest
from qpipe.param import listed, nearest
from qpipe.plan.history import rebuild
from qpipe.report.terminal.table import table
from qpipe.run.record import RECORD
from qpipe.run.stores import open_local_store
from qpipe.run.sweep import Job, plan_jobs

_SHORT = 16  # characters of a key that are shown
_LEAST = 8  # characters of a key that have to be given
_STAGE = "--stage"

Command = Callable[[Sequence[Job], Store, Sequence[str]], int]


def cache_command(arguments: Sequence[str]) -> tuple[Callable[[Sequence[Job]], int], list[str]]:
    """The function behind `qpipe cache ARGUMENTS`, and the arguments that are left for Hydra. Errors: ConfigError."""
    if not arguments or "=" in arguments[0] or arguments[0].startswith("-"):
        raise ConfigError(f"cache: names no command. Say `qpipe cache {'|'.join(COMMANDS)}`.")
    name, *rest = arguments
    if name not in COMMANDS:
        raise ConfigError(f"cache: no command '{name}'.{nearest(name, COMMANDS)} Commands: {listed(COMMANDS)}.")
    words: list[str] = []
    while rest and (rest[0].startswith(_STAGE) or not (rest[0][:1] in "-+~" or "=" in rest[0])):
        words.append(rest.pop(0))
    function, takes = COMMANDS[name]
    fits = len(words) == 1 if takes == "FILE" else bool(words) == bool(takes) or takes.startswith("[")
    if not fits:
        given = f"takes {takes}" if takes else "takes nothing"
        raise ConfigError(f"cache {name}: {given}, got {' '.join(words) or 'nothing'}.")

    def run(jobs: Sequence[Job]) -> int:
        with open_local_store(jobs[0].spec) as store:
            return function(jobs, store, words)

    return run, rest


def size_text(size: float) -> str:
    """Bytes for a person: three digits or so, and the unit."""
    if size < 999.5:
        return f"{size:.0f} B"
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 999.95:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:,.1f} TB"


def _show(rows: Sequence[tuple[str, ...]], right: tuple[int, ...]) -> None:
    print("\n".join(line for block in table(rows, 110, right=right) for line in block))


def _ls(jobs: Sequence[Job], store: Store, words: Sequence[str]) -> int:
    results, _ = read_results(store)
    kept = pinned(store)
    rows = [("key", "stage", "outputs", "size", "seconds", "used last", "")]
    parts = 0
    for key, entry in sorted(results.items(), key=lambda item: (-item[1].used, item[0])):
        if entry.is_part:
            parts += 1
            continue
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        size, mark = size_text(sum(entry.blobs.values())), "pinned" if key in kept else ""
        rows.append((key[:_SHORT], entry.stage, ", ".join(entry.kinds), size, f"{entry.seconds:.2f}", used, mark))
    _show(rows, right=(3, 4))
    total = sum(size for _, size in store.blobs())
    print(f"{len(rows) - 1} results and {parts} sub-results, {size_text(total)} in {store.root}")
    return 0


def _du(jobs: Sequence[Job], store: Store, words: Sequence[str]) -> int:
    """Own bytes are those that only this line needs; shared ones are counted in every line that needs them."""
    results, _ = read_results(store)
    have = dict(store.blobs())
    stages: dict[str, list[set[str]]] = defaultdict(list)
    kinds: dict[str, list[set[str]]] = defaultdict(list)
    for entry in results.values():
        stages[entry.stage + (" (sub-results)" if entry.is_part else "")].append(set(entry.blobs))
        for kind, blobs in _by_kind(store, entry):
            kinds[kind].append(blobs)
    _show([("stage", "results", "own", "shared"), *_shares(stages, have)], right=(1, 2, 3))
    print()
    _show([("kind", "outputs", "own", "shared"), *_shares(kinds, have)], right=(1, 2, 3))
    needed = {digest for entry in results.values() for digest in entry.blobs}
    loose = sum(size for digest, size in have.items() if digest not in needed)
    files = sum(entry.size_bytes for entry in results.values())
    print(
        f"\n{size_text(sum(have.values()) + files)} in {store.root}: {len(have)} blobs {size_text(sum(have.values()))} "
        f"(of these {size_text(loose)} that no result needs), {len(results)} results {size_text(files)}"
    )
    return 0


def _by_kind(store: Store, entry: Entry) -> Iterable[tuple[str, set[str]]]:
    for kind, root in entry.roots:
        try:
            yield kind, {root, *references(store.open(root))}
        except DamagedError:
            yield kind, {root}


def _shares(groups: Mapping[str, Sequence[set[str]]], have: Mapping[str, int]) -> list[tuple[str, ...]]:
    """A row per group, the largest first: how many results, bytes that only it needs, bytes that others need, too."""
    united = {name: set().union(*parts) for name, parts in groups.items()}
    users: dict[str, int] = defaultdict(int)
    for blobs in united.values():
        for digest in blobs:
            users[digest] += 1
    found = []
    for name, blobs in united.items():
        own = sum(have.get(digest, 0) for digest in blobs if users[digest] == 1)
        found.append((own, sum(have.get(digest, 0) for digest in blobs) - own, name))
    return [
        (name, str(len(groups[name])), size_text(own), size_text(shared))
        for own, shared, name in sorted(found, key=lambda row: (-row[0] - row[1], row[2]))
    ]


def _gc(jobs: Sequence[Job], store: Store, words: Sequence[str]) -> int:
    limit = jobs[0].spec.cache_max_bytes
    removed = collect(store, max_bytes=limit)
    print(
        f"removed {removed.results} results and {removed.blobs} blobs, {size_text(removed.size_bytes)}; "
        f"{size_text(removed.left_bytes)} are left"
    )
    if limit is not None and removed.left_bytes > limit:
        print(
            f"that is above cache.max_size ({size_text(limit)}): the rest is pinned, or a running process relies on it"
        )
    return 0


def _verify(jobs: Sequence[Job], store: Store, words: Sequence[str]) -> int:
    from qpipe.cache.audit import verify

    found = verify(store)
    for problem in found.problems:
        print(problem)
    state = f"{len(found.problems)} damaged, moved to {store.root / 'damaged'}" if found.problems else "all whole"
    print(f"{found.blobs} blobs and {found.results} results read: {state}")
    return CacheError.exit_code if found.problems else 0


def _rm(jobs: Sequence[Job], store: Store, words: Sequence[str]) -> int:
    keys = _named(jobs, store, words, "rm")
    if kept := sorted(keys & pinned(store)):
        raise CacheError(f"cache rm: {len(kept)} of them are pinned, first {kept[0][:_SHORT]}. Unpin them first.")
    removed = collect(store, drop=keys)
    left = sum(store.peek(key) is not None for key in keys)
    print(f"removed {len(keys) - left} results and {removed.blobs} blobs, {size_text(removed.size_bytes)}")
    if left:
        print(f"{left} results stay: a running process relies on them")
    return 1 if left else 0


def _pin(jobs: Sequence[Job], store: Store, words: Sequence[str]) -> int:
    for label, keys in _targets(jobs, store, words, "pin"):
        pin(store, keys, label)
        print(f"pinned {label}: {len(keys)} results")
    for label, standing in pins(store) if not words else ():
        print(f"{label}: {len(standing)} results, first {min(standing, default='')[:_SHORT]}")
    return 0


def _unpin(jobs: Sequence[Job], store: Store, words: Sequence[str]) -> int:
    for label, keys in _targets(jobs, store, words, "unpin"):
        if not unpin(store, keys):
            known = ", ".join(label for label, _ in pins(store)) or "none"
            raise CacheError(f"cache unpin: {label} is not pinned. Pins: {known}.")
        print(f"unpinned {label}")
    return 0


def _export(jobs: Sequence[Job], store: Store, words: Sequence[str]) -> int:
    from qpipe.cache.archive import export

    with store.using():
        with store.looking():
            verdicts = [item for walk in plan_jobs(jobs, store) for item in walk.verdicts().items()]
        keys = {outcome.key for _, outcome in verdicts if outcome.state == "hit" and outcome.key}
        made = export(store, keys, Path(words[0]))
    print(
        f"{words[0]}: {made.results} results and sub-results, {made.blobs} blobs, {size_text(made.size_bytes)}, "
        f"for {len(keys)} actions of this pipeline"
    )
    if left := [name for name, outcome in verdicts if outcome.state in ("run", "wait")]:
        print(f"not in the cache, and so not in the archive: {listed(left)}")
    return 0


def _import(jobs: Sequence[Job], store: Store, words: Sequence[str]) -> int:
    from qpipe.cache.archive import import_archive

    found = import_archive(store, Path(words[0]))
    if found.results:
        rebuild(store, again=True)  # so that plan and why know what ran before
    print(
        f"{words[0]}: {found.results} results came in, {found.standing} were there already, "
        f"{found.refused} entries were passed over"
    )
    return 0


def _targets(jobs: Sequence[Job], store: Store, words: Sequence[str], command: str) -> list[tuple[str, set[str]]]:
    """What each word names: the results of a run folder, of a node, or the one under a key."""
    found = []
    for word in words:
        path = Path(word) / RECORD if Path(word).is_dir() else Path(word)
        if path.name == RECORD and path.is_file():
            found.append((word, _recorded(path)))
        else:
            found.append((word, _named(jobs, store, [word], command)))
    return found


def _recorded(path: Path) -> set[str]:
    try:
        nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"].values()
        keys = {node["key"] for node in nodes if node["verdict"] in ("hit", "ran") and node["key"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"cache pin: '{path}' is not the record of a run: {error}.") from error
    if not keys or not all(is_digest(key) for key in keys):
        raise ConfigError(f"cache pin: the run in '{path.parent}' left no results.")
    return keys


def _named(jobs: Sequence[Job], store: Store, words: Sequence[str], command: str) -> set[str]:
    """The keys that nodes, beginnings of keys, and `--stage NAME` name. Errors: ConfigError."""
    keys: set[str] = set()
    remaining = list(words)
    results, _ = read_results(store)
    while remaining:
        word = remaining.pop(0)
        if word.startswith(_STAGE):
            stage = word.partition("=")[2] or (remaining.pop(0) if remaining else "")
            found = {key for key, entry in results.items() if entry.stage == stage}
            if not found:
                known = {entry.stage for entry in results.values()}
                raise ConfigError(
                    f"cache {command}: no result of a stage '{stage}'.{nearest(stage, known)} Stages: {listed(known)}."
                )
        elif word in jobs[0].spec.nodes:
            found = _of_node(jobs, store, word, command)
        else:
            found = {key for key in results if len(word) >= _LEAST and key.startswith(word)}
            if len(found) != 1:
                nodes = jobs[0].spec.nodes
                problem = f"{len(found)} results have keys that begin so" if found else "no node and no key"
                raise ConfigError(
                    f"cache {command}: '{word}': {problem}.{nearest(word, nodes)} Give a node ({listed(nodes)}), or at "
                    f"least {_LEAST} characters of a key that `qpipe cache ls` shows."
                )
        keys |= found
    return keys


def _of_node(jobs: Sequence[Job], store: Store, name: str, command: str) -> set[str]:
    verdicts = [walk.verdicts().get(name) for walk in plan_jobs(jobs, store)]
    found = {outcome.key for outcome in verdicts if outcome and outcome.state == "hit" and outcome.key}
    if not found:
        raise ConfigError(f"cache {command}: the cache has no result of '{name}' as it is configured now.")
    return found


COMMANDS: Mapping[str, tuple[Command, str]] = {
    "ls": (_ls, ""),
    "du": (_du, ""),
    "gc": (_gc, ""),
    "verify": (_verify, ""),
    "rm": (_rm, "NODE|KEY…|--stage STAGE"),
    "pin": (_pin, "[RUN_FOLDER|NODE|KEY…]"),
    "unpin": (_unpin, "RUN_FOLDER|NODE|KEY…"),
    "export": (_export, "FILE"),
    "import": (_import, "FILE"),
}
"""Every command: its function, and what it takes besides overrides: "" for nothing, "[…]" what may be left out."""
