"""Pipelines of many nodes: all of them run, all of them hit, whatever the order they are written in; none of it is told
line by line, and nothing climbs a chain by recursion."""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from omegaconf import OmegaConf

from qpipe.cache.index import Index
from qpipe.cache.store import Store
from qpipe.language.graph import build_graph
from qpipe.language.spec import read_spec
from qpipe.plan.keyring import Keyring
from qpipe.plan.walk import Walk
from qpipe.report.page.html import SHOWN, render
from qpipe.report.terminal.terminal import LISTED
from qpipe.run.executor import urgency
from tests.toy import Toy

NODES = 1000
DEEP = 3 * sys.getrecursionlimit()
SHAPES = ("chain", "fan-out")


def pipeline(shape: str, nodes: int) -> dict[str, dict[str, Any]]:
    """A number, and nodes that each add one number: to the node before, or all to the first."""
    stages: dict[str, dict[str, Any]] = {"n0": {"uses": "toy_number"}}
    for i in range(1, nodes):
        source = f"n{i - 1}" if shape == "chain" else "n0"
        stages[f"n{i}"] = {"uses": "toy_add", "scores": source, "amount": i}
    return stages


def shuffled(stages: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    names = list(stages)
    random.Random(0).shuffle(names)
    return {name: dict(reversed(stages[name].items())) for name in names}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_thousand_nodes_run_once_and_hit_from_then_on(shape: str, toy: Toy) -> None:
    stages = pipeline(shape, NODES)
    toy.pipeline(stages)
    cold = toy.run("run", "run.workers=0")
    assert cold.returncode == 0, cold.stderr
    assert Counter(toy.calls()) == {"number": 1, "add": NODES - 1}
    ran = toy.record()
    assert ran["totals"]["ran"] == NODES
    last = sum(range(NODES)) + 1 if shape == "chain" else NODES
    assert ran["nodes"][f"n{NODES - 1}"]["scores"]["score"] == last
    assert len(cold.stderr.splitlines()) <= LISTED + 10

    toy.pipeline(shuffled(stages))
    warm = toy.run("run", "run.workers=0", "run.expect=cached")
    assert warm.returncode == 0, warm.stderr
    assert toy.calls() == []
    hit = toy.record()
    assert hit["totals"]["hit"] == NODES
    assert {name: node["key"] for name, node in hit["nodes"].items()} == {
        name: node["key"] for name, node in ran["nodes"].items()
    }
    assert warm.stderr.splitlines() == [f"{NODES} nodes, all cached"]
    assert len(warm.stdout.splitlines()) < 20


def test_the_middle_of_a_chain_changes_what_is_below_it(toy: Toy) -> None:
    stages = pipeline("chain", 200)
    toy.pipeline(stages)
    toy.run("run", "run.workers=0")
    toy.calls()
    toy.pipeline(stages | {"n150": stages["n150"] | {"amount": 0}})
    assert toy.run("run", "run.workers=0").returncode == 0
    assert toy.calls() == ["add"] * 50
    assert toy.record()["totals"]["hit"] == 150


@pytest.fixture
def deep(toy_stages: Toy, tmp_path: Path) -> Walk:
    """A chain far deeper than the interpreter's stack, read and ready to be walked."""
    config = OmegaConf.create({"stages": pipeline("chain", DEEP), "goal": {"metric": "toy", "max_drop": 0.5}})
    store = Store(tmp_path / "cache")
    return Walk(build_graph(read_spec(config)), Keyring(store), store)


def test_a_chain_deeper_than_the_stack_is_planned(deep: Walk) -> None:
    assert [action.node for action in deep.advance()] == ["n0"]
    states = Counter(outcome.state for outcome in deep.verdicts().values())
    assert states == {"run": 1, "wait": DEEP - 1}
    assert urgency(deep.graph)["n0"] == (0.0, DEEP)


def test_a_chain_deeper_than_the_stack_fails_to_its_end(deep: Walk) -> None:
    deep.advance()
    deep.fail("n0", {"message": "no", "exit_code": 1})
    assert deep.advance() == []
    assert Counter(outcome.state for outcome in deep.outcomes.values()) == {"failed": 1, "skipped": DEEP - 1}


def test_a_chain_deeper_than_the_stack_is_drawn(deep: Walk) -> None:
    from qpipe.report.drawing.picture import graph_text, svg_graph

    nodes = {name: {"stage": "toy", "verdict": "hit"} for name in deep.graph.inputs}
    edges = deep.graph.edges()
    assert len(graph_text(nodes, edges).splitlines()) == DEEP
    drawn = ElementTree.fromstring(svg_graph(nodes, edges))
    assert sum(element.tag.endswith("rect") for element in drawn.iter()) == DEEP


def test_a_circle_as_long_as_that_is_found(toy_stages: Toy) -> None:
    from qpipe.errors import ConfigError

    stages = pipeline("chain", DEEP)
    stages["n1"]["scores"] = f"n{DEEP - 1}"
    config = OmegaConf.create({"stages": stages, "goal": {"metric": "toy", "max_drop": 0.5}})
    with pytest.raises(ConfigError, match="in a circle") as caught:
        build_graph(read_spec(config))
    assert len(str(caught.value)) < 1000


def test_a_long_row_of_disabled_nodes_hands_on(toy_stages: Toy) -> None:
    stages = pipeline("chain", DEEP)
    for i in range(1, DEEP - 1):
        stages[f"n{i}"]["enabled"] = False
    config = OmegaConf.create({"stages": stages, "goal": {"metric": "toy", "max_drop": 0.5}})
    graph = build_graph(read_spec(config))
    assert [source.node for source in graph.inputs[f"n{DEEP - 1}"]["scores"]] == ["n0"]


def record(nodes: int) -> dict[str, Any]:
    node = {"stage": "toy_add", "verdict": "hit", "original_duration_s": 0.5, "duration_s": 0.0}
    found = {f"n{i}": node for i in range(nodes)}
    found["n7"] = node | {"verdict": "failed", "error": {"message": "it went wrong"}}
    found["n8"] = node | {"original_duration_s": 7.0}
    edges = [[f"n{i}", f"n{i + 1}", "scores"] for i in range(nodes - 1)]
    return {"nodes": found, "edges": edges, "status": "failed"}


def test_a_report_of_many_nodes_shows_those_that_say_most_and_counts_the_rest() -> None:
    page = render(record(10_000))
    assert page.count('<details class="node"') == SHOWN
    assert "it went wrong" in page
    assert "7.0 s" in page
    assert f"and {10_000 - SHOWN:,} more nodes" in page
    assert "10,000 nodes are too many for a picture" in page
    assert len(page) < 1_000_000


def test_a_report_of_few_nodes_shows_them_all() -> None:
    page = render(record(50))
    assert page.count('<details class="node"') == 50
    assert "more nodes" not in page
    assert page.count("<rect") >= 50


def test_an_index_that_is_asked_for_much_answers_as_it_does_for_little(tmp_path: Path) -> None:
    index = Index(tmp_path / "index")
    for i in range(500):
        index.set("history", f"n{i}", [i])
        index.set("historyx", f"n{i}", -i)
    index.close()
    index.set("history", "n3", "new")
    index.close()
    again = Index(tmp_path / "index")
    found = [again.get("history", f"n{i}") for i in range(600)]
    assert found == [[0], [1], [2], "new", *([i] for i in range(4, 500)), *[None] * 100]
    again.set("history", "n4", 4)
    assert again.get("history", "n4") == 4
    assert again.get("historyx", "n4") == -4
    again.close()


@pytest.mark.slow
def test_a_chain_of_ten_thousand_is_planned_and_explained(toy: Toy) -> None:
    toy.pipeline(pipeline("chain", 10_000))
    plan = toy.run("plan")
    assert plan.returncode == 0, plan.stderr
    assert len(plan.stdout.splitlines()) < LISTED + 20
    why = toy.run("why", "n9999")
    assert why.returncode == 0, why.stderr
