"""The code digest: what a stage's formula is made of, found without importing or running any of it.

It covers a module and every first-party module that it reaches by import, wherever the import stands (in a
function, under TYPE_CHECKING, relative), in the normal form of `qpipe.keys.syntax`. First-party is what lies
neither in the standard library nor in an install folder, and whatever shares the package of the module asked
for. Packages of others count by version (`libraries`). qpipe's own engine does not count: it decides when a
formula runs, and the format of its artifacts has a version of its own in every key.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.machinery import SOURCE_SUFFIXES, ModuleSpec, PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpipe.errors import ConfigError
from qpipe.keys.hashing import Memo, digest, digest_bytes, digest_file, file_identity
from qpipe.keys.syntax import EVERY, Analysis, Import, analyse, bound_names

if TYPE_CHECKING:
    from importlib.metadata import Distribution

FORMULA = frozenset({"", "demo", "mapped", "methods", "model", "numerics", "stages"})
"""The parts of qpipe that results are made by; the others decide when a formula runs, never what it gives."""

_FORM = 1  # the version of the normal form
_READING = 4  # the version of what a memo holds of a source: its digest, and the imports found in it
_DISTRIBUTIONS = {"PIL": "pillow", "cv2": "opencv-python", "sklearn": "scikit-learn", "yaml": "PyYAML"}
"""Import names that are no distribution names, so common that the search of all packages is spared."""
_NONE = "-"  # remembered of a package that belongs to no distribution
_BUILD = re.compile(r"\+(cpu|cu\d+|rocm[\d.]+|xpu)$")  # the device a build is for; no key holds the device


class CodeIndex:
    """Code digests. A file is analysed once, and not even that where `memo` knows it untouched."""

    def __init__(self, memo: Memo) -> None:
        self._memo = memo
        self._finders: dict[Path | None, _Finder] = {}
        self._analyses: dict[str, Analysis] = {}
        self._known_versions: dict[str, str] = {}
        self._reached: dict[tuple[str, Path | None, bool], _Reach] = {}

    def digest(self, *module_names: str) -> str:
        """The code digest of modules. ConfigError where one cannot be found, read or parsed."""
        return digest("code", _FORM, self._reach_all(module_names).modules)

    def modules(self, *module_names: str) -> dict[str, str]:
        """Full name -> digest, of every module that the code digest of `module_names` covers."""
        return dict(self._reach_all(module_names).modules)

    def libraries(self, *module_names: str) -> dict[str, str]:
        """Distribution name -> version, of the packages of others that the modules' code imports."""
        return self._versions(self._reach_all(module_names))

    def module(self, name: str, search_path: Path, place: str = "") -> str | None:
        """The digest of one module by itself, looked for in `search_path` first, and where it is not on the path in its
        file `place`, relative to that; None where none can be read."""
        try:
            found = self._finders.setdefault(search_path, _Finder(search_path)).find(name)
            file = os.path.join(search_path, place) if found is None else found.file
            return self._analysis(file).digest if file and os.path.isfile(file) else None
        except (ConfigError, ValueError):  # a name with a null in it, which only a made-up result has
            return None

    def digest_factory(self, factory: str, search_path: Path) -> str:
        """The digest of a user's "module:function": the module's code, and the versions it builds on.

        Modules are looked for in `search_path` first, the user's working directory. ConfigError as for
        `digest`, and where `factory` is not of that form.
        """
        module_name, _, function = factory.partition(":")
        if not all(part.isidentifier() for part in [*module_name.split("."), *function.split(".")]):
            raise ConfigError(f"expected 'module:function', got '{factory}'.")
        reach = self._reach(module_name, search_path, own=False)
        return digest("factory", _FORM, function, reach.modules, self._versions(reach))

    def lacks(self, factory: str, search_path: Path) -> frozenset[str] | None:
        """What the module of a "module:function" binds, where this function is surely not among it; else None."""
        name, _, function = factory.partition(":")
        module = self._finders.setdefault(search_path, _Finder(search_path)).find(name)
        if module is None or module.file is None or not _is_source(module.file):
            return None
        bound = bound_names(Path(module.file).read_bytes())
        return bound if bound is not None and function.partition(".")[0] not in bound else None

    def factory_parts(self, factory: str, search_path: Path) -> dict[str, str]:
        """Full name -> digest of every module that `digest_factory` covers, and "library NAME" -> version."""
        reach = self._reach(factory.partition(":")[0], search_path, own=False)
        versions = self._versions(reach)
        return {**reach.modules, **{f"library {name}": found for name, found in versions.items()}}

    def _reach_all(self, roots: Sequence[str]) -> _Reach:
        found = [self._reach(root) for root in roots]
        return _Reach(
            {name: code for reach in found for name, code in reach.modules.items()},
            {name: place for reach in found for name, place in reach.libraries.items()},
        )

    def _reach(self, root: str, search_path: Path | None = None, own: bool = True) -> _Reach:
        """What `root` reaches; with `own`, its own package counts as first-party wherever it lies."""
        found = self._reached.get((root, search_path, own))
        if found is None:
            finder = self._finders.setdefault(search_path, _Finder(search_path))
            found = self._walk(root, finder, {"qpipe", root.partition(".")[0]} if own else {"qpipe"})
            self._reached[root, search_path, own] = found
        return found

    def _walk(self, root: str, finder: _Finder, own: set[str]) -> _Reach:
        if finder.find(root) is None:
            where = f" in {finder.search_path} or on Python's path" if finder.search_path else ""
            raise ConfigError(f"no module '{root}' was found{where}.")
        reach = _Reach({}, {})
        pending, seen = [root], {root}
        entered, opened = set[str](), set[str]()  # whose imports count, and whose lazy ones do too
        while pending:
            chain = finder.chain(pending.pop())
            asked = chain[-1].name if chain else ""  # the module itself, or the one that is asked for an attribute
            for module in chain:
                if module.name in (opened if module.name == asked else entered):
                    continue
                top = module.name.partition(".")[0]
                party = module.party(own)
                if party == "library" and (top in reach.libraries or self._distributions(top, module.location())):
                    reach.libraries[top] = module.location()
                elif party == "library":
                    party = "first"  # no version says when it changes: a copy, a link
                if party != "first":
                    break
                if module.file is None or module.name == "qpipe":
                    continue
                analysis = self._analysis(module.file)
                wanted: tuple[str, ...] = ()
                if module.name not in entered:
                    entered.add(module.name)
                    wanted = finder.targets(module, analysis)
                    if not analysis.is_empty:
                        reach.modules[module.name] = analysis.digest
                if module.name == asked:
                    opened.add(module.name)
                    wanted += finder.targets(module, analysis, lazy=True)
                fresh = [name for name in wanted if name not in seen]
                pending += fresh
                seen.update(fresh)
        return reach

    def _versions(self, reach: _Reach) -> dict[str, str]:
        """Distribution name -> version."""
        return {
            name: self._version(name)
            for top, location in sorted(reach.libraries.items())
            for name in self._distributions(top, location)
        }

    def _version(self, name: str) -> str:
        if name not in self._known_versions:
            self._known_versions[name] = _version(name, self._memo)
        return self._known_versions[name]

    def _distributions(self, top: str, location: str) -> list[str]:
        """The distributions that a top-level import name, found in the folder `location`, may come from."""
        key = f"{_FORM}|brought by|{top}|{location}|{os.stat(location).st_mtime_ns}"
        names = self._memo.get(key)
        if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
            names = _distributions(top) or [_NONE]
            self._memo.set(key, names)
        return [name for name in names if name != _NONE]

    def _analysis(self, file: str) -> Analysis:
        found = self._analyses.get(file)
        if found is None:
            try:
                found = self._read(file)
            except OSError as error:
                raise ConfigError(f"{file}: cannot be read: {error.strerror}.") from error
            self._analyses[file] = found
        return found

    def _read(self, file: str) -> Analysis:
        if not _is_source(file):
            return Analysis(digest_file(Path(file), self._memo), ())
        return analysis_of(file, file_identity(file), lambda: Path(file).read_bytes(), self._memo)


