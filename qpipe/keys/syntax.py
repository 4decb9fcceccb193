"""The normal form of Python source: its digest, and the imports it makes.

Two sources share a digest when they differ in comments, docstrings, type comments and layout alone, under
every Python version that can parse both. `ast.dump` and bytecode were rejected: they differ between versions.
So the syntax tree is written as a flat list of tokens, in which empty fields do not occur (a version that
adds a field to a node changes nothing) and fields come in the order of their names.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from qpipe.errors import ConfigError
from qpipe.keys.hashing import digest

_UNCOUNTED_FIELDS = frozenset({"type_comment", "type_ignores", "kind", "ctx"})
_IMPORTERS = frozenset({"import_module", "__import__", "resolve_name", "run_module", "locate", "attach"})
"""What imports by name: importlib, builtins, pkgutil, runpy, pydoc, lazy_loader."""
_NAMERS = frozenset({"get_class", "get_method", "get_object", "get_static_method", "EntryPoint"})
"""What is given the name of a thing with that of its module: hydra.utils, importlib.metadata."""
_OF_RUNS = frozenset({"not_after", "not_before", "resources"})
_LISTERS = frozenset({"iter_modules", "walk_packages"})
_OPEN = frozenset({"*", "__getattr__", "globals", "vars", "locals", "exec"})
"""Who binds one of these may bind anything."""
_DOTTED = re.compile(r"(\.*)([^\W\d]\w*(?:\.[^\W\d]\w*)*)")
_PREFIX = re.compile(r"(\.*)((?:[^\W\d]\w*\.)*)(?:\W.*)?", re.DOTALL)
EVERY = "**"
"""Stands among the names of an Import for every submodule there is."""


@dataclass(frozen=True)
class Import:
    """An import as written: `from ..a import b` is level 2, module "a", names ("b",).

    Level 0 without a module stands for the package itself whose `__init__` says so: its submodules `names`.
    """

    level: int
    module: str
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Analysis:
    """What counts of one source file; imports may name what is no module (an attribute, a chance string)."""

    digest: str
    imports: tuple[Import, ...]
    lazy: tuple[Import, ...] = ()
    """Those that run only when a name is asked of the module that it does not hold: in its own `__getattr__`, and with
    it `__all__` and what only a type checker reads. `from package.module import name` asks nothing of `package`."""

    @property
    def is_empty(self) -> bool:
        """Whether there is no statement in it: then only its name could count."""
        return self.digest == _empty()


def analyse(source: bytes, file: str) -> Analysis:
    """The analysis of the source in `file`. ConfigError where it is not Python of this version."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source, file)
    except SyntaxError as error:
        raise ConfigError(f"{file}:{error.lineno or 1}: not Python, {error.msg}.") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{file}: cannot be parsed as Python, {error or type(error).__name__}.") from error
    made = digest("syntax", _tokens(_plain(tree)))
    lazy = _lazy(tree)
    if not lazy:
        return Analysis(made, tuple(dict.fromkeys(_imports(tree))))
    rest = ast.Module([node for node in tree.body if node not in lazy], [])
    later = ast.Module(lazy, [])
    return Analysis(made, tuple(dict.fromkeys(_imports(rest))), tuple(dict.fromkeys(_imports(later))))


def _lazy(tree: ast.Module) -> list[ast.stmt]:
    """The module's `__getattr__` (PEP 562) and, where there is one, `__all__` and the `if TYPE_CHECKING:` blocks."""
    getters = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "__getattr__"]
    names = {id(node) for getter in getters for node in ast.walk(getter)}
    elsewhere = (node for node in ast.walk(tree) if id(node) not in names)
    if not getters or any(isinstance(node, ast.Name) and node.id == "__getattr__" for node in elsewhere):
        return []
    typing = [node for node in tree.body if isinstance(node, ast.If) and _name(node.test) == "TYPE_CHECKING"]
    assigned = [node for node in tree.body if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign)]
    return [
        *getters,
        *(node for node in typing if not node.orelse),
        *(node for node in assigned if _is_all(node)),
    ]


def _tokens(tree: ast.AST) -> list[object]:
    """The tree in preorder; every node and list comes with its size, so that no two trees read the same."""
    found: list[object] = []
    stack: list[Any] = [tree]
    while stack:
        item = stack.pop()
        if type(item) is _Label:
            found.append(item[0])
        elif isinstance(item, ast.AST):
            fields = _fields(item)
            found += (type(item).__name__, len(fields))
            for name, value in reversed(fields):
                stack += [value, _label(name)]
        elif type(item) is list:
            found += ("[]", len(item))
            stack += reversed(item)
        elif type(item) is complex:
            found.append(("complex", item.real, item.imag))
        else:
            found.append(("...",) if item is ... else (item,))
    return found


class _Label(tuple[str]):
    """The name of a field, among what is still to be written."""


@cache
def _label(name: str) -> _Label:
    return _Label((name,))


