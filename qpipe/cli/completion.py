"""What TAB offers: commands, their options, nodes, runs and stages; Hydra completes the overrides.

Hydra's shell scripts call `qpipe -sc query=…` with the line in COMP_LINE. What is ours is answered here; where an
override is being typed, the line is rewritten as if only overrides stood on it, and Hydra answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping, Sequence

from qpipe.cli.manual import COMMANDS, OPTIONS
from qpipe.cli.words import HYDRA_VALUED

_HELP = "--help"


def complete(environment: MutableMapping[str, str]) -> tuple[list[str], bool]:
    """The words that complete the line in `environment`, and whether Hydra is to add its own (its line is there)."""
    line = environment.get("COMP_LINE", "")
    typed = line[: int(environment.get("COMP_POINT", len(line)))]
    program, *words = typed.split(" ")
    if not words:
        return [], True
    current = words[-1]
    before = [word for word in words[:-1] if word]
    if not before:
        return _beginning(current, COMMANDS), True
    command = before[0]
    if command not in COMMANDS:
        return [], True
    known = OPTIONS.get(command, {})
    found = _of_command(command, before[1:], current, known)
    if found is not None:
        return found, False
    ours = [*_subjects(before[1:], known), *known, *_values(before[1:], known)]
    kept = [word for word in before[1:] if word not in ours and word.partition("=")[0] not in known]
    environment["COMP_LINE"] = " ".join([program, *kept, current])
    environment["COMP_POINT"] = str(len(environment["COMP_LINE"]))
    return [], True


def _of_command(command: str, before: Sequence[str], current: str, known: dict[str, str]) -> list[str] | None:
    """What completes a word of `command`; None where it is an override."""
    if before and known.get(before[-1]):
        return _beginning(current, _runs()) if known[before[-1]] == "RUN" else []
    if current.startswith("--"):
        return _beginning(current, [*known, _HELP])
    if _is_override(current):
        return None
    offer = _offer(command, _subjects(before, known))
    return None if offer is None else _beginning(current, offer(_overrides(before)))


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
        from qpipe.language.catalog import catalog

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
    from hydra import compose, initialize_config_module

    try:
        with initialize_config_module("qpipe.conf", version_base="1.3"):
            return [str(name) for name in compose("config", overrides=overrides).stages]
    except Exception:  # an unfinished or wrong line has no nodes; the command itself will say what is wrong
        return []


def _overrides(words: Sequence[str]) -> list[str]:
    """The overrides among `words`; `--config-dir FOLDER` becomes Hydra's own for it."""
    found = [word for word in words if _is_override(word)]
    for i, word in enumerate(words):
        name, _, value = word.partition("=")
        if name == "--config-dir":
            folder = value or (words[i + 1] if i + 1 < len(words) else "")
            found = [*(one for one in found if one != word), f"hydra.searchpath=[file://{folder}]"]
    return found


def _runs() -> list[str]:
    """`last`, `last~1` and the names of the runs below outputs/."""
    from qpipe.explain.past_runs import LAST, records

    return [LAST, f"{LAST}~1", *(record.parent.name for record in records())]


def _is_override(word: str) -> bool:
    return "=" in word or word.startswith(("~", "+"))


def _beginning(current: str, words: Iterable[str]) -> list[str]:
    return [word for word in words if word.startswith(current)]
