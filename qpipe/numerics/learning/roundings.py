"""Weights learned on their grids. Each way begins at the codes that a weight has, and nothing moves until a step does.

With c the codes at the start, counted from the zero point, and v = clip(W / s, c - margin, c + margin):

    ste_weight     w^ = s (c + round(d)),  d = v - c                                   straight through the rounding

where s = s0 exp(u) if scales are learned. Codes may move many steps, but never leave the range: after each step d is
brought back. A parameter is counted in steps of the grid, so that a learning rate is a share of a step; or in the
weight's own units (`relative` False), as the toolkits count it.

Source: Hubara et al., "Accurate Post Training Quantization With Small Calibration Sets" (AdaQuant), arXiv 2006.10518.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from qpipe.numerics.grid import Encoding
from qpipe.numerics.learning.cells import Cells
from qpipe.numerics.learning.variables import Variable, refuse_powers_of_two

RoundingName = Literal["ste_weight"]
EDGE = 0.49
"""How far beyond the last code a weight may stand: still rounded to that code, and one step away from leaving it."""


def start(
    rounding: RoundingName,
    weight: Tensor,
    current: Tensor,
    encoding: Encoding,
    *,
    learn_scale: bool = False,
    margin: float = 0.45,
    relative: bool = True,
) -> Variable:
    """A variable that is `current` on the grid of `encoding`, and knows by `weight`, in float, which codes are near.

    `current` may be the float weight, which is then rounded to nearest, or lie on the grid. `margin` is how much of the
    float weight counts, in steps: 0 begins in the middle of each code. Raises ValueError for an unknown `rounding`,
    more than 16 bits, a weight of another shape, and scales to be learned that are all powers of two.
    """
    if weight.shape != current.shape:
        raise ValueError(f"the weight has shape {tuple(weight.shape)}, what it is now {tuple(current.shape)}.")
    if learn_scale:
        refuse_powers_of_two(encoding)
    if rounding not in ROUNDINGS:
        raise ValueError(f"there is no rounding '{rounding}'; there are {', '.join(ROUNDINGS)}.")
    cells = Cells(encoding, weight)
    return ROUNDINGS[rounding](
        cells, weight, cells.codes(current), learn_scale=learn_scale, margin=margin, relative=relative
    )


class SteWeight:
    """Straight-through: the weight itself moves, its codes follow."""

    def __init__(
        self, cells: Cells, weight: Tensor, codes: Tensor, *, learn_scale: bool, margin: float, relative: bool
    ) -> None:
        self.cells, self.codes = cells, codes
        self.unit = None if relative else cells.step
        offset = (cells.steps(weight) - codes).clamp_(-margin, margin)
        self.d = self._counted(offset).requires_grad_()
        self._bounds = tuple(
            self._counted(end) for end in (cells.low - codes - EDGE, cells.high - codes + EDGE)
        )
        self.u = torch.zeros_like(cells.scale).requires_grad_(learn_scale)

    def _counted(self, steps: Tensor) -> Tensor:
        return steps if self.unit is None else steps * self.unit

    def _steps(self) -> Tensor:
        return self.d if self.unit is None else self.d / self.unit

    def _scale(self) -> Tensor:
        return self.cells.scale * torch.exp(self.u)

    def value(self) -> Tensor:
        """w^."""
        step = self.cells.spread(self._scale()) if self.u.requires_grad else self.cells.step
        found: Tensor = _Codes.apply(self._steps(), self.codes, step)  # type: ignore[no-untyped-call]  # torch's
        return found

    def hard(self) -> Tensor:
        """The same, without a gradient."""
        return self.value().detach()

    def final(self) -> tuple[Tensor, Encoding]:
        """w^ and its encoding."""
        codes = self.codes + self._steps().detach().round()
        return self.cells.final(codes, self._scale() if self.u.requires_grad else None)

    def parameters(self) -> dict[str, list[Tensor]]:
        """d, of kind weight; u, of kind scale, where scales are learned."""
        return {"weight": [self.d], **({"scale": [self.u]} if self.u.requires_grad else {})}

    def penalty(self, beta: float) -> None:
        """None."""

    def bound(self) -> None:
        """No code leaves the range."""
        with torch.no_grad():
            torch.clamp(self.d, *self._bounds, out=self.d)

    def changed(self) -> tuple[int, int]:
        """Codes that moved, of all."""
        return int(self._steps().detach().round().count_nonzero()), self.d.numel()


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


ROUNDINGS = {"ste_weight": SteWeight}
