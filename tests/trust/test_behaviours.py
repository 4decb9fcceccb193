"""What a person may expect of a cache: what has to run again runs, and nothing else does."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qpipe.keys.hashing import digest_bytes
from tests.trust.lab import FORMULA, Lab, blobs, outputs

CHAIN: dict[str, dict[str, Any]] = {
    "a": {"uses": "lab_make", "value": 2.0},
    "m": {"uses": "lab_mix", "parts": ["a"], "factor": 3.0},
    "g": {"uses": "lab_sign", "part": "m"},
    "s": {"uses": "lab_score", "part": "g"},
}
HELPERS = {
    "direct": "from lab_helper import mix as helper\ndef mix(row, factor):\n    return helper(row, factor)\n",
    "transitive": "import lab_between\ndef mix(row, factor):\n    return lab_between.between(row, factor)\n",
    "lazy": "def mix(row, factor):\n    from lab_helper import mix\n    return mix(row, factor)\n",
    "by name": "import importlib\ndef mix(row, factor):\n"
    "    return importlib.import_module('lab_helper').mix(row, factor)\n",
}


@pytest.mark.parametrize("way", HELPERS)
def test_an_edit_in_a_helper_of_another_module_runs_what_uses_it(lab: Lab, way: str) -> None:
    helper = lab.lab_formula.with_name("lab_helper.py")
    helper.write_text(FORMULA)
    helper.with_name("lab_between.py").write_text("from lab_helper import mix as between\n")
    lab.lab_formula.write_text(HELPERS[way])
    before = outputs(lab.finish(CHAIN))
    lab.calls()
    helper.write_text(
        "# why\ndef mix(row,\n        factor):\n    'what it does'\n    return (row * factor + 1)\n"
    )
    assert outputs(lab.finish(CHAIN)) == before
    assert lab.calls() == []
    helper.write_text(FORMULA.replace("+ 1", "+ 2"))
    after = outputs(lab.finish(CHAIN))
    assert after["m"] != before["m"]
    assert "mix-3.0" in lab.calls()
    helper.write_text(FORMULA)
    assert outputs(lab.finish(CHAIN)) == before
    assert lab.calls() == []


def test_early_cut_off_and_back_again(lab: Lab) -> None:
    before = outputs(lab.finish(CHAIN))
    lab.calls()
    other = {**CHAIN, "m": {**CHAIN["m"], "factor": 4.0}}
    assert outputs(lab.finish(other))["s"] == before["s"]
    calls = lab.calls()
    assert "sign" in calls
    assert "score" not in calls, "sign made the same bytes"
    lab.finish(CHAIN)
    lab.finish(other)
    assert lab.calls() == []


def test_what_no_key_holds_changes_nothing(lab: Lab) -> None:
    lab.pipeline(CHAIN)
    assert lab.words("run", "run.workers=0").wait() == 0
    lab.calls()
    for words in (
        ("goal.max_drop=0.1",),
        ("run.threads=2", "run.keep_going=false"),
        ("hydra.run.dir=elsewhere",),
        ("stages.m.factor=3",),
    ):
        child = lab.words("run", "run.workers=0", *words)
        assert child.wait() == 0, child.text()
    assert lab.calls() == []
    lab.pipeline({name: dict(reversed(body.items())) for name, body in reversed(CHAIN.items())})
    assert lab.words("run", "run.workers=0").wait() == 0
    assert lab.calls() == []


def test_a_deleted_intermediate_is_made_again_and_nothing_else(lab: Lab) -> None:
    record = lab.finish(CHAIN)
    lab.calls()
    digest = record["nodes"]["m"]["outputs"]["statistics"]["digest"]
    (lab.cache / "blobs" / digest[:2] / digest).unlink()
    again = lab.finish(CHAIN)
    assert outputs(again) == outputs(record)
    assert [name for name, node in again["nodes"].items() if node["verdict"] == "ran"] == ["m"]


def test_another_user_folder_home_and_seed_have_the_same_keys(lab: Lab) -> None:
    """By the whole command, under another hash seed, temporary folder, home and, where permitted, user."""
    lab.pipeline(CHAIN)
    assert lab.words("run", "run.workers=1").wait() == 0
    lab.calls()
    there = lab.folder / "else where"
    there.mkdir()
    for path in (lab.folder, *lab.folder.rglob("*")):
        path.chmod(0o777 if path.is_dir() else path.stat().st_mode | 0o066)
    lab.folder.parent.chmod(0o755)
    environment = lab.environment | {"HOME": str(there), "TMPDIR": str(there), "PYTHONHASHSEED": "77"}
    command = lab.command("run", "run.expect=cached")
    users: list[list[str]] = [[]]
    users += [["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]] if _may_switch() else []
    for user in users:
        own = there / str(len(user))
        own.mkdir()
        own.chmod(0o777)
        run = subprocess.run(
            [*user, *command], cwd=own, env=environment, capture_output=True, text=True, timeout=120
        )
        assert run.returncode == 0, run.stdout + run.stderr
    assert lab.calls() == []


def _may_switch() -> bool:
    """Whether this is root, setpriv is there, and another user may read the interpreter."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        return False
    probe = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        sys.executable,
        "-c",
        "import qpipe.cli.main",
    ]
    return subprocess.run(probe, capture_output=True, cwd="/").returncode == 0


