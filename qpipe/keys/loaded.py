"""What the modules of this process were made of: the code that runs has to be the code that the key names.

A key is made of the files as they were when the run was planned. They may be edited while it goes on; another file of
the same name may come first on a worker's path; and Python takes a .pyc for its source where size and whole seconds
agree, so that a quick edit runs as what it was before. Therefore every first-party module is compiled from bytes that
are kept here, its .pyc counts only where it is surely younger than the source, and `differing` holds the bytes against
the digests that a key was made of.

What is imported by a name that no key holds is noted, too. Python asks no finder for a module that the process has
already, so users' modules are laid aside while one of them is loaded and while an action runs (`apart`): whoever
imports one is given it as it is, and that it was asked for is seen. Rejected: a hook on `__import__`, which
`import_module` goes round and every import of every library would pay for.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import os
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qpipe.keys.code import analysis_of, is_first_party
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
"""Module -> those that it imported while it was loaded."""
_remembered: dict[str, set[str]] = {}
"""Module -> those that were found on the way of actions whose keys hold it."""
_paths: dict[str, list[tuple[int, str]]] = {}
"""Module -> what it put on `sys.path` when it was loaded, and where: 0 in front, -1 behind."""
_asked: list[set[str]] = []
"""Of the action and of each module that is being loaded what it has imported so far; the innermost last."""
_loading: list[str] = []
_aside: dict[str, types.ModuleType] = {}
"""The modules that are laid aside."""
around: list[Callable[[], contextlib.AbstractContextManager[None]]] = []
"""Contexts in which a module of a user's is loaded, with what it imports."""
_twice: set[str] = set()
"""Names under which two files were loaded, the second in an action."""
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
    """The modules of users that belong to those called `names` without being imported by them in plain sight: imported
    while they were loaded, by whatever name, or remembered of them (`remember`)."""
    names = set(names)
    return _within(names | {each for name in names for each in _remembered.get(name, ())})


def _within(names: set[str]) -> set[str]:
    """`names`, and what was imported while they were loaded, and while that was."""
    found, pending = set(names), list(names)
    while pending:
        new = _inside.get(pending.pop(), set()) - found
        found |= new
        pending += new
    return found


@contextlib.contextmanager
def apart(names: Iterable[str], asked: set[str]) -> Iterator[None]:
    """Lay aside the modules of users but those called `names`, the packages that they lie in and what belongs to them;
    `asked` is filled with those that are imported meanwhile. What `names` put on `sys.path` is there, as when they were
    loaded."""
    kept = _within({package for name in names for package in _with_packages(name)})
    _put_on_path(entry for name in _sources if name in kept for entry in _paths.get(name, ()))
    mine = [name for name in _sources if name not in kept and _is_users(name) and name in sys.modules]
    for name in mine:
        _aside[name] = sys.modules.pop(name)
    bound = [name for name in mine if _unbind(name)]
    _asked.append(asked)
    try:
        yield
    finally:
        _asked.pop()
        for name in mine:
            if name in _aside:
                sys.modules[name] = _aside.pop(name)
        for name in bound:
            _bind(name)


def _give_back(name: str) -> None:
    """Put a module back where it was, and with it what it has imported: types of theirs may be looked up by name."""
    pending = [name]
    while pending:
        each = pending.pop()
        if each in _aside:
            sys.modules[each] = _aside.pop(each)
            _bind(each)
            _put_on_path(_paths.get(each, ()))
            pending += _inside.get(each, ())


def _there(name: str) -> types.ModuleType | None:
    return _aside.get(name, sys.modules.get(name))


def _with_packages(name: str) -> Iterator[str]:
    return itertools.accumulate(name.split("."), "{}.{}".format)


def _in_package(name: str) -> tuple[dict[str, object], str]:
    """The namespace of the package that a module lies in, and its name there."""
    package, _, own = name.rpartition(".")
    return getattr(_there(package), "__dict__", {}), own


def _unbind(name: str) -> bool:
    """Take a module that is laid aside off its package; whether it was there."""
    held, own = _in_package(name)
    found = held.get(own) is _aside[name]
    if found:
        del held[own]
    return found


def _bind(name: str) -> None:
    held, own = _in_package(name)
    if name in sys.modules:
        held.setdefault(own, sys.modules[name])


def _put_on_path(entries: Iterable[tuple[int, str]]) -> None:
    for place, entry in entries:
        if entry not in sys.path:
            sys.path.insert(0 if place == 0 else len(sys.path), entry)


def remember(names: Iterable[str], found: Iterable[str]) -> None:
    """Keep that an action with the modules `names` in its key imported those `found`: the next one may have them at
    hand without importing them (`functools.cache`)."""
    users = [name for name in found if _is_users(name)]
    for name in names if users else ():
        if _is_users(name):
            _remembered.setdefault(name, set()).update(users)


