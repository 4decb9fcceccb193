"""The key of an action is frozen: the same ingredients have the same key, in every version, on every machine.

Where one of these digests has to change, `qpipe.artifacts.artifact.FORMAT` goes up and CHANGELOG says so under
"Cache": every cached result is then computed anew.
"""

from __future__ import annotations

import enum
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpipe.artifacts.artifact import Artifact
from qpipe.cache.store import Store
from qpipe.keys.code import CodeIndex
from qpipe.keys.hashing import _digest_any, digest
from qpipe.language.spec import NodeSpec
from qpipe.plan.decision import decide
from qpipe.plan.keyring import Keyring
from qpipe.plan.verdicts import Action

INGREDIENTS: dict[str, Any] = {
    "format": 1,
    "stage": "adaround",
    "version": 3,
    "function": "qpipe.stages.adaround:adaround",
    "code": "c0de" * 16,
    "libraries": {"numpy": "2.1.0", "torch": "2.9.0"},
    "params": {
        "beam": 8,
        "damping": 0.01,
        "names": ["conv1", "fc"],
        "enabled": True,
        "scheme": {"weight": {"bitwidth": 4, "signed": True}, "activation": None, "name": "w4"},
        "weights": {"content": "f11e" * 16},
        "factory": {"function": "build", "code": "fac7" * 16},
    },
    "ports": {"model": ["0" * 64], "scores": ["1" * 64, "2" * 64]},
}


def test_the_key_of_fixed_ingredients() -> None:
    assert digest("action", INGREDIENTS) == "821c5f6da1cc5f56b5ada665d07527ec44c8f6e2f9136e326d0d184efdd9beea"


class Colour(enum.Enum):
    red = 1


@dataclass(frozen=True)
class Point:
    x: float
    name: str = ""


Colour.__module__ = Point.__module__ = "golden"

VALUES: dict[str, tuple[Any, str]] = {
    "false": (False, "a843d437c72700a86b365bab2bd6d49dbbc206287efe307f792d79a32c316bb1"),
    "zero": (0, "5537bde90607f828ae98bc5343b8e1b11cf9af73049fe0e502b71c19c1760b8f"),
    "minus zero": (-0.0, "4e32944a28c1935e3640d90859fe45562db9b7a68f2f39b43756046b6fa9da7f"),
    "infinity": (float("inf"), "bc4ed1edbb551a4b78fbd5c50f162afad4302a7b19d941415b8068dbce7578a1"),
    "empty text": ("", "17e04b8b3db19cb32d0204a4e5186c52abeebe9a77b11e502d797cfa4fd0db0b"),
    "empty list": ([], "71b06f2922182f8dc7b3ac30290f2ec52a1580ab775e5f099ad76d0abd9f740a"),
    "empty tuple": ((), "f350cee169481e05b1983b443e9bdc9b56070fe8b89f419badf336189e310fb3"),
    "empty dict": ({}, "a32b3515333b2684e2af943bbc445f360a0d6b84fe9d10aebd6dad623214fbf2"),
    "enum": (Colour.red, "20982e6185b7cf43c8f343144b04e7f03497b3ec1567fc6c42e9cf1f519b25eb"),
    "dataclass": (Point(1.0, "a"), "88aeadd183b5a6abf6ae0169bc81d913b00047c5d050c40a1b0693d64859e964"),
    "int64": (
        np.array([[1, -2]], dtype=np.int64),
        "48e34a1f5045cf032add81ae5bdd3608fa867804ca2907ee237a767ae94d51b9",
    ),
    "bool array": (
        np.array([True, False]),
        "5b27ba328d4ffe354d8ec7707b396491df250adc5564c5a3f381b2c107e8be95",
    ),
    "half": (
        np.array(0.5, dtype=np.float16),
        "baf63765745d74d16f2c139eabf4698978a9dbffdca4228ede9708d1c4f1dd1b",
    ),
    "no values": (
        np.zeros((0, 3), np.float32),
        "a4303d2338b46bbf28661e437382ecefc10ac9d64ba241379e9dd2750be11f85",
    ),
    "nested": (
        {"a": [(1, None), {"b": b"\x00"}]},
        "dbeb8a116f65d4836c75e0f93ec26083fe98fc80fca03589a72cf882a89354d0",
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_the_digest_of_every_type(name: str) -> None:
    value, expected = VALUES[name]
    assert digest(value) == expected


SOURCE = '''
"""A stage as a plug-in brings it."""
from pathlib import Path
from typing import Annotated, Literal
from golden_formula import Grid, scale
from qpipe.stage import Factory, Range, Scores, stage

@stage(version=7)
def golden(scores: Scores, more: list[Scores], *, factor: Annotated[float, Range(gt=0)] = 2.0, path: Path,
           how: Literal["a", "b"] = "a", steps: tuple[int, ...] = (1, 2), grid: Grid, by: Factory) -> Scores:
    """Scales."""
    return Scores({"score": scale(scores.values["score"], factor)})
'''
FORMULA = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Grid:
    bitwidth: int
    signed: bool = True

def scale(a, b):  # a comment
    return a * b
"""


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NodeSpec:
    """A node of a stage with every kind of param; its files have a content that is the same everywhere."""
    (tmp_path / "golden_stage.py").write_text(SOURCE)
    (tmp_path / "golden_formula.py").write_text(FORMULA)
    (tmp_path / "weights.bin").write_bytes(b"weights")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("golden_stage", "golden_formula"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    stage = importlib.import_module("golden_stage").golden.__stage__
    params = {
        "factor": 0.5,
        "path": tmp_path / "weights.bin",
        "how": "b",
        "steps": (3, 4),
        "grid": importlib.import_module("golden_formula").Grid(4),
        "by": "golden_formula:scale",
    }
    return NodeSpec("any_name", stage, {}, params, {})


def test_the_key_of_a_whole_action(node: NodeSpec, tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    one, two = Artifact("Scores", "a" * 64, 10), Artifact("Scores", "b" * 64, 11)
    action = decide(node, {"scores": (one,), "more": (one, two)}, Keyring(store, tmp_path), store)
    assert isinstance(action, Action)
    assert action.key == "062eb32343d05f098c273173d594a104e4ef3181afe253d3c6231ab6dd14f142"


def test_plain_values_have_the_digest_that_any_value_has() -> None:
    deep: Any = "bottom"
    for i in range(200):
        deep = [deep] if i % 2 else {"k": deep}
    for value in (INGREDIENTS, deep, "x" * 10_000, *(value for value, _ in VALUES.values())):
        assert digest("action", value) == _digest_any(("action", value))


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
)


@given(plain)
def test_plain_values_of_any_shape_too(value: object) -> None:
    assert digest(value) == _digest_any((value,))


def test_another_version_of_a_library_makes_another_key(
    node: NodeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "cache")
    keys = set()
    for version in ("2.0", "2.1"):
        monkeypatch.setattr(CodeIndex, "libraries", lambda *_, version=version: {"numpy": version})
        keys.add(digest("action", Keyring(store, tmp_path).ingredients(node, {})))
    assert len(keys) == 2
