"""Operators of torch whose form in ONNX torch's exporter lacks, or writes as a loop over the data.

    amax, amin, prod       of all elements: Reduce… without axes
    fmax, fmin, hypot      elementwise; where one number is NaN, the other
    median, kthvalue       the last of the k smallest (TopK)
    embedding_bag          [bags, n] of who lies in which bag, times the rows: no loop, any number of bags

Each function takes what the operator of torch takes, and is traced when it is exported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import opset21 as op

Value = Any
"""A value of the graph that is being written."""


def amax(self: Value, dim: Sequence[int] = (), keepdim: bool = False) -> Value:
    """The largest element, of the dimensions `dim` or of all."""
    return _reduced(op.ReduceMax, self, dim, keepdim)


def amin(self: Value, dim: Sequence[int] = (), keepdim: bool = False) -> Value:
    """The smallest element, of the dimensions `dim` or of all."""
    return _reduced(op.ReduceMin, self, dim, keepdim)


def _reduced(reduce: Callable[..., Value], self: Value, dim: Sequence[int], keepdim: bool) -> Value:
    if not len(dim) or not len(self.shape):
        return reduce(self, keepdims=int(keepdim))
    return reduce(self, op.Constant(value_ints=[int(axis) for axis in dim]), keepdims=int(keepdim))


def prod(self: Value, dtype: int = -1) -> Value:
    """The product of all elements."""
    return op.ReduceProd(self if dtype == -1 or dtype is None else op.Cast(self, to=dtype), keepdims=0)


def fmax(self: Value, other: Value) -> Value:
    """The larger of both, or the one that is a number."""
    return op.Where(op.IsNaN(self), other, op.Where(op.IsNaN(other), self, op.Max(self, other)))


def fmin(self: Value, other: Value) -> Value:
    """The smaller of both, or the one that is a number."""
    return op.Where(op.IsNaN(self), other, op.Where(op.IsNaN(other), self, op.Min(self, other)))


def hypot(self: Value, other: Value) -> Value:
    """sqrt(a² + b²)."""
    return op.Sqrt(op.Add(op.Mul(self, self), op.Mul(other, other)))


def median(self: Value) -> Value:
    """The lower median of all elements."""
    flat = op.Reshape(self, op.Constant(value_ints=[-1]))
    last = op.Div(op.Sub(op.Size(flat), op.Constant(value_int=1)), op.Constant(value_int=2))
    smallest, _ = op.TopK(flat, op.Reshape(op.Add(last, op.Constant(value_int=1)), _one()), axis=0, largest=0)
    return op.Gather(smallest, last, axis=0)


def median_dim(self: Value, dim: int, keepdim: bool = False) -> tuple[Value, Value]:
    """The lower median along `dim`, and where it stands."""
    size = op.Shape(self, start=dim % len(self.shape), end=dim % len(self.shape) + 1)
    return _kth(self, op.Div(op.Add(size, _one()), op.Constant(value_ints=[2])), dim, keepdim)


def kthvalue(self: Value, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Value, Value]:
    """The k-th smallest element along `dim`, and where it stands."""
    return _kth(self, op.Constant(value_ints=[k]), dim, keepdim)


def _kth(self: Value, k: Value, dim: int, keepdim: bool) -> tuple[Value, Value]:
    """`k` is [1]."""
    values, places = op.TopK(self, k, axis=dim, largest=0)
    last = op.Sub(k, _one())
    if not keepdim:
        last = op.Squeeze(last)
    return op.Gather(values, last, axis=dim), op.Gather(places, last, axis=dim)


def embedding_bag(
    weight: Value,
    indices: Value,
    offsets: Value,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Value | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> tuple[Value, Value, Value, Value]:
    """Sum (mode 0), mean (1) or maximum (2) of the rows of `weight` (tokens, width) that each bag holds: (bags, width).

    `indices` are (n,), `offsets` where each bag begins. Of the other outputs of torch's operator, which training
    wants, the second and the last are no more than of the right type."""
    first, none = op.Constant(value_ints=[0]), op.Constant(value_ints=[1 << 62])
    indices, offsets = op.Cast(indices, to=7), op.Cast(offsets, to=7)
    rows = op.Gather(weight, indices)
    if per_sample_weights is not None:
        rows = op.Mul(rows, op.Unsqueeze(per_sample_weights, _one()))
    count = op.Shape(indices)
    behind = op.Slice(offsets, _one(), none)
    if include_last_offset:
        begin, end = op.Slice(offsets, first, op.Constant(value_ints=[-1])), behind
    else:
        begin, end = offsets, op.Concat(behind, count, axis=0)
    place = op.Unsqueeze(op.Range(op.Constant(value_int=0), op.Squeeze(count), op.Constant(value_int=1)), first)
    inside = op.And(op.GreaterOrEqual(place, op.Unsqueeze(begin, _one())), op.Less(place, op.Unsqueeze(end, _one())))
    if padding_idx is not None:
        left_out = op.Constant(value_ints=[padding_idx])
        if padding_idx < 0:
            left_out = op.Add(op.Shape(weight, start=0, end=1), left_out)
        counts = op.Not(op.Equal(indices, left_out))
        inside = op.And(inside, op.Unsqueeze(counts, first))
    held = op.CastLike(inside, weight)
    sizes = op.ReduceSum(held, _one(), keepdims=1)
    if mode == 2:
        lowest = op.CastLike(op.Constant(value_float=float("-inf")), weight)
        chosen = op.Where(op.Unsqueeze(inside, op.Constant(value_ints=[2])), op.Unsqueeze(rows, first), lowest)
        largest = op.ReduceMax(chosen, _one(), keepdims=0)
        zero = op.CastLike(op.Constant(value_float=0.0), weight)
        found = op.Where(op.Equal(sizes, zero), zero, largest)
    else:
        found = op.MatMul(held, rows)
        if mode == 1:
            found = op.Div(found, op.Max(sizes, op.CastLike(op.Constant(value_float=1.0), weight)))
    return found, indices, op.Cast(op.Squeeze(sizes, _one()), to=7), offsets


def _one() -> Value:
    return op.Constant(value_ints=[1])


aten = torch.ops.aten
TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    aten.amax.default: amax,
    aten.amin.default: amin,
    aten.prod.default: prod,
    aten.fmax.default: fmax,
    aten.fmin.default: fmin,
    aten.hypot.default: hypot,
    aten.median.default: median,
    aten.median.dim: median_dim,
    aten.kthvalue.default: kthvalue,
    aten.embedding_bag.default: embedding_bag,
    aten.embedding_bag.padding_idx: embedding_bag,
}
"""torch's operator -> what writes it."""
