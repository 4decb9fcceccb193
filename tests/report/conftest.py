"""Records as a run leaves them, made up here: they are input of the views, which compute nothing."""

from __future__ import annotations

from typing import Any

import pytest

ORDER = (
    ("load_model", "load_model", "hit"), ("calibration", "load_data", "hit"), ("evaluation", "load_data", "hit"),
    ("score_float", "evaluate", "hit"), ("nearest", "calibrate", "hit"), ("score_nearest", "evaluate", "hit"),
    ("bnf", "bnf", "ran"), ("cle", "cle", "ran"), ("cle_quantized", "calibrate", "ran"),
    ("score_cle", "evaluate", "ran"), ("adaround", "adaround", "ran"), ("score_adaround", "evaluate", "ran"),
    ("amp", "amp", "failed"), ("score_amp", "evaluate", "skipped"), ("choice", "first_within", "ran"),
    ("parity", "parity", "ran"), ("export", "export", "ran"),
)  # fmt: skip

EDGES = (
    ("load_model", "score_float", "model"), ("evaluation", "score_float", "data"), ("load_model", "nearest", "model"),
    ("calibration", "nearest", "data"), ("nearest", "score_nearest", "model"), ("evaluation", "score_nearest", "data"),
    ("load_model", "bnf", "model"), ("bnf", "cle", "model"), ("cle", "cle_quantized", "model"),
    ("calibration", "cle_quantized", "data"), ("cle_quantized", "score_cle", "model"),
    ("evaluation", "score_cle", "data"), ("cle", "adaround", "model"), ("calibration", "adaround", "data"),
    ("adaround", "score_adaround", "model"), ("evaluation", "score_adaround", "data"), ("adaround", "amp", "model"),
    ("calibration", "amp", "data"), ("amp", "score_amp", "model"), ("evaluation", "score_amp", "data"),
    ("score_nearest", "choice", "candidates"), ("score_cle", "choice", "candidates"),
    ("score_adaround", "choice", "candidates"), ("score_amp", "choice", "candidates"),
    ("choice", "parity", "model"), ("calibration", "parity", "data"), ("choice", "export", "model"),
)  # fmt: skip


def node(stage: str, verdict: str, index: int) -> dict[str, Any]:
    key = f"{index:02x}" * 32
    return {
        "stage": stage, "verdict": verdict, "reasons": [] if verdict == "hit" else ["never computed before"],
        "key": key, "inputs": {"model": "ab" * 32}, "outputs": {"model": {"kind": "Model", "digest": key, "size_bytes": 871_004}},
        "duration_s": 0.01 if verdict == "hit" else 3.2 * index, "cpu_s": 2.9 * index,
        "original_duration_s": 3.0 * index, "peak_rss_bytes": 512_000_000, "scores": {}, "notes": [], "error": None,
    }  # fmt: skip


def step(name: str, label: str, score: float, verdict: str, seconds: float, **more: bool) -> dict[str, Any]:
    return {
        "node": name, "label": label, "score": score, "metric": "top1", "drop": 0.9812 - score, "verdict": verdict,
        "duration_s": 0.01 if verdict == "hit" else seconds, "original_duration_s": seconds,
        "best": False, "baseline": False, **more,
    }  # fmt: skip


@pytest.fixture
def record() -> dict[str, Any]:
    """An AutoQuant run in which nearest came from the cache, adaround won, and amp failed."""
    nodes = {name: node(stage, verdict, index) for index, (name, stage, verdict) in enumerate(ORDER)}
    nodes["adaround"]["notes"] = ["Layer 'head' kept: its error did not shrink (0.0012 before, 0.0013 after)."]
    nodes["cle"]["notes"] = ["3 pairs equalized.", "2 dead channels left as they were."]
    nodes["amp"]["error"] = "MemoryError: the worker was killed at 4.1 GB.\nGive it more memory, or lower batch_size."
    nodes["parity"]["scores"] = {"histogram": {"0": 99_940, "1": 58, "2": 2}, "max_steps": 2, "top1_agreement": 1.0}
    return {
        "schema": 1, "qpipe": "0.1.0", "command": ["qpipe", "pipeline=autoquant"], "run_dir": "/tmp/outputs/2026-03-01/101500-ab12",
        "started": "2026-03-01T10:15:00+00:00", "finished": "2026-03-01T10:16:12+00:00", "status": 1,
        "environment": {"python": "3.11.9", "platform": "Linux-x86_64", "libraries": {"torch": "2.13.0", "onnx": "1.23.2"}},
        "goal": {"metric": "top1", "float": 0.9812, "allowed_drop": 0.01, "met": True},
        "best": {"node": "score_adaround", "score": 0.9801},
        "nodes": nodes, "edges": [list(edge) for edge in EDGES],
        "totals": {"ran": 9, "hit": 6, "failed": 1, "saved_s": 190.0, "cpu_s": 100.0},
        "ladder": [
            step("score_float", "float", 0.9812, "hit", 3.1, baseline=True),
            step("score_nearest", "nearest", 0.345, "hit", 42.0),
            step("score_cle", "bnf + cle", 0.9423, "ran", 1.2),
            step("score_adaround", "bnf + cle + adaround", 0.9801, "ran", 61.0, best=True),
        ],
        "files": {"export": ["/tmp/outputs/2026-03-01/101500-ab12/export/model.onnx", "/tmp/outputs/2026-03-01/101500-ab12/export/encodings.json"]},
    }  # fmt: skip