def test_a_folder_counts_by_names_and_contents(lab: Lab) -> None:
    folder = lab.folder / "data"
    (folder / "sub").mkdir(parents=True)
    (folder / "one.txt").write_text("1")
    (folder / "sub" / "two.txt").write_text("2")
    stages = {"d": {"uses": "lab_folder", "path": "data"}}
    lab.finish(stages)
    lab.calls()

    def runs() -> bool:
        lab.finish(stages)
        return lab.calls() == ["folder"]

    assert not runs()
    (folder / "three.txt").write_text("3")
    assert runs()
    (folder / "three.txt").rename(folder / "four.txt")
    assert runs()
    (folder / "four.txt").rename(folder / "sub" / "four.txt")
    assert runs()
    (folder / "sub" / "four.txt").unlink()
    assert not runs(), "as it was at first"
    (folder / "empty").mkdir()
    assert runs()
    (folder / "empty").rmdir()
    os.utime(folder / "one.txt", (0, 0))
    folder.rename(lab.folder / "moved")
    stages["d"]["path"] = "moved"
    assert not runs()


def test_a_factory_counts_by_its_code_and_that_of_its_helpers(lab: Lab) -> None:
    mine, helper = lab.folder / "mine.py", lab.folder / "mine_helper.py"
    mine.write_text(
        "from mine_helper import number\ndef load():\n    return number() + 1\ndef other():\n    return 0\n"
    )
    helper.write_text("def number():\n    return 1\n")
    stages = {"f": {"uses": "lab_factory", "function": "mine:load"}}
    first = outputs(lab.finish(stages))
    assert outputs(lab.finish(stages, workers=1)) == first
    assert lab.calls() == ["factory"]
    helper.write_text("def number():\n    return 2\n")
    second = outputs(lab.finish(stages))
    assert second != first
    assert lab.calls() == ["factory"]
    helper.write_text("def number():  # as before\n    return 1\n")
    assert outputs(lab.finish(stages)) == first
    assert lab.calls() == []
    assert outputs(lab.finish({"f": {"uses": "lab_factory", "function": "mine:other"}})) != first
    assert lab.calls() == ["factory"]


def test_an_entry_point_that_names_another_function_runs(lab: Lab) -> None:
    """Both functions stand in one module, so its code tells them not apart."""
    lab.source.write_text(
        lab.source.read_text()
        + '\n@stage(version=1)\ndef half(part: Statistics) -> Scores:\n    called("half")\n'
        '    return Scores({"score": float(part.arrays["row0"].sum()) / 2, "metric": "toy"})\n'
    )
    stages = {"a": CHAIN["a"], "s": {"uses": "lab_score", "part": "a"}}
    before = outputs(lab.finish(stages))
    points = lab.folder / "registered" / "toy-1.0.dist-info" / "entry_points.txt"
    points.write_text(points.read_text().replace("lab_stages:score", "lab_stages:half"))
    lab.calls()
    assert outputs(lab.finish(stages)) != before
    assert lab.calls() == ["half"]


def test_always_stages_read_the_world_and_what_follows_still_hits(lab: Lab) -> None:
    stages = {"o": {"uses": "lab_outside"}, "z": {"uses": "toy_add", "scores": "o"}}
    lab.outside.write_text("1")
    first = outputs(lab.finish(stages))
    lab.calls()
    assert outputs(lab.finish(stages)) == first
    assert lab.calls() == ["outside"]
    lab.outside.write_text("2")
    assert outputs(lab.finish(stages)) != first
    assert lab.calls() == ["outside", "add"]
    lab.outside.write_text("1")
    assert outputs(lab.finish(stages)) == first
    assert lab.calls() == ["outside"]


def test_a_failure_after_some_sub_results_is_not_cached_and_loses_none(lab: Lab) -> None:
    def stages(fail_after: int) -> dict[str, dict[str, Any]]:
        return {"a": CHAIN["a"], "m": {**CHAIN["m"], "layers": 4, "fail_after": fail_after}}

    for _ in range(2):
        assert lab.begin(stages(2)).wait() == 1
    calls = Counter(lab.calls())
    assert calls == {"make-2.0": 1, "mix-3.0": 2, "layer-3.0-0": 1, "layer-3.0-1": 1}
    lab.finish(stages(-1))
    assert Counter(lab.calls()) == {"mix-3.0": 1, "layer-3.0-2": 1, "layer-3.0-3": 1}


