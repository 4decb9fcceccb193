"""What a whole network is trained for: to give what the float model gives, to do its task, or a share of both.

    loss = share * distillation + (1 - share) * task + features * E (z^ - z)^2 over the variance of z

    mse            (y^ - y)^2 over the variance of y, the mean of each output, the sum over them
    kl             T^2 KL(softmax(y / T) | softmax(y^ / T)), classes on the last axis, of images on axis 1
    cross_entropy  of the labels, those below 0 left out
    a function     of (outputs, labels), a tensor of one number

z are the outputs of blocks, the mean over them. Without a task the result is judged by the squared error of each
output, of which none may lose.

Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from qpipe.errors import InputError, StageError
from qpipe.numerics.learning.losses import by_sample, divergence, features, judged_by, total

Array = npt.NDArray[Any]
Distillation = Literal["mse", "kl"]
Task = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Targets:
    """What a batch is compared with: the float model's outputs (n, ...), the labels where there are any, and the
    outputs of blocks, flattened, where these count."""

    outputs: Sequence[Tensor]
    labels: Tensor | None = None
    blocks: Sequence[Tensor] = ()


@dataclass(frozen=True, eq=False)
class Objective:
    """`variances` are those of the outputs `names` (see `variances_of`); `task` None: distillation alone. `features`
    weighs the errors of blocks, of which `block_variances` has one for each."""

    names: tuple[str, ...]
    variances: tuple[float, ...]
    distillation: Distillation = "mse"
    temperature: float = 1.0
    share: float = 1.0
    task: Task | None = None
    features: float = 0.0
    block_variances: tuple[float, ...] = ()

    def loss(self, outputs: Sequence[Tensor], targets: Targets) -> Tensor:
        """What is minimized, the mean over the batch. Behind the outputs there are those of the blocks in `targets`."""
        own, blocks = outputs[: len(self.names)], outputs[len(self.names) :]
        found = self._of_outputs(own, targets)
        if not blocks:
            return found
        return found + self.features / len(blocks) * features(self.block_variances)(blocks, targets.blocks)

    def _of_outputs(self, outputs: Sequence[Tensor], targets: Targets) -> Tensor:
        if self.task is None:
            return self._distilled(outputs, targets)
        task = self._task(outputs, targets)
        return task if self.share == 0.0 else self.share * self._distilled(outputs, targets) + (1.0 - self.share) * task

    def judge(self, outputs: Sequence[Tensor], targets: Targets) -> tuple[Tensor, Tensor]:
        """What the result is judged by, and the samples that it is of: without a task the squared errors by sample and
        output, since likelihoods of few samples fit what is peculiar to these; else the loss."""
        if self.task is not None:
            return judged_by(self.loss)(outputs, targets)
        rows = by_sample(outputs, targets.outputs, self.variances)
        return rows, torch.tensor(float(len(rows)), dtype=torch.float64)

    def _distilled(self, outputs: Sequence[Tensor], targets: Targets) -> Tensor:
        if self.distillation == "mse":
            return self._squared(outputs, targets)
        both = zip(outputs, targets.outputs, strict=True)
        return total(divergence(self.temperature, class_axis(y))(y, target) for y, target in both)

    def _squared(self, outputs: Sequence[Tensor], targets: Targets) -> Tensor:
        return features(self.variances)(outputs, targets.outputs)

    def _task(self, outputs: Sequence[Tensor], targets: Targets) -> Tensor:
        assert self.task is not None
        assert targets.labels is not None
        given = outputs[0] if len(outputs) == 1 else dict(zip(self.names, outputs, strict=True))
        return self.task(given, targets.labels)


def variances_of(outputs: Mapping[str, Array]) -> tuple[float, ...]:
    """The variance of each output about its mean over the samples; 1 for one that never moves."""
    found = (float(np.square(y.astype(np.float64) - y.mean(0, dtype=np.float64)).mean()) for y in outputs.values())
    return tuple(variance if variance > 0.0 else 1.0 for variance in found)


def class_axis(outputs: Tensor) -> int:
    """The axis that counts classes: of images, (n, C, H, W) and more, axis 1, else the last."""
    return 1 if outputs.ndim > 3 else -1


def cross_entropy(outputs: Any, labels: Tensor) -> Tensor:
    """The mean over all labels that are not below 0. Errors: InputError for labels that do not fit."""
    logits = outputs if isinstance(outputs, Tensor) else next(iter(outputs.values()))
    rows = logits.movedim(class_axis(logits), -1)
    if labels.ndim == rows.ndim and labels.shape[-1] == 1:
        labels = labels[..., 0]
    if tuple(labels.shape) != tuple(rows.shape[:-1]):
        raise InputError(f"Labels of shape {list(labels.shape)} do not fit outputs of shape {list(logits.shape)}.")
    flat = labels.flatten().long()
    if int(flat.max()) >= rows.shape[-1]:
        raise InputError(f"Label {int(flat.max())} is beyond the {rows.shape[-1]} classes of the outputs.")
    return functional.cross_entropy(rows.flatten(0, -2), flat.clamp(min=-100).where(flat >= 0, flat.new_tensor(-100)))


def checked(function: Callable[..., Any], name: str) -> Task:
    """A loss of the user's, which has to give one finite number that has a gradient. Errors: StageError."""

    def task(outputs: Any, labels: Tensor) -> Tensor:
        try:
            found = function(outputs, labels)
        except Exception as error:  # whatever the user's code raises
            raise StageError(f"{name} failed: {type(error).__name__}: {error}") from error
        if not isinstance(found, Tensor) or found.numel() != 1:
            raise StageError(f"{name} returned {type(found).__name__}; a loss is a torch tensor of one number.")
        if torch.is_grad_enabled() and not found.requires_grad:
            raise StageError(f"{name} returned a number without a gradient: compute it in torch, from the outputs.")
        return found.reshape(())

    return task
