"""The catalog: stage name -> Stage, from `qpipe.stages` and from plug-ins (entry-point group `qpipe.stages`).

Only modules are listed at first; a stage's module is imported when its name is asked for or a schema is made of it.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from qpipe.errors import ConfigError
from qpipe.keys.loaded import watch
from qpipe.param import listed, nearest
from qpipe.stage import REQUIRED, Stage

GROUP = "qpipe.stages"
MISSING = "???"
RESERVED = ("uses", "enabled", "resources")
FORMS = ("first_within",)
"""Names that `uses` takes beside stages: forms of the language."""


class Catalog(Mapping[str, Stage]):
    """All stages by name. Errors on lookup: KeyError; `find` refuses with the nearest name instead."""

    def __init__(self) -> None:
        package = importlib.import_module("qpipe.stages")
        built_in = {
            module.name: f"qpipe.stages.{module.name}:{module.name}"
            for module in pkgutil.iter_modules(package.__path__)
            if not module.name.startswith("_")
        }
        plug_ins = _plug_ins()
        clash = sorted(set(built_in) & set(plug_ins))
        if clash:
            raise ConfigError(
                f"stages: a plug-in brings '{clash[0]}', a built-in stage. Rename its entry point."
            )
        self._addresses = built_in | plug_ins
        watch(frozenset(address.partition(":")[0].partition(".")[0] for address in self._addresses.values()))
        self._loaded: dict[str, Stage] = {}

    def __getitem__(self, name: str) -> Stage:
        if name not in self._loaded:
            module, _, attribute = self._addresses[name].partition(":")
            found = _load(name, module, attribute)
            if any(param in RESERVED for param in (*found.params, *found.ports)):
                raise ConfigError(
                    f"stages: '{name}' has a param called one of {RESERVED}, which the language uses."
                )
            self._loaded[name] = dataclasses.replace(found, name=name, address=f"{module}:{attribute}")
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._addresses))

    def __len__(self) -> int:
        return len(self._addresses)

    def find(self, name: str, address: str) -> Stage:
        """The stage called `name`, for the node at `address`."""
        if name not in self._addresses:
            known = [*self, *FORMS]
            raise ConfigError(f"{address}: no stage '{name}'.{nearest(name, known)} Stages: {listed(known)}.")
        return self[name]


def _plug_ins() -> dict[str, str]:
    """Name -> `module:attribute` of the entry points. ConfigError where two packages bring one name."""
    found: dict[str, str] = {}
    for point in entry_points(group=GROUP):
        if found.setdefault(point.name, point.value) != point.value:
            raise ConfigError(
                f"stages: two plug-ins bring '{point.name}', {found[point.name]} and {point.value}. "
                "Uninstall one of them, or rename its entry point."
            )
    return found


def _load(name: str, module: str, attribute: str) -> Stage:
    try:
        found = getattr(importlib.import_module(module), attribute).__stage__
    except Exception as error:  # a stage's file is anyone's code
        raise ConfigError(
            f"stages: '{name}' cannot be loaded from {module}: {type(error).__name__}: {error}."
        ) from error
    assert isinstance(found, Stage)
    return found


@cache
def catalog() -> Catalog:
    """The catalog of this process."""
    return Catalog()


def schema(stage: Stage) -> dict[str, Any]:
    """What `stage@stages.NODE=<name>` composes: every port and param of the stage under its name, with its default.

    A required port or param stands as `???`, unless the stage's own `config` says what it usually is.
    """
    node: dict[str, Any] = {"uses": stage.name, "enabled": True}
    for port in stage.ports.values():
        node[port.name] = None if port.optional else MISSING
    for param in stage.params.values():
        node[param.name] = MISSING if param.default is REQUIRED else plain(param.default)
    return node | dict(stage.config)


def plain(value: Any) -> Any:
    """A default of a signature as YAML would write it: tuples as lists, paths as text."""
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
