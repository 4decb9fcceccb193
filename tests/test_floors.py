"""The house: which room may import from which, the order inside each, no circles, no folder too full; and what loading
a part may load. docs/architecture.md draws it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest

from qpipe.keys.syntax import Import, analyse
from tests.once import once

ROOT = Path(__file__).parents[1]
WORDS = ("errors", "mapped", "writing", "param", "stage")
"""What an author of a stage may import; files of qpipe/ itself."""
VALUE = ("errors", "mapped", "numerics", "model.network")
MODEL = (*VALUE, "model.operators", "model.structure", "model.qdq", "model.runtime")
ENGINE = (
    *("errors", "mapped", "writing", "keys", "artifacts", "param", "stage"),
    *("cache", "cache.shared", "language", "plan"),
)

HOUSE: dict[str, tuple[tuple[str, ...], str]] = {
    "numerics": (
        ("errors",),
        "scheme grid fake_quantize ranges observers allocation search thinning metric_names metrics jackknife images",
    ),
    "numerics.rounding": (("errors", "numerics"), "moments unfold rows codes gram"),
    "numerics.learning": (("errors", "numerics"), "cells variables roundings losses options optimize"),
    "keys": (("errors", "mapped"), "hashing companions syntax code state loaded changes"),
    "artifacts": (("errors", "mapped", "writing", "keys", "numerics"), "kinds artifact"),
    "model.network": (
        ("errors", "mapped", "numerics"),
        "facts naming packing shapes invariants rewriting network parts",
    ),
    "model.operators": (
        ("errors",),
        (
            "registry window conv detection elementwise index matmul integer norm pool "
            "recurrent reduce resize shape signal unsigned table"
        ),
    ),
    "model.structure": (
        (*VALUE, "numerics.rounding", "model.operators"),
        "families opaque layers operands module_lists blocks channels factors sharing composite geometry",
    ),
    "model.qdq": (
        (*VALUE, "model.operators", "model.structure"),
        "nodes bias weights block_form operator_form codes kernel_forms reader guards writer",
    ),
    "model.runtime": ((*VALUE, "param", "model.qdq"), "options session types kernels optimized"),
    "model.canon": (
        MODEL,
        (
            "definitions floats unrolling sequences plain_forms layer_forms attention_forms bound_forms folding "
            "opsets refusals form"
        ),
    ),
    "model.simulation": (MODEL, "constants samples opaque module stream run"),
    "model.files": (
        MODEL,
        "soundness onnx_reader given encodings_reader encodings_writer state_dict onnx_writer",
    ),
    "model.torch_export": (
        (*MODEL, "param", "model.canon", "model.simulation"),
        "errors names translations decomposition shortcuts exporter fidelity",
    ),
    "model": ((*MODEL, "model.canon", "model.simulation", "model.files", "model.torch_export"), "model"),
    "methods": ((*MODEL, "model.simulation"), "preconditions running_cost"),
    "methods.placement": (
        (*MODEL, "model.simulation"),
        "target filters survival float_parts placement calibration remarks",
    ),
    "methods.equalization": ((*MODEL, "model.simulation"), "links norm_links reach rescaling"),
    "methods.rounding": (
        (*MODEL, "model.simulation", "numerics.rounding", "numerics.learning", "methods.placement"),
        "walk by_gram by_gradient",
    ),
    "methods.learning": (
        (
            *(*MODEL, "param", "model.simulation", "numerics.rounding", "numerics.learning"),
            *("methods.placement", "methods.rounding"),
        ),
        "parts carry begin stretch reference selection tune blockwise objective whole",
    ),
    "methods.mixing": (
        (*MODEL, "model.simulation", "numerics.rounding", "methods.placement", "methods.rounding"),
        "products work choices fingerprint judge mix sensitivity",
    ),
    "methods.comparison": ((*MODEL, "model.simulation"), "inputs compare check parity"),
    "stages": (
        (
            *("errors", "param", "stage", "numerics", "numerics.rounding", "numerics.learning"),
            *("model.network", "model.structure", "model.runtime", "model.canon", "model.simulation"),
            *("model.files", "model.torch_export", "methods", "methods.placement", "methods.equalization"),
            *("methods.rounding", "methods.learning", "methods.mixing", "methods.comparison"),
        ),
        "",
    ),
    "cache": (
        ("errors", "mapped", "writing", "keys", "artifacts"),
        "disk index lock usage store pins audit cleanup archive",
    ),
    "cache.shared": (
        ("errors", "keys", "artifacts", "cache"),
        "objects remote lease uploads signing promises tier",
    ),
    "language": (
        ("errors", "keys", "numerics", "param", "stage", "cache.shared"),
        "catalog interpolation elsewhere spec graph labels",
    ),
    "plan": ((*ENGINE[:-1], "numerics"), "choice verdicts history keyring decision walk estimate"),
    "run": (
        (*ENGINE, "numerics"),
        "machine checkout context isolation performing workers executor deployment record swept stores sweep",
    ),
    "deployed": (
        (
            *("errors", "artifacts", "cache", "model.network", "model.files", "model.runtime", "model.simulation"),
            *("methods.comparison", "run"),
        ),
        "session timing memory measurement",
    ),
    "explain": ((*ENGINE, "run"), "shape past_runs causes runs_apart artifacts verification"),
    "report": ((), "text facts measured figures importance"),
    "report.terminal": (("report",), "table activity closing leaderboard run_table plain live terminal"),
    "report.drawing": (("report", "report.terminal"), "layout rails picture"),
    "report.page": (("writing", "report", "report.drawing"), "style charts mix html"),
    "demo": (("errors",), "data net train"),
    "search": ((*ENGINE, "run", "report"), "space study stream session"),
    "hydra_plugins": (("report", "search"), "returns launcher sweeper searching"),
    "cli": (
        (
            *(*ENGINE, "run", "explain", "report", "report.terminal", "report.drawing", "report.page"),
            *("search", "hydra_plugins"),
        ),
        (
            "requirements compose manual words config_files mistakes rerun run_commands explain_commands "
            "cache_commands completion main"
        ),
    ),
}
"""Room -> the rooms it may import from, and its files, each of which may import those before it. The rooms stand in
order: one may import only from those above, or from `WORDS`."""

WORDS_MAY = {
    "errors": (),
    "mapped": (),
    "writing": ("errors",),
    "param": ("errors",),
    "stage": ("keys", "artifacts", "param"),
}
FULL = {"model.operators": "a flat table, one family a file", "stages": "one technique a file"}
LARGEST_FOLDER = 12
HEAVY = ("torch", "onnx", "onnxruntime", "onnx_ir", "onnxscript", "numpy", "scipy", "diskcache")


def folder_of(room: str) -> Path:
    return ROOT / "stages" if room == "stages" else ROOT / "qpipe" / room.replace(".", "/")


def files_of(room: str) -> dict[str, Path]:
    """Module name below qpipe -> file, for the files that lie in the room's own folder."""
    return {f"{room}.{path.stem}": path for path in folder_of(room).glob("*.py") if path.stem != "__init__"}


