"""The house's floors: who may import whom, and what loading a part may load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qpipe.keys.syntax import Import, analyse

ROOT = Path(__file__).parents[1]
CACHE = [
    *("index", "disk", "lock", "usage", "store", "pins", "cleanup", "audit", "archive"),
    *("objects", "remote", "lease", "uploads", "signing", "promises", "tier"),
]
COLUMN = [
    *("errors", "mapped", "hashing", "companions", "syntax", "code", "loaded", "artifact"),
    *(f"cache.{name}" for name in CACHE),
    *("changes", "history", "param", "stage", "catalog", "spec", "graph", "plan", "estimate"),
    *("action", "workers", "executor", "record", "runs", "explain", "difference", "differing", "verify", "sweep"),
    *("commands", "cache_commands", "explain_commands", "compose", "mistakes", "manual", "completion", "cli"),
    "__main__",
]
"""The engine; each file may import only what stands before it."""

VOCABULARY = {"qpipe.errors", "qpipe.stage", "qpipe.param"}
"""What a stage may take from the engine: the words it is declared with."""

WINGS = {"model", "numerics", "report", "demo"}
HEAVY = ("torch", "onnx", "onnxruntime", "onnx_ir", "onnxscript", "numpy", "scipy", "diskcache")


def imported(file: Path, package: str) -> set[str]:
    """The full names that a file's imports may mean, wherever in the file they stand."""
    found = set()
    for item in analyse(file.read_bytes(), str(file)).imports:
        base = _base(item, package)
        found |= {base} | {f"{base}.{name}" for name in item.names}
    return found


def _base(item: Import, package: str) -> str:
    if not item.level:
        return item.module
    parts = package.split(".")[: len(package.split(".")) + 1 - item.level]
    return ".".join([*parts, item.module] if item.module else parts)


def parts(names: set[str]) -> set[str]:
    """The parts of qpipe among full names: "cache.store" for "qpipe.cache.store.Store"; a chance string is none."""
    found = [name.split(".")[1:] for name in names if name.startswith("qpipe.")]
    known = {*COLUMN, *WINGS, "stages", "hydra_plugins", "conf"}
    return {part for name in found for part in (name[0], ".".join(name[:2])) if part in known}


def files(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py"))


def package_of(file: Path) -> str:
    return ".".join(file.parent.relative_to(ROOT).parts)


def test_every_file_of_the_engine_has_its_place_in_the_column() -> None:
    flat = {path.stem for path in (ROOT / "qpipe").glob("*.py")}
    cache = {f"cache.{path.stem}" for path in (ROOT / "qpipe" / "cache").glob("*.py")}
    assert flat | cache - {"cache.__init__"} == {*COLUMN, "__init__"}


@pytest.mark.parametrize("name", COLUMN)
def test_the_engine_imports_only_downwards(name: str) -> None:
    file = ROOT / "qpipe" / f"{name.replace('.', '/')}.py"
    above = parts(imported(file, package_of(file))) - set(COLUMN[: COLUMN.index(name)])
    allowed = {
        "artifact": {"model", "numerics"},
        "catalog": {"stages"},
        "commands": {"report", "hydra_plugins"},
        "cache_commands": {"report"},
        "explain_commands": {"report"},
        "cli": {"report", "hydra_plugins"},
    }
    assert above <= allowed.get(name, set())


@pytest.mark.parametrize("file", files("qpipe/model") + files("qpipe/numerics"), ids=lambda file: file.stem)
def test_model_and_numerics_know_nothing_of_the_engine(file: Path) -> None:
    names = imported(file, package_of(file))
    assert parts(names) <= {"errors", "mapped", "model", "numerics"}
    if "numerics" in file.parts:
        assert "model" not in parts(names)
        assert not {name.partition(".")[0] for name in names} & {
            "onnx",
            "onnx_ir",
            "onnxruntime",
            "onnxscript",
        }


@pytest.mark.parametrize("file", files("qpipe/report") + files("qpipe/demo"), ids=lambda file: file.stem)
def test_report_and_demo_know_themselves_and_the_errors(file: Path) -> None:
    assert parts(imported(file, package_of(file))) <= {"errors", file.parent.name}


@pytest.mark.parametrize("file", files("stages"), ids=lambda file: file.stem)
def test_a_stage_imports_no_other_stage_and_nothing_of_the_engine_but_its_words(file: Path) -> None:
    names = {name for name in imported(file, "qpipe.stages") if name.startswith("qpipe.")}
    wings = {name for name in names if name.split(".")[1] in WINGS - {"report"}}
    words = {name for name in names if ".".join(name.split(".")[:2]) in VOCABULARY}
    assert names - wings - words == set()


def test_the_vocabulary_loads_nothing_that_a_fully_cached_run_can_do_without() -> None:
    stages = [f"qpipe.stages.{path.stem}" for path in files("stages") if path.stem != "__init__"]
    light = ["qpipe.methods.placement.target", "qpipe.numerics.scheme"]
    modules = ["qpipe.model", *light, "qpipe.cache.store", "qpipe.keys.code", *stages, "qpipe.cli.main"]
    program = (
        "import importlib, json, sys\n"
        "heavy, modules = json.loads(sys.argv[1])\n"
        "found = {}\n"
        "for name in modules:\n"
        "    before = set(sys.modules)\n"
        "    importlib.import_module(name)\n"
        "    found[name] = sorted(set(heavy) & (set(sys.modules) - before))\n"
        "print(json.dumps({name: loaded for name, loaded in found.items() if loaded}))"
    )
    argument = json.dumps([HEAVY, modules])
    done = subprocess.run([sys.executable, "-c", program, argument], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}
