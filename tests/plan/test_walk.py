"""Walks through a graph whose results are put into the cache by hand: what is asked for, and in which order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from qpipe.artifacts.artifact import FORMAT, Artifact, save
from qpipe.artifacts.kinds import Scores, canonical_json
from qpipe.cache.store import Store
from qpipe.keys.changes import differences
from qpipe.language.graph import build_graph
from qpipe.language.spec import read_spec
from qpipe.plan.keyring import Keyring
from qpipe.plan.verdicts import Action, artifact_json
from qpipe.plan.walk import Walk
from tests.toy import Toy


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def walk_of(store: Store, max_drop: float, costs: bool = False) -> Walk:
    """A float score and three candidates, each a model and its score, and what it costs."""
    stages: dict[str, Any] = {"float": {"uses": "toy_number"}}
    for name in ("x", "y", "z"):
        stages[name] = {"uses": "load_model", "factory": f"qpipe.demo.net:{name}", "data": None}
        stages[f"score_{name}"] = {"uses": "toy_number", "value": ord(name)}
        stages[f"cost_{name}"] = {"uses": "toy_number", "value": 500 + ord(name), "enabled": costs}
    candidates = [{"model": n, "scores": f"score_{n}", "cost": f"cost_{n}"} for n in ("x", "y", "z")]
    stages["best"] = {
        "uses": "first_within", "reference": "float", "max_drop": max_drop, "candidates": candidates,
    }  # fmt: skip
    stages["out"] = {"uses": "export", "model": "best"}
    stages["more"] = {"uses": "toy_add", "scores": "best.scores"}
    goal = {"metric": "toy", "max_drop": max_drop, "scores": "best.scores"}
    ladder = {f"score_{name}": None for name in ("x", "y", "z")}
    config = OmegaConf.create({"stages": stages, "goal": goal, "ladder": ladder})
    return Walk(build_graph(read_spec(config)), Keyring(store), store)


def give(
    walk: Walk, store: Store, scores: dict[str, float], costs: dict[str, float | None] | None = None
) -> list[str]:
    """Answer every action that `walk` asks for; the names of the nodes asked for, in order."""
    costs = costs or {}
    asked: list[str] = []
    actions: list[Action] = walk.advance()
    while actions:
        for action in actions:
            asked.append(action.node)
            if action.node in scores or action.node in costs:
                values = {"cost": costs[action.node]} if action.node in costs else {"score": scores[action.node]}
                made = save(Scores(values), store)
                result = {"scores": artifact_json(made)}
            elif action.node in ("x", "y", "z"):
                content = {"format": FORMAT, "kind": "Model", "meta": action.node, "blobs": {}}
                root = canonical_json(content)
                result = {"model": artifact_json(Artifact("Model", store.put(root), len(root)))}
            else:
                walk.fail(action.node, {"message": "no answer", "exit_code": 1})
                continue
            provenance = {"duration_s": 1.0}
            walk.finish(action.node, {"outputs": result, "ingredients": {}, "provenance": provenance})
        actions = walk.advance()
    return asked


@pytest.mark.usefixtures("toy_stages")
class TestFirstWithin:
    def test_it_stops_at_the_first_candidate_within_the_goal(self, store: Store) -> None:
        walk = walk_of(store, 0.1)
        asked = give(walk, store, {"float": 0.9, "score_x": 0.5, "score_y": 0.85, "score_z": 0.9})
        assert "score_z" not in asked
        assert "z" not in asked
        best = walk.outcomes["best"]
        assert best.chosen is not None
        assert best.chosen[0].node == "y"
        assert best.outputs["model"] == walk.outcomes["y"].outputs["model"]
        assert walk.verdicts()["z"].state == "not_needed"

    def test_a_candidate_is_asked_for_only_after_the_one_before_it_missed(self, store: Store) -> None:
        walk = walk_of(store, 0.1)
        first = {action.node for action in walk.advance()}
        assert first == {"float", "score_x"}

    def test_where_none_is_within_the_best_is_taken(self, store: Store) -> None:
        walk = walk_of(store, 0.1)
        asked = give(walk, store, {"float": 0.9, "score_x": 0.5, "score_y": 0.7, "score_z": 0.6})
        assert {"score_x", "score_y", "score_z"} <= set(asked)
        best = walk.outcomes["best"]
        assert best.chosen is not None
        assert best.chosen[0].node == "y"
        assert "none is within the goal" in best.reasons[0]

    @pytest.mark.parametrize(
        ("scores", "taken"), [((0.6, 0.7, 0.7), "y"), ((0.7, 0.6, 0.7), "x"), ((0.7, 0.7, 0.7), "x")]
    )
    def test_of_equally_good_ones_the_first_is_taken(
        self, store: Store, scores: tuple[float, ...], taken: str
    ) -> None:
        walk = walk_of(store, 0.1)
        given = dict(zip(("score_x", "score_y", "score_z"), scores, strict=True))
        give(walk, store, {"float": 0.9, **given})
        best = walk.outcomes["best"]
        assert best.chosen is not None
        assert best.chosen[0].node == taken

    def test_a_candidate_that_fails_does_not_stop_the_search(self, store: Store) -> None:
        walk = walk_of(store, 0.1)
        give(walk, store, {"float": 0.9, "score_y": 0.85})
        best = walk.outcomes["best"]
        assert best.chosen is not None
        assert best.chosen[0].node == "y"
        assert walk.outcomes["score_x"].state == "failed"

    def test_without_a_reference_nothing_is_chosen(self, store: Store) -> None:
        walk = walk_of(store, 0.1)
        give(walk, store, {"score_x": 0.5})
        assert walk.outcomes["best"].state == "skipped"
        assert walk.outcomes["out"].state == "skipped"


@pytest.mark.usefixtures("toy_stages")
def test_a_record_says_what_became_of_each_candidate_and_what_it_costs(store: Store) -> None:
    """Nobody knows what x costs; y is within the goal."""
    from qpipe.run.record import RunInfo, build_record

    walk = walk_of(store, 0.1, costs=True)
    given = {"float": 0.9, "score_x": 0.5, "score_y": 0.85, "score_z": 0.86}
    asked = give(walk, store, given, costs={"cost_x": None, "cost_y": 0.7, "cost_z": 0.5})
    assert not {"cost_z", "score_z"} & set(asked)
    best = walk.outcomes["best"]
    assert best.chosen is not None
    assert best.chosen[0].node == "y"
    record = build_record(walk, store, RunInfo(["qpipe"], store.root, 0.0), {}, {})
    rows = {row["node"]: (row.get("cost"), row["choice"]["fate"]) for row in record["ladder"] if "choice" in row}
    assert rows == {"score_x": (None, "missed"), "score_y": (0.7, "taken")}


def test_differences_are_told_value_by_value(toy_stages: Toy) -> None:
    before = {
        "format": 1,
        "stage": "s",
        "version": 1,
        "code": "a",
        "libraries": {"numpy": "1"},
        "params": {"iterations": 10, "path": {"content": "x"}, "scheme": {"weight": {"bitwidth": 8, "signed": True}}},
        "ports": {"model": ["m"], "data": ["d"]},
    }
    after = {
        **before,
        "code": "b",
        "libraries": {"numpy": "2"},
        "params": {"iterations": 20, "path": {"content": "y"}, "scheme": {"weight": {"bitwidth": 4, "signed": True}}},
        "ports": {"model": ["n"], "data": ["d"]},
    }
    assert differences(before, after) == [
        "code changed",
        'library numpy: "1" -> "2"',
        "param iterations: 10 -> 20",
        "param path: its content changed",
        "param scheme.weight.bitwidth: 8 -> 4",
        "input 'model' changed",
    ]
    assert differences(before, before) == []
