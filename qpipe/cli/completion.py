"""What TAB offers: commands, their options, nodes, runs and stages; Hydra completes the overrides.

Hydra's shell scripts call `qpipe -sc query=…` with the line in COMP_LINE. What is ours is answered here; where an
override is being typed, the line is rewritten as if only overrides stood on it, and Hydra answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from qpipe.cli.manual import COMMANDS, OPTIONS
from qpipe.cli.words import HYDRA_VALUED, take_options
from qpipe.errors import ConfigError
from qpipe.language.catalog import catalog
from qpipe.language.spec import RunSpec

_HELP = "--help"
_OPTIONS = ("--config-dir", "--config-name", "--multirun", _HELP)
"""Hydra's options that are offered."""
_FOLDERS = ("--config-dir", "-cd", "--config-path", "-cp")


def complete(environment: MutableMapping[str, str]) -> tuple[list[str], bool]:
    """The words that complete the line in `environment`, and whether Hydra is to add its own (its line is there)."""
    program, words = _words(environment)
    if not words:
        return [], True
    current = words[-1]
    before = [word for word in words[:-1] if word]
    if not before and not (current.startswith("-") or _is_override(current)):
        return _beginning(current, COMMANDS), True
    command, given = (before[0], before[1:]) if before and before[0] in COMMANDS else ("run", before)
    known = OPTIONS.get(command, {})
    found = _of_command(command, given, current, known)
    if found is not None:
        return found, False
    ours = [*_subjects(given, known), *known, *_values(given, known)]
    kept = [word for word in given if word not in ours and word.partition("=")[0] not in known]
    _, kept = take_options(kept, dict.fromkeys(HYDRA_VALUED, "VALUE"))
    flags = [word for word in kept if word.startswith("-")]
    environment["COMP_LINE"] = " ".join([program, *flags, *(word for word in kept if word not in flags), current])
    environment["COMP_POINT"] = str(len(environment["COMP_LINE"]))
    return [], True


def config_options(environment: Mapping[str, str]) -> list[str]:
    """The options of the line in `environment` that say where configs lie, for Hydra's own command line."""
    words = _words(environment)[1]
    try:
        found, _ = take_options(words[:-1], dict.fromkeys(HYDRA_VALUED, "VALUE"))
    except ConfigError:  # the value is being typed
        return []
    return [f"{name}={value}" for name, value in found.items() if name not in ("--cfg", "-c")]


def _words(environment: Mapping[str, str]) -> tuple[str, list[str]]:
    line = environment.get("COMP_LINE", "")
    program, *words = line[: int(environment.get("COMP_POINT", len(line)))].split(" ")
    return program, words


def _of_command(command: str, before: Sequence[str], current: str, known: dict[str, str]) -> list[str] | None:
    """What completes a word of `command`; None where it is an override that Hydra completes."""
    if before and known.get(before[-1]):
        return _beginning(current, _runs()) if known[before[-1]] == "RUN" else []
    if before and before[-1] in HYDRA_VALUED:
        return _folders(current) if before[-1] in _FOLDERS else []
    name, equals, value = current.partition("=")
    if equals and name in _FOLDERS:
        return [f"{name}={folder}" for folder in _folders(value)]
    if current.startswith("-"):
        return _beginning(current, dict.fromkeys([*known, *_OPTIONS]))
    if _is_override(current):
        done, comma, last = value.rpartition(",")  # of a sweep, the value behind the last comma
        found = values(name.lstrip("+"), _overrides(before))
        return [f"{name}={done}{comma}{each}" for each in _beginning(last, found)] if found and equals else None
    if current.count(".") == 2 and current.startswith("stages."):
        return _params(current, _overrides(before)) or None
    offer = _offer(command, _subjects(before, known))
    return None if offer is None else _beginning(current, offer(_overrides(before)))


def _params(typed: str, overrides: list[str]) -> list[str]:
    """`stages.NODE.PARAM=` of a node that was written by `uses` alone: its config does not have its params."""
    config = _composed(overrides)
    body = None if config is None else config.stages.get(typed.split(".")[1])
    if body is None or body.get("uses") not in catalog():
        return []
    place = typed.rpartition(".")[0]
    stage = catalog()[body.uses]
    names = [*stage.ports, *stage.params, "enabled"]
    return _beginning(typed, [f"{place}.{name}=" for name in names]) if set(names) - set(map(str, body)) else []


def values(address: str, overrides: list[str]) -> list[str]:
    """The values that an address takes where there are few: those of a Literal, an enum, a boolean; else []."""
    config = _composed(overrides)
    if config is None:
        return []
    from omegaconf import OmegaConf

    first, *path = address.split(".")
    hint: Any = None
    if first == "stages" and len(path) > 1:
        hint, path = _param(OmegaConf.select(config, f"stages.{path[0]}.uses"), path[1]), path[2:]
    elif first == "run":
        hint = RunSpec
    elif address == "cache.remote_mode":
        from qpipe.cache.shared.remote import Mode

        hint, path = Mode, []
    else:  # what the params of a stage are usually taken from
        for stage in catalog().values():
            for name, said in stage.config.items():
                source = str(said).removeprefix("${").removesuffix("}")
                if source != said and (address == source or address.startswith(f"{source}.")):
                    hint = stage.params[name].hint if name in stage.params else None
                    path = [key for key in address.removeprefix(source).split(".") if key]
    if address in _KNOWN:
        return list(_KNOWN[address])
    found = choices(_inside(hint, path))
    if not found and isinstance(OmegaConf.select(config, address, default=None), bool):
        found = ["true", "false"]
    return found


