"""What was measured is told in a line a figure, and the goal counts it."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from qpipe.explain.shape import wrong
from qpipe.report import text
from qpipe.report.facts import goal_sentence
from qpipe.report.measured import measured, verdict
from qpipe.report.page.charts import LABELS, ratio_chart
from qpipe.report.page.html import render
from qpipe.report.terminal.closing import closing_table

BEST = "top1 98.01 % with bnf + cle + adaround, 0.11 points below float (1.00 points allowed)"


def test_the_closing_table_has_a_line_for_each_figure(record: dict[str, Any]) -> None:
    shown = closing_table(record, 120).partition("export as deployed")[2].partition("\n\n")[0]
    assert [line.strip() for line in shown.splitlines()] == [
        "(onnxruntime 1.32.0, batch 1, 2 threads)",
        "latency: 0.80 of float, 0.40 ms against 0.50 ms",
        "file: 0.25 of float, 1.0 MB against 4.0 MB",
        "peak memory: 1.50 of float, 30 MB against 20 MB",
        "on integers: 28 of 29 Conv, MatMul and Gemm; 5 of 24 others",
        "in float: 1 x Conv (conv_3): float in, float out",
        "in float: 19 x DQ -> Min -> Q (min_3): onnxruntime has no integer kernel for it",
    ]


def test_the_page_draws_the_ratios_and_lists_what_is_in_float(record: dict[str, Any]) -> None:
    page = render(record)
    assert "<h2>As deployed</h2>" in page
    assert "<dd>0.80 of float, 0.40 ms against 0.50 ms</dd>" in page
    assert "<dd>28 of 29 Conv, MatMul and Gemm; 5 of 24 others</dd>" in page
    assert "DequantizeLinear -&gt; Min -&gt; QuantizeLinear" in page
    bars = list(ElementTree.fromstring(ratio_chart(measured(record)[0].ratios)).iter("rect"))
    lengths = [float(bar.attrib["width"]) for bar in bars]
    assert lengths == pytest.approx([lengths[0], 0.25 / 0.8 * lengths[0], 1.5 / 0.8 * lengths[0]], abs=0.1)
    assert [bar.attrib["class"] for bar in bars] == ["near", "near", "far"]
    line = float(ratio_chart(measured(record)[0].ratios).partition('class="float" d="M')[2].partition(" ")[0])
    assert line - LABELS == pytest.approx(lengths[0] / 0.8, abs=0.1)
    assert ratio_chart(()) == ""


def limited(record: dict[str, Any], met: bool | None, score_met: bool | None, **limits: Any) -> str | None:
    record["goal"] |= {"met": met, "score_met": score_met, "limits": limits}
    assert wrong(record) is None
    return verdict(record)


def test_the_verdict_is_one_sentence(record: dict[str, Any]) -> None:
    assert verdict(record) == goal_sentence(record)
    latency, size = {"limit": 0.9, "found": 0.8}, {"limit": 0.2, "found": 0.25}
    said = limited(record, True, True, latency=latency)
    assert said == f"goal met: {BEST}; latency 0.800 of float (at most 0.9 asked)"
    said = limited(record, False, True, latency=latency, size=size)
    assert said == f"goal missed: file 0.250 of float (at most 0.2 asked); {BEST}"
    said = limited(record, None, True, latency={"limit": 0.9, "found": None})
    assert said == f"goal not decided: latency not measured (at most 0.9 asked); {BEST}"
    record["goal"]["allowed_drop"] = 0.001
    said = limited(record, False, False, size_bytes={"limit": 500_000, "found": 1_000_000})
    assert said is not None
    assert said.startswith("goal missed by 0.01 points: top1")
    assert said.endswith("; file 1.0 MB (at most 500 kB asked)")


def test_a_failure_is_told_and_what_is_missing_left_out(record: dict[str, Any]) -> None:
    record["measured"]["export"] = {"error": "no memory"}
    assert "export as deployed\n    not measured: no memory\n" in closing_table(record)
    assert "export is not measured: no memory" in render(record)
    for odd in ({}, None, {"kernels": None}, {"kernels": {"in_float": [None, {}]}, "latency": "fast"}):
        record["measured"]["export"] = odd
        closing_table(record)
        render(record)
    del record["measured"]
    assert measured(record) == []
    assert "As deployed" not in render(record)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.000075, "0.075 ms"), (0.00016, "0.16 ms"), (0.0041, "4.1 ms"), (0.173, "173 ms"), (1.25, "1.2 s"), (None, "-")],
)
def test_a_latency_has_two_digits_at_least(seconds: float | None, said: str) -> None:
    assert text.latency(seconds) == said
