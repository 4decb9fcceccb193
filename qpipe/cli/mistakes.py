"""What Hydra, OmegaConf and YAML found wrong, in one line: the file and line or the address, what was found, what there
is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, KeyValidationError, OmegaConfBaseException

from qpipe.cli.config_files import config_folders, groups, not_utf8, odd_name, place, shown
from qpipe.language.interpolation import wrong_interpolation
from qpipe.param import listed, nearest

_TECHNICAL = ("full_key:", "object_type=", "reference_type=", "provider=", "Config search path", "Search path")


def one_line(error: BaseException, arguments: Sequence[str] = ()) -> str:
    """An error of Hydra's, of OmegaConf's or of YAML's in one line; `arguments` are those of the command line."""
    folders = config_folders(arguments)
    if isinstance(error, yaml.YAMLError):
        return _unreadable(error)
    if isinstance(error, UnicodeDecodeError) and (wrong := not_utf8(folders)):
        return f"{wrong[0]}:{wrong[1]}: this is no text in UTF-8. Save the file as UTF-8."
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        return _unknown_option(error.missing_cfg_file, error.options)
    if isinstance(error, OverrideParseException):
        problem = next(_sentences(error.message), "").partition(" expecting ")[0]
        return f"'{error.override}' cannot be read ({problem}). Say KEY=VALUE, and put quotes around a VALUE of signs."
    cause = error.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and isinstance(cause.parent_node, DictConfig):
        return _unknown_key(str(cause.full_key), str(cause.key), cause.parent_node)
    if isinstance(cause, KeyValidationError) and (found := odd_name(None, folders))[0]:
        what = found[1] or "nothing"
        return f"{found[0]}: a key is {what}, which YAML reads as null. Put it in quotes, or take another."
    for one in (error, cause):
        if isinstance(one, OmegaConfBaseException) and one.full_key:
            typed = any(word.lstrip("+").startswith(f"{one.full_key}=") for word in arguments)
            where = "" if typed else place(one.full_key, folders)
            return wrong_interpolation(one, f" ({where})" if where else "")
    return " ".join(_sentences(str(error))) or " ".join(_sentences(str(cause or type(error).__name__)))


def _sentences(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if (stripped := line.strip()) and not stripped.startswith(_TECHNICAL):
            yield stripped


def _unreadable(error: yaml.YAMLError) -> str:
    """FILE:LINE: what YAML does not take there."""
    if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark or error.context_mark):
        return f"{shown(mark.name)}:{mark.line + 1}: {_said(error, mark)}"
    if isinstance(error, yaml.reader.ReaderError):
        with open(error.name, encoding="utf-8", errors="replace") as file:
            line = file.read(error.position).count("\n") + 1
        code = error.character if isinstance(error.character, int) else ord(error.character)
        return f"{shown(error.name)}:{line}: a character that YAML does not take (U+{code:04X}). Remove it."
    return " ".join(_sentences(str(error)))


def _said(error: yaml.MarkedYAMLError, mark: yaml.Mark) -> str:
    problem, begun = error.problem or error.context or "", error.context_mark
    file = Path(mark.name)
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    here = lines[mark.line] if mark.line < len(lines) else ""
    if "cannot start any token" in problem and "\t" in here[: mark.column + 1]:
        return "a tab, where YAML indents with spaces alone. Put spaces there."
    if found := re.search(r"duplicate key '?([^'\n]*?)'?$", problem):
        return f"'{found[1]}' is there twice. Remove one, or give it another name."
    if found := re.search(r"constructor for the tag '([^']*)'", problem):
        return f"the tag '{found[1]}' means nothing in a config. Remove it."
    if "flow" in (error.context or "") and begun is not None:
        opening = lines[begun.line] if begun.line < len(lines) else ""
        bracket = opening[begun.column : begun.column + 1] or "{"
        quote = " Put an interpolation that stands in braces in quotes: \"${…}\"." if "${" in opening else ""
        return f"the '{bracket}' of line {begun.line + 1} is not closed here.{quote or ' Close it.'}"
    where = f" ({error.context}, line {begun.line + 1})" if begun is not None and error.context else ""
    return f"{problem}{where}. Mend the file there."


def _unknown_option(path: str, options: list[str]) -> str:
    group, _, name = path.rpartition("/")
    return f"{group}: there is no '{name}'.{nearest(name, options)} There are: {listed(options)}."


def _unknown_key(address: str, key: str, parent: DictConfig) -> str:
    place = address.rpartition(".")[0]
    known = {str(name) for name in parent} - {"hydra"}
    if not place:
        known |= _groups()
    return f"{place or 'config'}: there is no '{key}'.{nearest(key, known)} There are: {listed(known)}."


def _groups() -> set[str]:
    """The groups of the config, `pipeline` and the like."""
    return set(groups(()))
