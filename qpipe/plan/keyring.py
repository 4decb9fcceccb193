"""What the key of a node is made of, hashed once for a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qpipe.artifacts.artifact import FORMAT, Artifact
from qpipe.cache.store import Store
from qpipe.errors import ConfigError, InputError, QpipeError
from qpipe.keys.changes import digests_in, listing
from qpipe.keys.code import CodeIndex
from qpipe.keys.companions import content
from qpipe.keys.hashing import digest, stamp
from qpipe.language.spec import NodeSpec
from qpipe.param import factories_in, nearest, takes_libraries
from qpipe.plan.verdicts import Action


class Keyring:
    """Makes the ingredients of keys; remembers, within one run, what it has hashed."""

    def __init__(self, store: Store, search_path: Path | None = None) -> None:
        self._memo = store.index.memo("file")
        self._code = CodeIndex(store.index.memo("code"))
        self._search_path = search_path or Path.cwd()
        self._stages: dict[str, dict[str, Any]] = {}
        self._parts: dict[str, Mapping[str, str | None]] = {}
        self._listings: dict[str, str] = {}
        self._there: set[str] = set()

    @property
    def folder(self) -> str:
        """The working directory, where the person's modules and files are looked for."""
        return str(self._search_path)

    def ingredients(self, node: NodeSpec, inputs: Mapping[str, tuple[Artifact, ...]]) -> dict[str, Any]:
        """All that the result of `node` depends on, as JSON; its digest is the action key."""
        return {
            **self._of_stage(node),
            "params": {name: self._param(node, name) for name in sorted(node.params)},
            "ports": {
                port: [artifact.digest for artifact in artifacts]
                for port, artifacts in sorted(inputs.items())
            },
        }

    def refuse_missing(self, node: NodeSpec) -> None:
        """Refuse a function that its module is seen not to have. Errors: ConfigError."""
        for name, value in node.params.items():
            for factory in factories_in(value, node.stage.params[name].hint):
                if factory in self._there:
                    continue
                if (bound := self._code.lacks(factory, self._search_path)) is not None:
                    module, _, function = factory.partition(":")
                    raise ConfigError(
                        f"stages.{node.name}.{name}: module '{module}' has no '{function}'.{nearest(function, bound)}"
                    )
                self._there.add(factory)

    def stale(self, result: Mapping[str, Any]) -> list[str]:
        """The modules that a result names beside its key, {name: [digest, file]}, since they were imported by names
        made as it ran, and that are something else by now."""
        also = result.get("also", {})
        try:
            return [name for name, (made, place) in also.items() if self._module(name, place) != made]
        except (AttributeError, TypeError, ValueError):  # made up
            return ["?"]

    def _module(self, name: str, place: str) -> str | None:
        return self._code.module(name, self._search_path, place)

    def libraries(self, node: NodeSpec) -> list[str]:
        """Where the libraries lie that the params of `node` name."""
        return [
            str(self._search_path / path)
            for name, value in node.params.items()
            if takes_libraries(node.stage.params[name].hint)
            for path in _paths_in(value)
        ]

    def stamps(self, node: NodeSpec) -> dict[str, str]:
        """Param -> what tells whether the files that it names are written to from now on."""
        found = {name: list(_paths_in(value)) for name, value in node.params.items()}
        return {name: self._stamp(paths) for name, paths in found.items() if paths}

    def changed(self, node: NodeSpec, action: Action) -> list[str]:
        """The params of `node` that name files which are no longer what the key of `action` was made of, or were
        written to meanwhile."""
        before = action.ingredients["params"]
        found = []
        for name, paths in ((name, list(_paths_in(value))) for name, value in node.params.items()):
            try:
                same = not paths or (
                    self._stamp(paths) == action.stamps.get(name) and self._param(node, name) == before[name]
                )
            except QpipeError:
                same = False
            if not same:
                found.append(name)
        return found

    def _stamp(self, paths: Sequence[Path]) -> str:
        try:
            return digest([stamp(self._search_path / path) for path in paths])
        except OSError:
            return "gone"

    def listings(self, ingredients: Mapping[str, Any]) -> dict[str, str]:
        """What the digests among `ingredients` are made of, as far as this keyring made them: {digest: text}, a line
        for each module of a code digest and for each file of a path's content. Of more than 2,000 files, nothing."""
        found = {}
        for made in digests_in(ingredients):
            if made in self._parts:
                self._listings[made] = listing(self._parts.pop(made))
            if text := self._listings.get(made):
                found[made] = text
        return found

    def _of_stage(self, node: NodeSpec) -> dict[str, Any]:
        stage = node.stage
        if stage.name not in self._stages:
            code = self._code.digest(*stage.modules)
            self._parts[code] = self._code.modules(*stage.modules)
            self._stages[stage.name] = {
                "format": FORMAT,
                "stage": stage.name,
                "version": stage.version,
                "function": stage.origin,
                "code": code,
                "libraries": self._code.libraries(*stage.modules),
            }
        return self._stages[stage.name]

    def _param(self, node: NodeSpec, name: str) -> Any:
        value = node.params[name]
        factories = frozenset(factories_in(value, node.stage.params[name].hint))
        return self._content(value, f"stages.{node.name}.{name}", factories)

    def _factory(self, name: str, address: str) -> dict[str, str]:
        try:
            code = self._code.digest_factory(name, self._search_path)
        except ConfigError as error:
            raise ConfigError(f"{address}: {error}") from error
        self._parts[code] = self._code.factory_parts(name, self._search_path)
        return {"function": name.partition(":")[2], "code": code}

    def _content(self, value: Any, address: str, factories: frozenset[str]) -> Any:
        """`value` as JSON, paths replaced by the digest of what lies there, and `factories` by that of their code."""
        if isinstance(value, str):
            return self._factory(value, address) if value in factories else value
        if isinstance(value, Path):
            return {"content": self._path(value, address)}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {str(k): self._content(item, f"{address}.{k}", factories) for k, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._content(item, address, factories) for item in value]
        return value

    def _path(self, path: Path, address: str) -> str:
        try:
            made, files = content(path if path.is_absolute() else self._search_path / path, self._memo)
        except FileNotFoundError as error:
            raise ConfigError(
                f"{address}: no file or folder at '{path}'. Give the path of an existing one."
            ) from error
        except OSError as error:
            raise InputError(f"{address}: cannot read '{path}': {error.strerror or error}.") from error
        self._parts[made] = files
        return made


def _paths_in(value: Any) -> Iterator[Path]:
    """Every path in the value of a param, as `Keyring` reads it."""
    if isinstance(value, Path):
        yield value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _paths_in(getattr(value, field.name))
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _paths_in(item)
