"""Reductions over axes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qpipe.model.operators.registry import Ints, ints, operator

Axes = tuple[int, ...]


def _prod(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    for axis in sorted((a % x.ndim for a in axes), reverse=True):
        x = x.prod(axis, keepdim=keep, dtype=x.dtype)
    return x


def _sum(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    return x.sum(axes, keepdim=keep, dtype=x.dtype)


def _mean(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    return (
        x.mean(axes, keepdim=keep)
        if x.is_floating_point()
        else x.double().mean(axes, keepdim=keep).to(x.dtype)
    )


def _l1(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    return _sum(x.abs(), axes, keep)


def _l2(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    return _sum(x.square(), axes, keep).to(torch.promote_types(x.dtype, torch.float32)).sqrt().to(x.dtype)


def _log_sum(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    return _sum(x, axes, keep).log()


def _log_sum_exp(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    return torch.logsumexp(x, axes, keepdim=keep)


def _sum_square(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    return _sum(x.square(), axes, keep)


def _extreme(x: Tensor, axes: Axes, keep: bool, function: Callable[..., Tensor], empty: float) -> Tensor:
    if x.numel() == 0:
        shape = [1 if i in {a % x.ndim for a in axes} else n for i, n in enumerate(x.shape)]
        if x.dtype == torch.bool:
            empty = empty > 0
        elif not x.is_floating_point():
            empty = torch.iinfo(x.dtype).max if empty > 0 else torch.iinfo(x.dtype).min
        filled = torch.full(shape, empty, dtype=x.dtype, device=x.device)
        return filled if keep else filled.squeeze(axes)
    if x.dtype == torch.bool:
        return function(x.to(torch.uint8), axes, keepdim=keep).to(torch.bool)
    return function(x, axes, keepdim=keep)


def _max(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    return _extreme(x, axes, keep, torch.amax, -torch.inf)


def _min(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    return _extreme(x, axes, keep, torch.amin, torch.inf)


def _enter(name: str, function: Callable[[Tensor, Axes, bool], Tensor]) -> None:
    def reduction(
        x: Tensor, axes: Ints = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
    ) -> Tensor:
        dims = () if axes is None else ints(axes)
        if not dims:
            if noop_with_empty_axes:
                return _pointwise(x, function)
            dims = tuple(range(x.ndim))
        return function(x, dims, bool(keepdims)) if x.ndim else _pointwise(x, function)

    # torch.fx writes a function's name into the code of a module.
    reduction.__name__ = reduction.__qualname__ = f"reduce{function.__name__}"
    reduction.__doc__ = f"ONNX's {name} over `axes`, all without them."
    operator(name, numbers=(1,))(reduction)


def _pointwise(x: Tensor, function: Callable[[Tensor, Axes, bool], Tensor]) -> Tensor:
    """The reduction of each element alone: sums and products are x, norms are |x|, …"""
    return function(x.unsqueeze(-1), (-1,), False)


for _name, _function in {
    "ReduceL1": _l1,
    "ReduceL2": _l2,
    "ReduceLogSum": _log_sum,
    "ReduceLogSumExp": _log_sum_exp,
    "ReduceMax": _max,
    "ReduceMean": _mean,
    "ReduceMin": _min,
    "ReduceProd": _prod,
    "ReduceSum": _sum,
    "ReduceSumSquare": _sum_square,
}.items():
    _enter(_name, _function)


def _arg(x: Tensor, axis: int, keepdims: int, last: int, function: Callable[..., Tensor]) -> Tensor:
    if last:
        x = x.flip(axis)
    found = function(x, axis, keepdim=bool(keepdims))
    return x.shape[axis] - 1 - found if last else found


@operator("ArgMax")
def arg_max(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Where the maximum along `axis` stands, the first or the last one."""
    return _arg(x, axis, keepdims, select_last_index, torch.argmax)


@operator("ArgMin")
def arg_min(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Where the minimum along `axis` stands, the first or the last one."""
    return _arg(x, axis, keepdims, select_last_index, torch.argmin)
