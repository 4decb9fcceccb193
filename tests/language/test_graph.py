"""A declaration as a graph: what is wired to what, and every mistake refused in words."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from qpipe.errors import ConfigError
from qpipe.language.graph import Graph, Source, build_graph
from qpipe.language.spec import read_spec
from tests.toy import Toy

pytestmark = pytest.mark.usefixtures("toy_stages")
NUMBER = {"uses": "toy_number"}


def graph_of(stages: dict[str, Any], **rest: Any) -> Graph:
    config = {"stages": stages, "goal": {"metric": "toy", "max_drop": 0.1}, **rest}
    return build_graph(read_spec(OmegaConf.create(config)))


def add(source: str, **rest: Any) -> dict[str, Any]:
    return {"uses": "toy_add", "scores": source, **rest}


def test_names_of_nodes_on_ports_are_the_edges() -> None:
    graph = graph_of({"a": NUMBER, "b": add("a"), "c": {"uses": "toy_total", "scores": ["a", "b.scores"]}})
    assert graph.inputs["b"] == {"scores": (Source("a", "scores"),)}
    assert graph.edges() == [("a", "b", "scores"), ("a", "c", "scores"), ("b", "c", "scores")]
    assert graph.targets == ("c",)


def test_a_disabled_node_hands_on_what_came_in() -> None:
    graph = graph_of({"a": NUMBER, "b": add("a", enabled=False), "c": add("b")})
    assert graph.inputs["c"]["scores"] == (Source("a", "scores"),)
    assert graph.disabled == ("b",)


def test_a_chain_of_disabled_nodes_is_bridged() -> None:
    stages = {
        "a": NUMBER,
        **{f"n{i}": add("a" if i == 0 else f"n{i - 1}", enabled=False) for i in range(1500)},
    }
    graph = graph_of({**stages, "z": add("n1499")})
    assert graph.inputs["z"]["scores"] == (Source("a", "scores"),)


def test_a_chain_of_1500_nodes_is_no_recursion() -> None:
    stages = {"n0": NUMBER, **{f"n{i}": add(f"n{i - 1}") for i in range(1, 1500)}}
    assert graph_of(stages).targets == ("n1499",)


MODEL = {"uses": "load_model", "factory": "qpipe.demo.net:build", "data": None}
FIRST = {"uses": "first_within", "reference": "a", "max_drop": 0.1, "candidates": [{"model": "m", "scores": "a"}]}
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"a": {"uses": "toy_numbr"}}, "stages.a: no stage 'toy_numbr'. Did you mean 'toy_number'?"),
    ({"a": {"value": 1}}, "stages.a: a node needs 'uses'"),
    ({"a-b": NUMBER}, "stages.a-b: a node's name is letters, digits and '_'"),
    ({"a": NUMBER, "b": add("aa")}, "stages.b.scores: no node 'aa'. Did you mean 'a'? Nodes: a, b."),
    (
        {"a": NUMBER, "b": add("a.score")},
        "stages.b.scores: node 'a' has no output 'score'. Did you mean 'scores'?",
    ),
    (
        {"a": NUMBER, "b": add("a", amout=1)},
        "stages.b: 'toy_add' has no param 'amout'. Did you mean 'amount'?",
    ),
    ({"a": NUMBER, "b": add("a", amount="x")}, "stages.b.amount: expected int, got 'x'"),
    (
        {"a": {"uses": "toy_number", "value": 1e9}},
        "stages.a.value: must be >= -1000 and <= 1000, got 1000000000.0",
    ),
    (
        {"a": {"uses": "toy_add"}},
        "stages.a.scores: port 'scores' of 'toy_add' takes a Scores and is not wired.",
    ),
    ({"a": {"uses": "toy_read"}}, "stages.a.path: missing, and 'path' has no default."),
    ({"a": {"uses": "toy_read", "path": "???"}}, "stages.a.path: missing. Set stages.a.path=…"),
    (
        {"a": {"uses": "toy_read", "path": "${nothing}"}},
        "stages.a.path: the interpolation '${nothing}' names nothing that the config has.",
    ),
    ({"a": add("b"), "b": add("a")}, "feed one another in a circle"),
    (
        {"a": NUMBER, "f": {"uses": "toy_files", "scores": "a"}, "b": add("f")},
        "stages.b.scores: takes a Scores, and node 'f' makes",
    ),
    ({"a": NUMBER, "b": add(["a", "a"])}, "stages.b.scores: takes one node, got ['a', 'a']."),  # type: ignore[arg-type]
    (
        {"a": {"uses": "toy_number", "enabled": False}, "b": add("a")},
        "stages.b.scores: node 'a' is disabled and has no Scores",
    ),
    ({"a": {"uses": "toy_number", "enabled": "off"}}, "stages.a.enabled: expected bool, got 'off'."),
    ({"b": {"uses": "first_within", "candidates": []}}, "stages.b.reference: missing. 'first_within' needs"),
    ({"a": NUMBER, "b": {**FIRST, "least": 1.5}}, "stages.b: 'first_within' takes no 'least'."),
    ({"a": NUMBER, "b": {**FIRST, "candidates": [{"model": "a"}]}}, "expected {model: node, scores: node}, with or"),
    (
        {"a": NUMBER, "b": {**FIRST, "candidates": [{"model": "m", "scores": "a", "cost": "nobody"}]}, "m": MODEL},
        "stages.b.candidates[0].cost: no node 'nobody'.",
    ),
    ({}, "stages: no node is declared."),
]


@pytest.mark.parametrize(("stages", "words"), MISTAKES)
def test_a_mistake_is_one_sentence_with_its_address(stages: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        graph_of(stages)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message


def test_a_plug_in_says_which_orders_it_advises_against() -> None:
    source = {"uses": "load_model", "path": "net.onnx"}

    def chain(*names: str, **rest: Any) -> Graph:
        nodes = {"source": source}
        for name in names:
            optional = {} if name in ("bnf", "toy_prune") else {"data": None}
            nodes[name.removeprefix("toy_")] = {"uses": name, "model": list(nodes)[-1], **optional}
        return graph_of(nodes, **rest)

    assert chain("bnf", "cle").order == ("source", "bnf", "cle")
    assert chain("bnf", "toy_prune").order == ("source", "bnf", "prune")
    with pytest.raises(ConfigError) as after:
        chain("cle", "hbf", "toy_prune")
    assert "stages.prune: 'toy_prune' after 'cle' is discouraged: pruned channels cannot be told." in str(after.value)
    with pytest.raises(ConfigError) as before:
        chain("toy_prune", "bnf")
    assert "stages.bnf: 'bnf' after 'toy_prune' is discouraged: pruning comes last. Change" in str(before.value)
    with pytest.raises(ConfigError, match="'bnf' after 'cle' is discouraged: equalization looks"):
        chain("cle", "bnf")
    assert chain("toy_prune", "bnf", allow_discouraged=True).order == ("source", "prune", "bnf")


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"targets: no node 'bb'\. Did you mean 'b'\?"):
        graph_of({"a": NUMBER, "b": add("a")}, targets=["bb"])


def test_a_ladder_of_an_unknown_node_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"ladder\.x: no node 'x'"):
        graph_of({"a": NUMBER}, ladder={"x": "X"})


def test_the_plug_in_fixture_is_the_toy(toy_stages: Toy) -> None:
    assert (toy_stages.folder / "plugin" / "toy_stages.py").exists()
