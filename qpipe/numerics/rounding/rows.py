"""The grid of a weight whose rows stand as (groups, O / groups, K), and the way from and to an encoding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from qpipe.numerics.grid import Encoding, broadcast
from qpipe.numerics.rounding.unfold import Unfold

Sharing = Literal["row", "place", "tensor", "fixed"]


@dataclass(frozen=True, eq=False)
class RowGrid:
    """Scale and zero point of weight rows, float32, (groups, rows, 1) or (groups, rows, K); code bounds.

    `sharing` says which rows must keep one scale when scales are searched: each its own ("row"), those at one
    place in every group ("place"), all ("tensor"), or no row may change its scale ("fixed"). `free_sign` says that
    their codes may be mirrored then, which is another zero point.
    """

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int
    sharing: Sharing = "row"
    free_sign: bool = False

    def mirrored(self) -> RowGrid:
        """The grid of the negated values: the same scales, the zero points counted from the other end."""
        return replace(self, zero_point=self.qmin + self.qmax - self.zero_point)

    def replaced(self, where: Tensor, other: RowGrid) -> RowGrid:
        """The grid with the scales and zero points of `other` in the rows `where`, (groups, rows, 1)."""
        scale = torch.where(where, other.scale, self.scale)
        return replace(self, scale=scale, zero_point=torch.where(where, other.zero_point, self.zero_point))

    def pooled(self, value: Tensor) -> Tensor:
        """`value` per row, (groups, rows), summed over the rows that share a scale, in its own shape."""
        if self.sharing == "row":
            return value
        return (value.sum(0) if self.sharing == "place" else value.sum()).expand_as(value)

    def nearest(self, target: Tensor) -> Tensor:
        """The codes nearest to `target`, as float32 whole numbers, bit-equal to QuantizeLinear."""
        z = self.zero_point
        return (target / self.scale).round().clamp(self.qmin - z, self.qmax - z) + z

    def values(self, codes: Tensor) -> Tensor:
        """What the codes stand for."""
        return (codes - self.zero_point) * self.scale

    def permuted(self, order: Tensor) -> RowGrid:
        """The grid with its columns in `order`, (groups, K)."""
        if self.scale.shape[-1] == 1:
            return self
        index = order[:, None].expand(-1, self.scale.shape[1], -1)
        return replace(self, scale=self.scale.gather(2, index), zero_point=self.zero_point.gather(2, index))

    def some_rows(self, start: int, stop: int) -> RowGrid:
        """The grid of some of each group's rows."""
        return replace(self, scale=self.scale[:, start:stop], zero_point=self.zero_point[:, start:stop])

    def column(self, j: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point of column `j`, (groups, rows, 1)."""
        i = 0 if self.scale.shape[-1] == 1 else j
        return self.scale[..., i : i + 1], self.zero_point[..., i : i + 1]

    def columns(self, start: int, stop: int) -> RowGrid:
        """The grid of some columns."""
        if self.scale.shape[-1] == 1:
            return self
        return replace(self, scale=self.scale[..., start:stop], zero_point=self.zero_point[..., start:stop])


def row_grid(
    e: Encoding, unfold: Unfold, shape: tuple[int, ...], device: str | torch.device = "cpu"
) -> RowGrid:
    """The grid of a weight of `shape` as rows."""
    scale, zero_point = (torch.tensor(v, device=device) for v in broadcast(e, shape))
    rows = [unfold.weight_rows(v.float().expand(shape)) for v in (scale, zero_point)]
    one_per_row = all(bool((v == v[..., :1]).all()) for v in rows)
    s, z = ((v[..., :1] if one_per_row else v).contiguous() for v in rows)
    return RowGrid(s, z, e.qmin, e.qmax, _sharing(e, unfold), e.free_sign)


def _sharing(e: Encoding, unfold: Unfold) -> Sharing:
    if e.axis is None:
        return "tensor"
    if e.block_size is not None:
        return "fixed" if e.axis == unfold.weight_axis else "row"
    if e.axis != unfold.weight_axis:
        return "fixed"
    return "place" if unfold.kind == "conv_transpose" and unfold.groups > 1 else "row"


def row_encoding(e: Encoding, grid: RowGrid, unfold: Unfold, shape: tuple[int, ...]) -> Encoding:
    """`e` with the scales and zero points of `grid`, frozen: the inverse of `row_grid` after a scale search."""
    scale, zero_point = (_of_rows(v, e, unfold, shape) for v in (grid.scale, grid.zero_point))
    return replace(e, scale=scale, zero_point=zero_point, frozen=True)


def _of_rows(value: Tensor, e: Encoding, unfold: Unfold, shape: tuple[int, ...]) -> Any:
    """One element for each scale of `e`, of values that stand for a weight of `shape` as rows."""
    k = unfold.weight_rows(torch.empty(shape, device="meta")).shape[-1]
    full = unfold.weight_from_rows(value.expand(*value.shape[:2], k), shape).cpu().numpy()
    if e.axis is None:
        return full.reshape(-1)[0]
    if e.block_size is None:
        return full.swapaxes(0, e.axis).reshape(shape[e.axis], -1)[:, 0]
    return full.take(range(0, shape[e.axis], e.block_size), axis=e.axis)