def test_a_changed_layer_runs_itself_and_what_follows(lab: Lab) -> None:
    """Each sub-result is keyed by what goes into it: a longer stage does only what is new."""
    lab.finish({"a": CHAIN["a"], "m": {**CHAIN["m"], "layers": 3}})
    lab.calls()
    lab.finish({"a": CHAIN["a"], "m": {**CHAIN["m"], "layers": 5}})
    assert Counter(lab.calls()) == {"mix-3.0": 1, "layer-3.0-3": 1, "layer-3.0-4": 1}


def test_a_killed_stage_resumes_at_its_layer(lab: Lab) -> None:
    stages = {"a": CHAIN["a"], "m": {**CHAIN["m"], "layers": 12, "pause_s": 0.05}}
    right = outputs(lab.finish(stages, cache=lab.folder / "other"))
    lab.calls()
    child = lab.begin(stages)
    deadline = time.monotonic() + 20
    while sum(call.startswith("layer") for call in lab.seen()) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    child.kill()
    child.wait()
    assert outputs(lab.finish(stages)) == right
    counts = Counter(lab.calls())
    layers = {name: count for name, count in counts.items() if name.startswith("layer")}
    assert len(layers) == 12
    assert sum(layers.values()) in (12, 13), "the layer under way may run twice"


def test_a_bit_that_turns_in_a_remembered_import_hides_no_edit(lab: Lab) -> None:
    """A row of the index is read as it was written or not at all."""
    for path in (lab.source, lab.lab_formula):
        os.utime(path, (1, 1))
    _age(lab)
    before = outputs(lab.finish(CHAIN))
    database = lab.cache / "index" / "cache.db"
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT key, value FROM Cache WHERE value LIKE '%lab_formula%'").fetchall()
        assert rows
        for key, value in rows:
            changed = value.replace("lab_formula", "lab_forgula")
            connection.execute("UPDATE Cache SET value = ? WHERE key = ?", (changed, key))
    assert outputs(lab.finish(CHAIN)) == before
    lab.lab_formula.write_text(FORMULA.replace("+ 1", "+ 2"))
    assert outputs(lab.finish(CHAIN)) != before


def _age(lab: Lab) -> None:
    """Wait until the sources are old enough to be remembered."""
    newest = max(path.stat().st_ctime for path in (lab.source, lab.lab_formula))
    time.sleep(max(0.0, newest + 2.1 - time.time()))


def test_blobs_are_what_b3sum_says(lab: Lab) -> None:
    lab.finish(CHAIN)
    assert blobs(lab.cache)
    assert all(digest_bytes(path.read_bytes()) == path.name for path in blobs(lab.cache))


PYTHONS = sorted(Path(os.environ.get("PYENV_ROOT", "/root/.pyenv")).glob("versions/3.1[23]*/bin/python3"))
OTHER_KEYS = """
import json, sys
from pathlib import Path
sys.path[:0] = json.loads(sys.argv[1])
from qpipe.keys.code import CodeIndex
from qpipe.keys.hashing import digest
class Memo(dict):
    def set(self, key, value): self[key] = value
index = CodeIndex(Memo())
names = ["lab_stages", "toy_stages", "qpipe.stages.adaround", "qpipe.stages.bnf", "qpipe.model.model"]
print(json.dumps({name: index.digest(name) for name in names} | {"params": digest({"a": 1.5, "b": [None, "x"]})}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "python", PYTHONS or [None], ids=lambda python: python.parts[-3] if python else "none"
)
def test_other_pythons_make_the_same_keys(lab: Lab, tmp_path: Path, python: Path | None) -> None:
    if python is None:
        pytest.skip("no Python 3.12 or 3.13 below PYENV_ROOT")
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    version = python.parts[-3].rpartition(".")[0]
    wheel = [*pip, "--python-version", version, "--dest", str(tmp_path), "blake3"]
    if subprocess.run(wheel, capture_output=True, timeout=100).returncode:
        pytest.skip(f"no blake3 for Python {version} to be had")
    shutil.unpack_archive(next(tmp_path.glob("blake3*.whl")), site, "zip")
    package, root = tmp_path / "src", Path(__file__).parents[2]
    shutil.copytree(root / "qpipe", package / "qpipe")
    shutil.copytree(root / "stages", package / "qpipe" / "stages")

    def keys(interpreter: Path, extra: list[Path]) -> str:
        words = [
            str(interpreter),
            "-I",
            "-c",
            OTHER_KEYS,
            json.dumps([str(path) for path in (*extra, package, lab.source.parent)]),
        ]
        run = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        return run.stdout

    assert keys(python, [site]) == keys(Path(sys.executable), [])
