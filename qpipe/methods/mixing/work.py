"""What a model has to compute for one sample: the multiplications and the elements that a cost is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from qpipe.model.simulation.module import to_torch, watched
from qpipe.model.simulation.samples import batches
from qpipe.model.structure.operands import find_operands

if TYPE_CHECKING:
    from torch import Tensor

    from qpipe.methods.placement.placement import Placement
    from qpipe.model.network.network import Network

Array = npt.NDArray[Any]

FLOAT_BITS = 32


@dataclass(frozen=True)
class Work:
    """The multiplications of a model for one sample, with the names of both factors, and the number of elements of
    its quantized activations, those on one grid together."""

    products: tuple[tuple[int, str, str], ...]
    elements: tuple[tuple[int, str], ...]

    def of(self, names: set[str]) -> Work:
        """The part that the tensors `names` have to do with."""
        products = tuple(each for each in self.products if names & set(each[1:]))
        return Work(products, tuple(each for each in self.elements if each[1] in names))

    def without(self, names: set[str]) -> Work:
        """The part that the tensors `names` have nothing to do with."""
        products = tuple(each for each in self.products if not names & set(each[1:]))
        return Work(products, tuple(each for each in self.elements if each[1] not in names))

    def bitops(self, bits: Mapping[str, int]) -> int:
        """The bit operations at these bitwidths; a tensor that is not named counts as float."""
        products = sum(n * bits.get(a, FLOAT_BITS) * bits.get(b, FLOAT_BITS) for n, a, b in self.products)
        return products + sum(n * bits.get(name, FLOAT_BITS) for n, name in self.elements)


def measure_work(model: Network, placement: Placement, arrays: Mapping[str, Array]) -> Work:
    """The work of `model` for one of the samples in `arrays`."""
    shapes, samples = _shapes(model, arrays)

    def count(name: str) -> int:
        return math.prod(shapes.get(name, (0,))) // samples

    products = []
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
        products.append((times, a, b))
    elements = [(max(map(count, grid)), grid[0]) for grid in placement.grids]
    return Work(tuple(products), tuple(elements))


def _shapes(model: Network, arrays: Mapping[str, Array]) -> tuple[dict[str, tuple[int, ...]], int]:
    """The shape of every value for one small batch, and the number of samples in it."""
    found: dict[str, tuple[int, ...]] = {}

    def see(name: str, value: Tensor) -> None:
        found[name] = tuple(value.shape)

    batch = next(batches(model, arrays, 1))
    watched(to_torch(model, quantized=False, shared=True), batch.arrays, see)
    return found, len(batch.arrays[0])
