"""record.json: what is written can be read by everyone."""

from __future__ import annotations

import json
import math
import os

import pytest

from qpipe.run.record import RECORD, json_text, write_record


def test_scores_that_are_no_numbers_are_null(tmp_path):
    record = {"nodes": {"score": {"scores": {"score": -math.inf, "all": [1.0, math.nan], "n": 3}}}}
    write_record(record, tmp_path / "run")
    text = (tmp_path / "run" / RECORD).read_text()
    found = json.loads(text, parse_constant=refuse)
    assert found["nodes"]["score"]["scores"] == {"score": None, "all": [1.0, None], "n": 3}


def refuse(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def test_everything_else_is_as_it_was():
    value = {"a": [1, 2.5, "ä", None, True], "b": {"c": (1, 2)}}
    assert json.loads(json_text(value)) == {"a": [1, 2.5, "ä", None, True], "b": {"c": [1, 2]}}


@pytest.mark.parametrize(("verdict", "flushed"), [("ran", 1), ("failed", 1), ("hit", 0), ("skipped", 0)])
def test_what_no_later_run_can_tell_is_flushed(tmp_path, monkeypatch, verdict, flushed):
    calls = []
    monkeypatch.setattr(os, "fsync", calls.append)
    write_record({"nodes": {"source": {"verdict": "hit"}, "score": {"verdict": verdict}}}, tmp_path)
    assert len(calls) == flushed
