"""The multiplications of a model's layers for one sample, and their bit operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from qpipe.model.simulation.module import to_torch, watched
from qpipe.model.simulation.samples import batches
from qpipe.model.structure.operands import find_operands

if TYPE_CHECKING:
    from torch import Tensor

    from qpipe.model.network.network import Network

Array = npt.NDArray[Any]
Shapes = dict[str, tuple[int, ...]]
Products = tuple[tuple[int, str, str], ...]
"""Of each layer the number of multiplications, and the names of both factors."""

FLOAT_BITS = 32


def products(model: Network, count: Callable[[str], int], shapes: Shapes) -> Products:
    """The products of `model`, where `count` and `shapes` are those of `counted`."""
    found = []
    operands = {operand.name: operand for operand in find_operands(model)}
    for node in model.graph:
        output, operand = str(node.outputs[0].name), operands.get(str(node.name))
        if operand and operand.op_type == "ConvTranspose":  # at its inputs: each meets all weights of its channel
            times = count(operand.input) * math.prod(operand.shape[1:])
        elif operand:
            times = count(output) * operand.inner
        elif node.op_type == "MatMul":
            times = count(output) * shapes.get(str(node.inputs[0].name), (0,))[-1]  # type: ignore[union-attr]
        else:
            continue
        a, b = (operand.input, operand.weight) if operand else (str(v.name) for v in node.inputs if v is not None)
        found.append((times, a, b))
    return tuple(found)


def bitops(made: Products, bits: Mapping[str, int]) -> int:
    """The bit operations at these bitwidths: those of the one factor times those of the other, for every
    multiplication; a tensor that is not named counts as float."""
    return sum(n * bits.get(a, FLOAT_BITS) * bits.get(b, FLOAT_BITS) for n, a, b in made)


def bitops_share(model: Network, arrays: Mapping[str, Array]) -> float:
    """The bit operations of the layers of `model` as a share of those in float, for one of the samples in `arrays`."""
    made = products(model, *counted(model, arrays))
    return bitops(made, {name: each.bitwidth for name, each in model.encodings.items()}) / max(1, bitops(made, {}))


def counted(model: Network, arrays: Mapping[str, Array]) -> tuple[Callable[[str], int], Shapes]:
    """How many elements a value has for one sample, by its name, and the shapes of all values for a small batch."""
    found: Shapes = {}

    def see(name: str, value: Tensor) -> None:
        found[name] = tuple(value.shape)

    batch = next(batches(model, arrays, 1))
    watched(to_torch(model, quantized=False, shared=True), batch.arrays, see)
    samples = len(batch.arrays[0])
    return (lambda name: math.prod(found.get(name, (0,))) // samples), found
