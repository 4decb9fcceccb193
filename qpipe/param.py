"""Params: what a stage's signature says about a value, and how a value from a config is held against it.

A param's type is its annotation: bool, int, float, str, Path, Literal, X | None, list, tuple, dict, a frozen dataclass,
`Factory`, each with bounds where `Annotated[int, Range(ge=1)]` gives them. `coerce` turns the plain value that a config
holds into one of that type, or refuses with the address, what was found and what is allowed.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import importlib
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from qpipe.errors import ConfigError, InputError

MOST_LISTED = 200


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of a number, for `Annotated[float, Range(gt=0, le=1)]`."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def admits(self, value: float) -> bool:
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def __str__(self) -> str:
        signs = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
        bounds = ((sign, getattr(self, field)) for field, sign in signs)
        return " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)


@dataclasses.dataclass(frozen=True)
class _FactoryMark:
    """Marks a str as the name of a Python function, `module:function`."""


Factory = Annotated[str, _FactoryMark()]
"""`module:function`, found from the working directory; in a key it counts by its code, not by its name."""


@dataclasses.dataclass(frozen=True)
class _LibraryMark:
    """Marks a Path as a library that later actions load too."""


Library = Annotated[Path, _LibraryMark()]
"""A shared library. Its bytes count, as those of any path do; every action of the graph is told where it lies."""
LIBRARIES = "QPIPE_CUSTOM_OPS"
"""The environment variable that tells, a path a line."""


def takes_libraries(hint: Any) -> bool:
    """Whether `hint` holds `Library`, at any depth."""
    return isinstance(hint, _LibraryMark) or any(
        takes_libraries(argument) for argument in get_args(hint) if argument is not hint
    )


def is_ambiguous(hint: Any) -> bool:
    """Whether `hint` takes text as text and as a path: no telling which, and a path counts by its content."""
    if get_origin(hint) in (Union, types.UnionType):
        plain = {get_args(part)[0] if get_origin(part) is Annotated else part for part in get_args(hint)}
        if {str, Path} <= plain:
            return True
    return any(is_ambiguous(argument) for argument in get_args(hint) if argument is not hint)


def nearest(name: str, allowed: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the allowed name nearest to `name`, or nothing."""
    import difflib  # for a mistake alone

    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def listed(names: Iterable[str]) -> str:
    """The names in one line, sorted; `none` where there are none, and of very many the first."""
    found = sorted(names)
    more = f" and {len(found) - MOST_LISTED} more" if len(found) > MOST_LISTED else ""
    return (", ".join(found[:MOST_LISTED]) or "none") + more


def coerce(value: Any, hint: Any, address: str) -> Any:
    """`value` as an instance of `hint`.

    Errors: ConfigError, `<address>: expected …, got …`, for a wrong type, a value out of range or an unknown field.
    """
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        return _annotated(value, hint, address)
    if origin is Literal:
        return _literal(value, get_args(hint), address)
    if origin in (Union, types.UnionType):
        return _union(value, get_args(hint), address)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _dataclass(value, hint, address)
    if (origin or hint) in (list, tuple):
        return _sequence(value, hint, address)
    if origin in (dict, Mapping) or hint is dict or str(origin).endswith("Mapping'>"):
        return _mapping(value, hint, address)
    return _scalar(value, hint, address)


def of_its_type(default: Any, hint: Any) -> Any:
    """A signature's default as a config would give it: text for a path as a path, a list for a tuple as a tuple, all of
    it new, so that what a function does to it stays with that call. A default of another type is itself."""
    try:
        return coerce(default, hint, "default")
    except (ConfigError, TypeError):
        return copy.deepcopy(default)


