"""What is composed, and a Hydra and an OmegaConf in which a private name is no longer what it was.

    python -m tests.cli.composition FOLDER plain|quick [renamed|widened NAME]

prints what `composed` returns, and what was replaced for it. `renamed` gives the name another one, wherever Hydra and
OmegaConf say it; `widened` lets the function take one parameter more.
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any
from unittest import mock

ARGUMENTS = ["pipeline=autoquant", "goal.max_drop=1e-3", "+note='no'", "seed=010"]


def composed(arguments: list[str], folder: Path, quick: bool) -> dict[str, Any]:
    """What the task gets, what Hydra says of itself, and what it writes; `folder` is taken out of it."""
    import hydra
    import yaml
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from qpipe.cli.compose import quick_hydra
    from qpipe.cli.main import _register

    seen: dict[str, Any] = {}

    def task(config: Any) -> None:
        seen["config"] = OmegaConf.to_container(config)
        said = OmegaConf.to_yaml(HydraConfig.get()).replace(str(folder), "FOLDER")
        seen["hydra"] = yaml.safe_load(said)

    _register()
    argv = ["qpipe", *arguments, f"hydra.run.dir={folder}"]
    with mock.patch.object(sys, "argv", argv), quick_hydra() if quick else contextlib.nullcontext():
        hydra.main(version_base="1.3", config_path="pkg://qpipe.conf", config_name="config")(task)()
    for path in sorted((folder / ".hydra").iterdir()):
        seen[path.name] = yaml.safe_load(path.read_text().replace(str(folder), "FOLDER"))
    return seen


def renamed(source: str, name: str) -> ast.Module:
    return ast.parse(re.sub(rf"\b{name}\b", f"{name}_as_of_now", source))


def widened(source: str, name: str) -> ast.Module:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return widened(source, "__init__")
        if isinstance(node, ast.FunctionDef) and node.name == name:
            node.args.kwonlyargs.append(ast.arg("added"))
            node.args.kw_defaults.append(ast.Constant(None))
    return ast.fix_missing_locations(tree)


class Altered:
    """Finds the modules of Hydra and OmegaConf, and gives those that say `name` another source."""

    def __init__(self, change: Callable[[str, str], ast.Module], name: str) -> None:
        self.change, self.name = change, name

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in ("hydra", "omegaconf"):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or not isinstance(spec.loader, SourceFileLoader):
            return spec
        source = Path(spec.loader.path).read_text()
        if self.name in source:
            code = compile(self.change(source, self.name), spec.loader.path, "exec")
            spec.loader = Compiled(spec.loader.name, spec.loader.path, code)
        return spec


class Compiled(SourceFileLoader):
    def __init__(self, name: str, path: str, code: CodeType) -> None:
        super().__init__(name, path)
        self.code = code

    def get_code(self, fullname: str) -> CodeType:
        return self.code


def main() -> None:
    folder, how, *alteration = sys.argv[1:]
    if alteration:
        change = {"renamed": renamed, "widened": widened}[alteration[0]]
        sys.meta_path.insert(0, Altered(change, alteration[1]))  # type: ignore[arg-type]  # duck-typed, as they all are
    from qpipe.cli.compose import replacements

    known = replacements()
    before = [getattr(owner, name) for owner, name, _ in known]
    found = composed(ARGUMENTS, Path(folder), how == "quick")
    found["replaced"] = [f"{owner.__name__}:{name}" for owner, name, _ in known]
    found["left as it was"] = before == [getattr(owner, name) for owner, name, _ in known]
    print(json.dumps(found, default=repr))


if __name__ == "__main__":
    main()
