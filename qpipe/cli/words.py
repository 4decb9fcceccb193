"""The words of a command line: the command, its options, what it is about, and the options that are Hydra's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qpipe.cli.manual import COMMANDS
from qpipe.errors import ConfigError
from qpipe.param import listed, nearest

HYDRA_VALUED = (
    *("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--package", "-p", "--cfg", "-c"),
    "--experimental-rerun",
)
"""Hydra's options that take a value."""

HYDRA_FLAGS = (
    *("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m"),
    *("--shell-completion", "-sc", "--info", "-i"),
)


def split_command(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """(command, the other arguments); without a command it is `run`."""
    if arguments and arguments[0] in COMMANDS:
        return arguments[0], list(arguments[1:])
    return "run", list(arguments)


def is_subject(words: Sequence[str]) -> bool:
    """Whether the first word is the name of a thing, rather than an override or an option."""
    return bool(words) and "=" not in words[0] and words[0][:1] not in ("-", "+", "~")


def take_options(
    words: Sequence[str], known: Mapping[str, str], several: Mapping[str, list[str]] | None = None
) -> tuple[dict[str, str], list[str]]:
    """The options among `words`, `--name VALUE` or `--name=VALUE`, and the other words. `known` is {option: what its
    value is called}, "" for an option that takes none; of those in `several` every value goes into the list. Errors:
    ConfigError for a value that is missing."""
    found: dict[str, str] = {}
    rest: list[str] = []
    pending = list(reversed(words))
    while pending:
        word = pending.pop()
        name, equals, value = word.partition("=")
        if name not in known or (equals and not known[name]):
            rest.append(word)
        elif known[name] and not equals and (not pending or pending[-1].startswith("--")):
            raise ConfigError(f"{name}: has no value. Say `{name} {known[name]}`.")
        else:
            found[name] = pending.pop() if known[name] and not equals else value
            if several and name in several:
                several[name].append(found[name])
    return found, rest


def arranged(words: Sequence[str]) -> list[str]:
    """`words` with Hydra's options first: its parser takes no override behind one that stands among overrides. Errors:
    ConfigError for an option that there is not, or whose value is missing."""
    options: list[str] = []
    rest: list[str] = []
    pending = list(reversed(words))
    while pending:
        word = pending.pop()
        name, equals, _ = word.partition("=")
        if not word.startswith("-"):
            rest.append(word)
        elif name in HYDRA_VALUED and not equals:
            if not pending:
                raise ConfigError(f"{name}: has no value. Say `{name} …`.")
            options += [word, pending.pop()]
        elif name in HYDRA_VALUED or name in HYDRA_FLAGS:
            options.append(word)
        else:
            known = [each for each in (*HYDRA_VALUED, *HYDRA_FLAGS) if each.startswith("--")]
            raise ConfigError(f"{name}: there is no such option.{nearest(name, known)} Options: {listed(known)}.")
    return [*options, *rest]
