from __future__ import annotations

from typing import Any

import pytest

from qpipe.report import facts


def test_float_comes_first(record: dict[str, Any]) -> None:
    record["ladder"].reverse()
    assert next(step.label for step in facts.steps(record)) == "float"


def test_a_hit_says_what_it_cost_when_it_was_computed(record: dict[str, Any]) -> None:
    assert [step.time for step in facts.steps(record)] == ["was 3.1 s", "was 42 s", "1.2 s", "1 min 1 s"]


BEST = "top1 98.01 % with bnf + cle + adaround"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, f"goal met: {BEST}, 0.11 points below float (1.00 points allowed)"),
        (
            {"allowed_drop": 0.001, "met": False},
            f"goal missed by 0.01 points: {BEST}, 0.11 points below float (0.10 points allowed)",
        ),
        ({"met": None}, f"best: {BEST}, 0.11 points below float"),
        ({"float": None}, "goal not decided: top1, 1.00 points allowed, but no step has a score"),
        ({"float": 0.9801}, f"goal met: {BEST}, equal to float (1.00 points allowed)"),
        ({"float": 0.97}, f"goal met: {BEST}, 1.01 points above float (1.00 points allowed)"),
        ({"metric": None}, None),
    ],
)
def test_the_goal_in_one_sentence(
    record: dict[str, Any], change: dict[str, Any], sentence: str | None
) -> None:
    record["goal"] |= change
    assert facts.goal_sentence(record) == sentence


def test_totals_tell_what_the_cache_saved(record: dict[str, Any]) -> None:
    assert facts.totals_sentence(record) == (
        "9 ran, 6 from the cache, 1 failed, in 1 min 12 s (1 min 40 s of processor time); "
        "the cache saved 3 min 10 s"
    )


def test_times_may_be_seconds_since_the_epoch() -> None:
    assert facts.wall_s({"started": 1000.0, "finished": 1002.5}) == 2.5
    assert facts.wall_s({"started": "not a time", "finished": 1002.5}) is None


def test_each_node_tells_its_first_note_before_any_its_second(record: dict[str, Any]) -> None:
    assert [node for node, _ in facts.notes(record)] == ["cle", "adaround", "cle"]


def test_edges_to_unknown_nodes_are_left_out(record: dict[str, Any]) -> None:
    record["edges"] = [["cle", "adaround", "model"], ["gone", "adaround", "data"], ["short"]]
    assert facts.edges(record) == [("cle", "adaround", "model")]


def test_parity_is_summed_over_units(record: dict[str, Any]) -> None:
    (parity,) = facts.parities(record)
    assert parity.units.shares == (0.9994, 0.0006, 0, 0)
    assert parity.end_to_end.counts == (99_000, 900, 98, 2)
    assert [(value, found.largest) for value, _, found in parity.worst] == [("relu_2", 1)]
    assert parity.sentence == (
        "agrees; op by op 99.94 % equal, 100 % within one grid step, largest 1 step; "
        "end to end 99.00 % equal, 99.90 % within one grid step, largest 4 steps"
    )


def test_a_parity_without_counts_compared_nothing(record: dict[str, Any]) -> None:
    record["nodes"]["parity"]["scores"] = {"agree": False, "units": []}
    assert facts.parities(record)[0].sentence.startswith("does not agree; op by op nothing compared")


def test_a_parity_of_weights_alone_tells_of_the_outputs(record: dict[str, Any]) -> None:
    outputs = [{"name": "y", "max_difference": 3e-6, "largest": 2.0, "cosine": 1.0}, {"name": "z"}]
    record["nodes"]["parity"]["scores"] = {"agree": True, "units": [], "outputs": outputs}
    assert facts.parities(record)[0].sentence == (
        "agrees; no activation is quantized; the outputs differ by at most 1.5e-06 (relative)"
    )


@pytest.mark.parametrize(
    "broken", [{}, {"nodes": None, "goal": None, "ladder": None}, {"nodes": {"a": {}}, "totals": {}}]
)
def test_a_record_that_was_cut_short_can_be_read(broken: dict[str, Any]) -> None:
    assert facts.steps(broken) == ()
    assert facts.goal_sentence(broken) is None
    assert facts.failures(broken) == facts.notes(broken) == facts.files(broken) == []
    assert facts.parities(broken) == []
    assert facts.totals_sentence(broken) == "0 ran, 0 from the cache"


def test_a_goal_in_decibels_is_told_by_the_score_that_was_asked_for(record: dict[str, Any]) -> None:
    goal = {"metric": "sqnr_db", "float": 300.0, "allowed_drop": None, "min_score": 30.0}
    for reached, met, said in ((45.3, True, "goal met: sqnr_db 45.30 dB"), (27.5, False, "goal missed by 2.50 dB")):
        told = record | {"goal": goal | {"met": met}, "best": {"node": "x", "score": reached}, "ladder": []}
        sentence = facts.goal_sentence(told)
        assert sentence is not None
        assert sentence.startswith(said)
        assert sentence.endswith("(at least 30.00 dB asked)")
        assert "float" not in sentence
        assert facts.least(told) == 30