def _is_source(file: str) -> bool:
    """Whether it is Python's text; else an extension module, or a .pyc alone: their bytes count, their imports are seen
    when they run."""
    return file.endswith(tuple(SOURCE_SUFFIXES))


def analysis_of(file: str, identity: str | None, read: Callable[[], bytes], memo: Memo) -> Analysis:
    """The analysis of the module in `file` that `read` gives; from `memo` where `identity` stands for that content."""
    if not _is_source(file):
        return Analysis(digest_bytes(read()), ())
    key = f"{_FORM}|{_READING}|{identity}"
    known = _from_json(memo.get(key)) if identity else None
    if known is not None:
        return known
    analysis = analyse(read(), file)
    if identity and file_identity(file) == identity:
        memo.set(key, _to_json(analysis))
    return analysis


def is_first_party(spec: ModuleSpec, own: frozenset[str]) -> bool:
    """Whether a module that is about to be loaded counts by its code; all of the packages `own` does."""
    if not spec.origin:
        return False
    if spec.origin.startswith(_library_prefixes()) and spec.name.partition(".")[0] not in own:
        return False  # the quick way past the thousands of modules of a library
    module = _module(spec.name, spec)
    return module is not None and module.party(set(own)) == "first"


@cache
def _library_prefixes() -> tuple[str, ...]:
    return tuple(
        {
            os.path.join(sysconfig.get_path(name), "")
            for name in ("stdlib", "platstdlib", "purelib", "platlib")
        }
    )


