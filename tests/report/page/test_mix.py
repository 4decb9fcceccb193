"""Mixed precision in the report: one dot per measured mix, where it belongs, and nothing for what is missing."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from qpipe.report.page.html import render
from qpipe.report.page.mix import mix_chart, mixes


def scores() -> dict[str, Any]:
    measured = [(0.25, 0.83), (0.3, 0.975), (0.5, 0.987), (1.0, 0.986)]
    points = [{"share": share, "score": score, "loss": 0.1} for share, score in measured]
    return {
        "metric": "top1", "cost": "bitops", "of": "w8a16", "float": 0.986, "score": 0.975, "share": 0.3,
        "size_bytes": 100_000, "conversions": 2, "measured": points,
        "uniform": [{"candidate": "w4a8", **points[0]}, {"candidate": "w8a16", **points[3]}],
        "groups": [{"group": "conv1.weight", "tensors": 2, "candidate": "w4a8", "share": 0.1, "alone w4a8": 20.5}],
    }  # fmt: skip


@pytest.fixture
def mixed(record: dict[str, Any]) -> dict[str, Any]:
    record["nodes"]["amp"] |= {"scores": scores(), "error": None, "verdict": "ran"}
    return record


def test_a_dot_for_each_mix_in_proportion_to_cost_and_score(mixed: dict[str, Any]) -> None:
    (mix,) = mixes(mixed)
    root = ElementTree.fromstring(mix_chart(mix))
    dots = [(float(dot.attrib["cx"]), float(dot.attrib["cy"])) for dot in root.iter("circle")]
    assert len(dots) == 5
    (x0, y0), (x1, y1), *_, (x3, y3), chosen = dots
    assert chosen == (x1, y1)
    assert (x1 - x0) / (x3 - x0) == pytest.approx((0.3 - 0.25) / 0.75, abs=1e-3)
    assert (y1 - y0) / (y3 - y0) == pytest.approx((0.975 - 0.83) / (0.986 - 0.83), abs=1e-3)
    assert {text.text for text in root.iter("text")} >= {"w4a8", "w8a16", "amp"}


def test_the_page_tells_the_mix_and_its_groups(mixed: dict[str, Any]) -> None:
    page = render(mixed)
    for fact in ("Mixed precision", "97.50 % for 30.00 % of the bitops of w8a16", "conv1.weight", "alone w4a8"):
        assert fact in page


@pytest.mark.parametrize("missing", ["measured", "groups", "share", "score", "uniform", "metric", "of"])
def test_what_is_missing_is_left_out(mixed: dict[str, Any], missing: str) -> None:
    del mixed["nodes"]["amp"]["scores"][missing]
    assert "Mixed precision" in render(mixed)
    mixed["nodes"]["amp"]["scores"] = {}
    assert "Mixed precision" not in render(mixed)
