"""Normalizations, as inference computes them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from qpipe.errors import InputError
from qpipe.model.operators.registry import operator


@operator("BatchNormalization")
def batch_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> Tensor:
    """scale (x - mean) / sqrt(var + epsilon) + bias per channel, with the stored statistics."""
    if training_mode:
        raise InputError(
            "BatchNormalization in training mode cannot be quantized. Export the model in eval mode."
        )
    return F.batch_norm(x, mean, var, scale, bias, training=False, eps=epsilon)


@operator("InstanceNormalization")
def instance_normalization(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """Each channel of each sample normalized over its spatial dimensions."""
    # torch.nn.functional refuses a single spatial element, which ONNX allows; the function below it does not.
    return torch.instance_norm(x, scale, bias, None, None, True, 0.0, epsilon, False)


@operator("GroupNormalization")
def group_normalization(
    x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """Groups of channels normalized together; scale and bias of shape (C,)."""
    return torch.group_norm(x, num_groups, scale, bias, epsilon)


@operator("LayerNormalization", more="statistics")
def layer_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    statistics: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """x normalized over the dimensions from `axis` on; with `statistics` also mean and 1 / deviation."""
    axis = axis % x.ndim
    shape = x.shape[axis:]
    plain = scale.shape == shape and (bias is None or bias.shape == shape)
    if plain:
        y = F.layer_norm(x, shape, scale, bias, epsilon)
    else:
        y = F.layer_norm(x, shape, None, None, epsilon) * scale
        y = y if bias is None else y + bias
    if not statistics:
        return y
    dims = tuple(range(axis, x.ndim))
    mean = x.mean(dims, keepdim=True)
    variance = (x - mean).square().mean(dims, keepdim=True)
    return y, mean, torch.rsqrt(variance + epsilon)


@operator("MeanVarianceNormalization")
def mean_variance_normalization(x: Tensor, *, axes: tuple[int, ...] = (0, 2, 3)) -> Tensor:
    """(x - mean) / deviation over `axes`."""
    centred = x - x.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True).sqrt() + 1e-9)


@operator("LpNormalization")
def lp_normalization(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    """x divided by its p-norm along `axis`; 0 where that norm is 0."""
    norm = x.abs().sum(axis, keepdim=True) if p == 1 else x.square().sum(axis, keepdim=True).sqrt()
    return torch.where(
        norm == 0, torch.zeros_like(x), x / torch.where(norm == 0, torch.ones_like(norm), norm)
    )


@operator("LRN")
def local_response_normalization(
    x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0
) -> Tensor:
    """x / (bias + alpha / size sum of squares over neighbouring channels) ** beta."""
    before = (size - 1) // 2
    after = math.ceil((size - 1) / 2)
    flat = x.square().reshape(x.shape[0], 1, x.shape[1], -1)
    sums = F.avg_pool2d(F.pad(flat, (0, 0, before, after)), (size, 1), stride=1).reshape(x.shape)
    return x / (bias + alpha * sums) ** beta