_KNOWN = {"run.device": ("cpu", "cuda"), "run.expect": ("cached", "null")}


def _param(uses: object, name: str) -> Any:
    """The type of a param of the stage `uses`; None where there is none."""
    if name == "enabled":
        return bool
    if uses not in catalog():
        return None
    param = catalog()[str(uses)].params.get(name)
    return None if param is None else param.hint


def _inside(hint: Any, path: Sequence[str]) -> Any:
    """The type of a field below a dataclass."""
    for key in path:
        held = [each for each in parts(hint) if dataclasses.is_dataclass(each)]
        hint = get_type_hints(held[0]).get(key) if held else None
    return hint


def choices(hint: Any) -> list[str]:
    """The values of a type that has few, as they are written; [] for one of others, too."""
    found: list[str] = []
    for each in parts(hint):
        if get_origin(each) is Literal:
            found += [str(value) for value in get_args(each)]
        elif isinstance(each, type) and issubclass(each, Enum):
            found += [str(member.value) for member in each]
        elif each is bool:
            found += ["true", "false"]
        elif each is type(None):
            found.append("null")
    return [] if found == ["null"] else found


def parts(hint: Any) -> list[Any]:
    """The members of a union, without what annotates them."""
    if get_origin(hint) is Annotated:
        return parts(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return [each for part in get_args(hint) for each in parts(part)]
    return [hint]


def _folders(typed: str) -> list[str]:
    """The folders that begin so."""
    place = Path(typed).expanduser() if typed.endswith("/") else Path(typed).expanduser().parent
    if not place.is_dir():
        return []
    found = (entry for entry in sorted(place.iterdir()) if entry.is_dir() and not entry.name.startswith("."))
    return _beginning(typed, (f"{entry}/" for entry in found))


def _subjects(words: Sequence[str], known: dict[str, str]) -> list[str]:
    """The words that are neither overrides nor options nor the values of options."""
    valued = {*(name for name, value in known.items() if value), *HYDRA_VALUED}
    return [
        word
        for i, word in enumerate(words)
        if not _is_override(word) and not word.startswith("-") and not (i and words[i - 1] in valued)
    ]


def _values(words: Sequence[str], known: dict[str, str]) -> list[str]:
    """The values of a command's own options."""
    return [word for i, word in enumerate(words) if i and known.get(words[i - 1])]


def _offer(command: str, subjects: Sequence[str]) -> Callable[[list[str]], Iterable[str]] | None:
    """What can stand after `subjects`; None for overrides alone."""
    count = len(subjects)
    if command == "why" and not count:
        return nodes
    if command == "verify" and not count:
        return lambda overrides: ["all", *nodes(overrides)]
    if (command == "diff" and count < 2) or (command in ("report", "rerun") and not count):
        return lambda _: _runs()
    if command == "stages" and not count:
        return lambda _: list(catalog())
    if command == "cache":
        from qpipe.cli.cache_commands import COMMANDS as SUBCOMMANDS

        if not count:
            return lambda _: list(SUBCOMMANDS)
        if "NODE" in SUBCOMMANDS.get(subjects[0], (None, ""))[1]:
            return nodes
    return None


def nodes(overrides: list[str]) -> list[str]:
    """The nodes of the pipeline that these overrides compose; [] where they compose none."""
    config = _composed(overrides)
    return [] if config is None else [str(name) for name in config.stages]


def _composed(overrides: list[str]) -> Any:
    from hydra import compose, initialize_config_module

    from qpipe.cli.compose import quick_hydra

    try:
        with quick_hydra(), initialize_config_module("qpipe.conf", version_base="1.3"):
            return compose("config", overrides=overrides)
    except Exception:  # an unfinished or wrong line has no nodes; the command itself will say what is wrong
        return None


def _overrides(words: Sequence[str]) -> list[str]:
    """The overrides among `words`; `--config-dir FOLDER` becomes Hydra's own for it."""
    found = [word for word in words if _is_override(word)]
    for i, word in enumerate(words):
        name, _, value = word.partition("=")
        if name in ("--config-dir", "-cd"):
            folder = value or (words[i + 1] if i + 1 < len(words) else "")
            found = [*(one for one in found if one != word), f"hydra.searchpath=['file://{Path(folder).absolute()}']"]
    return found


def _runs() -> list[str]:
    """`last`, `last~1` and the names of the runs below outputs/."""
    from qpipe.explain.past_runs import LAST, records

    return [LAST, f"{LAST}~1", *(record.parent.name for record in records())]


def _is_override(word: str) -> bool:
    return "=" in word or word.startswith(("~", "+"))


def _beginning(current: str, words: Iterable[str]) -> list[str]:
    return [word for word in words if word.startswith(current)]
