"""Hydra's own cost, cut: what it takes to compose a config of thousands of nodes.

Hydra composes every config twice (the first time only to read `hydra.mode`), and OmegaConf reads and writes YAML with
the parser written in Python. Within `quick_hydra` the same config is composed once, by libyaml; `benchmarks/cache.py`
measures it against plain Hydra. What is composed is the same, tests/cli/test_compose.py holds it against plain Hydra.
Rejected: a cache of composed configs, which would have to know all that an interpolation may read.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import yaml
from hydra._internal import hydra as hydra_internal
from hydra.types import RunMode
from omegaconf import DictConfig, _utils, basecontainer, omegaconf

_FORCED = "hydra.mode=RUN"  # what Hydra adds to the overrides where no mode was asked for


@contextlib.contextmanager
def quick_hydra() -> Iterator[None]:
    """Within, Hydra composes once and YAML is read and written by libyaml, where PyYAML has it."""
    replaced: list[tuple[Any, str, Any]] = [(hydra_internal, "Hydra", QuickHydra)]
    if getattr(yaml, "__with_libyaml__", False):
        replaced += [(module, "get_yaml_loader", yaml_loader) for module in (_utils, basecontainer)]
        replaced += [(omegaconf, "get_omega_conf_dumper", yaml_dumper)]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    try:
        for owner, name, value in replaced:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


class QuickHydra(hydra_internal.Hydra):  # type: ignore[misc]  # hydra ships no types that mypy reads here
    """Hydra that keeps the config it composed to learn the mode, and runs with it."""

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
        if kept is not None and run_mode == RunMode.RUN and kept[0] == config_name:
            if overrides == kept[1]:
                return kept[2]
            if overrides == [*kept[1], _FORCED]:
                kept[2].hydra.overrides.hydra.append(_FORCED)
                kept[2].hydra.mode = RunMode.RUN
                return kept[2]
        composed: DictConfig = super().compose_config(config_name, overrides, run_mode, *rest, **options)
        return composed


@functools.cache
def yaml_loader() -> type[yaml.CSafeLoader]:
    """OmegaConf's loader on top of libyaml: its numbers, no time stamps, no key twice. Made once, not once a file."""
    original = _plain_loader()

    class Loader(yaml.CSafeLoader):
        yaml_implicit_resolvers = original.yaml_implicit_resolvers
        yaml_constructors = original.yaml_constructors

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys: set[str] = set()
            for key, _ in node.value:
                if key.tag == "tag:yaml.org,2002:str":
                    if key.value in keys:
                        raise yaml.constructor.ConstructorError(
                            "while constructing a mapping",
                            node.start_mark,
                            f"found duplicate key {key.value}",
                            key.start_mark,
                        )
                    keys.add(key.value)
            return super().construct_mapping(node, deep=deep)

    return Loader


@functools.cache
def yaml_dumper() -> type[yaml.CDumper]:
    """OmegaConf's dumper on top of libyaml: a text that reads as something else is quoted."""
    quoted = functools.cache(
        lambda text: _utils.yaml_is_bool(text) or _utils.is_int(text) or _utils.is_float(text)
    )

    class Dumper(yaml.CDumper):
        pass

    def represent(dumper: yaml.CDumper, text: str) -> yaml.ScalarNode:
        style = "'" if quoted(text) else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, represent)
    return Dumper


_plain_loader = _utils.get_yaml_loader