@dataclass(frozen=True)
class _Reach:
    """First-party module -> its digest; top-level name of a package of others -> the folder it lies in."""

    modules: dict[str, str]
    libraries: dict[str, str]


@dataclass(frozen=True)
class _Module:
    """Where a module lies: its file (None for a folder without __init__), and a package's folders."""

    name: str
    file: str | None
    folders: tuple[str, ...]
    builtin: bool = False

    def party(self, own: set[str]) -> str:
        """ "first", "library", "stdlib" or "engine"."""
        top, _, rest = self.name.partition(".")
        if top == "qpipe" and rest.partition(".")[0] not in FORMULA:
            return "engine"
        if top in own or (self.file is None and not self.builtin):
            return "first"
        if self.builtin:
            return "stdlib"
        location = self.location()
        if _is_install_folder(location):
            return "library"
        return "stdlib" if location in _stdlib_folders() else "first"

    def location(self) -> str:
        """The folder that the top-level package lies in."""
        path = Path(self.file or "")
        path = path.parent if path.name.startswith("__init__.") else path
        depth = self.name.count(".")
        return str(path.parents[min(depth, len(path.parents) - 1)])


class _Finder:
    """Finds modules as the import system would, without importing their parents."""

    def __init__(self, search_path: Path | None) -> None:
        self.search_path = search_path
        self._found: dict[str, _Module | None] = {}
        self._chains: dict[str, tuple[_Module, ...]] = {}
        self._targets: dict[tuple[str, bool], tuple[str, ...]] = {}
        self._shadowing = _shadowing()

    def chain(self, name: str) -> tuple[_Module, ...]:
        """The packages on the way to `name`, outermost first, then `name`; ends before what there is not."""
        known = self._chains.get(name)
        if known is None:
            parent = name.rpartition(".")[0]
            known = self.chain(parent) if parent else ()
            if len(known) == name.count("."):  # else something on the way is not there
                module = self.find(name)
                known = (*known, module) if module is not None else known
            self._chains[name] = known
        return known

    def targets(self, module: _Module, analysis: Analysis, lazy: bool = False) -> tuple[str, ...]:
        """The full names that the module's imports, or its lazy ones, may mean, each once."""
        known = self._targets.get((module.name, lazy))
        if known is None:
            imports = analysis.lazy if lazy else analysis.imports
            known = tuple(dict.fromkeys(_targets(module, imports, self)))
            self._targets[module.name, lazy] = known
        return known

    def find(self, name: str) -> _Module | None:
        """The module of that name; None where there is none."""
        if name not in self._found:
            self._found[name] = self._look(name)
        return self._found[name]

    def children(self, name: str) -> Iterator[str]:
        """The full names of everything in a package's folders that could be a module."""
        package = self.find(name)
        for folder in package.folders if package else ():
            for entry in sorted(os.listdir(folder)):
                stem = entry.partition(".")[0]
                if stem.isidentifier() and stem != "__init__":
                    yield f"{name}.{stem}"

    def _look(self, name: str) -> _Module | None:
        parent, _, _ = name.rpartition(".")
        if not parent:
            if name in sys.stdlib_module_names:
                found = self._local(name) or (_before_stdlib(name) if name in self._shadowing else None)
                return _module(name, found) if found else _Module(name, None, (), builtin=True)
            return _module(name, self._local(name) or _spec(name, None))
        package = self.find(parent)
        if package is None or not package.folders:
            return None
        return _module(name, _spec(name, list(package.folders)))

    def _local(self, name: str) -> ModuleSpec | None:
        """The user's module of that name; a mere folder of that name does not hide an installed package."""
        if self.search_path is None or name in sys.builtin_module_names:
            return None
        spec = PathFinder.find_spec(name, [str(self.search_path)])
        return None if spec is None or (spec.origin is None and _spec(name, None)) else spec


