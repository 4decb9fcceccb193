from __future__ import annotations

from typing import Any

import pytest

from qpipe.report.terminal.closing import closing_table

LADDER = """
     step                     top1  points            time
  --------------------------------------------------------
     float                 98.12 %          hit  was 3.1 s
     nearest               34.50 %  -63.62  hit   was 42 s
     bnf + cle             94.23 %   -3.89  ran      1.2 s
  >  bnf + cle + adaround  98.01 %   -0.11  ran  1 min 1 s
"""


def test_the_ladder_stands_first_with_the_winner_marked(record: dict[str, Any]) -> None:
    assert closing_table(record).startswith(LADDER)


def test_it_says_goal_totals_failures_notes_parity_and_files(record: dict[str, Any]) -> None:
    page = closing_table(record, 160)
    for fact in (
        "goal met: top1 98.01 %", "the cache saved 3 min 10 s", "amp: The worker was killed at 4.1 GB.",
        "adaround: Layer 'head' kept", "parity: agrees; op by op 99.94 % equal",
        "end to end 99.00 % equal",
        "/data/outputs/2026-03-01/101500-ab12/export/model.onnx",
    ):  # fmt: skip
        assert fact in page


@pytest.mark.parametrize("width", [50, 80, 120])
def test_only_paths_may_be_wider_than_the_terminal(record: dict[str, Any], width: int) -> None:
    record["nodes"]["amp"]["error"]["message"] = "It failed because " + "of many things " * 30
    lines = closing_table(record, width, fancy=True).splitlines()
    assert all(len(line) <= width for line in lines if "/data/" not in line)


def test_without_a_terminal_it_is_plain_ascii(record: dict[str, Any]) -> None:
    assert closing_table(record).isascii()
    assert not closing_table(record, fancy=True).isascii()
    assert "\x1b" not in closing_table(record)
    assert "\x1b[1;32m" in closing_table(record, colour=True)


def test_many_notes_are_cut_with_their_number(record: dict[str, Any]) -> None:
    record["nodes"]["cle"]["notes"] = [f"Pair {i} equalized." for i in range(9)]
    assert "and 5 more in report.html" in closing_table(record)


def test_a_step_that_was_not_needed_has_no_score(record: dict[str, Any]) -> None:
    record["ladder"][3] |= {
        "score": None,
        "drop": None,
        "verdict": "not_needed",
        "duration_s": None,
        "best": False,
    }
    (line,) = [line for line in closing_table(record).splitlines() if "bnf + cle + adaround  " in line]
    assert line.split()[5:] == ["-", "-", "not", "needed", "-"]


def test_scores_in_different_metrics_carry_their_names(record: dict[str, Any]) -> None:
    record["ladder"][2] |= {"metric": "sqnr_db", "score": 20.0}
    page = closing_table(record)
    assert "20.00 dB sqnr_db" in page
    assert "34.50 % top1" in page


def test_an_empty_record_still_ends_with_totals() -> None:
    assert closing_table({}) == "\n  0 ran, 0 from the cache\n"


def test_names_cannot_steer_the_terminal(record: dict[str, Any]) -> None:
    record["ladder"][1]["label"] = "\x1b[2Jnearest"
    record["nodes"]["cle"]["notes"] = ["\x1b]0;title\x07"]
    assert "\x1b" not in closing_table(record)