def absolute(value: Any) -> Any:
    """The value of a param with every path in it absolute: what runs may be in another folder than who asked."""
    if isinstance(value, Path):
        return value.absolute()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: absolute(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        same = all(changed[name] is getattr(value, name) for name in changed)
        return value if same else dataclasses.replace(value, **changed)
    if isinstance(value, dict):
        return {key: absolute(item) for key, item in value.items()}
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(absolute(item) for item in value)
    return value


def factories_in(value: Any, hint: Any) -> Iterator[str]:
    """The names of functions in a param's value, as its type says where they stand: `Factory`, and lists, mappings,
    dataclasses and unions of it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        if isinstance(value, str) and any(isinstance(mark, _FactoryMark) for mark in arguments[1:]):
            yield value
        else:
            yield from factories_in(value, arguments[0])
    elif origin in (Union, types.UnionType):
        names_one = (
            isinstance(value, str) and ":" in value
        )  # of `Literal[...] | Factory`, that which names a function
        for option in arguments if names_one or not isinstance(value, str) else ():
            yield from factories_in(value, option)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = _field_types(type(value))
        for field in dataclasses.fields(value):
            yield from factories_in(getattr(value, field.name), hints[field.name])
    elif isinstance(value, Mapping) and len(arguments) == 2:
        for item in value.values():
            yield from factories_in(item, arguments[1])
    elif isinstance(value, list | tuple) and arguments:
        kinds = (
            arguments if origin is tuple and arguments[-1] is not Ellipsis else [arguments[0]] * len(value)
        )
        for item, kind in zip(value, kinds, strict=False):
            yield from factories_in(item, kind)


def describe(hint: Any) -> str:
    """The type in the words of an error message."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        base, *marks = arguments
        if any(isinstance(mark, _FactoryMark) for mark in marks):
            return "'module:function'"
        ranges = [str(mark) for mark in marks if isinstance(mark, Range)]
        return " ".join([describe(base), *ranges])
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else describe(part) for part in arguments)
    if origin in (list, tuple):
        return f"a list of {describe(arguments[0])}" if arguments else "a list"
    if dataclasses.is_dataclass(hint):
        return "a mapping with " + listed(field.name for field in dataclasses.fields(hint))
    return {Path: "a path", str: "a text"}.get(hint, getattr(hint, "__name__", str(hint)))


def _refuse(value: Any, hint: Any, address: str) -> ConfigError:
    return ConfigError(f"{address}: expected {describe(hint)}, got {value!r}.")


def _scalar(value: Any, hint: Any, address: str) -> Any:
    converters: dict[Any, tuple[tuple[type, ...], Callable[[Any], Any]]] = {
        bool: ((bool,), bool),
        int: ((int,), int),
        float: ((int, float), lambda number: float(number) + 0.0),  # -0.0 is 0.0, as in a digest
        str: ((str,), str),
        Path: ((str, Path), Path),
        type(None): ((type(None),), lambda _: None),
    }
    if hint not in converters:
        raise TypeError(f"{address}: params of type {hint!r} are not supported")
    accepted, convert = converters[hint]
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)  # YAML reads a digit-only name as a number
    empty = hint is Path and value == ""  # Path("") would be the working directory
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool) or empty:
        raise _refuse(value, hint, address)
    return convert(value)


def _annotated(value: Any, hint: Any, address: str) -> Any:
    base, *marks = get_args(hint)
    result = coerce(value, base, address)
    for mark in marks:
        if isinstance(mark, Range) and isinstance(result, int | float) and not mark.admits(result):
            raise ConfigError(f"{address}: must be {mark}, got {value!r}.")
        if isinstance(mark, _FactoryMark) and not _names_a_function(result):
            raise _refuse(value, hint, address)
    return result


def _names_a_function(text: str) -> bool:
    module, _, function = text.partition(":")
    return all(part.isidentifier() for part in module.split(".")) and function.isidentifier()


def _literal(value: Any, choices: tuple[Any, ...], address: str) -> Any:
    for choice in choices:
        if type(value) is type(choice) and value == choice:
            return choice
    hinted = (
        nearest(value, [choice for choice in choices if isinstance(choice, str)])
        if isinstance(value, str)
        else ""
    )
    raise ConfigError(f"{address}: expected one of {', '.join(map(repr, choices))}, got {value!r}.{hinted}")


