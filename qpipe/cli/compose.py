"""Hydra's own cost, cut: what it takes to compose a config of thousands of nodes, or the thousand configs of a sweep.

Hydra composes every config twice (the first time only to read `hydra.mode`), and OmegaConf reads and writes YAML with
the parser written in Python. Within `quick_hydra` the same config is composed once, by libyaml; `benchmarks/cache.py`
measures it against plain Hydra. Of a sweep, what the files say is merged once for each choice of groups; a job that
sets other values is a copy of that, with its overrides applied and resolved by Hydra as ever; `benchmarks/sweep.py`
measures that. What is composed is the same, tests/cli/test_compose.py holds it against plain Hydra.
Rejected: a cache of composed configs on the disk, which would have to know all that an interpolation may read.

All that is replaced is private. So each name is looked up first: where one is missing, or takes other parameters than
it took, nothing that rests on it is replaced, and plain Hydra composes: slower, and the same.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig

COMPOSING: Mapping[tuple[str, str], str] = {
    ("hydra._internal.hydra", "Hydra"): "(task_name, config_loader)",
    ("hydra._internal.hydra", "Hydra.create_main_hydra2"): "(task_name, config_search_path)",
    ("hydra._internal.hydra", "Hydra.get_mode"): "(self, config_name, overrides)",
    ("hydra._internal.hydra", "Hydra.compose_config"): (
        "(self, config_name, overrides, run_mode, with_log_configuration=False, from_shell=True, "
        "validate_sweep_overrides=True)"
    ),
}
_LOADER = "hydra._internal.config_loader_impl"
SWEEPING: Mapping[tuple[str, str], str] = {
    (_LOADER, "create_defaults_list"): "(repo, config_name, overrides_list, prepend_hydra, skip_missing)",
    ("hydra._internal.defaults_list", "Overrides"): "(repo, overrides_list)",
    (_LOADER, "ConfigLoaderImpl._compose_config_from_defaults_list"): "(self, defaults, repo)",
    (_LOADER, "ConfigLoaderImpl._parse_overrides_and_create_caching_repo"): "(self, config_name, overrides)",
}
READING = {
    ("omegaconf._utils", "get_yaml_loader"): "()",
    ("omegaconf.basecontainer", "get_yaml_loader"): "()",
}
WRITING = {("omegaconf.omegaconf", "get_omega_conf_dumper"): "()"}
"""{(module, private name): its parameters}. What stands in one of the four is replaced together, or not at all."""

_FORCED = "hydra.mode=RUN"  # what Hydra adds to the overrides where no mode was asked for


@contextlib.contextmanager
def quick_hydra() -> Iterator[None]:
    """Within, Hydra composes once and YAML is read and written by libyaml, where PyYAML has it."""
    replaced = replacements()
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    try:
        for owner, name, value in replaced:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def replacements() -> list[tuple[Any, str, Any]]:
    """(module, name, what takes its place) of all that is as it is known here."""
    found: list[tuple[Any, str, Any]] = []
    if _known(COMPOSING):
        module = importlib.import_module("hydra._internal.hydra")
        found.append((module, "Hydra", _composing_once(module.Hydra)))
    if _known(SWEEPING):
        found += _merging_once(importlib.import_module(_LOADER))
    if not getattr(yaml, "__with_libyaml__", False):
        return found
    for names, quick in ((READING, yaml_loader), (WRITING, yaml_dumper)):
        if not _known(names):
            continue
        places = [(importlib.import_module(module), name) for module, name in names]
        getters = {getattr(module, name) for module, name in places}
        made = quick(getters.pop()()) if len(getters) == 1 else None
        if made is not None:
            get = functools.partial(_always, made)  # made once, where OmegaConf makes a class for each file
            found += [(module, name, get) for module, name in places]
    return found


def _always(made: type[Any]) -> type[Any]:
    return made


def _known(names: Mapping[tuple[str, str], str]) -> bool:
    return all(parameters(module, name) == expected for (module, name), expected in names.items())


def parameters(module: str, name: str) -> str | None:
    """What a name of a module takes, without types: "(self, deep=False)"; None where it is none, or not there."""
    try:
        place: Any = importlib.import_module(module)
        found = inspect.signature(functools.reduce(getattr, name.split("."), place))
    except (ImportError, AttributeError, TypeError, ValueError):
        return None
    untyped = [each.replace(annotation=each.empty) for each in found.parameters.values()]
    return str(found.replace(parameters=untyped, return_annotation=found.empty))


def _composing_once(plain: Any) -> type[Any]:
    """Hydra that keeps the config it composed to learn the mode, and runs with it."""

    class QuickHydra(plain):  # type: ignore[misc]  # hydra ships no types that mypy reads here
        _kept: tuple[str | None, list[str], DictConfig] | None = None

        def get_mode(self, config_name: str | None, overrides: list[str]) -> Any:
            """As Hydra's: the mode the config asks for, None where it asks for none or is wrong."""
            try:
                config = self.compose_config(config_name, overrides, RunMode.RUN, with_log_configuration=True)
            except Exception:  # a sweep's overrides, or a mistake: Hydra will say so in its own order
                return super().get_mode(config_name, overrides)
            self._kept = (config_name, list(overrides), config)
            return config.hydra.mode

        def compose_config(
            self, config_name: str | None, overrides: list[str], run_mode: RunMode, *rest: Any, **options: Any
        ) -> DictConfig:
            """The composed config: the one that is kept, once, where it is the one that is asked for."""
            kept, self._kept = self._kept, None
            asked = (run_mode, rest, options)
            if kept is not None and asked == (RunMode.RUN, (), {"with_log_configuration": True}):
                if (config_name, overrides) == kept[:2]:
                    return kept[2]
                if (config_name, overrides) == (kept[0], [*kept[1], _FORCED]):
                    kept[2].hydra.overrides.hydra.append(_FORCED)
                    kept[2].hydra.mode = RunMode.RUN
                    return kept[2]
            composed: DictConfig = super().compose_config(config_name, overrides, run_mode, *rest, **options)
            return composed

    return QuickHydra


