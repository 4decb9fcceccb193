"""What a record.json may hold, field by field: whoever edits one by hand is told which field is not what it was.

Fields may be missing, or null: a record of an older version, or of a run that was cut short. Those that are not named
here are passed over.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

DEEPEST = 60
"""So deep lists and mappings may lie in one another; a run leaves 8."""


class Each(NamedTuple):
    """A mapping of any names, all of one shape."""

    shape: Any


class Either(NamedTuple):
    """One shape or the other."""

    first: Any
    second: Any


TEXT, NUMBER, TRUTH, ANY = "text", "a number", "true or false", "anything"
STAMP = Either(TEXT, NUMBER)
ARTIFACT = {"kind": TEXT, "digest": TEXT, "size_bytes": NUMBER}
TIMES = {"duration_s": NUMBER, "original_duration_s": NUMBER, "cpu_s": NUMBER, "original_cpu_s": NUMBER,
         "peak_rss_bytes": NUMBER}  # fmt: skip
STEP = {
    **TIMES, "node": TEXT, "label": TEXT, "score": NUMBER, "metric": TEXT, "drop": NUMBER, "verdict": TEXT,
    "best": TRUTH, "baseline": TRUTH, "cost": NUMBER,
    "choice": {"fate": TEXT, "metric": TEXT, "gain": NUMBER, "noise": NUMBER},
}  # fmt: skip
NODE = {
    **TIMES, "stage": TEXT, "verdict": TEXT, "reasons": [TEXT], "key": TEXT, "params": Each(ANY), "counted": Each(ANY),
    "inputs": Each(Either(TEXT, [TEXT])), "outputs": Each(ARTIFACT), "chosen": {"model": TEXT, "scores": TEXT},
    "scores": Each(ANY), "notes": [TEXT],
    "error": Either(TEXT, {"kind": TEXT, "message": TEXT, "type": TEXT, "traceback": TEXT}),
}  # fmt: skip
SHARE = {"integer": NUMBER, "all": NUMBER}
MEASURED = {
    **{f"{which}{name}": NUMBER for which in ("", "float_") for name in ("latency_s", "size_bytes", "peak_bytes")},
    "latency": NUMBER, "size": NUMBER, "memory": NUMBER, "batch": NUMBER, "threads": NUMBER, "cores": NUMBER,
    "processor": TEXT, "onnxruntime": TEXT, "real_samples": TRUTH, "error": TEXT,
    "kernels": {
        "layers": SHARE, "others": SHARE,
        "in_float": [{"op_type": TEXT, "count": NUMBER, "form": TEXT, "example": TEXT, "why": TEXT}],
    },
}  # fmt: skip
RECORD_SHAPE: Mapping[str, Any] = {
    "schema": NUMBER, "qpipe": TEXT, "command": Either(TEXT, [TEXT]), "started": STAMP, "finished": STAMP,
    "status": TEXT, "run_dir": TEXT, "git": {"commit": TEXT, "dirty": TRUTH},
    "environment": {"python": TEXT, "platform": TEXT, "libraries": Each(TEXT)},
    "goal": {
        "metric": TEXT, "float": NUMBER, "allowed_drop": NUMBER, "min_score": NUMBER, "reached": NUMBER,
        "deployed": NUMBER, "met": TRUTH,
        "reference": TEXT, "scores": TEXT, "score_met": TRUTH, "limits": Each({"limit": NUMBER, "found": NUMBER}),
    },
    "best": {"node": TEXT, "score": NUMBER}, "ladder": [STEP], "nodes": Each(NODE), "stages": Each(Each(ANY)),
    "listings": Each(TEXT), "edges": [[TEXT]], "files": Each(Either(TEXT, [TEXT])), "measured": Each(MEASURED),
    "totals": Each(NUMBER),
}  # fmt: skip


def wrong(record: Any) -> str | None:
    """The first field that is not of its shape, in words; None where all are."""
    if _depth(record) > DEEPEST:
        return f"lists and mappings lie more than {DEEPEST} deep in one another"
    return next(_wrong(record, RECORD_SHAPE, ""), None)


def _wrong(value: Any, shape: Any, address: str) -> Iterator[str]:
    if value is None and address:
        return
    if isinstance(shape, Either):
        if next(_wrong(value, shape.first, address), None) and next(_wrong(value, shape.second, address), None):
            yield _said(value, f"{_name(shape.first)} or {_name(shape.second)}", address)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            yield _said(value, _name(shape), address)
            return
        for i, item in enumerate(value):
            yield from _wrong(item, shape[0], f"{address}[{i}]")
    elif isinstance(shape, Each | Mapping):
        if not isinstance(value, Mapping):
            yield _said(value, _name(shape), address)
            return
        for name, item in value.items():
            inner = shape.shape if isinstance(shape, Each) else shape.get(name, ANY)
            yield from _wrong(item, inner, f"{address}.{name}".removeprefix("."))
    elif not _is(value, shape):
        yield _said(value, shape, address)


def _is(value: Any, shape: str) -> bool:
    if shape == NUMBER:
        return not isinstance(value, bool) and isinstance(value, int | float) and _is_within(value)
    return {TEXT: isinstance(value, str), TRUTH: isinstance(value, bool)}.get(shape, True)


def _is_within(value: float) -> bool:
    """Whether a float can hold it: JSON has integers of any length."""
    try:
        float(value)
    except OverflowError:
        return False
    return True


def _name(shape: Any) -> str:
    return shape if isinstance(shape, str) else "a list" if isinstance(shape, list) else "a mapping"


def _said(value: Any, wanted: str, address: str) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f"{address or 'all'}: expected {wanted}, got {text if len(text) <= 40 else text[:37] + '…'}"


def _depth(value: Any) -> int:
    """How deep lists and mappings lie in one another; as deep as may be, and one more, at most."""
    depth, level = 0, [value]
    while level and depth <= DEEPEST:
        level = [
            item
            for each in level
            if isinstance(each, Mapping | list)
            for item in (each.values() if isinstance(each, Mapping) else each)
        ]
        depth += bool(level)
    return depth
