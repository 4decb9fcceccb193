"""What a record says of the exported files as they run in onnxruntime, beside the float model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qpipe.report import text
from qpipe.report.facts import Record, goal_met, goal_sentence, real


@dataclass(frozen=True)
class Ratio:
    """A figure of the exported file as a share of float's, and the sentence that says both; `limit` is the goal's."""

    name: str
    value: float
    sentence: str
    limit: float | None


@dataclass(frozen=True)
class InFloat:
    """Operators that onnxruntime runs in float, alike in form: how many, one of them, and why."""

    op_type: str
    count: int
    form: str
    example: str
    why: str

    @property
    def sentence(self) -> str:
        form = self.form.replace("DequantizeLinear", "DQ").replace("QuantizeLinear", "Q")
        return f"{self.count} x {form} ({text.clip(self.example, 30)}): {self.why}"


@dataclass(frozen=True)
class Measured:
    """The figures of one exporting node. `integer` says what runs on integers: (what, how many, of how many)."""

    node: str
    conditions: str
    ratios: tuple[Ratio, ...]
    integer: tuple[tuple[str, int, int], ...]
    in_float: tuple[InFloat, ...]
    error: str

    @property
    def on_integers(self) -> str:
        """The shares on integer kernels in one sentence."""
        return "; ".join(f"{found} of {of} {what}" for what, found, of in self.integer)


def measured(record: Record) -> list[Measured]:
    """What was measured, by node; nothing of a record that has none."""
    found, limits = _mapping(record.get("measured")), _mapping(_mapping(record.get("goal")).get("limits"))
    return [_measured(str(node), _mapping(figures), limits) for node, figures in found.items()]


def _measured(node: str, figures: Mapping[str, Any], limits: Mapping[str, Any]) -> Measured:
    shown = {
        "latency": ("latency", "latency_s", text.latency),
        "size": ("file", "size_bytes", text.size),
        "memory": ("peak memory", "peak_bytes", text.size),
    }
    ratios = []
    for ratio, (name, figure, said) in shown.items():
        value, own, of_float = (real(figures.get(each)) for each in (ratio, figure, f"float_{figure}"))
        if value is not None:
            sentence = f"{value:.2f} of float, {said(own)} against {said(of_float)}"
            ratios.append(Ratio(name, value, sentence, real(_mapping(limits.get(ratio)).get("limit"))))
    kernels = _mapping(figures.get("kernels"))
    rows = [(name, _mapping(kernels.get(key))) for key, name in (("layers", _LAYERS), ("others", "others"))]
    integer = tuple((name, _count(row, "integer"), _count(row, "all")) for name, row in rows if _count(row, "all"))
    groups = [row for row in kernels.get("in_float") or () if isinstance(row, Mapping)]
    in_float = tuple(
        InFloat(
            text.clean(row.get("op_type") or ""), _count(row, "count"), text.clean(row.get("form") or ""),
            text.clean(row.get("example") or ""), text.clean(row.get("why") or ""),
        )
        for row in groups
    )  # fmt: skip
    return Measured(
        text.clean(node), _conditions(figures), tuple(ratios), integer, in_float, text.clean(figures.get("error") or "")
    )


_LAYERS = "Conv, MatMul and Gemm"


def _conditions(figures: Mapping[str, Any]) -> str:
    """In which onnxruntime, on what machine, and of how many samples at a time."""
    threads, cores, batch = (real(figures.get(name)) for name in ("threads", "cores", "batch"))
    own = None if cores is None else f"default threads on {text.plural(int(cores), 'core')}"
    parts = [
        f"onnxruntime {text.clean(figures['onnxruntime'])}" if figures.get("onnxruntime") else None,
        None if batch is None else f"batch {int(batch)}",
        own if threads is None else text.plural(int(threads), "thread"),
        "made-up inputs" if batch is not None and figures.get("real_samples") is False else None,
    ]
    return ", ".join(filter(None, parts))


def limits(record: Record) -> list[tuple[str, bool | None]]:
    """What the goal asks of the exported files: a sentence for each limit, and whether it is kept; None where it was
    not measured."""
    names = {"latency": "latency", "size": "file", "size_bytes": "file"}
    found = []
    for key, row in _mapping(_mapping(record.get("goal")).get("limits")).items():
        limit, value = (real(_mapping(row).get(name)) for name in ("limit", "found"))
        if limit is None or key not in names:
            continue
        shown, asked = (f"{value:.3f} of float" if value else "", f"{limit:g}")
        if key == "size_bytes":
            shown, asked = text.size(value), text.size(limit)
        reached = "not measured" if value is None else shown
        found.append((f"{names[key]} {reached} (at most {asked} asked)", None if value is None else value <= limit))
    return found


def verdict(record: Record) -> str | None:
    """Whether the goal was met, by the score and by what was measured, in one sentence; None where there is no goal."""
    asked = limits(record)
    if not asked:
        return goal_sentence(record)
    goal = _mapping(record.get("goal"))
    score = goal_sentence({**record, "goal": {**goal, "met": goal.get("score_met")}}) or ""
    met = goal_met(record)
    said = [sentence for sentence, kept in asked if met or kept is met]
    if score.startswith(("goal missed", "goal not decided")):
        return "; ".join([score, *said])
    fact = score.removeprefix("goal met: ").removeprefix("best: ")
    if met:
        said = [fact, *said]
    elif fact:
        said.append(fact)
    word = {True: "met", False: "missed", None: "not decided"}[met]
    return f"goal {word}: {'; '.join(filter(None, said))}"


def _count(row: Mapping[str, Any], name: str) -> int:
    return int(real(row.get(name)) or 0)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
