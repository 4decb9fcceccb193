"""Weights learned on their grids. Each way begins at the codes that a weight has, and nothing moves until a step does.

With c the codes at the start, counted from the zero point, and v = clip(W / s0, c - margin, c + margin):

    ste_weight           w^ = s (c + round(d))       d = v - c at the start; straight through the rounding
    signed_step          the same, but d moves by half a step at most, so that a code moves by one
    rectified_sigmoid    w^ = s (b + h(V))           h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1); b and b + 1 are the codes
                         on both sides of v, one of them c; for good h is 0 or 1, whichever is nearer
    flexround            w^ = s clip(round(v s0 / s exp(-(s2 + s3 + s4))))      s2 of W's shape, s3 one a scale or
                         an output channel, s4 one an input channel; all 0 at the start

where s = s0 exp(u) if scales are learned; flexround's is s0 (exp(g) qmax - exp(b) qmin) / (qmax - qmin), codes counted
from the zero point, which stays. Codes never leave the range: after each step d is brought back, and a weight beyond
the range has both codes inside. A parameter is counted in steps of the grid, so that a rate is a share of a step; or,
for d, in the weight's own units (`relative` False), as the toolkits count it.

Source: Hubara et al., "Accurate Post Training Quantization With Small Calibration Sets" (AdaQuant), arXiv 2006.10518;
Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent", arXiv 2309.05516; Nagel et al., "Up or Down?",
arXiv 2004.10568; Lee et al., "FlexRound", arXiv 2306.00317, with the range of Shao et al., "OmniQuant", 2308.13137.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from qpipe.numerics.grid import Encoding
from qpipe.numerics.learning.cells import Cells
from qpipe.numerics.learning.variables import Variable, refuse_powers_of_two

RoundingName = Literal["ste_weight", "signed_step", "rectified_sigmoid", "flexround"]
ROUNDINGS: tuple[RoundingName, ...] = ("ste_weight", "signed_step", "rectified_sigmoid", "flexround")
EDGE = 0.49
"""How far beyond the last code a weight may stand: still rounded to that code, and one step away from leaving it."""
STRETCH = (-0.1, 1.1)
"""Where the sigmoid is stretched to before it is clipped, so that 0 and 1 are reached."""
TINY = 1e-5
"""How far from 0 and 1 every h begins, so that each has a gradient: in the clipped part it has none."""


def start(
    rounding: RoundingName,
    weight: Tensor,
    current: Tensor,
    encoding: Encoding,
    *,
    learn_scale: bool = False,
    margin: float = 0.45,
    relative: bool = True,
    out_axis: int | None = None,
    in_axis: int | None = None,
) -> Variable:
    """A variable that is `current` on the grid of `encoding`, and knows by `weight`, in float, which codes are near.

    `current` may be the float weight, which is then rounded to nearest, or lie on the grid. `margin` is how much of the
    float weight counts, in steps, below 0.5: 0 begins in the middle of each code. `out_axis` and `in_axis` give
    flexround a factor for each index along these axes; without `out_axis`, one for each scale. Raises ValueError for an
    unknown `rounding`, more than 16 bits, a weight of another shape, and scales to be learned that are powers of two.
    """
    if weight.shape != current.shape:
        raise ValueError(f"the weight has shape {tuple(weight.shape)}, what it is now {tuple(current.shape)}.")
    if not 0.0 <= margin < 0.5:
        raise ValueError(f"margin must be at least 0 and below 0.5, got {margin}.")
    if learn_scale:
        refuse_powers_of_two(encoding)
    cells = Cells(encoding, weight)
    codes, steps = cells.codes(current), cells.steps(weight)
    if rounding in ("ste_weight", "signed_step"):
        offset = (steps - codes).clamp_(-margin, margin)
        reach = 0.5 if rounding == "signed_step" else None
        return SteWeight(cells, codes, offset, Exponential(cells, learn_scale), None if relative else cells.step, reach)
    if rounding == "rectified_sigmoid":
        return RectifiedSigmoid(cells, codes, steps, Exponential(cells, learn_scale))
    if rounding == "flexround":
        near = codes + (steps - codes).clamp_(-margin, margin)
        return FlexRound(cells, codes, near, Range(cells, learn_scale), out_axis, in_axis)
    raise ValueError(f"there is no rounding '{rounding}'; there are {', '.join(ROUNDINGS)}.")


class Exponential:
    """The scales of a grid times exp(u), u = 0 at the start; as they are where they are not `learned`."""

    def __init__(self, cells: Cells, learned: bool) -> None:
        self.cells = cells
        self.free = [torch.zeros_like(cells.scale).requires_grad_()] if learned else []

    def factor(self) -> Tensor:
        """What the scales are multiplied by, of their shape."""
        return torch.exp(self.free[0])

    def step(self) -> Tensor:
        """The scales, in a shape that broadcasts against the weight."""
        return self.cells.spread(self.cells.scale * self.factor()) if self.free else self.cells.step

    def final(self, codes: Tensor) -> tuple[Tensor, Encoding]:
        """The weight that has these codes, and its encoding."""
        learned = any(bool(u.detach().count_nonzero()) for u in self.free)
        return self.cells.final(codes, self.cells.scale * self.factor() if learned else None)


class Range(Exponential):
    """Both ends of the range learned: the largest code's value times exp(g), the smallest one's times exp(b)."""

    def __init__(self, cells: Cells, learned: bool) -> None:
        super().__init__(cells, learned)
        zero_point = torch.tensor(cells.encoding.zero_point, device=cells.scale.device).to(cells.scale.dtype)
        self.low, self.high = cells.encoding.qmin - zero_point, cells.encoding.qmax - zero_point
        self.free = [torch.zeros_like(cells.scale).requires_grad_() for _ in range(2 if learned else 0)]

    def factor(self) -> Tensor:
        """What the scales are multiplied by, of their shape."""
        g, b = self.free
        return (g.exp() * self.high - b.exp() * self.low) / (self.high - self.low)


class SteWeight:
    """Straight-through: the weight itself moves, its codes follow; within `reach` steps of where it began, if given."""

    def __init__(
        self, cells: Cells, codes: Tensor, offset: Tensor, scale: Exponential, unit: Tensor | None, reach: float | None
    ) -> None:
        self.codes, self.scale, self.unit = codes, scale, unit
        low, high = cells.low - codes - EDGE, cells.high - codes + EDGE
        if reach is not None:
            low, high = torch.maximum(low, offset - reach), torch.minimum(high, offset + reach)
        self.d, self._low, self._high = (v if unit is None else v * unit for v in (offset, low, high))
        self.d = self.d.contiguous().requires_grad_()

    def _steps(self) -> Tensor:
        return self.d if self.unit is None else self.d / self.unit

    def value(self) -> Tensor:
        """w^."""
        found: Tensor = _Codes.apply(self._steps(), self.codes, self.scale.step())  # type: ignore[no-untyped-call]  # torch's
        return found

    def hard(self) -> Tensor:
        """The same, without a gradient."""
        return self.value().detach()

    def final(self) -> tuple[Tensor, Encoding]:
        """w^ and its encoding."""
        return self.scale.final(self.codes + self._steps().detach().round())

    def parameters(self) -> dict[str, list[Tensor]]:
        """d, of kind weight; u, of kind scale, where scales are learned."""
        return _kinds([self.d], self.scale)

    def penalty(self, beta: float) -> None:
        """None."""

    def bound(self) -> None:
        """No code leaves the range, nor the reach."""
        with torch.no_grad():
            torch.clamp(self.d, self._low, self._high, out=self.d)

    def changed(self) -> tuple[int, int]:
        """Codes that moved, of all."""
        return int(self._steps().detach().round().count_nonzero()), self.d.numel()


class RectifiedSigmoid:
    """AdaRound's choice between the two codes around a weight."""

    def __init__(self, cells: Cells, codes: Tensor, steps: Tensor, scale: Exponential) -> None:
        self.codes, self.scale = codes, scale
        self.base = torch.where(steps < codes, codes - 1.0, codes)
        self.base = torch.clamp(self.base, cells.low, cells.high - 1.0)
        up = codes > self.base
        fraction = (steps - self.base).clamp_(TINY, 1.0 - TINY)
        v = start_of(_agreeing(fraction, up))
        self.v = torch.where(up, v.clamp(min=0.0), v.clamp(max=-1e-6)).requires_grad_()
        self._known: tuple[int, Tensor] | None = None

    def _sigmoid(self) -> Tensor:
        """sigmoid(V) as it is now: asked for by the value and by the penalty."""
        if self._known is None or self._known[0] != self.v._version:
            self._known = self.v._version, torch.sigmoid(self.v.detach())
        return self._known[1]

    def value(self) -> Tensor:
        """w^ with roundings undecided."""
        found: Tensor = _Sigmoid.apply(self.v, self._sigmoid(), self.base, self.scale.step())  # type: ignore[no-untyped-call]  # torch's
        return found

    def _hard(self) -> Tensor:
        return self.base + (self.v.detach() >= 0.0)

    def hard(self) -> Tensor:
        """w^ with each rounded to one side."""
        return self._hard() * self.scale.step().detach()

    def final(self) -> tuple[Tensor, Encoding]:
        """The same, and its encoding."""
        return self.scale.final(self._hard())

    def parameters(self) -> dict[str, list[Tensor]]:
        """V, of kind weight; u, of kind scale, where scales are learned."""
        return _kinds([self.v], self.scale)

    def penalty(self, beta: float) -> Tensor:
        """sum(1 - |2 h(V) - 1|^beta)."""
        found: Tensor = _Penalty.apply(self.v, self._sigmoid(), beta)  # type: ignore[no-untyped-call]  # torch's
        return found

    def bound(self) -> None:
        """Nothing to bring back: both codes lie in the range."""
        self._known = None  # a fused step leaves the version as it was

    def changed(self) -> tuple[int, int]:
        """Codes that moved, of all."""
        return int((self._hard() != self.codes).sum()), self.v.numel()


