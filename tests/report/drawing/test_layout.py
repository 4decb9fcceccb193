from __future__ import annotations

import itertools
import random

import networkx
import numpy as np
import pytest
from scipy.optimize import isotonic_regression

from qpipe.report.drawing.layout import GAP_Y, _crossings, _cut, _pool, _ranks, _untangle, layout, topological

Pairs = list[tuple[str, str]]


def random_graph(seed: int, nodes: int = 20) -> tuple[list[str], Pairs]:
    """A connected acyclic graph in which each node takes one or two of the earlier ones."""
    draw = random.Random(seed)
    names = [f"n{i}" for i in range(nodes)]
    return names, [
        (names[draw.randrange(i)], names[i]) for i in range(1, nodes) for _ in range(draw.randint(1, 2))
    ]


@pytest.mark.parametrize("seed", range(5))
def test_each_node_stands_right_of_what_it_needs_and_no_boxes_overlap(seed: int) -> None:
    names, pairs = random_graph(seed)
    plan = layout({name: (80.0 + 3 * i, 40.0) for i, name in enumerate(names)}, pairs)
    for source, target in pairs:
        here, there = plan.boxes[source], plan.boxes[target]
        assert here.x + here.width / 2 < there.x - there.width / 2
    for one, other in itertools.combinations(plan.boxes.values(), 2):
        beside = abs(one.x - other.x) >= (one.width + other.width) / 2
        assert beside or abs(one.y - other.y) >= (one.height + other.height) / 2 + GAP_Y - 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_the_picture_holds_every_box_and_line(seed: int) -> None:
    names, pairs = random_graph(seed)
    plan = layout(dict.fromkeys(names, (80.0, 40.0)), pairs)
    for box in plan.boxes.values():
        assert 0 < box.x - box.width / 2 < box.x + box.width / 2 < plan.width
        assert 0 < box.y - box.height / 2 < box.y + box.height / 2 < plan.height
    for x, y in (point for line in plan.lines for point in (line.start, line.end)):
        assert 0 < x < plan.width
        assert 0 < y < plan.height


def test_the_layer_of_a_node_is_its_longest_path() -> None:
    names, pairs = random_graph(1, 40)
    graph = networkx.DiGraph(pairs)
    longest = dict.fromkeys(names, 0)
    for name in networkx.topological_sort(graph):
        longest[name] = max((longest[before] + 1 for before in graph.predecessors(name)), default=0)
    assert _ranks(names, pairs) == longest | {"n0": 0}


def test_a_source_stands_right_before_its_first_user() -> None:
    pairs = [
        ("model", "bnf"),
        ("bnf", "cle"),
        ("cle", "round"),
        ("data", "round"),
        ("data", "score"),
        ("round", "score"),
    ]
    ranks = _ranks(["model", "data", "bnf", "cle", "round", "score"], pairs)
    assert ranks["data"] == ranks["round"] - 1 == 2


@pytest.mark.parametrize("seed", range(5))
def test_crossings_are_counted_as_by_brute_force_and_untangling_never_adds_any(seed: int) -> None:
    names, pairs = random_graph(seed)
    links = _cut(_ranks(names, pairs), pairs, frozenset())

    def brute_force() -> int:
        at = {item: index for layer in links.layers for index, item in enumerate(layer)}
        layer_of = {item: rank for rank, layer in enumerate(links.layers) for item in layer}
        return sum(
            layer_of[a] == layer_of[c] and (at[a] - at[c]) * (at[b] - at[d]) < 0
            for (a, b), (c, d) in itertools.combinations(links.lazy, 2)
        )

    before = brute_force()
    assert _crossings(links) == before
    _untangle(links)
    assert _crossings(links) == brute_force() <= before


def test_crossings_that_can_be_avoided_are() -> None:
    names = ["a", "b", "c", "x", "y", "z"]
    links = _cut(
        {name: int(name in "xyz") for name in names}, [("a", "z"), ("b", "y"), ("c", "x")], frozenset()
    )
    assert _crossings(links) == 3
    _untangle(links)
    assert _crossings(links) == 0


def test_heights_are_the_least_squares_ones_that_keep_order_and_gaps() -> None:
    wanted = np.random.default_rng(0).normal(0, 60, 12)
    names = [f"n{i}" for i in range(12)]
    offsets = np.arange(12) * (30.0 + GAP_Y)
    expected = isotonic_regression(wanted - offsets).x + offsets
    np.testing.assert_allclose(_pool(list(wanted), names, dict.fromkeys(names, 30.0)), expected, atol=1e-9)


def test_edges_of_one_source_share_their_bends() -> None:
    pairs = [("a", "b"), ("b", "c"), ("c", "d"), ("d", "e"), ("data", "b"), ("data", "d"), ("data", "e")]
    plan = layout(dict.fromkeys(("a", "data", "b", "c", "d", "e"), (80.0, 40.0)), pairs)
    assert sum(line.straight for line in plan.lines) == 3  # beside b, c and d, once each


def test_a_line_is_lazy_where_all_that_it_carries_is() -> None:
    pairs = [("a", "b"), ("b", "pick"), ("a", "pick"), ("a", "c"), ("c", "d"), ("d", "e")]
    plan = layout(dict.fromkeys(("a", "b", "c", "d", "e", "pick"), (80.0, 40.0)), pairs, frozenset({"pick"}))
    into_pick = [line for line in plan.lines if line.end == (plan.boxes["pick"].x - 40, plan.boxes["pick"].y)]
    assert len(into_pick) == 2
    assert all(line.lazy for line in into_pick)
    assert not all(line.lazy for line in plan.lines)


def test_a_cycle_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="cycle through some of: b, c"):
        topological(["a", "b", "c"], [("a", "b"), ("b", "c"), ("c", "b")])


def test_an_empty_graph_has_an_empty_picture() -> None:
    plan = layout({}, [])
    assert not plan.boxes
    assert not plan.lines
    assert plan.width > 0
