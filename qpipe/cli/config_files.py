"""The config files that a person wrote, in the folders of `--config-dir`: read again where a mistake is told, for the
line it stands in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

_OPTIONS = ("--config-dir", "-cd", "--config-path", "-cp")
_HEADER = r"\s*#\s*@package\s+(\S+)\s*$"
_SEARCHED = r"file://([^,\]\s'\"]+)"


def config_folders(arguments: Sequence[str]) -> list[Path]:
    """The folders that a command line names: `--config-dir DIR`, `--config-path DIR`, `hydra.searchpath=[file://…]`."""
    found: list[Path] = []
    for i, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name in _OPTIONS:
            found += [Path(value or arguments[i + 1])] if value or i + 1 < len(arguments) else []
        elif equals and name.lstrip("+") == "hydra.searchpath":
            found += [Path(each) for each in re.findall(_SEARCHED, value)]
    return [folder for folder in found if folder.is_dir()]


def shipped_folder() -> Path:
    """Where qpipe's own config files lie."""
    return Path(str(files("qpipe.conf")))


def groups(folders: Sequence[Path]) -> dict[str, list[str]]:
    """{group: its options}: the shipped ones, then those in `folders`."""
    found: dict[str, dict[str, None]] = {}
    for folder in (shipped_folder(), *folders):
        for path in sorted(folder.glob("*/*.yaml")):
            found.setdefault(path.parent.name, {})[path.stem] = None
    return {group: list(options) for group, options in found.items()}


def config_files(folders: Sequence[Path]) -> Iterator[Path]:
    """Every YAML file in them."""
    for folder in folders:
        yield from sorted(path for path in folder.rglob("*.yaml") if path.is_file())


def shown(path: str | Path) -> str:
    """The path as a person finds it: from the working directory where it lies below it."""
    found = Path(path)
    return str(found.relative_to(Path.cwd()) if found.is_relative_to(Path.cwd()) else found)


def package(path: Path) -> str:
    """What the header `# @package NAME` of a file says; "" where it has none."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if found := re.match(_HEADER, line):
                return found[1]
            if line.strip() and not line.lstrip().startswith("#"):
                break
    return ""


def place(address: str, folders: Sequence[Path]) -> str:
    """"FILE:LINE" of `stages.a.uses` where one file has it; else ""."""
    keys = [key for key in re.split(r"[.\[\]]+", address) if key]
    found = []
    for path, root in _trees(folders):
        node: Any = root
        mark = None
        for key in keys:
            mark, node = _entry(node, key)
        if mark is not None:
            found.append(f"{shown(path)}:{mark.line + 1}")
    return found[0] if len(found) == 1 else ""


def odd_name(name: object, folders: Sequence[Path]) -> tuple[str, str]:
    """("FILE:LINE", the word that stands there) of a node whose name YAML reads as `name`, which is no text."""
    for path, root in _trees(folders):
        for body in (root, *(value for _, value in _pairs(root))):  # below `stages`, or below a package
            for key, value in _pairs(body):
                if key.value != "stages":
                    continue
                for node, _ in _pairs(value):
                    if isinstance(node, yaml.ScalarNode) and not node.tag.endswith(":str") and _read(node) == name:
                        return f"{shown(path)}:{node.start_mark.line + 1}", node.value
    return "", str(name)


def not_utf8(folders: Sequence[Path]) -> tuple[Path, int] | None:
    """The first file that is no text in UTF-8, and the line of its first wrong byte."""
    for path in config_files(folders):
        content = path.read_bytes()
        try:
            content.decode()
        except UnicodeDecodeError as error:
            return path, content.count(b"\n", 0, error.start) + 1
    return None


def _trees(folders: Sequence[Path]) -> Iterator[tuple[Path, yaml.Node]]:
    for path in config_files(folders):
        try:
            root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except (yaml.YAMLError, UnicodeDecodeError, OSError, RecursionError):
            continue
        if root is not None:
            yield path, root


def _pairs(node: Any) -> list[tuple[Any, Any]]:
    return node.value if isinstance(node, yaml.MappingNode) else []


def _entry(node: Any, key: str) -> tuple[Any, Any]:
    """(mark, value) of an entry of a mapping or a list; (None, None) where there is none."""
    for name, value in _pairs(node):
        if name.value == key:
            return name.start_mark, value
    if isinstance(node, yaml.SequenceNode) and key.isdecimal() and int(key) < len(node.value):
        return node.value[int(key)].start_mark, node.value[int(key)]
    return None, None


def _read(node: yaml.ScalarNode) -> Any:
    return yaml.safe_load(node.value)


_GLOBAL = "_global_"
_GROUPS = ("pipeline", "experiment", "model", "data")
"""The groups whose files speak of the whole config, so that each has to begin with its header."""
_WHOLE = ("stages", "goal", "ladder", "baselines", "targets", "allow_discouraged")
"""What belongs at the top of a config."""


def without_header(config: Mapping[str, Any], folders: Sequence[Path]) -> tuple[Path, str] | None:
    """The file whose header is missing or misspelled, and below what the things that it says lie instead of at the top
    of `config`; None where all is in its place."""
    for group in _GROUPS:
        if group in config and (group in _GROUPS[:2] or _speaks_of_all(config[group], group)):
            files = config_files([folder / group for folder in folders])
            if path := next((path for path in files if package(path) != _GLOBAL), None):
                return path, group
    for name in config:
        if name in _WHOLE or name not in config:  # the second: `???`
            continue
        if not isinstance(config[name], Mapping) or "stages" not in config[name]:
            continue
        if path := next((path for path in config_files(folders) if package(path) == name), None):
            return path, str(name)
    return None


def _speaks_of_all(body: Any, group: str, depth: int = 3) -> bool:
    return isinstance(body, Mapping) and depth > 0 and any(
        name in (*_WHOLE, group) or (name in body and _speaks_of_all(body[name], group, depth - 1)) for name in body
    )


def not_read(choices: Mapping[str, str | None], arguments: Sequence[str]) -> str | None:
    """What is said where a file in the person's folders has the name of a shipped one that was taken instead of it;
    None where every file that was asked for is read. `choices` are {group: option}."""
    folders = config_folders(arguments)
    for group, option in choices.items() if folders else ():
        if "@" in group or not option:
            continue
        name = f"{group}/{option}.yaml"
        if path := _other(name, folders):
            return (
                f"{shown(path)}: it is not read, since {group}={option} is qpipe's own. Rename the file, say to "
                f"my_{Path(option).name}.yaml, and take {group}=my_{Path(option).name}."
            )
    path = _other("config.yaml", folders)
    asked = any(word.partition("=")[0] in ("--config-name", "-cn") for word in arguments)
    if path is None or not (asked or _of_a_run(path.parent)):
        return None
    folder = path.parent.parent if path.parent.name == ".hydra" else path.parent
    if _of_a_run(path.parent):
        return (
            f"{shown(path)}: it is not read, since `config` is qpipe's own. To run again what that run recorded, say "
            f"`qpipe rerun {shown(folder)}`."
        )
    return f"{shown(path)}: it is not read, since `config` is qpipe's own. Rename it and say --config-name NAME."


def _of_a_run(folder: Path) -> bool:
    return folder.name == ".hydra" or (folder / "record.json").is_file()


def _other(name: str, folders: Sequence[Path]) -> Path | None:
    """The file of that name in one of the folders, where a shipped one of another content goes before it."""
    shipped = shipped_folder()
    if not (shipped / name).is_file():
        return None
    for folder in folders:
        if (path := folder / name).is_file() and path.read_bytes() != (shipped / name).read_bytes():
            return path
    return None