def _merging_once(module: Any) -> list[tuple[Any, str, Any]]:
    """What parses overrides once each, and reads and merges files once for each choice of groups."""
    loader = module.ConfigLoaderImpl
    kept = _Merged(
        loader._parse_overrides_and_create_caching_repo,
        module.create_defaults_list,
        loader._compose_config_from_defaults_list,
    )
    return [
        (loader, "_parse_overrides_and_create_caching_repo", lambda *rest: kept.parsed(*rest)),
        (module, "create_defaults_list", kept.listed),
        (loader, "_compose_config_from_defaults_list", lambda *rest, **named: kept.merged(*rest, **named)),
    ]


class _Merged:
    """What the files of a config come to, by the groups that were chosen, before any value is overridden.

    Hydra merges without copying, into what it read: so every merge reads the files anew, and what it gave is kept as
    bytes. `hydra.searchpath` on the command line changes what is read: then all is left to Hydra.
    """

    def __init__(
        self, parse: Callable[..., Any], list_defaults: Callable[..., Any], merge: Callable[..., Any]
    ) -> None:
        self._parse, self._list, self._merge = parse, list_defaults, merge
        self._overrides: dict[str, Any] = {}
        self._places: dict[tuple[int, str | None], tuple[Any, Any]] = {}
        """By loader and config: the loader, so that no other gets its number, and a repository that only says what
        groups there are."""
        self._lists: dict[tuple[Any, ...], Any] = {}
        self._bases: dict[tuple[Any, ...], bytes] = {}
        self._fresh: Callable[[], Any] | None = None

    def parsed(self, loader: Any, config_name: str | None, lines: Sequence[str]) -> tuple[list[Any], Any]:
        """As Hydra's: the overrides, and where configs are read."""
        for line in lines:
            if line not in self._overrides:
                self._overrides[line] = OverridesParser.create().parse_overrides([line])[0]
        found = [self._overrides[line] for line in lines]
        if any(each.get_key_element() == "hydra.searchpath" for each in found):
            self._fresh = None
            return self._parse(loader, config_name, lines)  # type: ignore[no-any-return]
        place = (id(loader), config_name)
        if place not in self._places:
            self._places[place] = loader, self._parse(loader, config_name, [])[1]
        self._fresh = lambda: self._parse(loader, config_name, [])[1]
        return found, self._places[place][1]

    def listed(
        self, repo: Any, config_name: str | None, overrides_list: list[Any], prepend_hydra: bool, skip_missing: bool
    ) -> Any:
        """As Hydra's: the files to merge, in order, and the overrides that are left to apply."""
        rest = (config_name, overrides_list, prepend_hydra, skip_missing)
        if self._fresh is None:
            return self._list(repo, *rest)
        from hydra._internal.defaults_list import Overrides

        values = Overrides(repo=repo, overrides_list=overrides_list).config_overrides
        groups = tuple(each.input_line for each in overrides_list if not any(each is value for value in values))
        key = (id(repo), config_name, groups, prepend_hydra, skip_missing)
        if key not in self._lists:
            self._lists[key] = self._list(self._fresh(), *rest)
        return replace(self._lists[key], config_overrides=values)

    def merged(self, loader: Any, defaults: Sequence[Any], repo: Any) -> DictConfig:
        """As Hydra's: the files merged."""
        if self._fresh is None:
            return self._merge(loader, defaults=defaults, repo=repo)  # type: ignore[no-any-return]
        key = (id(repo), *(repr(each) for each in defaults))
        if key not in self._bases:
            self._bases[key] = pickle.dumps(self._merge(loader, defaults=defaults, repo=self._fresh()))
        base: DictConfig = pickle.loads(self._bases[key])
        return base


def yaml_loader(plain: type[Any]) -> type[Any] | None:
    """OmegaConf's loader on top of libyaml: its numbers, no time stamps, no key twice. None where it does more."""
    own = {"construct_mapping", "yaml_constructors", "yaml_implicit_resolvers"}
    if plain.__bases__ != (yaml.SafeLoader,) or _own(plain) != own:
        return None
    tables = ("yaml_constructors", "yaml_multi_constructors", "yaml_implicit_resolvers")
    return type("Loader", (yaml.CSafeLoader, plain), {name: getattr(plain, name) for name in tables})


def yaml_dumper(plain: type[Any]) -> type[Any] | None:
    """OmegaConf's dumper on top of libyaml: a text that reads as something else is quoted, which is asked once for a
    text. None where it does more."""
    own = {"str_representer", "str_representer_added", "yaml_representers"}
    if plain.__bases__ != (yaml.Dumper,) or _own(plain) != own:
        return None
    asked: dict[str, tuple[str, str | None]] = {}
    representers = dict(plain.yaml_representers)
    represent_text = representers[str]

    def represent(dumper: yaml.CDumper, text: str) -> yaml.ScalarNode:
        if text in asked:
            tag, style = asked[text]
            return dumper.represent_scalar(tag, text, style=style)
        node: yaml.ScalarNode = represent_text(dumper, text)
        asked[text] = (node.tag, node.style)
        return node

    tables = {
        "yaml_representers": {**representers, str: represent},
        "yaml_multi_representers": plain.yaml_multi_representers,
    }
    return type("Dumper", (yaml.CDumper, plain), tables)


class _Empty:
    """What every class has."""


def _own(made: type[Any]) -> set[str]:
    """What a class itself defines."""
    return set(vars(made)) - set(vars(_Empty))
