"""Records as a run leaves them, made up here: they are input of the views, which compute nothing."""

from __future__ import annotations

from typing import Any

import pytest

ORDER = (
    ("load_model", "load_model", "hit"), ("calibration", "load_data", "hit"),
    ("evaluation", "load_data", "hit"),
    ("score_float", "evaluate", "hit"), ("nearest", "calibrate", "hit"), ("score_nearest", "evaluate", "hit"),
    ("bnf", "bnf", "ran"), ("cle", "cle", "ran"), ("cle_quantized", "calibrate", "ran"),
    ("score_cle", "evaluate", "ran"), ("adaround", "adaround", "ran"), ("score_adaround", "evaluate", "ran"),
    ("amp", "amp", "failed"), ("score_amp", "evaluate", "skipped"), ("choice", "first_within", "ran"),
    ("parity", "parity", "ran"), ("export", "export", "ran"),
)  # fmt: skip

WIRES = """
score_float   model=load_model     data=evaluation
nearest       model=load_model     data=calibration
score_nearest model=nearest        data=evaluation
bnf           model=load_model
cle           model=bnf
cle_quantized model=cle            data=calibration
score_cle     model=cle_quantized  data=evaluation
adaround      model=cle            data=calibration
score_adaround model=adaround      data=evaluation
amp           model=adaround       data=calibration
score_amp     model=amp            data=evaluation
choice        candidates=score_nearest candidates=score_cle candidates=score_adaround candidates=score_amp
parity        model=choice         data=calibration
export        model=choice
"""

EDGES = tuple(
    (wire.partition("=")[2], line.split()[0], wire.partition("=")[0])
    for line in WIRES.strip().splitlines()
    for wire in line.split()[1:]
)


def node(stage: str, verdict: str, index: int) -> dict[str, Any]:
    key = f"{index:02x}" * 32
    return {
        "stage": stage, "verdict": verdict,
        "reasons": [] if verdict == "hit" else ["never computed before"],
        "key": key, "params": {"iterations": 100 * index}, "inputs": {"model": "ab" * 32},
        "outputs": {"model": {"kind": "Model", "digest": key, "size_bytes": 871_004}},
        "duration_s": 0.01 if verdict == "hit" else 3.2 * index, "cpu_s": 2.9 * index,
        "original_duration_s": 3.0 * index, "peak_rss_bytes": 512_000_000,
        "scores": {}, "notes": [], "error": None,
    }  # fmt: skip


def parity() -> dict[str, Any]:
    """As the stage leaves it: by unit and end to end, how many values are 0, 1, 2 and more grid steps apart."""

    def row(value: str, counts: list[int], largest: int) -> dict[str, Any]:
        return {"value": value, "op_types": ["Conv", "Relu"], "counts": counts, "largest": largest}

    return {
        "score": 1.0, "metric": "within_one", "agree": True, "within_one": 1.0, "first": "relu_1", "samples": 64,
        "units": [row("relu_1", [60_000, 0, 0, 0], 0), row("relu_2", [39_940, 60, 0, 0], 1)],
        "end_to_end": [row("relu_1", [60_000, 0, 0, 0], 0), row("relu_2", [39_000, 900, 98, 2], 4)],
        "outputs": [{"name": "logits", "max_difference": 0.02, "cosine": 0.9999}],
    }  # fmt: skip


def measured() -> dict[str, Any]:
    """As `qpipe.run.deployment` leaves it."""

    def row(op_type: str, count: int, form: str, why: str) -> dict[str, Any]:
        return {"op_type": op_type, "count": count, "form": form, "example": f"{op_type.lower()}_3", "why": why}

    return {
        "latency_s": 0.0004, "float_latency_s": 0.0005, "latency": 0.8, "size_bytes": 1_000_000,
        "float_size_bytes": 4_000_000, "size": 0.25, "peak_bytes": 30_000_000, "float_peak_bytes": 20_000_000,
        "memory": 1.5, "batch": 1, "threads": 2, "cores": 2, "processor": "A processor", "onnxruntime": "1.32.0",
        "real_samples": True,
        "kernels": {
            "layers": {"integer": 28, "all": 29}, "others": {"integer": 5, "all": 24},
            "in_float": [
                row("Conv", 1, "Conv", "float in, float out"),
                row("Min", 19, "DequantizeLinear -> Min -> QuantizeLinear", "onnxruntime has no integer kernel for it"),
            ],
        },
    }  # fmt: skip


def step(name: str, label: str, score: float, verdict: str, seconds: float, **more: bool) -> dict[str, Any]:
    return {
        "node": name, "label": label, "score": score, "metric": "top1", "drop": 0.9812 - score,
        "verdict": verdict,
        "duration_s": 0.01 if verdict == "hit" else seconds, "original_duration_s": seconds,
        "best": False, "baseline": False, **more,
    }  # fmt: skip


@pytest.fixture
def record() -> dict[str, Any]:
    """An AutoQuant run in which nearest came from the cache, adaround won, and amp failed."""
    nodes = {name: node(stage, verdict, index) for index, (name, stage, verdict) in enumerate(ORDER)}
    nodes["adaround"]["notes"] = [
        "Layer 'head' kept: its error did not shrink (0.0012 before, 0.0013 after)."
    ]
    nodes["cle"]["notes"] = ["3 pairs equalized.", "2 dead channels left as they were."]
    nodes["amp"]["error"] = {"message": "The worker was killed at 4.1 GB.\nLower batch_size."}
    nodes["parity"]["scores"] = parity()
    folder = "/data/outputs/2026-03-01/101500-ab12"
    return {
        "schema": 1, "qpipe": "0.1.0", "command": ["qpipe", "pipeline=autoquant"], "run_dir": folder,
        "started": "2026-03-01T10:15:00+00:00", "finished": "2026-03-01T10:16:12+00:00", "status": "failed",
        "environment": {"python": "3.11.9", "platform": "Linux-x86_64", "libraries": {"torch": "2.13.0"}},
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
        "measured": {"export": measured()},
        "files": {"export": [f"{folder}/export/model.onnx", f"{folder}/export/encodings.json"]},
    }  # fmt: skip
