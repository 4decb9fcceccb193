"""What a key is made of: each ingredient makes another key where it changes, and nothing else does."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from qpipe.artifacts.artifact import Artifact
from qpipe.cache.store import Store
from qpipe.keys.hashing import digest
from qpipe.language.catalog import catalog
from qpipe.language.spec import NodeSpec
from qpipe.plan.keyring import Keyring
from qpipe.plan.verdicts import Action

ONE, TWO = Artifact("Scores", "1" * 64, 10), Artifact("Scores", "2" * 64, 10)
pytestmark = pytest.mark.usefixtures("toy_stages")


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    return Keyring(Store(tmp_path / "cache"), tmp_path)


def node_of(stage: str, **params: Any) -> NodeSpec:
    return NodeSpec("any", catalog()[stage], {}, params, params)


def test_the_artifacts_on_a_port_count_in_their_order(keyring: Keyring) -> None:
    node = node_of("toy_total")
    assert keyring.ingredients(node, {"scores": (ONE, TWO)})["ports"] == {"scores": ["1" * 64, "2" * 64]}
    assert keyring.ingredients(node, {"scores": (TWO, ONE)})["ports"] == {"scores": ["2" * 64, "1" * 64]}


def test_the_name_of_a_node_and_the_order_of_its_params_do_not_count(keyring: Keyring) -> None:
    one, other = node_of("toy_add", amount=2, seconds=0.5), node_of("toy_add", seconds=0.5, amount=2)
    other = dataclasses.replace(other, name="other")
    assert digest(keyring.ingredients(one, {})) == digest(keyring.ingredients(other, {}))


@pytest.mark.parametrize("change", ["version", "function", "name"])
def test_the_version_the_function_and_the_name_of_a_stage_count(tmp_path: Path, change: str) -> None:
    node, sign = node_of("toy_number", value=1.0), catalog()["toy_sign"]
    changed = {"version": 2, "function": sign.function, "name": sign.name}[change]
    other = dataclasses.replace(node, stage=dataclasses.replace(node.stage, **{change: changed}))
    found = [Keyring(Store(tmp_path / "cache")).ingredients(each, {}) for each in (node, other)]
    assert digest(found[0]) != digest(found[1])


def test_a_path_counts_by_what_lies_there_wherever_it_lies(keyring: Keyring, tmp_path: Path) -> None:
    (tmp_path / "one").write_text("3")
    (tmp_path / "copy").write_text("3")
    (tmp_path / "two").write_text("4")
    paths = (Path("one"), tmp_path / "copy", Path("two"))
    one, copy, two = (keyring.ingredients(node_of("toy_read", path=path), {})["params"] for path in paths)
    assert one == copy != two


def test_a_path_inside_a_value_counts_as_one_beside_it(keyring: Keyring, tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Holder:
        files: tuple[Path, ...]

    keys = set()
    for text in ("3", "4"):
        (tmp_path / "file").write_text(text)
        keys.add(digest(keyring.ingredients(node_of("toy_read", path=Holder((Path("file"),))), {})))
    assert len(keys) == 2


def action_of(keyring: Keyring, node: NodeSpec) -> Action:
    ingredients = keyring.ingredients(node, {})
    return Action("any", node.stage.name, "", ingredients, {}, {}, (), stamps=keyring.stamps(node))


def test_a_file_that_was_written_to_or_is_gone_has_changed(keyring: Keyring, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("3")
    node = node_of("toy_read", path=Path("file"))
    action = action_of(keyring, node)
    assert keyring.changed(node, action) == []
    status = file.stat()
    file.write_text("4")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert keyring.changed(node, action) == ["path"]
    file.write_text("3")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 2))
    assert keyring.changed(node, action) == ["path"]  # what it held meanwhile nobody knows
    file.unlink()
    assert keyring.changed(node, action) == ["path"]


def test_a_file_of_other_content_and_the_same_stamp_has_changed(
    keyring: Keyring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("3")
    monkeypatch.setattr("qpipe.plan.keyring.stamp", lambda path: "the same")
    node = node_of("toy_read", path=Path("file"))
    action = action_of(keyring, node)
    (tmp_path / "file").write_text("4")
    assert keyring.changed(node, action) == ["path"]


def test_a_module_beside_the_key_is_stale_once_it_is_something_else(keyring: Keyring, tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("x = 1")
    made = keyring._code.module("beside", tmp_path)
    assert keyring.stale({}) == keyring.stale({"also": {"beside": [made, "beside.py"]}}) == []
    assert keyring.stale({"also": {"beside": ["0" * 64, "beside.py"]}}) == ["beside"]
    assert keyring.stale({"also": {"nowhere": [made, "nowhere.py"]}}) == ["nowhere"]
    assert keyring.stale({"also": {"elsewhere": [made, "beside.py"]}}) == []  # it came from a path of its own
    for made_up in ("made up", {"beside": made}, {"nowhere": [made, 1]}, {"a": [made, "\0"]}):
        assert keyring.stale({"also": made_up}), made_up
