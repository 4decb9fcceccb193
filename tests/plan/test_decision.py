"""Every verdict on one node, and the reason that goes with it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from qpipe.artifacts.artifact import save
from qpipe.artifacts.kinds import Scores
from qpipe.cache.store import Store
from qpipe.keys.hashing import digest
from qpipe.language.catalog import catalog
from qpipe.language.spec import NodeSpec
from qpipe.plan.decision import decide
from qpipe.plan.history import remember
from qpipe.plan.keyring import Keyring
from qpipe.plan.verdicts import Action, Outcome, artifact_json

pytestmark = pytest.mark.usefixtures("toy_stages")


class Scene:
    """One node of a stage that makes a number, and a cache."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder / "cache")
        self.node = self.of(value=1.0)

    def of(self, stage: str = "toy_number", **params: Any) -> NodeSpec:
        return NodeSpec("one", catalog()[stage], {}, params, params)

    def decide(self, node: NodeSpec | None = None) -> Outcome | Action:
        return decide(node or self.node, {}, Keyring(self.store), self.store)

    def publish(self, port: str = "scores", **more: Any) -> tuple[str, dict[str, Any]]:
        """Its result, as the executor publishes it: the key, and the result."""
        ingredients = Keyring(self.store).ingredients(self.node, {})
        key = digest("action", ingredients)
        outputs = {port: artifact_json(save(Scores({"score": 1.0}), self.store))}
        provenance = {"node": "one", "duration_s": 2.5}
        result = {"outputs": outputs, "ingredients": ingredients, "provenance": provenance, **more}
        result = self.store.publish(key, result)
        remember(self.store, key, result)
        return key, result


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def reasons(verdict: Outcome | Action) -> tuple[str, ...]:
    assert isinstance(verdict, Action)
    return verdict.reasons


def test_a_result_that_is_there_whole_is_a_hit(scene: Scene) -> None:
    key, result = scene.publish()
    verdict = scene.decide()
    assert isinstance(verdict, Outcome)
    assert (verdict.state, verdict.key, verdict.result) == ("hit", key, result)
    assert verdict.outputs["scores"].digest == result["outputs"]["scores"]["digest"]


def test_what_never_ran_runs(scene: Scene) -> None:
    assert reasons(scene.decide()) == ("never run",)


def test_another_param_runs_under_another_key_and_says_which(scene: Scene) -> None:
    key, _ = scene.publish()
    verdict = scene.decide(scene.of(value=2.0))
    assert reasons(verdict) == ("param value: 1.0 -> 2.0",)
    assert isinstance(verdict, Action)
    assert verdict.key != key
    assert verdict.expected_s == 2.5
    assert not verdict.always


def test_a_result_that_lost_a_blob_is_no_hit(scene: Scene) -> None:
    _, result = scene.publish()
    scene.store.discard(result["outputs"]["scores"]["digest"], 0)
    assert reasons(scene.decide()) == ("cached result lost 1 of its blobs",)


def test_a_result_that_is_gone_was_evicted(scene: Scene) -> None:
    key, _ = scene.publish()
    scene.store.forget(key)
    assert reasons(scene.decide()) == ("result evicted",)


@pytest.mark.parametrize("port", ["model", "score"])
def test_a_result_of_other_outputs_was_made_by_no_such_stage(scene: Scene, port: str) -> None:
    scene.publish(port)
    assert reasons(scene.decide()) == ("what the cache holds under its key was made by no such stage",)


def test_a_result_with_more_than_the_stages_outputs_is_none_of_it(scene: Scene) -> None:
    ingredients = Keyring(scene.store).ingredients(scene.node, {})
    made = artifact_json(save(Scores({"score": 1.0}), scene.store))
    result = {"outputs": {"scores": made, "more": made}, "ingredients": ingredients}
    scene.store.publish(digest("action", ingredients), result)
    assert isinstance(scene.decide(), Action)


def test_a_result_whose_other_modules_changed_is_replaced(scene: Scene) -> None:
    scene.publish(also={"nowhere_to_be_found": ["0" * 64, "nowhere.py"]})
    verdict = scene.decide()
    assert "nowhere_to_be_found" in reasons(verdict)[0]
    assert isinstance(verdict, Action)
    assert verdict.always


def test_a_stage_that_reads_the_world_never_hits(scene: Scene) -> None:
    scene.publish()
    stage = dataclasses.replace(scene.node.stage, always=True)
    verdict = scene.decide(dataclasses.replace(scene.node, stage=stage))
    assert reasons(verdict) == ("reads the outside world every time",)
    assert isinstance(verdict, Action)
    assert verdict.always
