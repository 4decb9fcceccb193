from __future__ import annotations

import itertools
import math
import re
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpipe.report import facts
from qpipe.report.page.charts import parity_chart, score_chart, ticks


def test_a_dot_per_step_in_proportion_to_its_score(record: dict[str, Any]) -> None:
    root = ElementTree.fromstring(score_chart(facts.steps(record), facts.least(record)))
    places = [float(dot.attrib["cx"]) for dot in root.iter("circle")]
    scores = [step["score"] for step in record["ladder"]]
    share = [(place - places[1]) / (places[0] - places[1]) for place in places]
    assert share == pytest.approx(
        [(score - scores[1]) / (scores[0] - scores[1]) for score in scores], abs=1e-3
    )


def test_the_allowed_range_begins_at_the_goal(record: dict[str, Any]) -> None:
    chart = score_chart(facts.steps(record), facts.least(record))
    (start,) = (float(x) for x in re.findall(r'class="allowed" x="([\d.]+)"', chart))
    root = ElementTree.fromstring(chart)
    places = [float(dot.attrib["cx"]) for dot in root.iter("circle")]
    per_score = (places[0] - places[1]) / (0.9812 - 0.345)
    assert start == pytest.approx(places[0] - 0.01 * per_score, abs=0.2)
    assert 'class="allowed"' not in score_chart(facts.steps(record), None)


def test_a_step_without_a_score_says_why(record: dict[str, Any]) -> None:
    record["ladder"][2] |= {"score": None, "drop": None, "verdict": "not_needed"}
    chart = score_chart(facts.steps(record), facts.least(record))
    assert chart.count("<circle") == 3
    assert ">not needed<" in chart


def test_one_score_alone_is_no_chart(record: dict[str, Any]) -> None:
    assert score_chart(facts.steps(record)[:1], 0.01) == ""


@pytest.mark.parametrize("scores", [(0.5, 0.5), (0.0, 0.0), (-3.0, -1e6), (1e-12, 2e-12)])
def test_any_scores_can_be_drawn(record: dict[str, Any], scores: tuple[float, float]) -> None:
    record["ladder"] = [
        step | {"score": score} for step, score in zip(record["ladder"], scores, strict=False)
    ]
    assert ElementTree.fromstring(score_chart(facts.steps(record), 0.0)).tag == "svg"


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_evenly_apart_and_inside(low: float, span: float) -> None:
    found = ticks(low, low + span)
    assert 2 <= len(found) <= 7
    slack = 1e-6 * span + 4 * math.ulp(max(abs(low), abs(low + span)))
    assert all(low - slack <= tick <= low + span + slack for tick in found)
    gaps = [after - before for before, after in itertools.pairwise(found)]
    assert max(gaps) == pytest.approx(min(gaps), rel=1e-2)


def test_parity_bars_shrink_with_the_logarithm_of_their_share() -> None:
    chart = parity_chart(facts.Distances((9899, 100, 0, 1), 7), "end to end")
    first, second, third = (float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', chart))
    assert second == pytest.approx(first * 4 / 6, rel=1e-2)
    assert third == pytest.approx(second / 2, rel=1e-2)
    assert chart.count("<rect") == 3
    assert "3 steps or more" in chart
