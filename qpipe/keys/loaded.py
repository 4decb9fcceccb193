"""What the modules of this process were made of: the code that runs has to be the code that the key names.

A key is made of the files as they were when the run was planned. They may be edited while it goes on; another file of
the same name may come first on a worker's path; and Python takes a .pyc for its source where size and whole seconds
agree, so that a quick edit runs as what it was before. Therefore every first-party module is compiled from bytes that
are kept here, its .pyc counts only where it is surely younger than the source, and `differing` holds the bytes against
the digests that a key was made of.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import time
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qpipe.keys.code import is_first_party, remembered_analysis
from qpipe.keys.hashing import Memo, file_identity
from qpipe.keys.state import state_of
from qpipe.keys.syntax import Analysis

_RACY_NS = 2_000_000_000  # as in qpipe.keys.hashing: file systems stamp times as coarsely as this


@dataclass(frozen=True)
class _Source:
    """The bytes that a module was made of, their file and, where it is sure, what stands for that content."""

    file: str
    identity: str | None
    content: bytes


_sources: dict[str, _Source] = {}
_analyses: dict[str, Analysis] = {}
_inside: dict[str, set[str]] = {}
"""Module -> those that were loaded while it was, or found on the way of an action whose key holds it."""
_loading: list[str] = []
_states: dict[str, object] = {}
"""Module of a user's -> what it held when it was loaded."""
_agreed: dict[str, int] = {}
"""Code digest -> how many modules were loaded when all of them last agreed with it."""


def watch(own: frozenset[str]) -> None:
    """Keep from now on what first-party modules are made of; those of the packages `own` wherever they lie."""
    for finder in sys.meta_path:
        if isinstance(finder, _Finder):
            finder.own |= own
            return
    sys.meta_path.insert(0, _Finder(own | {"qpipe"}))


def differing(code: str, expected: Mapping[str, str], memo: Memo) -> list[str]:
    """The modules among `expected`, {name: first digits of its digest}, that run here and are something else.

    `code` names the expectation: it is not looked at again before another module is loaded.
    """
    if _agreed.get(code) == len(_sources):
        return []
    count = len(_sources)
    found = [
        name
        for name, digits in expected.items()
        if name in _sources and not _analysis(name, memo).digest.startswith(digits)
    ]
    if not found:
        _agreed[code] = count
    return found


def belonging(names: Iterable[str]) -> set[str]:
    """The first-party modules, other than qpipe's, that belong to those called `names` without being imported by them
    in plain sight: loaded while they were, by whatever name, or remembered of them (`remember`)."""
    found: set[str] = set()
    pending = [name for name in names if name in _inside]
    while pending:
        new = _inside.get(pending.pop(), set()) - found
        found |= new
        pending += new
    return {name for name in found if name in _sources}


def remember(names: Iterable[str], found: Iterable[str]) -> None:
    """Keep that an action with the modules `names` in its key loaded those `found`: the next one does not load them."""
    users = [name for name in found if _is_users(name)]
    for name in names if users else ():
        if _is_users(name):
            _inside.setdefault(name, set()).update(users)


def changed_modules() -> list[str]:
    """The modules of users that hold something else than when they were loaded."""
    there = {name: sys.modules[name] for name in _states if name in sys.modules}  # one that is gone is loaded anew
    return sorted(name for name, module in there.items() if state_of(module) != _states[name])


def _is_users(name: str) -> bool:
    return name.partition(".")[0] != "qpipe"


def count() -> int:
    """How many first-party modules were loaded so far."""
    return len(_sources)


def loaded_since(count: int, memo: Memo) -> dict[str, str]:
    """{name: digest} of the first-party modules with statements in them that were loaded when `count` others were."""
    return digests(list(_sources)[count:], memo)


def _analysis(name: str, memo: Memo) -> Analysis:
    found = _analyses.get(name)
    if found is None:
        source = _sources[name]
        found = remembered_analysis(source.file, source.identity, lambda: source.content, memo)
        _analyses[name] = found
    return found


def digests(names: Iterable[str], memo: Memo) -> dict[str, str]:
    """{name: digest} of modules that are loaded and have statements in them."""
    made = {name: _analysis(name, memo) for name in names if name in _sources}
    return {name: analysis.digest for name, analysis in made.items() if not analysis.is_empty}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds what the finders behind it find, and lets first-party modules be loaded by `_Loader`."""

    def __init__(self, own: frozenset[str]) -> None:
        self.own = own

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if type(spec.loader) is importlib.machinery.SourceFileLoader and is_first_party(
                    spec, self.own
                ):
                    spec.loader = _Loader(spec.loader.name, spec.loader.path)
                return spec
        return None


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a module from bytes that it keeps."""

    def exec_module(self, module: types.ModuleType) -> None:
        name = module.__name__
        if not _is_users(name):
            super().exec_module(module)
            return
        for outer in _loading[-1:]:
            _inside.setdefault(outer, set()).add(name)
        before = None if _loading else {other: state_of(sys.modules.get(other)) for other in _states}
        _loading.append(name)
        try:
            super().exec_module(module)
        finally:
            _loading.pop()
        _states[name] = state_of(module)
        if (
            before is not None
        ):  # what an import does to other modules, such as entering into a table, is no action's
            for other in [*before, *(new for new in _states if new not in before)]:
                now = state_of(sys.modules.get(other))
                if other not in before or now != before[other]:
                    _states[other] = now

    def get_code(self, fullname: str) -> types.CodeType | None:
        file = os.fspath(self.path)
        before, identity = _look(file), file_identity(file)
        content = self.get_data(file)
        same = _look(file) == before
        _sources[fullname] = _Source(file, identity if same else None, content)
        _analyses.pop(fullname, None)
        _agreed.clear()
        if same and _bytecode_is_sound(file):
            code = super().get_code(fullname)
            if _look(file) == before:
                return code
        compiled: types.CodeType = self.source_to_code(content, file)
        return compiled


def _look(file: str) -> tuple[int, ...]:
    status = os.stat(file)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _bytecode_is_sound(file: str) -> bool:
    """Whether Python may take, or write, the .pyc of a source file: it is younger than the source's last change."""
    changed = os.stat(file).st_ctime_ns
    try:
        cached = importlib.util.cache_from_source(file)
        written = os.stat(cached).st_mtime_ns
    except (OSError, NotImplementedError):  # there is none, so one is made of what is there now
        return time.time_ns() - changed > _RACY_NS
    if written - changed > _RACY_NS:
        return True
    if time.time_ns() - changed <= _RACY_NS:
        return False
    try:
        os.unlink(cached)  # it may be of the source before; a new one is made
    except OSError:
        return False
    return True
