"""What a model has to compute for one sample: the multiplications and the elements that a cost is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qpipe.methods.mixing.products import FLOAT_BITS, Array, Products, bitops, counted, products

if TYPE_CHECKING:
    from qpipe.methods.placement.placement import Placement
    from qpipe.model.network.network import Network

__all__ = ["FLOAT_BITS", "Array", "Work", "measure_work"]


@dataclass(frozen=True)
class Work:
    """The multiplications of a model for one sample, with the names of both factors, and the number of elements of
    its quantized activations, those on one grid together."""

    products: Products
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
        return bitops(self.products, bits) + sum(n * bits.get(name, FLOAT_BITS) for n, name in self.elements)


def measure_work(model: Network, placement: Placement, arrays: Mapping[str, Array]) -> Work:
    """The work of `model` for one of the samples in `arrays`."""
    count, shapes = counted(model, arrays)
    elements = [(max(map(count, grid)), grid[0]) for grid in placement.grids]
    return Work(products(model, count, shapes), tuple(elements))
