"""Hydra's own cost, cut: what it takes to compose a config of thousands of nodes.

Hydra composes every config twice (the first time only to read `hydra.mode`), and OmegaConf reads and writes YAML with
the parser written in Python. Within `quick_hydra` the same config is composed once, by libyaml; `benchmarks/cache.py`
measures it against plain Hydra. What is composed is the same, tests/cli/test_compose.py holds it against plain Hydra.
Rejected: a cache of composed configs, which would have to know all that an interpolation may read.

All that is replaced is private. So each name is looked up first: where one is missing, or takes other parameters than
it took, nothing that rests on it is replaced, and plain Hydra composes: slower, and the same.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
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
READING = {
    ("omegaconf._utils", "get_yaml_loader"): "()",
    ("omegaconf.basecontainer", "get_yaml_loader"): "()",
}
WRITING = {("omegaconf.omegaconf", "get_omega_conf_dumper"): "()"}
"""{(module, private name): its parameters}. What stands in one of the three is replaced together, or not at all."""

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