def _shadowing() -> set[str]:
    """What lies on the path before the standard library and may bear the name of one of its modules."""
    return {entry.partition(".")[0] for folder in _ahead() for entry in os.listdir(folder)}


def _ahead() -> list[str]:
    """The folders on the path before the standard library."""
    folders = [os.path.abspath(entry) for entry in sys.path]
    stop = next((i for i, folder in enumerate(folders) if folder in _stdlib_folders()), len(folders))
    return [folder for folder in folders[:stop] if os.access(folder, os.R_OK) and os.path.isdir(folder)]


def _before_stdlib(name: str) -> ModuleSpec | None:
    """A user's module that bears the name of a standard one, and is found before it."""
    spec = None if name in sys.builtin_module_names else PathFinder.find_spec(name, _ahead())
    return spec if spec is not None and spec.origin is not None else None


def _spec(name: str, folders: list[str] | None) -> ModuleSpec | None:
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        try:
            spec: ModuleSpec | None = find(name, folders) if find else None
        except KeyError:  # a namespace inside a namespace asks for its parent, which is not imported here
            return _namespace(name, folders or [])
        if spec is not None:
            return spec
    return None


def _namespace(name: str, folders: list[str]) -> ModuleSpec:
    spec = ModuleSpec(name, None, is_package=True)
    found = (os.path.join(folder, name.rpartition(".")[2]) for folder in folders)
    spec.submodule_search_locations = [folder for folder in found if os.path.isdir(folder)]
    return spec


def _module(name: str, spec: ModuleSpec | None) -> _Module | None:
    if spec is None:
        return None
    folders = tuple(os.path.abspath(folder) for folder in spec.submodule_search_locations or ())
    if spec.origin in ("built-in", "frozen"):
        return _Module(name, None, folders, builtin=True)
    file = os.path.abspath(spec.origin) if spec.has_location and spec.origin else None
    return _Module(name, file, folders)


