"""Operators that read, make or change shapes; the integers they need are computed on the host.

`Shape` and `Size` return tensors on the CPU, and what is computed from these stays there, so that a batch
dimension stays dynamic and a GPU never waits for one.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from qpipe.model.operators.registry import TORCH_DTYPES, Ints, ints, number, operator


@operator("Shape")
def shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    """The dimensions start..end of x, int64 on the CPU."""
    return torch.tensor(x.shape[start:end], dtype=torch.int64)


@operator("Size")
def size(x: Tensor) -> Tensor:
    """The number of elements of x, int64 on the CPU."""
    return torch.tensor(x.numel(), dtype=torch.int64)


@operator("Reshape", numbers=(1,))
def reshape(x: Tensor, shape: Ints, *, allowzero: int = 0) -> Tensor:
    """x in another shape: -1 is inferred, 0 copies x's dimension unless `allowzero`."""
    target = ints(shape)
    if not allowzero and 0 in target:
        target = tuple(x.shape[i] if d == 0 else d for i, d in enumerate(target))
    return x.reshape(target)


@operator("Flatten")
def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    """x as a matrix: the dimensions before `axis` are its rows."""
    axis = axis if axis >= 0 else axis + x.ndim
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@operator("Transpose")
def transpose(x: Tensor, *, perm: tuple[int, ...] | None = None) -> Tensor:
    """x with its dimensions permuted; reversed without `perm`."""
    return x.permute(perm if perm is not None else tuple(reversed(range(x.ndim))))


@operator("Squeeze", numbers=(1,))
def squeeze(x: Tensor, axes: Ints = None) -> Tensor:
    """x without the dimensions `axes`, or without all of size 1."""
    return x.squeeze() if axes is None else x.squeeze(ints(axes))


@operator("Unsqueeze", numbers=(1,))
def unsqueeze(x: Tensor, axes: Ints) -> Tensor:
    """x with dimensions of size 1 at `axes` of the result."""
    wanted = ints(axes)
    rank = x.ndim + len(wanted)
    for axis in sorted(a if a >= 0 else a + rank for a in wanted):
        x = x.unsqueeze(axis)
    return x


@operator("Concat")
def concat(*tensors: Tensor, axis: int) -> Tensor:
    """The inputs joined along `axis`."""
    return torch.cat(tensors, axis)


@operator("Split", numbers=(1,), many=True)
def split(
    x: Tensor, sizes: Ints = None, *, axis: int = 0, num_outputs: int | None = None
) -> tuple[Tensor, ...]:
    """x in pieces along `axis`: of the sizes given, or `num_outputs` equal ones, the last one smaller."""
    if sizes is None:
        length = x.shape[axis]
        pieces = num_outputs or 1
        chunk = -(-length // pieces)
        sizes = tuple(min(chunk, length - i * chunk) for i in range(pieces))
    return torch.split(x, list(ints(sizes)), axis)


@operator("Expand", numbers=(1,))
def expand(x: Tensor, shape: Ints) -> Tensor:
    """x broadcast against `shape`; either may have the larger dimension."""
    wanted = ints(shape)
    rank = max(x.ndim, len(wanted))
    mine = (1,) * (rank - x.ndim) + tuple(x.shape)
    theirs = (1,) * (rank - len(wanted)) + wanted
    return x.expand([t if m == 1 else m for m, t in zip(mine, theirs, strict=True)])


@operator("Tile", numbers=(1,))
def tile(x: Tensor, repeats: Ints) -> Tensor:
    """x repeated along each dimension."""
    return x.repeat(ints(repeats))


@operator("Range")
def arange(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """start, start + delta, … below limit, on the CPU, in the type of the inputs."""
    first, last, step = number(start), number(limit), number(delta)
    count = max(0, math.ceil((last - first) / step))
    return (first + torch.arange(count) * step).to(start.dtype)


@operator("ConstantOfShape", numbers=(0,))
def constant_of_shape(shape: Ints, *, value: float = 0.0, dtype: int = 1) -> Tensor:
    """A tensor on the CPU filled with `value`, of the ONNX type `dtype`."""
    return torch.full(ints(shape), value, dtype=TORCH_DTYPES[dtype])


@operator("EyeLike")
def eye_like(x: Tensor, *, k: int = 0, dtype: int | None = None) -> Tensor:
    """A matrix of x's shape with ones on diagonal k."""
    out = torch.zeros(x.shape, dtype=x.dtype if dtype is None else TORCH_DTYPES[dtype], device=x.device)
    out.diagonal(k).fill_(1)
    return out


@operator("Trilu", numbers=(1,))
def trilu(x: Tensor, k: Tensor | int | tuple[int, ...] = 0, *, upper: int = 1) -> Tensor:
    """The upper or lower triangle of x, from diagonal k on; the rest is 0."""
    diagonal = int(number(k))
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


@operator("DepthToSpace")
def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """(N, C b b, H, W) -> (N, C, H b, W b), the block index before (DCR) or after (CRD) the channel."""
    n, c, h, w = x.shape
    b = blocksize
    if mode == "CRD":
        return F.pixel_shuffle(x, b)
    split_up = x.reshape(n, b, b, c // (b * b), h, w)
    return split_up.permute(0, 3, 4, 1, 5, 2).reshape(n, c // (b * b), h * b, w * b)


@operator("SpaceToDepth")
def space_to_depth(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """(N, C, H b, W b) -> (N, C b b, H, W), the block index before (DCR) or after (CRD) the channel."""
    n, c, h, w = x.shape
    b = blocksize
    if mode == "CRD":
        return F.pixel_unshuffle(x, b)
    split_up = x.reshape(n, c, h // b, b, w // b, b)
    return split_up.permute(0, 3, 5, 1, 2, 4).reshape(n, c * b * b, h // b, w // b)


@operator("Pad", numbers=(1, 2, 3))
def pad(
    x: Tensor,
    pads: Ints,
    value: Tensor | float | tuple[float, ...] | None = None,
    axes: Ints = None,
    *,
    mode: str = "constant",
) -> Tensor:
    """x widened by `pads` (begins, then ends, negative crops), with `value`, or by reflect, edge or wrap."""
    amounts = ints(pads)
    dims = tuple(range(x.ndim)) if axes is None else tuple(a % x.ndim for a in ints(axes))
    before = dict(zip(dims, amounts[: len(dims)], strict=True))
    after = dict(zip(dims, amounts[len(dims) :], strict=True))
    if mode == "constant":
        flat = [n for d in reversed(range(x.ndim)) for n in (before.get(d, 0), after.get(d, 0))]
        return F.pad(x, flat, value=0 if value is None else number(value))
    # By index, one dimension at a time: torch's own modes want particular ranks and forbid wide pads.
    for d in dims:
        if before[d] or after[d]:
            x = x.index_select(d, _pad_index(x.shape[d], before[d], after[d], mode, x.device))
    return x


def _pad_index(length: int, before: int, after: int, mode: str, device: torch.device) -> Tensor:
    """Which of `length` elements stands at each place of the widened dimension."""
    index = torch.arange(-before, length + after, device=device)
    if mode == "edge":
        return index.clamp(0, length - 1)
    if mode == "wrap":
        return index % length
    period = max(1, 2 * (length - 1))
    index = index % period
    return torch.where(index < length, index, period - index)