def every_file() -> dict[str, Path]:
    found = {name: ROOT / "qpipe" / f"{name}.py" for name in (*WORDS, "__main__")}
    for room in HOUSE:
        found |= files_of(room)
        if (folder_of(room) / "__init__.py").exists():
            found[room] = folder_of(room) / "__init__.py"
    return found


FILES = every_file()


def imported(name: str) -> set[str]:
    """The modules below qpipe that a file imports, wherever in the file that stands; those of strings do not count."""
    file, found = FILES[name], set()
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    analysis = analyse(file.read_bytes(), str(file))
    for item in (*analysis.imports, *analysis.lazy):
        base = _base(item, f"qpipe.{package}".rstrip("."))
        for full in (f"{base}.{part}" for part in (*item.names, "")):
            parts = full.rstrip(".").split(".")
            if parts[0] == "qpipe":
                found.add(".".join(parts[1:]))
    return {each for each in found if each in FILES and each != name}


def _base(item: Import, package: str) -> str:
    if not item.level:
        return item.module
    parts = package.split(".")[: len(package.split(".")) + 1 - item.level]
    return ".".join([*parts, item.module] if item.module else parts)


def room_of(name: str) -> str:
    """The room a file lies in; a file of qpipe/ itself is its own."""
    return name if name in HOUSE or "." not in name else name.rpartition(".")[0]


