"""Code that no import names in plain sight: an edit of it runs all that used it, the first in its process and the
next."""

from __future__ import annotations

import py_compile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.trust.lab import Lab, outputs


@dataclass(frozen=True)
class Way:
    """How the module `way` comes to the code in the file `hidden`, both below the plug-in's folder."""

    source: str
    hidden: str = "zq_pkg/deep.py"
    text: str = "NUMBER = 1\nclass Number:\n    value = NUMBER\ndef number():\n    return NUMBER\n"
    module: str = "zq_pkg.deep"
    """Its name, for another action that imports it first."""
    files: tuple[tuple[str, str], ...] = (("zq_pkg/__init__.py", ""),)
    before: str = ""
    """What that other action does before it imports it."""


PACKAGE = ("zq_pkg/__init__.py", "")
NAMES = ("zq_names.py", "WHICH = 'zq_pkg.deep'")
EXTENDED = ("zq_pkg/__init__.py", "import pkgutil\n__path__ = pkgutil.extend_path(__path__, __name__)\n")
APPENDED = "import os\n__path__.append(os.path.join(os.path.dirname(__file__), os.pardir, 'aside'))\n"
BESIDE = "import os, sys\nsys.path.insert(0, os.path.join(os.path.dirname(__file__), 'aside'))\n"
IMPORTED = "importlib.import_module(zq_names.WHICH).NUMBER"
POINT = "importlib.metadata.EntryPoint('n', WHERE, 'zq').load()()"
INSTALLED = "next(iter(importlib.metadata.entry_points(group='zq.numbers'))).load()()"
REGISTERED = "../registered/zq-1.0.dist-info/"


def called(expression: str, *files: tuple[str, str]) -> Way:
    """What is looked up when it is called."""
    source = f"import hydra, importlib.metadata, zq_names\ndef number():\n    return {expression}\n"
    return Way(source, files=(PACKAGE, NAMES, *files))


WAYS = {
    "get_method": called("hydra.utils.get_method('zq_pkg.deep.number')()"),
    "get_class": called("hydra.utils.get_class('zq_pkg.deep.Number').value"),
    "get_method as it is loaded": Way("import hydra\nnumber = hydra.utils.get_method('zq_pkg.deep.number')"),
    "get_method of a constant": called("hydra.utils.get_method(zq_names.WHICH + '.number')()"),
    "a constant": called(IMPORTED),
    "a constant as it is loaded": Way(
        f"import importlib, zq_names\nFOUND = {IMPORTED}\ndef number():\n    return FOUND", files=(PACKAGE, NAMES)
    ),
    "a constant, and an import there": called(
        IMPORTED, ("zq_names.py", "WHICH = 'zq_between'"), ("zq_between.py", "from zq_pkg.deep import NUMBER")
    ),
    "__import__": called("__import__(zq_names.WHICH, fromlist=['x']).NUMBER"),
    "an entry point": called(POINT.replace("WHERE", "'zq_pkg.deep:number'")),
    "an entry point of a constant": called(POINT.replace("WHERE", "zq_names.WHICH + ':number'")),
    "an installed entry point": called(
        INSTALLED,
        (REGISTERED + "METADATA", "Name: zq\nVersion: 1.0\n"),
        (REGISTERED + "entry_points.txt", "[zq.numbers]\nn = zq_pkg.deep:number\n"),
    ),
    "extend_path": Way(
        "from zq_pkg.deep import number",
        hidden="../other/zq_pkg/deep.py",
        files=(EXTENDED, ("../other/zq_pkg/__init__.py", EXTENDED[1])),
    ),
    "__path__": Way(
        "from zq_pkg.deep import number", hidden="aside/deep.py", files=(("zq_pkg/__init__.py", APPENDED),)
    ),
    "below a .pyc": Way(
        "from zq_bare import number", files=(PACKAGE, ("zq_bare.py", "from zq_pkg.deep import number"))
    ),
    "below a .pyc of a constant": called(
        IMPORTED, ("zq_names.py", "WHICH = 'zq_bare'"), ("zq_bare.py", "from zq_pkg.deep import NUMBER")
    ),
    "the name of a standard module": Way(
        "from sched import number", hidden="sched.py", module="sched", files=()
    ),
    "sys.path": Way(
        BESIDE + "from zq_aside import number", hidden="aside/zq_aside.py", module="zq_aside", files=(), before=BESIDE
    ),
    "sys.path as it is called": Way(
        "def number():\n    " + BESIDE.replace("\n", "\n    ") + "from zq_aside import NUMBER\n    return NUMBER\n",
        hidden="aside/zq_aside.py",
        module="zq_aside",
        files=(),
        before=BESIDE,
    ),
    "sys.path as another is loaded": Way(
        "import zq_paths\ndef number():\n    from zq_aside import NUMBER\n    return NUMBER\n",
        hidden="aside/zq_aside.py",
        module="zq_aside",
        files=(("zq_paths.py", BESIDE),),
        before="import zq_paths\n",
    ),
}  # fmt: skip

