"""What is learned: the protocol of a variable, an activation's step size, and a tensor that stays in float.

A variable holds a few torch parameters, each of a kind ("weight", "scale", "bias", "act_scale", ...) that has its own
learning rate. Weights on a grid are variables too: `qpipe.numerics.learning.roundings`.

    step      s = s0 exp(u), u = 0 at the start; its gradient times 1 / sqrt(n qmax), n the features of a sample
    free      b = b0 + unit p, p = 0 at the start

Source: the factor of the step's gradient: Esser et al., "Learned Step Size Quantization", arXiv 1902.08153.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from qpipe.numerics.grid import SMALLEST_SCALE, Encoding
from qpipe.numerics.learning.cells import powers_of_two

Snapshot = dict[str, list[Tensor]]
"""The parameters of a variable as they were, by kind."""


class Variable(Protocol):
    """One tensor of the network that is learned. At the start it is, bit for bit, what it was before."""

    def value(self) -> Tensor:
        """What the network computes with while learning, differentiable in the parameters."""
        ...

    def hard(self) -> Tensor:
        """What the network would compute with if learning ended here; no gradient."""
        ...

    def final(self) -> tuple[Tensor, Encoding | None]:
        """The tensor for good, float32, and its encoding; a weight is a fixed point of the encoding's quantizer."""
        ...

    def parameters(self) -> Mapping[str, list[Tensor]]:
        """The torch parameters by kind."""
        ...

    def penalty(self, beta: float) -> Tensor | None:
        """The term that drives undecided roundings to either side, before its weight; None where there is none."""
        ...

    def bound(self) -> None:
        """Brings the parameters back between their bounds, after each step."""
        ...

    def changed(self) -> tuple[int, int]:
        """How many codes differ from the start, of how many; (0, 0) where there are no codes."""
        ...


def snapshot(variable: Variable) -> Snapshot:
    """The parameters of `variable` as they are now, copied."""
    return {kind: [p.detach().clone() for p in held] for kind, held in variable.parameters().items()}


def restore(variable: Variable, taken: Snapshot) -> None:
    """Puts the parameters of `variable` back to what they were when `taken`."""
    with torch.no_grad():
        for kind, held in variable.parameters().items():
            for parameter, before in zip(held, taken[kind], strict=True):
                parameter.copy_(before)


class Step:
    """The step size of an activation's quantizer; its zero point stays.

    `features` is the number of elements of one sample that share a scale. Raises ValueError for scales that are all
    powers of two, which a target asks for and learning would leave.
    """

    def __init__(self, encoding: Encoding, features: int = 1, device: str | torch.device = "cpu") -> None:
        refuse_powers_of_two(encoding)
        self.encoding = encoding
        self.start = torch.tensor(encoding.scale, device=device)
        self.u = torch.zeros_like(self.start).requires_grad_()
        self.gradient_scale = 1.0 / math.sqrt(max(1, features) * max(1, encoding.qmax))

    def value(self) -> Tensor:
        """The scales, of the encoding's shape."""
        return self.start * torch.exp(scaled_gradient(self.u, self.gradient_scale))

    def hard(self) -> Tensor:
        """The same, without a gradient."""
        return (self.start * torch.exp(self.u.detach())).clamp_(min=SMALLEST_SCALE)

    def final(self) -> tuple[Tensor, Encoding]:
        """The scales and the encoding that has them."""
        scale = self.hard()
        return scale, replace(self.encoding, scale=scale.cpu().numpy())

    def parameters(self) -> dict[str, list[Tensor]]:
        """u, of kind act_scale."""
        return {"act_scale": [self.u]}

    def penalty(self, beta: float) -> None:
        """None."""

    def bound(self) -> None:
        """Nothing: exp keeps the scale positive."""

    def changed(self) -> tuple[int, int]:
        """(0, 0)."""
        return 0, 0


class Free:
    """A tensor without a grid: a bias, a normalization's weight. A rate r moves it by about r * unit a step."""

    def __init__(self, start: Tensor, kind: str = "bias", unit: Tensor | float = 1.0) -> None:
        self.start, self.kind, self.unit = start.detach(), kind, unit
        self.p = torch.zeros_like(self.start).requires_grad_()

    def value(self) -> Tensor:
        """b."""
        return self.start + self.p * self.unit

    def hard(self) -> Tensor:
        """b, without a gradient."""
        return self.value().detach()

    def final(self) -> tuple[Tensor, None]:
        """b in float32, and no encoding."""
        return self.hard().float(), None

    def parameters(self) -> dict[str, list[Tensor]]:
        """p, of the kind that was given."""
        return {self.kind: [self.p]}

    def penalty(self, beta: float) -> None:
        """None."""

    def bound(self) -> None:
        """Nothing."""

    def changed(self) -> tuple[int, int]:
        """(0, 0)."""
        return 0, 0


def scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """`x`, whose gradient is multiplied by `factor`."""
    scaled = x * factor
    return scaled + (x - scaled).detach()


def refuse_powers_of_two(encoding: Encoding) -> None:
    """Raises ValueError where every scale is a power of two."""
    if powers_of_two(encoding):
        raise ValueError("scales that are powers of two are not learned: they would leave their grid.")
