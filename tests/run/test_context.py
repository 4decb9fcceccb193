"""Sub-results of a running action: when one is found, when its function is called, what comes back."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qpipe.cache.store import Store
from qpipe.keys import loaded
from qpipe.run.context import ActionContext

INGREDIENTS: dict[str, Any] = {
    "format": 1,
    "stage": "toy",
    "version": 1,
    "function": "toy:toy",
    "code": "c0de" * 16,
    "libraries": {"numpy": "2.0"},
    "params": {"beam": 8},
    "ports": {"model": ["1" * 64]},
}


class Scene:
    """A store, and contexts of one action after the other; `calls` counts those of `double`."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder / "cache")
        self.calls = 0
        self.told: list[dict[str, Any]] = []

    def context(self, **changes: Any) -> ActionContext:
        request = {"device": "cpu", "ingredients": {**INGREDIENTS, **changes}}
        return ActionContext(request, self.store, self.told.append, 1)

    def double(self, x: Any) -> Any:
        self.calls += 1
        return {"twice": 2 * np.asarray(x), "of": float(np.sum(x))}


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_a_sub_result_is_found_by_the_next_action_of_the_same_code(scene: Scene) -> None:
    x = np.arange(3, dtype=np.float32)
    first = scene.context().memo("double", scene.double, x)
    again = scene.context(params={"beam": 9}, ports={}).memo("double", scene.double, x)
    assert scene.calls == 1
    assert np.array_equal(first["twice"], again["twice"])
    assert first["of"] == again["of"] == 3.0


@pytest.mark.parametrize(
    "change", [{"code": "c0da" * 16}, {"version": 2}, {"stage": "other"}, {"function": "toy:other"}, {"format": 2}]
)
def test_other_code_finds_none_of_it(scene: Scene, change: dict[str, Any]) -> None:
    scene.context().memo("double", scene.double, 1)
    scene.context(**change).memo("double", scene.double, 1)
    scene.context(libraries={"numpy": "2.1"}).memo("double", scene.double, 1)
    assert scene.calls == 3


def test_every_input_and_the_name_tell_sub_results_apart(scene: Scene) -> None:
    asked: list[tuple[str, Any]] = [("a", 1), ("b", 1), ("a", 1.0), ("a", [1])]
    asked += [("a", np.array(1)), ("a", np.array([1]))]
    for name, value in asked:
        scene.context().memo(name, scene.double, value)
    assert scene.calls == len(asked)


def test_another_function_of_the_same_name_and_inputs_is_another_sub_result(scene: Scene) -> None:
    def one(x: int) -> int:
        return x + 1

    def two(x: int) -> int:
        return x + 2

    assert [scene.context().memo("plus", function, 1) for function in (one, two)] == [2, 3]


def damaged(scene: Scene, key: str) -> None:
    """Turn a bit in every blob of the sub-result."""
    result = scene.store.result(key)
    assert result is not None
    for name in result["blobs"]:
        path = scene.store.path(name)
        path.chmod(0o644)
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def lost(scene: Scene, key: str) -> None:
    result = scene.store.result(key)
    assert result is not None
    for name in result["blobs"]:
        scene.store.discard(name, 0)


@pytest.mark.parametrize("harm", [damaged, lost])
def test_a_sub_result_that_cannot_be_read_is_made_again(scene: Scene, harm: Callable[[Scene, str], None]) -> None:
    context = scene.context()
    wanted = context.memo("double", scene.double, [1.0, 2.0])
    harm(scene, *context.parts)
    scene.store = Store(scene.store.root)
    found = scene.context().memo("double", scene.double, [1.0, 2.0])
    assert scene.calls == 2
    assert np.array_equal(found["twice"], wanted["twice"])


def test_what_comes_back_the_first_time_is_what_is_read_the_next_time(scene: Scene) -> None:
    first = scene.context().memo("pair", lambda: (1, [2, (3,)]))
    again = scene.context().memo("pair", lambda: None)
    assert first == again == [1, [2, [3]]]


def test_parts_and_events_name_what_was_published(scene: Scene) -> None:
    context = scene.context()
    context.memo("double", scene.double, 1)
    assert scene.told == [{"event": "published", "key": key} for key in context.parts]
    assert len(context.parts) == 1


def test_what_imported_a_module_that_no_key_holds_is_not_kept(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    (scene.store.root.parent / "zq_by_name.py").write_text("FACTOR = 2")
    monkeypatch.syspath_prepend(scene.store.root.parent)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    loaded.watch(frozenset())
    listings = {"listings": {INGREDIENTS["code"]: "1234  known"}}
    request = {"device": "cpu", "ingredients": INGREDIENTS, "provenance": listings}

    def factor(name: str) -> int:
        scene.calls += 1
        return int(importlib.import_module(name).FACTOR)

    for _ in range(2):  # it is loaded in the first, and there in the second
        context = ActionContext(request, scene.store, scene.told.append, 1)
        with context.apart():
            assert context.memo("factor", factor, "zq_by_name") == 2
        assert list(context.found_on_the_way()) == ["zq_by_name"]
    assert scene.calls == 2
    assert scene.told == []
    del sys.modules["zq_by_name"]


def test_the_last_step_is_always_told(scene: Scene) -> None:
    context = scene.context()
    for done in range(1, 101):
        context.progress(done, 100, "steps")
    assert scene.told[0]["done"] == 1
    assert scene.told[-1]["done"] == 100
    assert len(scene.told) < 50