@pytest.fixture(scope="session")
def imports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """What each file imports; read once for all that test side by side."""

    def read(folder: Path) -> None:
        (folder / "imports.json").write_text(json.dumps({name: sorted(imported(name)) for name in FILES}))

    found = json.loads((once(tmp_path_factory, "imports", read) / "imports.json").read_text())
    return {name: set(each) for name, each in found.items()}


def test_every_folder_is_a_room_and_every_file_has_its_place_in_it() -> None:
    folders = {path.parent for path in (ROOT / "qpipe").rglob("*.py") if "__pycache__" not in path.parts}
    rooms = {".".join(folder.relative_to(ROOT / "qpipe").parts) for folder in folders}
    assert rooms - {""} == set(HOUSE) - {"stages"}
    assert {path.stem for path in (ROOT / "qpipe").glob("*.py")} == {*WORDS, "__init__", "__main__"}
    for room, (_, order) in HOUSE.items():
        assert room == "stages" or sorted(files_of(room)) == sorted(f"{room}.{name}" for name in order.split())


def test_rooms_import_only_from_rooms_above() -> None:
    above: set[str] = set(WORDS)
    for room, (may, _) in HOUSE.items():
        assert set(may) <= above, room
        above.add(room)


@pytest.mark.parametrize("name", sorted(set(FILES) - {"__main__"}))
def test_a_file_imports_only_what_its_room_may_and_what_stands_before_it(
    name: str, imports: dict[str, set[str]]
) -> None:
    room = room_of(name)
    may, order = (WORDS_MAY[name], "") if name in WORDS else HOUSE[room]
    own = [f"{room}.{each}" for each in order.split()]
    before = set(own[: own.index(name)]) if name in own else set(own)
    found = imports[name] - {room}
    elsewhere = {each for each in found if room_of(each) not in may and each not in before}
    if name == "artifacts.artifact":
        elsewhere -= {"model.model", "model.network.network"}  # by name, when a value is loaded
    if name == "language.catalog":
        elsewhere -= {"stages"}  # by name, when a stage is asked for
    assert not elsewhere


def test_there_is_no_circle_among_files(imports: dict[str, set[str]]) -> None:
    graph = nx.DiGraph([(name, each) for name, found in imports.items() for each in found])
    # The names of modules that a kind or the catalog loads by are text, not imports.
    graph.remove_edges_from([("artifacts.artifact", "model.model"), ("language.catalog", "stages")])
    assert [sorted(circle) for circle in nx.strongly_connected_components(graph) if len(circle) > 1] == []


@pytest.mark.parametrize("room", sorted(set(HOUSE) - set(FULL)))
def test_a_folder_holds_few_files(room: str) -> None:
    assert len(files_of(room)) <= LARGEST_FOLDER


def test_numerics_knows_no_onnx() -> None:
    for room in ("numerics", "numerics.rounding", "numerics.learning"):
        for file in files_of(room).values():
            names = {item.module.partition(".")[0] for item in analyse(file.read_bytes(), str(file)).imports}
            assert not names & {"onnx", "onnx_ir", "onnxruntime", "onnxscript"}, file


def test_tests_lie_where_what_they_test_lies() -> None:
    """A folder of tests has the name of a room, or holds what goes through many."""
    across = {"crash", "trust", "whole"}
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    rooms = {".".join(folder.parts) for folder in folders} - {"", *across}
    assert rooms <= set(HOUSE)


def test_every_room_is_installed() -> None:
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    rooms = {"hydra_plugins.qpipe" if room == "hydra_plugins" else f"qpipe.{room}" for room in HOUSE}
    assert listed == {*rooms, "qpipe", "qpipe.conf"}


def test_the_vocabulary_loads_nothing_that_a_fully_cached_run_can_do_without() -> None:
    stages = [f"qpipe.{name}" for name in files_of("stages")]
    light = ["qpipe.methods.placement.target", *(f"qpipe.numerics.{n}" for n in ("scheme", "thinning", "metric_names"))]
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