def _plain(tree: ast.Module) -> ast.Module:
    """`tree` without what `@stage(...)` says of orders and resources: it decides whether and where the stage runs, and
    is in no result."""
    names = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module == "qpipe.stage" and not node.level
        for alias in node.names
        if alias.name == "stage"
    }
    for node in tree.body if names else ():
        for mark in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
            if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Name) and mark.func.id in names:
                mark.keywords = [each for each in mark.keywords if each.arg not in _OF_RUNS]
    return tree


def _fields(node: ast.AST) -> list[tuple[str, Any]]:
    found = []
    kind: Any = type(node)
    for name in _counted(kind):
        value = getattr(node, name, None)
        if type(value) is list:
            value = _joined(value) if isinstance(node, ast.JoinedStr) else _without_docstrings(value)
        elif name == "format_spec" and isinstance(value, ast.JoinedStr) and not _joined(value.values):
            value = None  # f"{x:}"; some versions give it no spec at all
        if value is not None and value != []:
            found.append((name, value))
    return found


@cache
def _counted(kind: Any) -> list[str]:
    return sorted(set(kind._fields) - _UNCOUNTED_FIELDS)


def _without_docstrings(items: list[Any]) -> list[Any]:
    """All but the strings that stand as statements: docstrings of whatever, without effect."""
    return [item for item in items if not (isinstance(item, ast.Expr) and _is_text(item.value))]


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) is str


def _joined(parts: Sequence[ast.expr]) -> list[ast.expr]:
    """The parts of an f-string, neighbouring text made one: versions cut it differently."""
    found: list[ast.expr] = []
    for part in parts:
        if not isinstance(part, ast.Constant):
            found.append(part)
        elif found and isinstance(found[-1], ast.Constant):
            found[-1] = ast.Constant(str(found[-1].value) + str(part.value))
        elif part.value:
            found.append(part)
    return found


def _imports(tree: ast.AST) -> Iterator[Import]:
    """Every import in the tree; where names are computed, every string that could be one, too."""
    strings: list[str] = []
    literal: set[int] = set()  # the importers that are called with a name in plain sight
    computed = False
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield Import(node.level, node.module or "", tuple(alias.name for alias in node.names))
            computed = computed or any(alias.name in _IMPORTERS and alias.asname for alias in node.names)
        elif isinstance(node, ast.Constant) and type(node.value) is str:
            strings.append(node.value)
        elif isinstance(node, ast.Call) and _name(node.func) in _IMPORTERS:
            if node.args and isinstance(node.args[0], ast.Constant):
                literal.add(id(node.func))
                yield from _imported_by(node, node.args[0].value)
        elif isinstance(node, ast.Call) and _name(node.func) in _NAMERS:
            for text in _texts(node):
                yield from _named(text.partition(":")[0], (0,))
        elif isinstance(node, ast.Call) and _name(node.func) in _LISTERS:
            yield Import(1, "", (EVERY,))
        elif isinstance(node, ast.Name | ast.Attribute) and _name(node) in _IMPORTERS:
            computed = computed or id(node) not in literal
        elif isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign) and _is_all(node):
            yield Import(0, "", tuple(text for text in _texts(node) if text.isidentifier()))
    if computed:
        for text in strings:
            yield from _named(text, (0, 1))
            yield from _below(text)


def _imported_by(call: ast.Call, name: object) -> Iterator[Import]:
    """What `import_module(name, package)`, `__import__(name, fromlist=…)` and their like may mean."""
    others = [text for text in _texts(call) if text != name]
    for item in _named(str(name).partition(":")[0], (0,)):
        yield Import(item.level, item.module, tuple(text for text in others if text.isidentifier()))
        if item.level == 1:
            for package in others:
                yield from _named(f"{package}.{item.module}", (0,))


def _below(text: str) -> Iterator[Import]:
    """`text` as the beginning of names: "package.", "package.%s", "package.{}", "." stand for every module there."""
    match = _PREFIX.fullmatch(text)
    if match and (dots := match[1]) + (module := match[2]):
        yield from (Import(level, module[:-1], (EVERY,)) for level in ([len(dots)] if dots else [0, 1]))


def _is_all(node: ast.Assign | ast.AugAssign | ast.AnnAssign) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return any(_name(target) == "__all__" for target in targets)


def _texts(tree: ast.AST) -> list[str]:
    return [
        node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and type(node.value) is str
    ]


def _name(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _named(text: object, levels: tuple[int, ...]) -> Iterator[Import]:
    """`text` as the name of a module; without leading dots, at each of `levels`."""
    match = _DOTTED.fullmatch(text) if isinstance(text, str) else None
    if match:
        dots, name = match.groups()
        yield from (Import(level, name) for level in ((len(dots),) if dots else levels))


@cache
def _empty() -> str:
    return analyse(b"", "").digest


def bound_names(source: bytes) -> frozenset[str] | None:
    """The names that a module binds at its top; None where it may bind others, too."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    found: set[str] = set()
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
            continue  # what stands inside is not the module's
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.update((each.asname or each.name).partition(".")[0] for each in node.names)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        pending += ast.iter_child_nodes(node)
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            found.update(node.names)
        elif isinstance(node, ast.Attribute) and node.attr == "modules":  # sys.modules[__name__]
            return None
    return None if found & _OPEN else frozenset(found)
