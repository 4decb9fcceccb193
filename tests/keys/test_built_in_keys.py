"""The keys of the built-in stages hold what they compute with, and nothing else: on a copy of the tree, edited."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qpipe.keys.code import CodeIndex
from qpipe.language.catalog import catalog

ROOT = Path(__file__).parents[2]
LARGEST = {"load_data": 3, "nearest": 12, "bnf": 14, "export": 24, "hbf": 30, "calibrate": 50, "cle": 50, "polish": 65}
"""Modules of qpipe in a key: what is rewritten often, such as messages, files and the exporter, is in few."""

PROGRAM = """
import json, sys
from pathlib import Path
root = Path(sys.argv[1])
sys.path.insert(0, str(root))
import qpipe
assert Path(qpipe.__file__).is_relative_to(root)
from qpipe.keys.code import CodeIndex
from qpipe.language.catalog import catalog
class Memo(dict):
    def set(self, key, value): self[key] = value
memo = Memo()  # files that no edit touched are looked through once
stages = {name: catalog()[name].modules for name in catalog() if not name.startswith("toy_")}
def digests():
    index = CodeIndex(memo)
    return {name: index.digest(*modules) for name, modules in stages.items()}
before, changed = digests(), {}
for edit, files in json.loads(sys.argv[2]).items():
    kept = {}
    for name, (old, new) in files.items():
        path = root / "qpipe" / name
        kept[path] = path.read_text() if path.exists() else None
        text = kept[path] or ""
        assert old in text, (name, old)
        path.write_text(text.replace(old, new, 1) if old else text + new)
    after = digests()
    changed[edit] = sorted(name for name in before if after[name] != before[name])
    for path, text in kept.items():
        path.unlink() if text is None else path.write_text(text)
assert digests() == before
print(json.dumps(changed))
"""

EDITS: dict[str, dict[str, tuple[str, str]]] = {
    "a message of the torch exporter": {"model/torch_export/errors.py": ("cannot export", "is not able to export")},
    "a message of the ONNX reader": {"model/files/onnx_reader.py": ("does not exist.", "is not there.")},
    "a face method": {"model/model.py": ("class ModelEditor", "def new(): ...\n\n\nclass ModelEditor")},
    "a new stage": {"stages/fresh.py": ("", "from qpipe.stage import Scores, stage\n")},
    "a new order": {"stages/cle.py": ("not_after={", "not_after={'hbf': 'why',")},
    "a new observer": {"numerics/observers.py": ("", "\n\nclass NewObserver: ...\n")},
    "a new operator": {
        "model/operators/fresh.py": ("", "from qpipe.model.operators.registry import operator\n"),
        "model/operators/table.py": ("    conv,", "    conv,\n    fresh,"),
    },
    "a new solver beside gram": {"numerics/rounding/fresh.py": ("", "def solve(): ...\n")},
    "the engine": {"plan/decision.py": ("never run", "not run"), "cli/main.py": ("", "\nX = 1\n")},
    "what a network is": {"model/network/network.py": ("", "\nX = 1\n")},
}


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Edit -> the stages whose code digest it changed."""
    root = tmp_path_factory.mktemp("tree")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "qpipe", root / "qpipe", ignore=ignore)
    shutil.copytree(ROOT / "stages", root / "qpipe" / "stages", ignore=ignore)
    words = [sys.executable, "-c", PROGRAM, str(root), json.dumps(EDITS)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


def test_a_reworded_message_of_the_exporter_changes_load_model_alone(changed: dict[str, list[str]]) -> None:
    assert changed["a message of the torch exporter"] == ["load_model"]
    assert changed["a message of the ONNX reader"] == ["load_model"]


def test_what_is_there_for_people_alone_changes_nothing(changed: dict[str, list[str]]) -> None:
    assert changed["a face method"] == []
    assert changed["the engine"] == []


def test_what_no_stage_reaches_changes_nothing(changed: dict[str, list[str]]) -> None:
    assert changed["a new stage"] == []
    assert changed["a new order"] == []
    assert changed["a new solver beside gram"] == []


def test_a_new_observer_changes_what_observes(changed: dict[str, list[str]]) -> None:
    assert changed["a new observer"] == ["adaround", "amp", "calibrate", "quantscheme_select"]


def test_a_new_operator_changes_what_runs_the_simulation(changed: dict[str, list[str]]) -> None:
    found = set(changed["a new operator"])
    assert found >= {"adaround", "amp", "calibrate", "evaluate", "load_model", "parity", "quantscheme_select"}
    assert not found & {"bnf", "cle", "export", "hbf", "load_data", "nearest"}


def test_what_a_network_is_changes_all_that_take_one(changed: dict[str, list[str]]) -> None:
    assert set(changed["what a network is"]) == set(catalog()) - {"load_data", "hold_out"} - {
        name for name in catalog() if name.startswith("toy_")
    }


@pytest.mark.parametrize("name", sorted(LARGEST))
def test_a_key_holds_few_modules(name: str) -> None:
    class Notes(dict[str, object]):
        def set(self, key: str, value: object) -> None:
            self[key] = value

    assert len(CodeIndex(Notes()).modules(*catalog()[name].modules)) <= LARGEST[name]
