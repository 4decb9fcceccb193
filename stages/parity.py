"""Whether the simulation computes what is deployed: torch with fake-quantize against QDQ in onnxruntime.

    unit by unit    each quantized value from equal inputs; differences are counted in steps of its grid
    end to end      both run whole, and one flipped rounding may travel on

A difference from equal inputs is one of rounding where the value, before it was rounded, lay next to the
middle between two codes; `tie_distance` says how near at most, in steps.

    score = share of all elements, unit by unit, that are at most one step apart

Assumes: a model with encodings.
Source: own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from qpipe.numerics.thinning import thinned
from qpipe.stage import NULL, Context, Range, Samples, Scores, stage

if TYPE_CHECKING:
    from qpipe.methods.comparison.parity import ParityReport
    from qpipe.model.network.network import Network


def difference(report: ParityReport) -> str | None:
    """A sentence about the units that do not agree, with the worst of them; of a model without quantized activations
    about its outputs; None where all agree."""
    if not report.units:
        outputs = [output for output in report.outputs if not output.agree]
        told = (f"'{o.name}' by {o.max_difference:.3g} of {o.largest:.3g}" for o in outputs)
        return f"Outputs differ from the deployed ones: {', '.join(told)}." if outputs else None
    apart = [unit for unit in report.units if not unit.agree]
    if not apart:
        return None
    worst = next(unit for unit in report.units if unit.value == report.worst)
    return (
        f"{len(apart)} of {len(report.units)} quantized values differ from the deployed ones, '{worst.value}' "
        f"({', '.join(worst.op_types)}) by {worst.largest} steps of its grid."
    )


def origin(report: ParityReport) -> str | None:
    """Sentences that say where the differences come from, unit by unit and end to end; None where there are none."""
    elements = sum(unit.elements for unit in report.units)
    apart = elements - sum(unit.counts[0] for unit in report.units)
    if not apart:
        return None
    said = f"From equal inputs {apart} of {elements} values differ"
    if report.tie_distance is not None:
        said += f", none further than {report.tie_distance:.1g} steps from the middle between two codes"
    first = (
        next(tensor for tensor in report.end_to_end if tensor.value == report.first) if report.first else None
    )
    if first is None:
        return f"{said}. End to end none does."
    total = sum(tensor.elements for tensor in report.end_to_end)
    equal = sum(tensor.counts[0] for tensor in report.end_to_end) / total
    return (
        f"{said}. End to end they begin at '{first.value}' ({', '.join(first.op_types)}) and travel on: "
        f"{equal:.2%} of the values are equal."
    )


def bias_rounding(model: Network, report: ParityReport) -> str | None:
    """What onnxruntime does to float biases, where that may be why units do not agree; None elsewhere."""
    if report.agree or model.facts.biases != "float":
        return None
    return (
        "The target keeps biases in float. onnxruntime, which stands in for its engine here, rounds them to int32, "
        "which moves values by up to half of s_x * s_w / s_y steps; target.bias=int32 does the same beforehand."
    )


@stage(version=1, config={"data": "evaluation"})
def parity(
    model: Network,
    data: Samples,
    *,
    limit: Annotated[int, Range(ge=1)] = 64,
    batch_size: Annotated[int, Range(ge=1)] = 16,
    ctx: Context = NULL,
) -> Scores:
    """`score`, the share of values within one grid step, `agree`, and all counts by unit and by tensor.

    `limit` samples, evenly spread, are compared, `batch_size` at a time. Units that do not agree are noted, and
    where differences come from. Errors: InputError for a model without encodings, or data that do not fit.
    """
    from qpipe.methods.comparison.parity import parity as compare

    report = compare(model, thinned(data.arrays, limit), batch_size=batch_size)
    for sentence in (difference(report), bias_rounding(model, report), origin(report)):
        if sentence:
            ctx.note(sentence)
    return Scores({"score": report.within_one, "metric": "within_one", **report.to_json()})
