"""Layers as matrices: a convolution, its transpose or a linear layer as y = W x, rows of K inputs per output.

A weight becomes (groups, O / groups, K), the inputs become (groups, rows, K), K = C_in / groups * kernel
elements, and row by row `inputs @ weight^T` are the layer's outputs before the bias:

    Conv            row of output p:  x[c, p * stride - pad + k * dilation]                     0 outside
    ConvTranspose   row of output p:  x[c, (p + pad - k * dilation) / stride] where that is whole, 0 elsewhere
    Gemm, MatMul    the last axis

Not all positions are taken: at most `limit` per sample, one at a random place in each of `limit` equal
stretches. The places depend on the seed and the sample's number alone, so that batches do not matter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Unfold:
    """How one layer's inputs and weight become matrices.

    `pads` are ONNX's: all begins, then all ends. `weight_axis` is the weight's output-channel axis: for
    linear 0 means (O, K), 1 means (K, O); a Conv's is 0 and a ConvTranspose's 1. Tuples default to strides
    and dilations of 1, pads and output_padding of 0. Raises ValueError where they do not fit the kernel.
    """

    kind: Literal["conv", "conv_transpose", "linear"]
    kernel_shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    groups: int = 1
    weight_axis: int = 0

    def __post_init__(self) -> None:
        rank = len(self.kernel_shape)
        if (rank == 0) != (self.kind == "linear"):
            raise ValueError(f"a layer of kind {self.kind} cannot have a kernel of {rank} dimensions.")
        for name, length, default in (
            ("strides", rank, 1),
            ("pads", 2 * rank, 0),
            ("dilations", rank, 1),
            ("output_padding", rank, 0),
        ):
            value = getattr(self, name) or (default,) * length
            if len(value) != length:
                raise ValueError(
                    f"{name} of a kernel with {rank} dimensions has {length} numbers, got {value}."
                )
            object.__setattr__(self, name, tuple(value))
        if self.kind != "linear":
            object.__setattr__(self, "weight_axis", 0 if self.kind == "conv" else 1)

    def weight_rows(self, weight: Tensor) -> Tensor:
        """The weight as (groups, O / groups, K)."""
        if self.kind == "linear":
            return (weight if self.weight_axis == 0 else weight.T).unsqueeze(0)
        if self.kind == "conv":
            return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)
        split = weight.reshape(self.groups, weight.shape[0] // self.groups, weight.shape[1], -1)
        return split.transpose(1, 2).reshape(self.groups, weight.shape[1], -1)

    def weight_from_rows(self, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of `weight_rows`, for a weight of `shape`."""
        if self.kind == "linear":
            return (rows[0] if self.weight_axis == 0 else rows[0].T).reshape(shape)
        if self.kind == "conv":
            return rows.reshape(shape)
        kernel = math.prod(self.kernel_shape)
        split = rows.reshape(self.groups, shape[1], shape[0] // self.groups, kernel)
        return split.transpose(1, 2).reshape(shape)

    def output_shape(self, x_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The positions at which the layer has outputs: spatial sizes, or the axes between first and last."""
        if self.kind == "linear":
            return tuple(x_shape[1:-1])
        rank = len(self.kernel_shape)
        sizes = []
        for i in range(rank):
            reach = self.dilations[i] * (self.kernel_shape[i] - 1) + 1
            pad = self.pads[i] + self.pads[rank + i]
            n = x_shape[2 + i]
            if self.kind == "conv":
                sizes.append((n + pad - reach) // self.strides[i] + 1)
            else:
                sizes.append((n - 1) * self.strides[i] + self.output_padding[i] + reach - pad)
        return tuple(sizes)

    def rows(self, x: Tensor, positions: Array | None = None) -> Tensor:
        """The inputs of outputs as (groups, samples * positions, K), a sample's positions side by side.

        `x` is the layer's input, samples first. `positions`, integers (samples, p), number the outputs of
        `output_shape` in C order, as `sample_positions` draws them; None takes every position.
        """
        outputs = self.output_shape(tuple(x.shape))
        if positions is None:
            positions = np.broadcast_to(np.arange(math.prod(outputs)), (x.shape[0], math.prod(outputs)))
        if self.kind == "linear":
            chosen = torch.tensor(positions, device=x.device)[:, :, None]
            flat = x.reshape(x.shape[0], -1, x.shape[-1])
            return flat.take_along_dim(chosen, 1).reshape(1, -1, x.shape[-1])
        index = torch.tensor(self._sources(positions, outputs, tuple(x.shape[2:])), device=x.device)
        samples, channels, per_row = x.shape[0], x.shape[1], index.shape[-1]
        # One more element, 0, stands behind each channel: where the kernel reaches outside.
        flat = torch.nn.functional.pad(x.reshape(samples, channels, -1), (0, 1))
        index = index.reshape(samples, 1, -1).expand(-1, channels, -1)
        patches = flat.gather(2, index).reshape(samples, self.groups, channels // self.groups, -1, per_row)
        return patches.permute(1, 0, 3, 2, 4).reshape(self.groups, -1, channels // self.groups * per_row)

    def _sources(self, positions: Array, outputs: tuple[int, ...], sizes: tuple[int, ...]) -> Array:
        """For each position the flat input index under each kernel element, (samples, p, kernel elements)."""
        rank = len(sizes)
        total = np.zeros((*positions.shape, 1), np.int64)
        valid = np.ones((*positions.shape, 1), bool)
        for i, place in enumerate(np.unravel_index(positions, outputs)):
            taps = np.arange(self.kernel_shape[i]) * self.dilations[i]
            if self.kind == "conv":
                source = place[..., None] * self.strides[i] - self.pads[i] + taps
                inside = np.ones_like(source, bool)
            else:
                source, rest = np.divmod(place[..., None] + self.pads[i] - taps, self.strides[i])
                inside = rest == 0
            inside &= (source >= 0) & (source < sizes[i])
            stride = math.prod(sizes[i + 1 : rank])
            total = (total[..., :, None] + source[..., None, :] * stride).reshape(*positions.shape, -1)
            valid = (valid[..., :, None] & inside[..., None, :]).reshape(*positions.shape, -1)
        return np.where(valid, total, math.prod(sizes))


def sample_positions(count: int, limit: int, first: int, samples: int, seed: int) -> npt.NDArray[np.int64]:
    """Which of `count` positions to take for samples `first`..: integers (samples, min(limit, count))."""
    taken = min(limit, count)
    if taken == count:
        return np.broadcast_to(np.arange(count), (samples, count))
    sample = (np.arange(samples, dtype=np.uint64) + np.uint64(first))[:, None]
    stretch = np.arange(taken, dtype=np.uint64)[None]
    with np.errstate(over="ignore"):
        counter = (
            np.uint64(seed & (2**64 - 1)) + (sample + np.uint64(1)) * np.uint64(0xD1B54A32D192ED03)
        ) ^ stretch
        uniform = (_mix(_mix(counter)) >> np.uint64(11)).astype(np.float64) / 2.0**53
    start = np.arange(taken) * count // taken
    length = (np.arange(taken) + 1) * count // taken - start
    return start + np.floor(uniform * length).astype(np.int64)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele et al., "Fast Splittable Pseudorandom Number Generators")."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