class FlexRound:
    """A weight divided by learned factors before it is rounded, so that large weights move further than small ones."""

    def __init__(
        self, cells: Cells, codes: Tensor, near: Tensor, scale: Range, out_axis: int | None, in_axis: int | None
    ) -> None:
        self.cells, self.codes, self.near, self.scale = cells, codes, near, scale
        along = [[n if i == axis else 1 for i, n in enumerate(cells.shape)] for axis in (out_axis, in_axis)]
        rows = cells.scale.shape if out_axis is None else along[0]
        self._by_scale = out_axis is None
        shapes = [cells.shape, rows, *([along[1]] if in_axis is not None else [])]
        self.factors = [torch.zeros(tuple(s), dtype=near.dtype, device=near.device).requires_grad_() for s in shapes]

    def _codes(self) -> Tensor:
        each, rows, *columns = self.factors
        logarithm = each + (self.cells.spread(rows) if self._by_scale else rows)
        for column in columns:
            logarithm = logarithm + column
        steps = self.near * torch.exp(-logarithm)
        if self.scale.free:
            steps = steps / self.cells.spread(self.scale.factor())
        found: Tensor = _Rounded.apply(steps, self.cells.low, self.cells.high)  # type: ignore[no-untyped-call]  # torch's
        return found

    def value(self) -> Tensor:
        """w^."""
        return self._codes() * self.scale.step()

    def hard(self) -> Tensor:
        """The same, without a gradient."""
        return self.value().detach()

    def final(self) -> tuple[Tensor, Encoding]:
        """w^ and its encoding."""
        return self.scale.final(self._codes())

    def parameters(self) -> dict[str, list[Tensor]]:
        """s2, s3, s4, of kind weight; g and b, of kind scale, where scales are learned."""
        return _kinds(self.factors, self.scale)

    def penalty(self, beta: float) -> None:
        """None."""

    def bound(self) -> None:
        """Nothing: codes are clipped."""

    def changed(self) -> tuple[int, int]:
        """Codes that moved, of all."""
        return int((self._codes().detach() != self.codes).sum()), self.codes.numel()


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)."""
    return _stretched(torch.sigmoid(v))


def start_of(fraction: Tensor) -> Tensor:
    """The V for which h(V) is `fraction`, in 0..1."""
    low, high = STRETCH
    return -torch.log((high - low) / (fraction - low) - 1.0)


def rounding_penalty(v: Tensor, beta: float) -> Tensor:
    """sum(1 - |2 h(V) - 1|^beta): 0 where every h is 0 or 1."""
    found: Tensor = _Penalty.apply(v, torch.sigmoid(v.detach()), beta)  # type: ignore[no-untyped-call]  # torch's
    return found


def _agreeing(fraction: Tensor, up: Tensor) -> Tensor:
    """`fraction` on the side it was rounded to. What a solver rounded the other way begins near the middle."""
    agrees = (fraction >= 0.5) == up
    return torch.where(agrees, fraction, torch.where(up, 0.55, 0.45).to(fraction.dtype))


def _kinds(weight: list[Tensor], scale: Exponential) -> dict[str, list[Tensor]]:
    return {"weight": weight, **({"scale": scale.free} if scale.free else {})}


class _Codes(torch.autograd.Function):
    """(c + round(d)) s, straight through the rounding."""

    @staticmethod
    def forward(ctx: Any, d: Tensor, codes: Tensor, step: Tensor) -> Tensor:
        codes = d.round().add_(codes)
        ctx.save_for_backward(codes, step)
        return codes * step

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        codes, step = ctx.saved_tensors
        d = grads[0] * step if ctx.needs_input_grad[0] else None
        s = (grads[0] * codes).sum_to_size(step.shape) if ctx.needs_input_grad[2] else None
        return d, None, s


class _Sigmoid(torch.autograd.Function):
    """(b + h(V)) s. A dozen passes over the weight through torch's own derivatives, here three."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, sigmoid: Tensor, base: Tensor, step: Tensor) -> Tensor:
        steps = _stretched(sigmoid).add_(base)
        ctx.save_for_backward(v, sigmoid, steps if ctx.needs_input_grad[3] else None, step)
        return steps * step

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
        v, sigmoid, steps, step = ctx.saved_tensors
        slope = _through_sigmoid(grads[0] * step, v, sigmoid) if ctx.needs_input_grad[0] else None
        return slope, None, None, None if steps is None else (grads[0] * steps).sum_to_size(step.shape)


