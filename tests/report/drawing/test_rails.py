from __future__ import annotations

import time
from typing import Any

import pytest

from qpipe.report.drawing.rails import graph_text, reading_order
from tests.report.conftest import EDGES, ORDER

NODES: dict[str, dict[str, Any]] = {
    name: {"stage": stage, "verdict": verdict} for name, stage, verdict in ORDER
}

DIAMOND = """\
●    =  load         hit
├─●  +  cle          run   model load
●─┤  ?  round  bias  wait  model load, cle
●─┘  ?  score        wait  model round; reference cle
"""


def diamond() -> str:
    nodes = {
        "load": {"stage": "load", "verdict": "hit"}, "cle": {"stage": "cle", "verdict": "run"},
        "round": {"stage": "bias", "verdict": "wait"}, "score": {"stage": "score", "verdict": "wait"},
    }  # fmt: skip
    edges = [("load", "cle", "model"), ("load", "round", "model"), ("cle", "round", "model"),
             ("round", "score", "model"), ("cle", "score", "reference")]  # fmt: skip
    return graph_text(nodes, edges, fancy=True)


def test_rails_run_from_each_node_to_its_last_user() -> None:
    assert diamond() == DIAMOND


def test_each_node_is_named_once_below_what_it_needs() -> None:
    lines = graph_text(NODES, EDGES, width=200).splitlines()
    assert len(lines) == len(ORDER)
    row = {name: next(i for i, line in enumerate(lines) if name in line.split()[:8]) for name in NODES}
    assert all(row[source] < row[target] for source, target, _ in EDGES)


def test_verdicts_have_marks_and_lazy_candidates_a_question_mark() -> None:
    page = graph_text(NODES, EDGES, width=200)
    assert "x  amp" in page
    assert "candidates score_nearest ? score_cle ? score_adaround ? score_amp" in page


@pytest.mark.parametrize("width", [60, 100])
def test_it_fits_the_width_and_is_ascii(width: int) -> None:
    page = graph_text(NODES, EDGES, width=width)
    assert page.isascii()
    assert max(map(len, page.splitlines())) <= width


def test_sources_are_read_right_before_they_are_used() -> None:
    order = reading_order(
        ["model", "data", "bnf", "round"],
        {"model": [], "data": [], "bnf": ["model"], "round": ["bnf", "data"]},
    )
    assert order == ["model", "bnf", "data", "round"]


def test_a_chain_of_thousands_is_drawn_without_recursion() -> None:
    nodes = {f"n{i}": {"stage": "cle", "verdict": None} for i in range(3000)}
    edges = [(f"n{i}", f"n{i + 1}", "model") for i in range(2999)]
    began = time.perf_counter()
    assert len(graph_text(nodes, edges).splitlines()) == 3000
    assert time.perf_counter() - began < 10


def test_where_there_would_be_too_many_rails_the_names_must_do() -> None:
    nodes = {f"n{i}": {"stage": "cle"} for i in range(60)} | {"join": {"stage": "first_within"}}
    page = graph_text(nodes, [(f"n{i}", "join", "candidates") for i in range(60)])
    assert page.splitlines()[0] == "n0    cle"


def test_no_nodes_no_lines() -> None:
    assert graph_text({}, []) == ""