def changed_modules() -> list[str]:
    """The modules of users that hold something else than when they were loaded, or that are two by now."""
    there = {name: sys.modules[name] for name in _states if name in sys.modules}  # one that is gone is loaded anew
    return sorted({name for name, module in there.items() if state_of(module) != _states[name]} | _twice)


def _is_users(name: str) -> bool:
    return name.partition(".")[0] != "qpipe"


def count() -> int:
    """How many first-party modules were loaded so far."""
    return len(_sources)


def loaded_since(count: int) -> list[str]:
    """The first-party modules that were loaded when `count` others were."""
    return list(_sources)[count:]


def users_since(count: int) -> list[str]:
    """The modules of users that were loaded when `count` modules were."""
    return [name for name in loaded_since(count) if _is_users(name)]


def file(name: str) -> str:
    """Where a module lies that is loaded."""
    return _sources[name].file


def _analysis(name: str, memo: Memo) -> Analysis:
    found = _analyses.get(name)
    if found is None:
        source = _sources[name]
        found = analysis_of(source.file, source.identity, lambda: source.content, memo)
        _analyses[name] = found
    return found


def digests(names: Iterable[str], memo: Memo) -> dict[str, str]:
    """{name: digest} of modules that are loaded and have statements in them."""
    made = {name: _analysis(name, memo) for name in names if name in _sources}
    return {name: analysis.digest for name, analysis in made.items() if not analysis.is_empty}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds what the finders behind it find, and lets first-party modules be loaded by loaders of ours."""

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
                loader = _LOADERS.get(type(spec.loader))
                if loader is not None and is_first_party(spec, self.own):
                    spec.loader = loader(spec.name, spec.origin or "")
                return spec
        return None


class _Sourced(importlib.machinery.SourceFileLoader):
    """Loads a module from bytes that it keeps."""

    def exec_module(self, module: types.ModuleType) -> None:
        _import(module, os.fspath(self.path), super().exec_module)

    def get_code(self, fullname: str) -> types.CodeType | None:
        file = os.fspath(self.path)
        before = _look(file)
        content, same = _keep(fullname, file)
        if same and _bytecode_is_sound(file):
            code = super().get_code(fullname)
            if _look(file) == before:
                return code
        compiled: types.CodeType = self.source_to_code(content, file)
        return compiled


class _Sourceless(importlib.machinery.SourcelessFileLoader):
    """Loads a module of which there is a .pyc alone, and keeps its bytes."""

    def exec_module(self, module: types.ModuleType) -> None:
        _import(module, os.fspath(self.path), super().exec_module)

    def get_code(self, fullname: str) -> types.CodeType | None:
        _keep(fullname, os.fspath(self.path))
        return super().get_code(fullname)


_LOADERS: dict[type, type[_Sourced | _Sourceless]] = {
    importlib.machinery.SourceFileLoader: _Sourced,
    importlib.machinery.SourcelessFileLoader: _Sourceless,
}


def _import(module: types.ModuleType, file: str, load: Callable[[types.ModuleType], None]) -> None:
    """Load a module, and note it where it is asked for; one of this file that is laid aside is given back instead."""
    name = module.__name__
    if not _is_users(name):
        load(module)
        return
    for asked in _asked[-1:]:
        asked.add(name)
    if name in _aside and _sources[name].file == file:
        _give_back(name)
        return
    if _aside.pop(name, None) is not None and len(_asked) > len(_loading):
        _twice.add(name)
    before = None if _loading else {other: state_of(_there(other)) for other in _states}
    packages = [*_with_packages(name)][:-1]
    inside = _inside[name] = {package for package in packages if package in _sources}
    path = list(sys.path)
    _loading.append(name)
    try:
        outermost = [] if before is None else around
        with contextlib.ExitStack() as stack:
            for made in outermost:
                stack.enter_context(made())
            with apart([name], inside):
                load(module)
    finally:
        _loading.pop()
    _paths[name] = _added(path)
    _states[name] = state_of(module)
    if before is not None:  # what an import does to other modules, such as entering into a table, is no action's
        for other in [*before, *(new for new in _states if new not in before)]:
            now = state_of(_there(other))
            if other not in before or now != before[other]:
                _states[other] = now


def _added(before: Sequence[str]) -> list[tuple[int, str]]:
    """What is on `sys.path` that was not there before, in the order in which it can be put there again."""
    first = next((i for i, entry in enumerate(sys.path) if entry in before), 0)
    new = [(0, entry) for entry in reversed(sys.path[:first])]
    return [*new, *((-1, entry) for entry in sys.path[first:] if entry not in before)]


def _keep(name: str, file: str) -> tuple[bytes, bool]:
    """The bytes that a module is made of, kept; and whether they stayed the same while they were read."""
    before, identity = _look(file), file_identity(file)
    content = Path(file).read_bytes()
    same = _look(file) == before
    _sources[name] = _Source(file, identity if same else None, content)
    _analyses.pop(name, None)
    _agreed.clear()
    return content, same


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