class _Penalty(torch.autograd.Function):
    """sum(1 - |t|^beta), t = 2 h(V) - 1, with one power for the value and the gradient."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, sigmoid: Tensor, beta: float) -> Tensor:
        t = _stretched(sigmoid).mul_(2.0).sub_(1.0)
        power = t.abs().pow_(beta - 1.0)
        ctx.save_for_backward(v, sigmoid, torch.copysign(power, t))
        ctx.beta = beta
        return t.numel() - torch.dot(power.flatten(), t.abs_().flatten())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        v, sigmoid, power = ctx.saved_tensors
        return _through_sigmoid(power * (-2.0 * ctx.beta * grads[0]), v, sigmoid), None, None


def _stretched(sigmoid: Tensor) -> Tensor:
    low, high = STRETCH
    return (sigmoid * (high - low)).add_(low).clamp_(0.0, 1.0)


def _through_sigmoid(gradient: Tensor, v: Tensor, sigmoid: Tensor) -> Tensor:
    """The gradient in V of what has `gradient` in h(V): 0 where h is clipped."""
    low, high = STRETCH
    end = math.log(high / -low)
    inside: Tensor = torch.ops.aten.hardtanh_backward(gradient, v, -end, end)
    found: Tensor = torch.ops.aten.sigmoid_backward(inside, sigmoid)
    return found.mul_(high - low)


class _Rounded(torch.autograd.Function):
    """clip(round(v), low, high): straight through inside the range, nothing outside."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, low: Tensor, high: Tensor) -> Tensor:
        rounded = v.round()
        ctx.save_for_backward((rounded >= low) & (rounded <= high))
        return torch.clamp(rounded, low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None
