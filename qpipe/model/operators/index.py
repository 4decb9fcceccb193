"""Operators that pick, place and order elements."""

from __future__ import annotations

import torch
from torch import Tensor

from qpipe.model.operators.registry import Ints, ints, number, operator


@operator("Slice", numbers=(1, 2, 3, 4))
def slices(x: Tensor, starts: Ints, ends: Ints, axes: Ints = None, steps: Ints = None) -> Tensor:
    """x[start:end:step] along each of `axes`, with Python's meaning of negative bounds and steps."""
    first, last = ints(starts), ints(ends)
    dims = tuple(range(len(first))) if axes is None else ints(axes)
    strides = (1,) * len(first) if steps is None else ints(steps)
    for start, end, dim, step in zip(first, last, dims, strides, strict=True):
        begin, stop, stride = slice(start, end, step).indices(x.shape[dim])
        if stride > 0:
            x = x[(slice(None),) * (dim % x.ndim) + (slice(begin, max(begin, stop), stride),)]
        else:
            x = x.index_select(dim, torch.arange(begin, stop, stride, device=x.device))
    return x


def _wrapped(index: Tensor, length: int) -> Tensor:
    """Negative indices counted from the end."""
    index = index.long()
    return torch.where(index < 0, index + length, index)


@operator("Gather")
def gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """x[…, indices, …] at `axis`; the dimensions of `indices` replace that one."""
    axis = axis % x.ndim
    index = _wrapped(indices, x.shape[axis])
    if index.ndim == 0:
        return (
            x.select(axis, int(index))
            if index.device.type == "cpu"
            else x.index_select(axis, index.reshape(1)).squeeze(axis)
        )
    picked = x.index_select(axis, index.reshape(-1))
    return picked.reshape(x.shape[:axis] + index.shape + x.shape[axis + 1 :])


@operator("GatherElements")
def gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """x picked element by element along `axis`."""
    return x.gather(axis, _wrapped(indices, x.shape[axis]))


@operator("GatherND")
def gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    """x at the index tuples in the last dimension of `indices`, after `batch_dims` shared dimensions."""
    depth = indices.shape[-1]
    shared = x.shape[:batch_dims]
    batches = torch.Size(shared).numel()
    table = x.reshape(batches, *x.shape[batch_dims:])
    index = indices.reshape(batches, -1, depth)
    rows = torch.arange(batches, device=x.device).unsqueeze(1).expand(-1, index.shape[1])
    columns = [_wrapped(index[..., i], x.shape[batch_dims + i]) for i in range(depth)]
    picked = table[(rows, *columns)]
    return picked.reshape(indices.shape[:-1] + x.shape[batch_dims + depth :])


@operator("ScatterElements")
def scatter_elements(
    x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none"
) -> Tensor:
    """x with `updates` set, added, multiplied, or taken as min or max, at `indices` along `axis`."""
    index = _wrapped(indices, x.shape[axis])
    if reduction == "none":
        return x.scatter(axis, index, updates)
    return x.scatter_reduce(axis, index, updates, _REDUCTIONS[reduction])


_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@operator("ScatterND")
def scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    """x with `updates` set, added, … at the index tuples in the last dimension of `indices`."""
    depth = indices.shape[-1]
    index = indices.reshape(-1, depth)
    size = torch.Size(x.shape[depth:]).numel()
    flat = torch.zeros(index.shape[0], dtype=torch.int64, device=x.device)
    for i in range(depth):
        flat = flat * x.shape[i] + _wrapped(index[:, i], x.shape[i])
    rows = x.reshape(-1, size)
    values = updates.reshape(index.shape[0], size)  # of no index at all, too
    spread = flat.unsqueeze(1).expand_as(values)
    if reduction == "none":
        return rows.scatter(0, spread, values).reshape(x.shape)
    return rows.scatter_reduce(0, spread, values, _REDUCTIONS[reduction]).reshape(x.shape)


@operator("OneHot", numbers=(1,))
def one_hot(indices: Tensor, depth: Ints, values: Tensor, *, axis: int = -1) -> Tensor:
    """values[1] where the new dimension `axis` equals the index, values[0] elsewhere."""
    count = int(number(depth))  # type: ignore[arg-type]  # OneHot's depth is not optional
    axis = axis % (indices.ndim + 1)
    index = torch.where(indices < 0, indices + count, indices).long().unsqueeze(axis)
    view = [1] * (indices.ndim + 1)
    view[axis] = count
    hot = index == torch.arange(count, device=indices.device).reshape(view)
    return torch.where(hot, values[1], values[0])


@operator("TopK", numbers=(1,), many=True)
def top_k(x: Tensor, k: Ints, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, Tensor]:
    """The k largest or smallest values along `axis` and where they stand; of equals the first comes first."""
    order = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
    count = ints(k)[0]
    return order.values.narrow(axis, 0, count), order.indices.narrow(axis, 0, count)


@operator("NonZero")
def non_zero(x: Tensor) -> Tensor:
    """The index tuples of elements that are not 0, shape (rank, found)."""
    return x.nonzero().t().contiguous()


@operator("Compress")
def compress(x: Tensor, condition: Tensor, *, axis: int | None = None) -> Tensor:
    """The slices of x along `axis` (of the flat x without one) where `condition` holds."""
    if axis is None:
        x, axis = x.reshape(-1), 0
    return x.index_select(axis, condition.nonzero().reshape(-1))


@operator("ReverseSequence")
def reverse_sequence(x: Tensor, lengths: Tensor, *, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    """Each sequence reversed over its own length."""
    time = torch.arange(x.shape[time_axis], device=x.device).unsqueeze(1)
    index = torch.where(time < lengths, lengths - 1 - time, time)
    if batch_axis == 0:
        index = index.t()
    return x.gather(time_axis, index.reshape(index.shape + (1,) * (x.ndim - 2)).expand_as(x))


@operator("Unique", many=True)
def unique(x: Tensor, *, axis: int | None = None, sorted: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The different elements, or slices along `axis`; where each comes first, which one each element is, and
    how many there are of each. In order of appearance unless `sorted`."""
    dim = 0 if axis is None else axis
    flat = x.reshape(-1) if axis is None else x
    values, inverse, counts = torch.unique(
        flat, sorted=True, return_inverse=True, return_counts=True, dim=dim
    )
    places = torch.arange(inverse.numel(), device=x.device)
    first = torch.full_like(counts, inverse.numel()).scatter_reduce(0, inverse, places, "amin")
    if not sorted:
        order = first.argsort()
        values, first, counts = values.index_select(dim, order), first[order], counts[order]
        inverse = order.argsort()[inverse]
    return values, first, inverse, counts
