"""block() cuts a part out that computes the same; digraph() shows who reads whom."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest

from qpipe.model import Model
from qpipe.numerics.grid import Encoding
from tests.model.nets import normal, parsed


@pytest.fixture
def model() -> Model:
    text = """net (float[N,3,8,8] x) => (float[N,4,8,8] y) {
        a = Conv<pads=[1,1,1,1]>(x, w)  b = Relu(a)  c = Conv<pads=[1,1,1,1]>(b, v)  d = Add(c, a)  y = Relu(d) }"""
    return Model.from_proto(parsed(text, w=normal(4, 3, 3, 3), v=normal(4, 4, 3, 3)))


def test_a_block_replays_bit_for_bit(model: Model) -> None:
    x = normal(2, 3, 8, 8)
    a, b, d = model.session(outputs=["a", "b", "d"]).run(None, {"x": x})
    part = model.block(["a", "b"], ["d"])
    assert [node.name for node in part.graph] == ["c", "d"]
    assert set(part.params) == {"v"}
    assert part.inputs[0].shape == ("N", 4, 8, 8)
    assert np.array_equal(part.session().run(None, {"a": a, "b": b})[0], d)
    assert [spec.name for spec in model.block(["x"], ["y"]).outputs] == ["y"]


def test_a_block_keeps_the_encodings_of_its_values_and_leaves_the_model_alone(model: Model) -> None:
    grid = Encoding(8, True, True, np.ones((), np.float32), np.zeros((), np.int32))
    quantized = model.with_encodings({"w": grid, "v": grid, "b": grid})
    before = quantized.pack()[1]
    assert set(quantized.block(["a"], ["d"]).encodings) == {"v", "b"}
    assert quantized.pack()[1] == before


def test_blocks_that_are_none_are_refused(model: Model) -> None:
    with pytest.raises(ValueError, match="not properly bounded"):
        model.block(["b"], ["d"])
    with pytest.raises(ValueError, match="no value named 'q'"):
        model.block(["q"], ["d"])


def test_the_digraph_has_nodes_operators_and_values(model: Model) -> None:
    graph = model.digraph()
    assert list(graph) == ["a", "b", "c", "d", "y"]
    assert graph.nodes["a"]["op_type"] == "Conv"
    assert graph.edges["a", "d"]["values"] == ("a",)
    assert list(nx.topological_sort(graph)) == ["a", "b", "c", "d", "y"]
    assert list(nx.articulation_points(graph.to_undirected())) == ["d"]
