"""What calibrating leaves a person to know: weights without a grid, values that their grid cannot tell apart."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qpipe.numerics.grid import dequantize

if TYPE_CHECKING:
    from qpipe.methods.placement.calibration import Observers
    from qpipe.methods.placement.placement import Placement
    from qpipe.model.network.network import Network
    from qpipe.numerics.grid import Encoding

Array = npt.NDArray[Any]
_SHOWN = 3


def remarks(
    model: Network,
    placement: Placement,
    observers: Observers,
    encodings: Mapping[str, Encoding],
    arrays: Mapping[str, Array],
) -> Iterator[str]:
    """A sentence about each such thing, for a model that gets `encodings` from what the observers saw in `arrays`;
    they watch what `joined_inputs` says besides."""
    yield from _zeros(arrays)
    if set(placement.in_float) - set(encodings):
        yield weights_in_float(placement, encodings)
    for name, (first, *others) in placement.turned.items():
        yield (
            f"'{name}' is read along two axes: its scales are those of '{first}', and {_listed(others)} computes in "
            "float. 'prepare' with tied_weights: copy gives each a weight of its own."
        )
    yield from _lost_in_concat(model, observers, encodings)


def weights_in_float(placement: Placement, encodings: Mapping[str, Encoding]) -> str:
    """How many weights have a grid, which have none, and why; some may have come with one."""
    reasons: dict[str, list[str]] = {}
    for name, why in placement.in_float.items():
        if name not in encodings:
            reasons.setdefault(why, []).append(name)
    total = len(placement.weights) + len(placement.in_float)
    given = total - sum(map(len, reasons.values()))
    left = "; ".join(f"{_listed(names)}, because {why}" for why, names in reasons.items())
    return f"{given} of {total} weights have a grid; in float: {left}."


def _zeros(arrays: Mapping[str, Array]) -> Iterator[str]:
    zeros = [name for name, a in arrays.items() if a.dtype.kind == "f" and a.size and not a.any()]
    if zeros:
        yield (
            f"The calibration data of {_listed(zeros)} are all 0, and the ranges are of what the model makes of that. "
            "Give samples like those that it will see."
        )


def joined_inputs(model: Network, placement: Placement) -> list[str]:
    """The inputs of each Concat that have its grid, and whose own range is not known therefore."""
    found = []
    for group in placement.shared:
        for node in model.graph:
            if node.op_type == "Concat" and node.outputs[0].name in group:
                found += [str(value.name) for value in node.inputs if value is not None and value.name in group]
    return list(dict.fromkeys(found))


def _lost_in_concat(model: Network, observers: Observers, encodings: Mapping[str, Encoding]) -> Iterator[str]:
    """The inputs of a Concat of which next to nothing comes out of it."""
    for node in model.graph:
        output = str(node.outputs[0].name)
        if node.op_type != "Concat" or output not in encodings:
            continue
        step = float(encodings[output].scale)
        for name in dict.fromkeys(str(value.name) for value in node.inputs if value is not None):
            low, high = _range(name, observers, encodings)
            if high - low < step:
                yield (
                    f"All of '{name}', {low:.3g} to {high:.3g}, lies within one step, {step:.3g}, of the grid of "
                    f"'{output}' (Concat), where next to nothing is left of it. "
                    f"target.nodes.exclude=[{_exactly('name', node.name)},{_exactly('value', output)}] leaves "
                    f"'{output}' in float."
                )


def _range(name: str, observers: Observers, encodings: Mapping[str, Encoding]) -> tuple[float, float]:
    """The range of a value: what was seen of it, or that of its grid; any where neither is known."""
    if (name,) in observers:
        return observers[name,].min, observers[name,].max
    if name not in encodings or encodings[name].axis is not None:
        return -math.inf, math.inf
    low, high = dequantize(np.array([encodings[name].qmin, encodings[name].qmax]), encodings[name])
    return float(low), float(high)


def _exactly(kind: str, name: str | None) -> str:
    """The node filter that `name` alone matches."""
    return f"'{kind}:{re.escape(str(name))}'"


def _listed(names: Iterable[str]) -> str:
    quoted = [f"'{name}'" for name in names]
    more = f" and {len(quoted) - _SHOWN} more" if len(quoted) > _SHOWN else ""
    return ", ".join(quoted[:_SHOWN]) + more
