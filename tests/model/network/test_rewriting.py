"""The moves that rewrite rules are made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qpipe.model.network.invariants import constant, permutation
from qpipe.model.network.rewriting import add_constant, apply, bypass, replace
from tests.model.nets import normal, parsed

CHAIN = "m (float[N,4] x) => (float[N,4] y) { a = Abs(x)  b = Neg(a)  y = Exp(b) }"


def graph_of(text: str, **tensors: Any) -> ir.Graph:
    graph: ir.Graph = ir.from_proto(parsed(text, **tensors)).graph
    return graph


def op_types(graph: ir.Graph) -> list[str]:
    return [node.op_type for node in graph]


def test_each_node_is_offered_to_the_rules_in_order_until_one_removes_it() -> None:
    graph, seen = graph_of(CHAIN), list[str]()

    def drop_neg(graph: ir.Graph, node: ir.Node) -> bool:
        seen.append(f"first {node.op_type}")
        return node.op_type == "Neg" and bypass(graph, node, node.inputs[0])

    def look(graph: ir.Graph, node: ir.Node) -> bool:
        seen.append(f"then {node.op_type}")
        return False

    assert apply(graph, (drop_neg, look))
    assert seen == ["first Abs", "then Abs", "first Neg", "first Exp", "then Exp"]
    assert not apply(graph, (drop_neg, look))


def test_readers_of_a_node_that_is_passed_by_read_what_it_read() -> None:
    graph = graph_of(CHAIN)
    assert bypass(graph, graph[1], graph[0].outputs[0])
    assert op_types(graph) == ["Abs", "Exp"]
    assert graph[1].inputs[0] is graph[0].outputs[0]


def test_an_output_of_the_model_keeps_its_name_when_its_node_is_passed_by() -> None:
    graph = graph_of(CHAIN)
    assert bypass(graph, graph[2], graph[1].outputs[0])
    assert [value.name for value in graph.outputs] == ["y"]
    assert graph.outputs[0].producer() is graph[1]


@pytest.mark.parametrize("source", ["x", "w", "z"])
def test_an_input_a_parameter_or_another_output_cannot_become_an_output(source: str) -> None:
    text = f"m (float[4] x) => (float[4] y, float[4] z) {{ z = Abs(x)  y = Identity({source}) }}"
    graph = graph_of(text, **({"w": normal(4)} if source == "w" else {}))
    value = graph[1].inputs[0]
    assert not bypass(graph, graph[1], value)
    assert op_types(graph) == ["Abs", "Identity"]


@pytest.mark.parametrize(
    ("given", "shape", "wanted"), [("<perm=[0,2,1]>", "2,3,4", (0, 2, 1)), ("", "2,3,4", (2, 1, 0)), ("", None, None)]
)
def test_a_permutation_that_is_left_out_turns_all_axes_around(given: str, shape: str | None, wanted: Any) -> None:
    graph = graph_of(f"m (float[{shape or 'N'}] x) => (float y) {{ y = Transpose{given}(x) }}")
    if shape is None:
        graph.inputs[0].shape = None
    assert permutation(graph[0]) == wanted


def test_only_an_initializer_is_a_constant() -> None:
    graph = graph_of("m (float[4] x) => (float[4] y) { a = Abs(x)  y = Clip(a, , w) }", w=np.float32(3))
    found = [constant(graph[1], index) for index in range(4)]
    assert found[2] == 3
    assert found[:2] == [None, None]
    assert found[3] is None


def test_a_node_in_the_place_of_another_has_its_name_type_and_metadata() -> None:
    graph = graph_of(CHAIN)
    old = graph[2]
    old.metadata_props["scope"] = "layer"
    assert replace(graph, old, ir.node("Log", [graph[1].outputs[0]]))
    assert op_types(graph) == ["Abs", "Neg", "Log"]
    assert graph.outputs[0] is graph[2].outputs[0]
    assert (graph.outputs[0].name, graph.outputs[0].dtype) == ("y", ir.DataType.FLOAT)
    assert graph[2].metadata_props == {"scope": "layer"}


def test_a_new_constant_has_a_name_of_its_own() -> None:
    graph = graph_of(CHAIN)
    apply(graph, ())
    names = [add_constant(graph, "a", np.zeros(3)).name for _ in range(2)]
    assert names == ["a_1", "a_2"]
    assert set(graph.initializers) == {"a_1", "a_2"}