def _targets(module: _Module, imports: tuple[Import, ...], finder: _Finder) -> Iterator[str]:
    """The full names that `imports` may mean when they stand in `module`."""
    package = module.name.split(".") if module.folders else module.name.split(".")[:-1]
    for item in imports:
        if item.level > len(package):
            continue
        parts = package[: len(package) + 1 - item.level] if item.level else []
        base = ".".join([*parts, item.module] if item.module else parts)
        if not item.level and not base:
            base = module.name if module.folders else ""
        if not base:
            continue
        if not item.level and not item.names:  # `import a.b` binds a, which may then be asked for anything
            yield from itertools.accumulate(base.split("."), "{}.{}".format)
        yield base
        for name in item.names:
            if name == EVERY:
                yield from finder.children(base)
            elif name != "*":
                yield f"{base}.{name}"


@cache
def _is_install_folder(folder: str) -> bool:
    """Whether packages are installed there (site-packages, pip's --target), rather than worked on."""
    if {"site-packages", "dist-packages"} & set(Path(folder).parts):
        return True
    try:
        return any(entry.endswith(".dist-info") for entry in os.listdir(folder))
    except OSError:
        return False


@cache
def _stdlib_folders() -> frozenset[str]:
    return frozenset(os.path.abspath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib"))


def _distributions(top: str) -> list[str]:
    """The distributions that a top-level import name may come from: that of this name, where it brings a package of the
    name or says of none what it brings, and all others that bring one."""
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        found = distribution(_DISTRIBUTIONS.get(top, top))
    except PackageNotFoundError:
        return sorted(set(_brought().get(top, [])))
    brings = _brings(found)
    return [found.name] if not brings or top in brings else sorted(set(_brought().get(top, [])))


@cache
def _brought() -> Mapping[str, list[str]]:
    from importlib.metadata import packages_distributions

    return packages_distributions()


def _brings(found: Distribution) -> set[str]:
    """The top-level import names of a distribution, as far as it says."""
    rows = (found.read_text("RECORD") or "").splitlines()
    tops = {row.split(",")[0].split("/")[0].partition(".")[0] for row in rows if ".dist-info/" not in row}
    return tops | set((found.read_text("top_level.txt") or "").split())


def _version(name: str, memo: Memo) -> str:
    """The version, and what else says which code it is: of what was installed from a folder or file of this machine a
    digest of its files, as they are now; of what came from a repository the commit, from an address the hash."""
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        found = distribution(name)
    except PackageNotFoundError:
        return "unversioned"
    version = _BUILD.sub("", found.version)
    origin = _origin(found)
    commit, archive = origin.get("vcs_info", {}).get("commit_id"), origin.get("archive_info", {})
    if commit:
        return f"{version} {commit}"
    hashes = archive.get("hashes") or archive.get("hash")
    if hashes:  # a wheel, which may be torch's with its gigabytes
        return f"{version} {digest('hashes', hashes)[:16]}"
    if not str(origin.get("url", "")).startswith("file:"):
        return version
    rows = [line.split(",") for line in (found.read_text("RECORD") or "").splitlines()]
    files = sorted(row for row in rows if ".dist-info/" not in row[0] and not row[0].startswith("..") and any(row[1:]))
    contents = [_content(Path(str(found.locate_file(row[0]))), memo) for row in files]
    return f"{version} {digest('files', files, contents)[:16]}"


def _origin(found: Distribution) -> dict[str, Any]:
    """What `direct_url.json` says: where a distribution came from, if not from an index."""
    try:
        said = json.loads(found.read_text("direct_url.json") or "{}")
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _content(file: Path, memo: Memo) -> str | None:
    try:
        return digest_file(file, memo)
    except OSError:
        return None


def _to_json(analysis: Analysis) -> Any:
    return [analysis.digest, *(_listed(imports) for imports in (analysis.imports, analysis.lazy))]


def _listed(imports: Sequence[Import]) -> list[Any]:
    return [[item.level, item.module, list(item.names)] for item in imports]


def _from_json(value: Any) -> Analysis | None:
    """What `_to_json` wrote; None for anything else."""
    try:
        found, *listings = value
        imports, lazy = (
            tuple(Import(int(level), module, tuple(names)) for level, module, names in listing)
            for listing in listings
        )
        return Analysis(found, imports, lazy)
    except (TypeError, ValueError):
        return None
