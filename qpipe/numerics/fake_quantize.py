"""Rounding onto a grid in torch, with gradients: the simulation of what `qpipe.numerics.grid` computes.

    y = (clip(round_half_even(x / s) + z, qmin, qmax) - z) * s

bit for bit as numpy's `quantize_dequantize` and onnxruntime. Gradients, u = x / s:

    dy/dx = 1 inside the range, 0 where clipped                                   (straight through)
    dy/ds = round(u) - u inside; qmin - z or qmax - z where clipped               (learned step size)
    dy/dz = 0 inside; -s where clipped

torch's own fake_quantize_per_tensor_affine multiplies by 1/s, which flips codes at ties, and was measured
five times slower on a CPU, forward and backward; it is not used. On a CUDA device a scale stays a tensor:
there torch divides by a Python number through its reciprocal.

Source: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons", arXiv 1308.3432;
Esser et al., "Learned Step Size Quantization", arXiv 1902.08153.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from qpipe.numerics.grid import Encoding


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    block_size: int | None = None,
) -> Tensor:
    """`x` rounded onto the grid, of x's shape, differentiable in `x`, `scale` and `zero_point`.

    `scale` and `zero_point` have shape () per tensor, (C,) per channel along `axis`, and the shape of `x` with `axis`
    counted in blocks per block. A floating-point `zero_point` is rounded first, straight through. The gradient of
    the scale is the plain one; LSQ's factor 1 / sqrt(n * qmax) is left to the learning rate.
    """
    learned = torch.is_grad_enabled() and (scale.requires_grad or zero_point.requires_grad)
    if axis is None and not learned and not x.is_cuda:
        return _constant(x, float(scale), round(float(zero_point)), qmin, qmax)
    s, z = _broadcast(scale, x, axis, block_size), _broadcast(zero_point, x, axis, block_size)
    rounded: Tensor = _Rounded.apply(x, s, z, qmin, qmax)  # type: ignore[no-untyped-call]  # torch's
    return rounded


class FakeQuantize(torch.nn.Module):
    """The quantizer of one tensor. `enabled = False` lets the tensor through untouched.

    Buffers `scale` (float32) and `zero_point` (int32); change the grid by `set_encoding` only, since
    constants are kept as Python numbers beside them for speed. After `learn_scale` the scale (and zero
    point) are parameters.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, e: Encoding) -> None:
        super().__init__()
        self.register_buffer("scale", torch.zeros(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))
        self.enabled = True
        self.register_load_state_dict_post_hook(_keep_constants)  # type: ignore[no-untyped-call]  # torch's
        self.set_encoding(e)

    @classmethod
    def from_encoding(cls, e: Encoding) -> FakeQuantize:
        """The quantizer that rounds onto the grid of `e`."""
        return cls(e)

    def set_encoding(self, e: Encoding) -> None:
        """Takes over the grid of `e`; learned scales become constants again."""
        device = self.scale.device
        self._parameters.clear()
        self._buffers["scale"] = torch.tensor(e.scale, device=device)
        self._buffers["zero_point"] = torch.tensor(e.zero_point, device=device)
        self.bitwidth, self.signed, self.symmetric, self.frozen = e.bitwidth, e.signed, e.symmetric, e.frozen
        self.qmin, self.qmax, self.free_sign = e.qmin, e.qmax, e.free_sign
        self.axis, self.block_size = e.axis, e.block_size
        _keep_constants(self)

    def learn_scale(self, zero_point: bool = False) -> list[torch.nn.Parameter]:
        """Makes the scale, and where asked the zero point, parameters, and returns them."""
        names = ["scale", "zero_point"] if zero_point else ["scale"]
        for name in names:
            value = getattr(self, name).detach().to(torch.float32).clone()
            self._buffers.pop(name, None)
            self.register_parameter(name, torch.nn.Parameter(value))
        return [self._parameters[name] for name in names]  # type: ignore[misc]  # set just above

    @property
    def encoding(self) -> Encoding:
        """The grid as it is now, learned scales included: kept positive, zero points rounded and in range."""
        tiny = float(np.finfo(np.float32).tiny)
        scale = self.scale.detach().abs().clamp(min=tiny).cpu().numpy()
        zero_point = (
            self.zero_point.detach().round().clamp(self.qmin, self.qmax).to(torch.int32).cpu().numpy()
        )
        return Encoding(
            self.bitwidth,
            self.signed,
            self.symmetric,
            scale,
            zero_point,
            self.axis,
            self.block_size,
            self.frozen,
            self.free_sign,
        )

    def forward(self, x: Tensor) -> Tensor:
        """`x` rounded onto the grid, of x's shape."""
        if not self.enabled:
            return x
        if self._constants is not None and not self._parameters and not x.is_cuda:
            return _constant(x, *self._constants, self.qmin, self.qmax)
        return fake_quantize(x, self.scale, self.zero_point, self.qmin, self.qmax, self.axis, self.block_size)

    def extra_repr(self) -> str:
        """bitwidth, sign and granularity, for print."""
        sign = "int" if self.signed else "uint"
        return f"{sign}{self.bitwidth}, axis={self.axis}, block_size={self.block_size}"

    _constants: tuple[float, int] | None = None


