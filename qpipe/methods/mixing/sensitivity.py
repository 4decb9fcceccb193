"""How much a model loses when one group of tensors is quantized, all else in float.

    by outputs      loss = 1 / sqnr of the outputs, or the drop of another metric; a forward pass per option
    gram            loss = tr(dW H dW^T) / tr(W H W^T) + the share of noise in the inputs; no forward pass per option

dW is the rounding error of the weight, H = E[x x^T] of the float model's inputs. Losses of groups add up: small
noises of different sources do. All of it goes through `memo`, under the content that it depends on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from qpipe.methods.mixing.fingerprint import float_fingerprint, grids_fingerprint
from qpipe.methods.rounding.walk import Walk
from qpipe.model.structure.geometry import unfold_of
from qpipe.model.structure.layers import find_layers
from qpipe.numerics.grid import Encoding, quantize_dequantize
from qpipe.numerics.rounding.moments import MomentSums
from qpipe.numerics.rounding.unfold import Unfold, sample_positions

if TYPE_CHECKING:
    from qpipe.methods.mixing.choices import Choices, Group
    from qpipe.methods.placement.calibration import Observers
    from qpipe.model.network.network import Network
    from qpipe.model.structure.layers import Layer

Array = npt.NDArray[Any]
Memo = Callable[..., Any]
Progress = Callable[[int, int, str], None]
POSITIONS = 25
"""Places per sample at which a layer's inputs are looked at."""


def score_alone(
    choices: Choices, score: Callable[[Group, Mapping[str, Encoding]], float], progress: Progress
) -> list[list[float]]:
    """The score of each group alone, for each of its options."""
    total, done = sum(len(group.options) for group in choices.groups), 0
    scores: list[list[float]] = []
    for group in choices.groups:
        scores.append([])
        for option in range(len(group.options)):
            progress(done, total, f"{group.name} {group.options[option]}")
            scores[-1].append(score(group, choices.alone(group, option)))
            done += 1
    return scores


def loss_of(metric: str, score: float, reference: float) -> float:
    """What a score loses against `reference`, the float model's: noise over signal for sqnr_db, else the drop."""
    return 10.0 ** (-score / 10.0) if metric == "sqnr_db" else max(0.0, reference - score)


class GramSensitivity:
    """The layerwise estimate on moments, taken from one pass of the float model when they are first needed."""

    def __init__(
        self,
        model: Network,
        arrays: Mapping[str, Array],
        observers: Observers,
        memo: Memo,
        *,
        seed: int,
        device: str = "cpu",
    ) -> None:
        self._model, self._arrays, self._memo = model, dict(arrays), memo
        self._seed, self._device = seed, device
        self._observers = dict(observers)
        self._layers = find_layers(model)
        self._content = float_fingerprint(model, arrays)
        self._moments: Mapping[str, Array] | None = None

    def score(self, group: Group, encodings: Mapping[str, Encoding]) -> float:
        """The estimated sqnr_db of a group alone on these grids."""
        noise = sum(self._noise(names, encodings) for names in self._observers)  # they saw more than the samples here
        weights = {name: encodings[name] for name in group.weights if name in encodings}
        return -10.0 * math.log10(max(self._weight_losses(weights) + noise, 1e-30))

    def each(self, weights: Mapping[str, Encoding]) -> dict[str, float]:
        """What each of `weights` on its grid loses, over all layers that it is in."""

        def run(*_: Any) -> dict[str, float]:
            return {name: self._sum({name: encoding}) for name, encoding in weights.items()}

        found: dict[str, float] = self._memo("gram of each", run, self._content, grids_fingerprint(weights), self._seed)
        return found

    def _weight_losses(self, weights: Mapping[str, Encoding]) -> float:
        """The sum over the layers whose weights have these grids."""
        if not weights:
            return 0.0

        def run(*_: Any) -> float:
            return self._sum(weights)

        return float(self._memo("gram", run, self._content, grids_fingerprint(weights), self._seed))

    def _sum(self, weights: Mapping[str, Encoding]) -> float:
        known = {layer.weight for layer in self._layers}
        of_layers = (
            self._weight_loss(number, layer, weights[layer.weight])
            for number, layer in enumerate(self._layers)
            if layer.weight in weights
        )
        return sum(of_layers) + sum(self._plain_loss(name, weights[name]) for name in sorted(set(weights) - known))

    def _noise(self, names: tuple[str, ...], encodings: Mapping[str, Encoding]) -> float:
        """The noise in the values that one observer watched, over their energy; 0 where they stay float."""
        return self._observers[names].noise(encodings[names[0]]) if names[0] in encodings else 0.0

    def _weight_loss(self, number: int, layer: Layer, encoding: Encoding) -> float:
        """tr(dW H dW^T) / tr(W H W^T) over all groups of the layer."""
        if self._moments is None:
            self._moments = self._memo("second moments", self._collect, self._content, POSITIONS, self._seed)
        weight = self._model.param(layer.weight)
        error = quantize_dequantize(weight, encoding, layer.weight) - weight
        unfold = unfold_of(layer, tuple(self._moments[f"{number}.spatial"].tolist()))
        second = torch.tensor(self._moments[f"{number}.second"], dtype=torch.float64)
        noise, signal = (_energy(unfold, array, second) for array in (error, weight))
        return noise / signal if signal > 0.0 else 0.0

    def _plain_loss(self, name: str, encoding: Encoding) -> float:
        """|dW|^2 / |W|^2, for the weight of a node that is no layer: as if all its inputs were alike."""
        weight = self._model.param(name).astype(np.float64)
        error = quantize_dequantize(self._model.param(name), encoding, name) - weight
        return float(np.square(error).sum() / max(np.square(weight).sum(), 1e-300))

    def _collect(self, *_: Any) -> dict[str, Array]:
        """H of every layer, and the size of its inputs, where its geometry depends on that."""
        walk = Walk(self._model, self._arrays, asymmetric=False, device=self._device)
        found: dict[str, Array] = {}
        for number, layer in enumerate(self._layers):
            x = walk.inputs(layer)[1]
            spatial = tuple(x[0].shape[2:]) if layer.kernel_shape else ()
            unfold, taken = unfold_of(layer, spatial), 0
            rows = unfold.weight_rows(torch.tensor(self._model.param(layer.weight)))
            sums = MomentSums(rows.shape[0], rows.shape[2], device=x[0].device, name=layer.name)
            for batch in x:
                count = math.prod(unfold.output_shape(tuple(batch.shape)))
                where = sample_positions(count, POSITIONS, taken, len(batch), self._seed)
                sums.update(unfold.rows(batch, where))
                taken += len(batch)
            m = sums.moments()
            second = m.cov.double() + m.mean_hat[:, :, None] * m.mean_hat[:, None, :]
            found[f"{number}.second"] = second.float().cpu().numpy()
            found[f"{number}.spatial"] = np.array(spatial, np.int64)
        return found


def _energy(unfold: Unfold, weight: Array, second: torch.Tensor) -> float:
    """tr(W H W^T), summed over groups."""
    rows = unfold.weight_rows(torch.tensor(weight, dtype=torch.float64))
    return float(torch.einsum("gok,gkl,gol->", rows, second, rows))
