"""How far the activations between two layers reach, channel by channel: measured on samples, or told by statistics.

Without samples a layer's output is taken for normal: with the mean beta and spread gamma that a folded
normalization left, or else, for inputs of unit variance, with its bias for the mean and the norm of its
weight row for the spread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qpipe.methods.equalization.links import Link, along, bounds
from qpipe.model.runtime.session import make_session
from qpipe.model.simulation.samples import batches
from qpipe.model.structure.channels import grouped

if TYPE_CHECKING:
    from qpipe.model.network.network import Array, Network
    from qpipe.model.structure.layers import Layer

Vector = NDArray[np.float64]
DEVIATIONS = 3.0
_BATCH = 32


def activation_reach(
    model: Network, layers: Mapping[str, Layer], links: Mapping[str, Link], arrays: Mapping[str, Array] | None
) -> dict[str, Vector]:
    """{first layer of a link: (C,)}: how far its activation reaches, over the samples, or as statistics tell."""
    if arrays is None:
        return {name: expected_reach(model, layers[name], link) for name, link in links.items()}
    return measured_reach(model, arrays, layers, links)


def expected_reach(model: Network, layer: Layer, link: Link) -> Vector:
    """(C,): the largest magnitude behind the first activation on the way, 3 deviations from the mean."""
    normalized = model.facts.statistics.get(layer.output)
    if normalized is not None:
        mean, spread = normalized.beta, np.abs(normalized.gamma)
    else:
        weight = grouped(model.param(layer.weight), layer.groups, layer.channel_axis)
        mean = (
            np.zeros(layer.channels)
            if layer.bias is None
            else model.param(layer.bias).reshape(-1).astype(float)
        )
        spread = np.sqrt((weight**2).sum(axis=(2, 3))).reshape(-1)
    largest = np.maximum(mean + DEVIATIONS * spread, 0.0)
    rectified = any(step.node.op_type == "Relu" or _from_zero(step.node) for step in link.way.steps)
    reach = largest if rectified else np.maximum(largest, DEVIATIONS * spread - mean)
    return _bounded(link, reach)


def measured_reach(
    model: Network, arrays: Mapping[str, Array], layers: Mapping[str, Layer], links: Mapping[str, Link]
) -> dict[str, Vector]:
    """{first layer of a link: (C,)}: the largest magnitude behind its activation, over all samples, in onnxruntime."""
    names = [layers[name].activation_output for name in links]
    found: dict[str, Vector] = {}
    for outputs in _values(model, arrays, names):
        for (name, link), array in zip(links.items(), outputs, strict=True):
            axis = array.ndim - 1 if layers[name].op_type == "MatMul" else 1
            others = tuple(other for other in range(array.ndim) if other != axis)
            largest = _bounded(link, np.abs(array).max(axis=others).astype(np.float64))
            found[name] = np.maximum(found.get(name, largest), largest)
    return found


def unreached(model: Network, arrays: Mapping[str, Array], links: Iterable[Link]) -> set[str]:
    """The names of the Clips on the way of `links` whose upper bound no sample reaches, in onnxruntime."""
    uppers: dict[str, tuple[str, float]] = {}
    for node in (step.node for link in links for step in link.way.steps if step.node.op_type == "Clip"):
        upper, value = bounds(node)[1], node.inputs[0]
        if upper is not None and value is not None:
            uppers[str(node.name)] = (str(value.name), float(upper))
    free = set(uppers)
    for outputs in _values(model, arrays, [value for value, _ in uppers.values()]):
        for (name, (_, bound)), array in zip(uppers.items(), outputs, strict=True):
            if array.max() >= bound:
                free.discard(name)
    return free


def _values(model: Network, arrays: Mapping[str, Array], names: list[str]) -> Iterator[list[Array]]:
    """The float values called `names`, batch by batch."""
    if not names:
        return
    session = make_session(model, quantized=False, outputs=names)
    for batch in batches(model, arrays, _BATCH):
        yield session.run(None, dict(zip([spec.name for spec in model.inputs], batch.arrays, strict=True)))


def _from_zero(node: ir.Node) -> bool:
    lower = bounds(node)[0] if node.op_type in ("Clip", "Max") else None
    return lower is not None and bool((lower >= 0).all())


def _bounded(link: Link, reach: Vector) -> Vector:
    """`reach` (C,), at most the upper bounds on the way of `link`."""
    for step in link.way.steps:
        upper = bounds(step.node)[1] if step.node.op_type in ("Clip", "Min") else None
        if upper is not None:
            everywhere = np.broadcast_to(upper, along(step, reach).shape).reshape(-1)
            reach = np.minimum(reach, np.maximum(step.channels.gathered(everywhere.astype(np.float64)), 0.0))
    return reach