def _union(value: Any, options: tuple[Any, ...], address: str) -> Any:
    if value is None and type(None) in options:
        return None
    rest = [option for option in options if option is not type(None)]
    if len(rest) == 1:
        return coerce(value, rest[0], address)
    for option in rest:
        try:
            return coerce(value, option, address)
        except ConfigError:
            continue
    raise ConfigError(
        f"{address}: expected {' or '.join(describe(option) for option in options)}, got {value!r}."
    )


def _sequence(value: Any, hint: Any, address: str) -> Any:
    if not isinstance(value, list | tuple):
        raise _refuse(value, hint, address)
    arguments = get_args(hint)
    if get_origin(hint) is tuple and arguments and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            raise ConfigError(f"{address}: expected {len(arguments)} values, got {len(value)}: {value!r}.")
        kinds: Iterable[Any] = arguments
    else:
        kinds = [arguments[0] if arguments else Any] * len(value)
    items = [
        coerce(item, kind, f"{address}[{i}]") for i, (item, kind) in enumerate(zip(value, kinds, strict=True))
    ]
    return tuple(items) if (get_origin(hint) or hint) is tuple else items


def _mapping(value: Any, hint: Any, address: str) -> Any:
    if not isinstance(value, Mapping):
        raise _refuse(value, hint, address)
    arguments = get_args(hint)
    kind = arguments[1] if arguments else Any
    return {str(key): coerce(item, kind, f"{address}.{key}") for key, item in value.items()}


def _dataclass(value: Any, hint: Any, address: str) -> Any:
    if isinstance(value, hint):
        return value
    if not isinstance(value, Mapping):
        raise _refuse(value, hint, address)
    fields = {field.name: field for field in dataclasses.fields(hint) if field.init}
    hints = _field_types(hint)
    for name in value:
        if name not in fields:
            raise ConfigError(
                f"{address}: no field '{name}' here.{nearest(str(name), fields)} Its fields: {listed(fields)}."
            )
    for name, field in fields.items():
        without = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if without and name not in value:
            raise ConfigError(f"{address}.{name}: missing; expected {describe(hints[name])}.")
    try:
        return hint(**{name: coerce(item, hints[name], f"{address}.{name}") for name, item in value.items()})
    except ValueError as error:
        raise ConfigError(f"{address}: {error}") from error


@functools.cache
def _field_types(made: type[Any]) -> Mapping[str, Any]:
    """The types of a dataclass's fields by name; worked out once, for it takes longer than all else here."""
    return get_type_hints(made, include_extras=True)


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection for the while. What makes millions of objects that stay, such as an import of torch, would
    have Python look through all of them over and over: a sixth of the time that it takes, and more the more there are.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def load_factory(factory: str) -> Callable[..., Any]:
    """The function that `module:function` names, the module found from the working directory or installed.

    Errors: InputError, naming what is missing; an exception inside the module's own code is chained to it.
    """
    module_name, _, function_name = factory.partition(":")
    if not _names_a_function(factory):
        raise InputError(f"{factory!r} names no Python function; it has to be 'module:function'.")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        with uncollected():
            module = importlib.import_module(module_name)
    except Exception as error:  # the module is the user's: whatever its code raises is theirs to read
        raise InputError(f"{factory}: cannot import {module_name} from {folder}: {error!r}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        hint = nearest(function_name, names)
        raise InputError(f"{factory}: module {module_name} has no function '{function_name}'.{hint}")
    found: Callable[..., Any] = function
    return found


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "p": 10**15}

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgtp]?)(i?)b?", re.IGNORECASE)


def parse_size(text: Any, address: str) -> int | None:
    """Bytes from "20GB", "512 MiB" or a number; None from None. ConfigError for anything else."""
    if text is None:
        return None
    match = _SIZE.fullmatch(str(text).strip())
    if match is None or isinstance(text, bool):
        raise ConfigError(f"{address}: expected a size such as 20GB or 512MiB, or null, got {text!r}.")
    number, unit, binary = match.groups()
    power = "kmgtp".find(unit.lower()) + 1 if unit else 0
    return int(float(number) * (1024**power if binary else _UNITS[unit.lower()]))
