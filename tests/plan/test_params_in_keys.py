"""What a param is to a key: a function by its code wherever its type says that one stands, a path by its content,
a default as a config would give it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from qpipe.cache.store import Store
from qpipe.language.spec import NodeSpec
from qpipe.param import Factory, coerce, of_its_type
from qpipe.plan.keyring import Keyring
from qpipe.stage import Scores, describe_function


@dataclasses.dataclass(frozen=True)
class Recipe:
    by: Factory
    times: int = 1


@pytest.fixture
def keyring(tmp_path: Path) -> Iterator[Keyring]:
    (tmp_path / "zq_mine.py").write_text("def f():\n    return 1\n\ndef g():\n    return 2\n")
    (tmp_path / "w.txt").write_text("one")
    with Store(tmp_path / "cache") as store:
        yield Keyring(store, tmp_path)


def ingredient(keyring: Keyring, hint: Any, value: Any) -> Any:
    """What the value of a param of that type is in a key."""

    def made(*, p: Any) -> Scores:
        return Scores({"score": 0.0})

    made.__annotations__["p"] = hint
    stage = describe_function(made, 1, {}, False)
    return keyring.ingredients(NodeSpec("n", stage, {}, {"p": coerce(value, hint, "p")}, {"p": value}, True), {})[
        "params"
    ]["p"]


HOLDERS: dict[str, tuple[Any, Any]] = {
    "itself": (Factory, "zq_mine:f"),
    "optional": (Factory | None, "zq_mine:f"),
    "beside names": (Literal["top1"] | Factory, "zq_mine:f"),
    "list": (list[Factory], ["zq_mine:g", "zq_mine:f"]),
    "tuple": (tuple[Factory, ...], ["zq_mine:f"]),
    "pair": (tuple[int, Factory], [3, "zq_mine:f"]),
    "mapping": (dict[str, Factory], {"a": "zq_mine:f"}),
    "dataclass": (Recipe, {"by": "zq_mine:f"}),
    "dataclasses in a list": (list[Recipe | None], [None, {"by": "zq_mine:f", "times": 2}]),
    "deep": (dict[str, list[Recipe]], {"a": [{"by": "zq_mine:f"}]}),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_function_counts_by_its_code_wherever_it_stands(keyring: Keyring, tmp_path: Path, holder: str) -> None:
    hint, value = HOLDERS[holder]
    first = ingredient(keyring, hint, value)
    assert "code" in str(first)
    assert "zq_mine" not in str(first)
    (tmp_path / "zq_mine.py").write_text("def f():\n    return 3\n\ndef g():\n    return 2\n")
    with Store(tmp_path / "cache") as store:
        assert ingredient(Keyring(store, tmp_path), hint, value) != first


def test_text_that_only_looks_like_a_function_is_text(keyring: Keyring) -> None:
    assert ingredient(keyring, str, "zq_mine:f") == "zq_mine:f"
    assert ingredient(keyring, list[str], ["zq_mine:f"]) == ["zq_mine:f"]
    assert ingredient(keyring, Literal["top1"] | Factory, "top1") == "top1"


@pytest.mark.parametrize(
    ("default", "hint", "wanted"),
    [
        ("w.txt", Path, Path("w.txt")),
        ([1, 2], tuple[int, ...], (1, 2)),
        ((1, 2), list[int], [1, 2]),
        ({"by": "m:f"}, Recipe, Recipe("m:f")),
        (-0.0, float, 0.0),
        (1, float, 1.0),
        (None, int, None),
        ("x", int, "x"),
    ],
)
def test_a_default_is_what_a_config_would_give(default: Any, hint: Any, wanted: Any) -> None:
    found = of_its_type(default, hint)
    assert (type(found), str(found)) == (type(wanted), str(wanted))


def test_a_default_is_new_in_every_call() -> None:
    default: list[list[str]] = [[]]
    of_its_type(default, list[list[str]])[0].append("x")
    of_its_type(default, int)[0].append("x")
    assert default == [[]]
