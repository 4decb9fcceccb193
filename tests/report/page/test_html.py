from __future__ import annotations

import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qpipe.report.page.html import render, write_report

HOSTILE = '"><img src=x onerror=alert(1)></script><script>alert(2)</script>\x00\x1b[2J\ud800'
VOID = {"meta", "br", "img", "link", "input", "hr", "path", "rect", "circle"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that what opens closes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def hostile(value: Any) -> Any:
    """`value` with every text replaced, and every name of a node too."""
    if isinstance(value, dict):
        return {name: hostile(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [hostile(entry) for entry in value]
    return HOSTILE if isinstance(value, str) else value


def test_the_page_holds_the_facts(record: dict[str, Any]) -> None:
    page = Page(render(record))
    for fact in (
        "Goal met: top1 98.01 % with bnf + cle + adaround", "98.12 %", "-63.62",
        "saved by the cache", "3 min 10 s",
        "The worker was killed at 4.1 GB.", "Layer 'head' kept", "99.94 %", "iterations", "0a" * 32, "871 kB",
        "qpipe pipeline=autoquant", "3.11.9", "2.13.0", "never computed before",
    ):  # fmt: skip
        assert fact in page.text, fact
    assert page.tags.count("svg") == 5
    assert ("href", "./export/model.onnx") in page.attributes


def test_it_loads_nothing_and_runs_nothing(record: dict[str, Any]) -> None:
    page = Page(render(record))
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & set(page.tags)
    assert all(value and value.startswith("./") for name, value in page.attributes if name in ("href", "src"))
    assert "url(" not in render(record)
    assert any(
        value and "default-src 'none'" in value for name, value in page.attributes if name == "content"
    )


def test_nothing_in_a_record_becomes_markup(record: dict[str, Any]) -> None:
    record["nodes"]["parity"]["scores"]["layers"] = [{"layer": "conv", HOSTILE: 1.0}]
    expected = Page(render(record))
    evil = hostile(record)
    evil["nodes"] = {f"{HOSTILE}{name}": node for name, node in evil["nodes"].items()}
    evil["files"] = {HOSTILE: [HOSTILE]}
    page = Page(render(evil))
    assert set(page.tags) <= set(expected.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "\x1b" not in page.text
    assert "alert(2)" in page.text


def test_a_file_outside_the_run_folder_is_no_link(record: dict[str, Any]) -> None:
    record["files"] = {
        "export": ["/elsewhere/model.onnx", "/data/outputs/2026-03-01/101500-ab12/a b/#1.onnx"]
    }
    page = Page(render(record))
    assert [value for name, value in page.attributes if name == "href"] == ["./a%20b/%231.onnx"]


@pytest.mark.parametrize(
    "broken", [{}, {"nodes": {"a": {}}}, {"goal": None, "best": None, "environment": None}]
)
def test_a_record_that_was_cut_short_still_makes_a_page(broken: dict[str, Any]) -> None:
    assert "h1" in Page(render(broken)).tags


def test_a_cycle_in_the_record_leaves_only_the_picture_out(record: dict[str, Any]) -> None:
    record["edges"].append(["export", "load_model", "model"])
    assert "the graph has a cycle" in Page(render(record)).text


def test_failed_nodes_are_open_and_show_their_traceback(record: dict[str, Any]) -> None:
    record["nodes"]["amp"]["error"]["traceback"] = 'File "amp.py", line 3, in <module>'
    page = render(record)
    assert page.count('<details class="node" open>') == 1
    assert "line 3, in &lt;module&gt;" in page


def test_rows_of_numbers_become_a_table(record: dict[str, Any]) -> None:
    layers = [{"layer": f"conv{i}", "sqnr_db": 20.0 + i} for i in range(60)]
    record["nodes"]["adaround"]["scores"] = {"layers": layers}
    page = Page(render(record))
    assert "conv49" in page.text
    assert "conv50" not in page.text
    assert "and 10 more" in page.text


def test_the_file_is_written_whole_and_quickly(record: dict[str, Any], tmp_path: Path) -> None:
    write_report(record, tmp_path / "report.html")
    spent = []
    for _ in range(5):
        began = time.process_time()
        write_report(record, tmp_path / "report.html")
        spent.append(time.process_time() - began)
    assert min(spent) < 0.03  # a fully cached run writes it too
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert re.match(r"<!doctype html>", (tmp_path / "report.html").read_text(encoding="utf-8"))