STAGE = """
from qpipe.stage import Scores, stage
from zq_way import number
@stage(version=1)
def own(*, value: float = 0.0) -> Scores:
    return Scores({"score": float(number()) + value, "metric": "toy"})
"""


def write(lab: Lab, way: Way) -> Path:
    """The plug-in's files; the one that is hidden."""
    folder = lab.source.parent
    first = f"{way.before}import {way.module}\ndef number():\n    return {way.module}.NUMBER\n"
    own = (("zq_way.py", way.source), ("zq_first.py", first), ("zq_own.py", STAGE))
    for name, text in (*way.files, (way.hidden, way.text), *own):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    bare = folder / "zq_bare.py"
    if bare.exists():
        py_compile.compile(str(bare), str(bare.with_suffix(".pyc")))
        bare.unlink()
    points = folder.parent / "registered" / "toy-1.0.dist-info" / "entry_points.txt"
    points.write_text(points.read_text() + "own = zq_own:own\n")
    other = str(folder.parent / "other")
    lab.environment["PYTHONPATH"] += f":{other}"
    return (folder / way.hidden).resolve()


FIRST = {"f": {"uses": "lab_factory", "function": "zq_first:number"}, "s": {"uses": "toy_sign", "scores": "f"}}
"""Another action, which is begun before: more depends on it."""
HOW: dict[str, tuple[int, bool]] = {"alone": (0, False), "after another": (0, True), "in a worker": (1, True)}
"""How many workers, and whether another action comes first."""
USERS: dict[str, dict[str, dict[str, Any]]] = {
    "stage": {"o": {"uses": "own"}, "p": {"uses": "own", "value": 5.0}},
    "factory": {
        "o": {"uses": "lab_factory", "function": "zq_way:number"},
        "p": {"uses": "lab_functions", "functions": ["zq_way:number"]},
    },
}


SLOW = [pytest.param(how, marks=pytest.mark.slow) for how in ("alone", "in a worker")]


@pytest.mark.parametrize("how", ["after another", *SLOW])
@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("name", WAYS)
def test_an_edit_runs_all_that_used_it_and_else_they_hit(lab: Lab, name: str, user: str, how: str) -> None:
    workers, first = HOW[how]
    hidden = write(lab, WAYS[name])
    stages = {**(FIRST if first else {}), **USERS[user]}
    before = outputs(lab.finish(stages, workers=workers))
    assert ran(lab.finish(stages, workers=workers)) == set()
    hidden.write_text(WAYS[name].text.replace("NUMBER = 1", "NUMBER = 2  # another"))
    record = lab.finish(stages, workers=workers)
    assert all(outputs(record)[node] != before[node] for node in "op")
    assert ran(record) >= {"o", "p"}
    assert ran(lab.finish(stages, workers=workers)) == set()


def ran(record: dict[str, Any]) -> set[str]:
    return {name for name, node in record["nodes"].items() if node["verdict"] == "ran"}
