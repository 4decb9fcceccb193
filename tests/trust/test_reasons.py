"""What is said of why a node runs is true: of other wires, of results that are gone."""

from __future__ import annotations

import re

from tests.trust.lab import Lab

STAGES = {
    "a": {"uses": "lab_make", "value": 2.0},
    "b": {"uses": "lab_make", "value": 3.0},
    "m": {"uses": "lab_mix", "parts": ["a", "b"], "layers": 1},
    "n": {"uses": "toy_number", "value": 2.0},
    "other": {"uses": "toy_number", "value": 5.0},
    "z": {"uses": "toy_add", "scores": "n"},
}


def said(lab: Lab, *words: str) -> str:
    child = lab.words(*words, "run.workers=0")
    assert child.wait() == 0, child.text()
    return child.text()


def test_other_wires_are_not_taken_for_other_results(lab: Lab) -> None:
    lab.pipeline(STAGES)
    said(lab, "run")
    for wires in ("b,a", "a,a", "a,b,b", "b"):
        text = said(lab, "why", "m", f"stages.m.parts=[{wires}]")
        assert f"because it takes its input 'parts' from {wires.replace(',', ', ')} instead of a, b" in text
        assert text.count("because") == 1, "what made the inputs is as it was"
    text = said(lab, "why", "z", "stages.z.scores=other")
    assert "because it takes its input 'scores' from other instead of n" in text
    assert "param value" not in text, "neither node changed"
    text = said(lab, "why", "m", "stages.m.parts=[b,a]", "stages.b.value=9")
    assert "because b runs with param value: 3.0 -> 9.0" in text
    assert "from b, a instead of a, b" in text


def test_a_renamed_node_is_followed(lab: Lab) -> None:
    lab.pipeline(STAGES)
    said(lab, "run")
    renamed = {"number": STAGES["n"] | {"value": 7.0}, "z": {"uses": "toy_add", "scores": "number"}}
    lab.pipeline(renamed)
    text = said(lab, "why", "z")
    assert "because number runs with param value: 2.0 -> 7.0" in text


def test_what_was_removed_was_run(lab: Lab) -> None:
    lab.pipeline(STAGES)
    assert re.search("toy_number +never run", said(lab, "plan"))
    said(lab, "run")
    said(lab, "cache", "gc", "cache.max_size=0")
    assert "result evicted" in said(lab, "plan")
    text = said(lab, "plan", "stages.n.value=8")
    assert "its last result was of another key, and is gone from the cache" in text
    assert not re.search("never run$", text, re.MULTILINE)
    text = said(lab, "why", "n")
    assert "never ran" not in text
    assert "no earlier result is in the cache" in text
