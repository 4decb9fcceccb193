"""What is learned: the protocol of a variable, an activation's step size, and a tensor that stays in float.

A variable holds a few torch parameters, each of a kind ("weight", "scale", "bias", "act_scale", ...) that has its own
learning rate. Weights on a grid are variables too: `qpipe.numerics.learning.roundings`.

    step      s = s0 exp(u), u = 0 at the start; its gradient times 1 / sqrt(n qmax), n the features of a sample
    ends      a = a0 + p (b0 - a0), b = b0 + q (b0 - a0), a <= 0 <= b; s = (b - a) / (qmax - qmin), z = qmin - a / s,
              rounded, straight through; p = q = 0 at the start
    free      b = b0 + unit p, p = 0 at the start

Source: the factor of the step's gradient: Esser et al., "Learned Step Size Quantization", arXiv 1902.08153; the
gradient of a zero point: Bhalgat et al., "LSQ+", arXiv 2004.09576; both ends of a range: AIMET's range learning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import numpy as np
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


class Ends:
    """Both ends of the range of an activation's quantizer, from which its scale and zero point follow; 0 stays inside.

    Raises ValueError for scales that are all powers of two, and for a symmetric grid, whose zero point is not free.
    """

    def __init__(self, encoding: Encoding, device: str | torch.device = "cpu") -> None:
        refuse_powers_of_two(encoding)
        if encoding.symmetric:
            raise ValueError("the zero point of a symmetric grid stays: its step size alone can be learned.")
        self.encoding, self.span = encoding, encoding.qmax - encoding.qmin
        self.start = torch.tensor(encoding.scale, device=device)
        self.low = encoding.qmin - torch.tensor(encoding.zero_point, device=device).to(self.start.dtype)
        self.p, self.q = (torch.zeros_like(self.start).requires_grad_() for _ in range(2))

    def value(self) -> Tensor:
        """(2, *shape of the scales): the scales, and the zero points before they are rounded."""
        factor = 1.0 + (self.q - self.p)
        zero_point = self.encoding.qmin - (self.low + self.span * self.p) / factor
        return torch.stack([self.start * factor, zero_point])

    def hard(self) -> Tensor:
        """The same, rounded and without a gradient."""
        scale, zero_point = self.value().detach()
        return torch.stack([scale.clamp(min=SMALLEST_SCALE), zero_point.round()])

    def final(self) -> tuple[Tensor, Encoding]:
        """The same, and the encoding that has them."""
        scale, zero_point = found = self.hard()
        kept = {"scale": scale.cpu().numpy(), "zero_point": zero_point.cpu().numpy().astype(np.int32)}
        return found, replace(self.encoding, **kept)

    def parameters(self) -> dict[str, list[Tensor]]:
        """p and q, of kind act_scale."""
        return {"act_scale": [self.p, self.q]}

    def penalty(self, beta: float) -> None:
        """None."""

    def bound(self) -> None:
        """0 stays between the ends, and these a hundredth of the first range apart."""
        with torch.no_grad():
            torch.minimum(self.p, -self.low / self.span, out=self.p)
            torch.maximum(self.q, -1.0 - self.low / self.span, out=self.q)
            torch.maximum(self.q, self.p - 0.99, out=self.q)

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
