"""What a module keeps from call to call, in a form that can be compared: numbers, texts and containers in its globals,
in the defaults of its functions and on its classes. Of other objects only which one it is; what they hold is not seen.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

DEEPEST = 6
LARGEST = 10_000
"""Levels of containers, and items in one, that are looked at; of what is larger its length counts."""

_PLAIN = (str, bytes, int, float, complex, bool, type(None))


def state_of(module: types.ModuleType | None) -> object:
    """What `module` holds now; equal to what it held before where nothing changed."""
    if module is None:
        return None
    return tuple((name, _held(value, module.__name__)) for name, value in _names(vars(module)))


def _names(held: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in sorted(held.items()):
        if not (name.startswith("__") and name.endswith("__")) and not isinstance(value, types.ModuleType):
            yield name, value


def _held(value: Any, module: str) -> object:
    """A global: a function by its defaults and a class by what it holds, where this module wrote them."""
    if isinstance(value, types.FunctionType) and value.__module__ == module:
        return (id(value), _frozen(value.__defaults__, 0), _frozen(value.__kwdefaults__, 0))
    if isinstance(value, type) and value.__module__ == module:
        return (id(value), tuple((name, _held(item, module)) for name, item in _names(vars(value))))
    return _frozen(value, 0)


def _frozen(value: Any, depth: int) -> object:
    kind = type(value)
    if kind in _PLAIN:
        return (kind.__name__, value)
    if depth >= DEEPEST or not isinstance(value, list | tuple | set | frozenset | dict | deque | bytearray):
        return id(value)
    if isinstance(value, bytearray):
        return (id(value), bytes(value))
    if len(value) > LARGEST:
        return (id(value), len(value))
    if isinstance(value, dict):
        return (id(value), tuple((_frozen(k, depth + 1), _frozen(v, depth + 1)) for k, v in value.items()))
    if isinstance(value, set | frozenset):
        return (id(value), frozenset(_frozen(item, depth + 1) for item in value))
    made = tuple(_frozen(item, depth + 1) for item in value)
    return made if isinstance(value, tuple) else (id(value), made)
