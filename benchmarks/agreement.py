"""What a quantized model is for, as one number: how far it decides as the float one does, 1.0 where always.

Each takes the outputs of the float file and of the quantized one, both (samples, ...) in the order of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Agreement = Callable[[Sequence[Array], Sequence[Array]], float]


def same_class(axis: int = -1) -> Agreement:
    """The share of places (samples, pixels, steps in time) whose largest entry along `axis` is the same."""

    def agree(wanted: Sequence[Array], found: Sequence[Array]) -> float:
        return float((wanted[0].argmax(axis) == found[0].argmax(axis)).mean())

    return agree


def same_side(threshold: float, output: int = 0) -> Agreement:
    """The overlap of where the output is above `threshold`: intersection over union; 1.0 where both are empty."""

    def agree(wanted: Sequence[Array], found: Sequence[Array]) -> float:
        a, b = wanted[output] > threshold, found[output] > threshold
        union = (a | b).sum()
        return float((a & b).sum() / union) if union else 1.0

    return agree


def same_text(wanted: Sequence[Array], found: Sequence[Array]) -> float:
    """The share of characters that a greedy CTC decoding has alike: 1 - edit distance over the longer text's length.

    Outputs are (samples, steps, characters), the blank first."""
    texts = [[_collapsed(row.argmax(-1)) for row in outputs[0]] for outputs in (wanted, found)]
    wrong = sum(_edits(a, b) for a, b in zip(*texts, strict=True))
    return 1.0 - wrong / max(1, sum(max(len(a), len(b)) for a, b in zip(*texts, strict=True)))


def _collapsed(steps: Array) -> list[int]:
    kept = np.flatnonzero(np.diff(steps, prepend=-1))
    return [int(step) for step in steps[kept] if step]


def _edits(a: list[int], b: list[int]) -> int:
    row = list(range(len(b) + 1))
    for i, one in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (one != other))
    return row[-1]


def same_boxes(score: float, overlap: float = 0.5) -> Agreement:
    """F1 of the boxes of a YOLOv8 head, (samples, 4 + classes, anchors): those that non-maximum suppression leaves
    above `score`, a pair being one of the same class that overlaps by `overlap` (intersection over union)."""

    def agree(wanted: Sequence[Array], found: Sequence[Array]) -> float:
        hits = total = 0
        for a, b in zip(wanted[0], found[0], strict=True):
            ours, theirs = _boxes(a, score), _boxes(b, score)
            total += len(ours) + len(theirs)
            for box in ours:
                near = [i for i, other in enumerate(theirs) if other[0] == box[0] and _iou(box, other) >= overlap]
                if near:
                    hits += 2
                    theirs.pop(near[0])
        return hits / total if total else 1.0

    return agree


def _boxes(head: Array, score: float) -> list[tuple[int, Array]]:
    """(class, corners), by falling score."""
    best = head[4:].max(0)
    kept: list[tuple[int, Array]] = []
    for i in sorted(np.flatnonzero(best > score), key=lambda i: -best[i]):
        (x, y, w, h), label = head[:4, i], int(head[4:, i].argmax())
        box = label, np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
        if all(other[0] != label or _iou(box, other) < 0.45 for other in kept):
            kept.append(box)
    return kept


def _iou(a: tuple[int, Array], b: tuple[int, Array]) -> float:
    low, high = np.maximum(a[1][:2], b[1][:2]), np.minimum(a[1][2:], b[1][2:])
    shared = (high - low).clip(0).prod()
    return float(shared / (sum((box[2:] - box[:2]).prod() for _, box in (a, b)) - shared))
