"""Second moments of a layer's inputs, collected batch by batch: all that a layerwise objective needs to know.

With x the input of the float model, x^ that of the quantized one and W the float weight, per group:

    mu = E[x]   mu^ = E[x^]   H = Cov(x^)   C = Cov(W (x - x^), x^)   v = Var(W (x - x^))   p = Var(W x)

C, v and p go through W at once: W Cov(x - x^, x^) has the shape of W, not of H, and subtracting before
multiplying loses no digits where x and x^ are close. Rows are shifted by the first batch's mean for the same
reason. Every tenth sample is held out: it enters sums of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qpipe.errors import InputError

HELD_OUT_EVERY = 10
"""One sample of so many is held out, the fifth of each ten, so that five samples already hold one out."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments over `count` rows. Shapes: means (groups, K) float64; `cov` (groups, K, K) float32.

    `cross` (groups, O / groups, K), `drift` and `energy` (groups, O / groups) are C, v and p; `cross` and
    `drift` are None where the float inputs were not given, and then `mean` is `mean_hat`; `energy` is None
    without a weight.
    """

    count: int
    mean: Tensor
    mean_hat: Tensor
    cov: Tensor
    cross: Tensor | None = None
    drift: Tensor | None = None
    energy: Tensor | None = None


class MomentSums:
    """Running sums for `Moments`; float inputs beside quantized ones need `weight`, (groups, O / groups, K)."""

    def __init__(
        self,
        groups: int,
        k: int,
        weight: Tensor | None = None,
        device: str | torch.device = "cpu",
        name: str = "",
    ) -> None:
        self.count, self.name = 0, name
        self.weight = None if weight is None else weight.detach().to(device, torch.float32)
        shape = None if weight is None else tuple(weight.shape[:2])
        self._sums: dict[str, Tensor] = {
            "shift": torch.zeros(groups, k, device=device),
            "shift_hat": torch.zeros(groups, k, device=device),
            "sum": torch.zeros(groups, k, dtype=torch.float64, device=device),
            "sum_hat": torch.zeros(groups, k, dtype=torch.float64, device=device),
            "square": torch.zeros(groups, k, k, device=device),
        }
        if shape is not None:
            self._sums["energy"] = torch.zeros(*shape, dtype=torch.float64, device=device)
            self._sums["drift"] = torch.zeros(*shape, dtype=torch.float64, device=device)
            self._sums["cross"] = torch.zeros(*shape, k, device=device)
        self._asymmetric = False

    def update(self, x_hat: Tensor, x: Tensor | None = None) -> None:
        """Takes in rows (groups, rows, K): the quantized model's inputs, and the float model's at their places."""
        if x is not None and self.weight is None:
            raise ValueError("float inputs beside quantized ones need the layer's weight.")
        if not x_hat.shape[1]:
            return
        with full_float32():
            self._update(x_hat.detach().float(), None if x is None else x.detach().float())

    def _update(self, x_hat: Tensor, x: Tensor | None) -> None:
        s = self._sums
        if self.count == 0:
            self._asymmetric = x is not None
            s["shift_hat"].copy_(x_hat.mean(1))
            s["shift"].copy_(s["shift_hat"] if x is None else x.mean(1))
        elif self._asymmetric != (x is not None):
            raise ValueError("float inputs must come with every batch or with none.")
        self.count += x_hat.shape[1]
        h = x_hat - s["shift_hat"][:, None]
        s["sum_hat"] += h.sum(1, dtype=torch.float64)
        s["square"].baddbmm_(h.transpose(1, 2), h)
        f = h
        if x is not None:
            f = x - s["shift"][:, None]
            s["sum"] += f.sum(1, dtype=torch.float64)
        if self.weight is not None:
            s["energy"] += (f @ self.weight.transpose(1, 2)).square().sum(1, dtype=torch.float64)
        if x is not None and self.weight is not None:
            drift = (f - h) @ self.weight.transpose(1, 2)
            s["drift"] += drift.square().sum(1, dtype=torch.float64)
            s["cross"].baddbmm_(drift.transpose(1, 2), h)

    def moments(self) -> Moments:
        """The moments of all rows so far.

        Raises ValueError when there are none, InputError with the layer's name where an input was not finite.
        """
        if not self.count:
            raise ValueError("there are no rows to take moments of.")
        if not all(bool(torch.isfinite(value).all()) for value in self._sums.values()):
            raise InputError(f"The inputs of layer '{self.name}' hold nan or infinity: it cannot be tuned.")
        s, n = self._sums, self.count
        mean_hat = s["sum_hat"] / n
        mean = s["sum"] / n if self._asymmetric else mean_hat
        cov = s["square"] / n - (mean_hat[:, :, None] * mean_hat[:, None, :]).float()
        energy = drift = cross = None
        if self.weight is not None:
            w = self.weight.double()
            energy = s["energy"] / n - torch.einsum("grk,gk->gr", w, mean).square()
            if self._asymmetric:
                delta = torch.einsum("grk,gk->gr", w, mean - mean_hat)
                drift = s["drift"] / n - delta.square()
                cross = s["cross"] / n - (delta[:, :, None] * mean_hat[:, None, :]).float()
        return Moments(n, mean + s["shift"], mean_hat + s["shift_hat"], cov, cross, drift, energy)


class LayerMoments:
    """The moments of one layer, every tenth sample apart. Takes the rows of whole samples, in their order."""

    def __init__(
        self,
        groups: int,
        k: int,
        weight: Tensor | None = None,
        device: str | torch.device = "cpu",
        name: str = "",
    ) -> None:
        self.samples = 0
        self._fit = MomentSums(groups, k, weight, device, name)
        self._held_out = MomentSums(groups, k, weight, device, name)

    def update(self, x_hat: Tensor, x: Tensor | None = None, samples: int = 1) -> None:
        """Takes in the rows of `samples` samples, (groups, samples * positions, K), as `Unfold.rows` gives."""
        apart = (np.arange(self.samples, self.samples + samples) % HELD_OUT_EVERY) == HELD_OUT_EVERY // 2 - 1
        self.samples += samples
        for sums, chosen in ((self._fit, ~apart), (self._held_out, apart)):
            if chosen.all():
                sums.update(x_hat, x)
            elif chosen.any():
                index = torch.tensor(np.flatnonzero(chosen), device=x_hat.device)
                sums.update(
                    _samples(x_hat, samples, index), None if x is None else _samples(x, samples, index)
                )

    @property
    def fit(self) -> Moments:
        """The moments to solve on."""
        return self._fit.moments()

    @property
    def held_out(self) -> Moments | None:
        """The moments to judge on; None with fewer than five samples."""
        return self._held_out.moments() if self._held_out.count else None


def to_arrays(moments: Moments) -> dict[str, npt.NDArray[Any]]:
    """The moments as arrays by name, without what is None: what a sub-result's key is made of."""
    fields = ("mean", "mean_hat", "cov", "cross", "drift", "energy")
    present = {name: getattr(moments, name) for name in fields if getattr(moments, name) is not None}
    return {"count": np.array(moments.count), **{name: t.cpu().numpy() for name, t in present.items()}}


@contextmanager
def full_float32() -> Iterator[None]:
    """Matrix products in true float32 while it lasts: tf32's 10 bits are too few for covariances."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _samples(rows: Tensor, samples: int, index: Tensor) -> Tensor:
    split = rows.reshape(rows.shape[0], samples, -1, rows.shape[-1])
    return split.index_select(1, index).reshape(rows.shape[0], -1, rows.shape[-1])