def _keep_constants(module: torch.nn.Module, incompatible_keys: Any = None) -> None:
    assert isinstance(module, FakeQuantize)
    per_tensor = module.axis is None
    module._constants = (float(module.scale), int(module.zero_point)) if per_tensor else None


def _broadcast(value: Tensor, x: Tensor, axis: int | None, block_size: int | None) -> Tensor:
    if axis is None:
        return value
    if block_size is None:
        return value.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    return value.repeat_interleave(block_size, dim=axis).narrow(axis, 0, x.shape[axis])


def _constant(x: Tensor, scale: float, zero_point: int, qmin: int, qmax: int) -> Tensor:
    if x.requires_grad and torch.is_grad_enabled():
        result: Tensor = _ConstantGrid.apply(x, scale, zero_point, qmin, qmax)  # type: ignore[no-untyped-call]  # torch's
        return result
    return _onto_grid(x, scale, zero_point, qmin, qmax)


def _onto_grid(x: Tensor, scale: float, zero_point: int, qmin: int, qmax: int) -> Tensor:
    steps = torch.div(x, scale).round_().clamp_(qmin - zero_point, qmax - zero_point)
    # 0 + scale * steps in one pass: the same product, and -0 becomes the +0 that integer codes give.
    return torch.add(torch.zeros((), dtype=x.dtype, device=x.device), steps, alpha=scale, out=steps)


class _ConstantGrid(torch.autograd.Function):
    """Per tensor with constants: saves x alone, which its producer keeps anyway, and no mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, zero_point: int, qmin: int, qmax: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = (qmin - zero_point - 0.5) * scale, (qmax - zero_point + 0.5) * scale
        return _onto_grid(x, scale, zero_point, qmin, qmax)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grads[0], x, *ctx.bounds), None, None, None, None


class _Rounded(torch.autograd.Function):
    """Any granularity: s and z broadcast against x; gradients for those of the three that ask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor, z: Tensor, qmin: int, qmax: int) -> Tensor:
        z = z.round() if z.is_floating_point() else z
        ctx.save_for_backward(x, s, z)
        ctx.codes = qmin, qmax
        return torch.div(x, s).round_().clamp_(qmin - z, qmax - z).mul_(s).add_(0.0)  # no -0

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, s, z = ctx.saved_tensors
        (qmin, qmax), grad = ctx.codes, grads[0]
        if not ctx.needs_input_grad[1] and not ctx.needs_input_grad[2]:
            inside = (x > (qmin - z - 0.5) * s) & (x < (qmax - z + 0.5) * s)
            return grads[0] * inside, None, None, None, None
        u = x / s
        rounded = u.round()
        low, high = rounded < qmin - z, rounded > qmax - z
        inside = ~(low | high)
        dx = grad * inside if ctx.needs_input_grad[0] else None
        ds = dz = None
        if ctx.needs_input_grad[1]:
            step = torch.where(inside, rounded - u, torch.where(low, qmin - z, qmax - z).to(u.dtype))
            ds = (grad * step).sum_to_size(s.shape)
        if ctx.needs_input_grad[2]:
            dz = (grad * -s * ~inside).sum_to_size(z.shape)
        return dx, ds, dz, None, None
