"""The loop: variables turned so that the outputs come near their targets, judged by samples that it does not learn on.

Each step draws a batch, and goes along the gradient of the loss (Adam, or the gradient's sign alone). Now and then the
result as it would be for good is judged on the held-out samples. The best that was seen is what comes out, and where
none was better than the start, the start does. Better is what errs less in all and, where the judge tells outputs
apart, loses by more than the noise at none of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qpipe.numerics.grid import Encoding
from qpipe.numerics.learning.losses import Judge, Loss, loses, mse, squared_error
from qpipe.numerics.learning.options import LearningOptions
from qpipe.numerics.learning.variables import Snapshot, Variable, restore, snapshot

Forward = Callable[[dict[str, Tensor], Any, torch.Generator | None], Any]
"""(values by name, inputs, draw) -> outputs. `draw` is there while learning, for what is random; None is for good."""

Batches = Callable[[Tensor, torch.Generator | None], tuple[Any, Any]]
"""(indices of samples, int64 on the CPU, draw) -> (their inputs, their targets). `draw` as for Forward."""


@dataclass(frozen=True, eq=False)
class Learned:
    """`values` for good, by name, the `encodings` of those that have one, and a JSON `report`.

    error_before and error_after are the judge's on held-out samples, tuning_before and tuning_after on those learned
    on; outputs_before and outputs_after the former by output, where the judge tells several apart; `iterations` that
    were run; `changed`, the share of codes that differ from the start; kept: "after", or "before" where nothing was
    better than the start, which is then what the values are.
    """

    values: dict[str, Tensor]
    encodings: dict[str, Encoding]
    report: dict[str, Any]


def learn(
    variables: Mapping[str, Variable],
    forward: Forward,
    batches: Batches,
    samples: int,
    *,
    options: LearningOptions | None = None,
    loss: Loss | None = None,
    judge: Judge = squared_error,
    held_out: Tensor | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Learned:
    """The `variables` learned together on `samples`, of which `held_out` (indices; None: a share drawn) only judge.

    All that is random comes from a generator of its own with `seed`. `loss` None is `mse()`. `progress(done, total)` is
    called about a hundred times.
    """
    learning = Learning(
        variables, forward, batches, samples,
        options=options, loss=loss, judge=judge, held_out=held_out, seed=seed, progress=progress,
    )  # fmt: skip
    learning.run()
    return learning.learned()


class Learning:
    """What `learn` does, in parts: run until some iteration, take the state, go on from it later with the same bits."""

    def __init__(
        self,
        variables: Mapping[str, Variable],
        forward: Forward,
        batches: Batches,
        samples: int,
        *,
        options: LearningOptions | None = None,
        loss: Loss | None = None,
        judge: Judge = squared_error,
        held_out: Tensor | None = None,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.variables, self.forward, self.batches = dict(variables), forward, batches
        self.options, self.loss, self.judge = options or LearningOptions(), loss or mse(), judge
        self.progress = progress or (lambda done, total: None)
        self._draw = torch.Generator().manual_seed(seed)
        self._tuning, self._held_out = _parted(samples, self.options.hold_out, held_out, self._draw)
        rates = self._adjusted()
        self._groups = _groups(self.variables, rates)
        self._optimizer = _optimizer(self._groups, rates, self.options)
        self.done, self._stopped = 0, False
        self._first = {name: snapshot(v) for name, v in self.variables.items()}
        self._tuning_before, _ = self._judged(self._tuning)
        self._before, self._rows = self._judged(self._held_out)
        self._least = self._before
        self._outputs: list[float] | None = None if self._rows is None else self._rows.mean(0).tolist()
        self._best: dict[str, Snapshot] | None = None
        self._idle = 0

    @property
    def over(self) -> bool:
        """Whether there is nothing left to do."""
        return self._stopped or self.done >= self.options.iterations or not self._groups

    def run(self, until: int | None = None) -> None:
        """Learns until so many iterations are done, counted from the very first; None until the end."""
        end = self.options.iterations if until is None else min(until, self.options.iterations)
        total = self.options.iterations
        while not self.over and self.done < end:
            self._step()
            self.done += 1
            if self.done % max(1, total // 100) == 0 or self.done == total:
                self.progress(self.done, total)
            if self.done % self.options.every == 0 or self.done == total:
                self._look()

    def _step(self) -> None:
        options = self.options
        values = {name: v.value() for name, v in self.variables.items()}
        gradients = self._gradients(values)
        roots = [values[name] for name in gradients]
        beta = options.beta_at(self.done)
        terms = [v.penalty(beta) for v in self.variables.values()] if beta is not None and options.reg_param else []
        penalties = [term for term in terms if term is not None]
        weights = [term.new_tensor(options.reg_param) for term in penalties]
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward([*roots, *penalties], [*gradients.values(), *weights])
        share = options.share_of_rate(self.done)
        for group in self._optimizer.param_groups:
            group["lr"] = group["rate"] * share
        self._optimizer.step()
        for variable in self.variables.values():
            variable.bound()

    def _gradients(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The gradient of the loss of a batch in each value that has one; `at_once` samples run through together."""
        index = self._drawn()
        leaves = {name: v.detach().requires_grad_(v.requires_grad) for name, v in values.items()}
        for part in torch.split(index, self.options.at_once or len(index)):
            x, target = self.batches(part, self._draw)
            loss = self.loss(self.forward(leaves, x, self._draw), target)
            loss = loss if len(part) == len(index) else loss * (len(part) / len(index))
            loss.backward()  # type: ignore[no-untyped-call]  # torch's
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    def _drawn(self) -> Tensor:
        count, size = len(self._tuning), min(self.options.batch_size, len(self._tuning))
        if self.options.sampling == "random":
            return self._tuning[torch.randperm(count, generator=self._draw)[:size]]
        return self._tuning[(self.done * size + torch.arange(size)) % count]

    def _look(self) -> None:
        error, rows = self._judged(self._held_out)
        lost = self._rows is not None and rows is not None and bool(loses(self._rows, rows).any())
        if error < self._least and not lost:
            self._best = {name: snapshot(v) for name, v in self.variables.items()}
            self._least, self._idle = error, 0
            self._outputs = None if rows is None else rows.mean(0).tolist()
            return
        undecided = self.options.beta_at(self.done) is None and any(
            v.penalty(1.0) is not None for v in self.variables.values()
        )
        self._idle += 0 if undecided else 1
        self._stopped = bool(self.options.early_stop) and self._idle >= self.options.early_stop

    def _judged(self, index: Tensor) -> tuple[float, Tensor | None]:
        """The judge's error of the hard result on the first of these samples, infinite where it is none, and the errors
        by sample and output where it tells them apart."""
        index, size = index[: self.options.check_samples], self.options.batch_size
        error = share = 0.0
        rows: list[Tensor] = []
        with torch.no_grad():
            values = {name: v.hard() for name, v in self.variables.items()}
            for part in torch.split(index, size):
                x, target = self.batches(part, None)
                found, of = self.judge(self.forward(values, x, None), target)
                error, share = error + float(found.sum()), share + float(of)
                rows += [found.cpu()] if found.ndim == 2 else []
        error = error / share if share > 0 else error
        return error if math.isfinite(error) else math.inf, torch.cat(rows) if rows else None

    def _adjusted(self) -> Mapping[str, float]:
        """The rates, with that of weights as `lr_adjust` says."""
        if self.options.lr_adjust is None:
            return self.options.rates
        threshold, rate = self.options.lr_adjust
        error, parts = 0.0, torch.split(self._tuning[: self.options.check_samples], self.options.batch_size)
        with torch.no_grad():
            values = {name: v.hard() for name, v in self.variables.items()}
            for part in parts:
                x, target = self.batches(part, None)
                error += float(self.loss(self.forward(values, x, None), target)) * len(part)
        above = error > threshold * sum(map(len, parts))
        return {**self.options.rates, "weight": rate} if above else self.options.rates

    def state(self) -> dict[str, Any]:
        """All that `load` needs to go on: JSON values and tensors."""
        adam = self._optimizer.state
        return {
            "done": self.done,
            "stopped": self._stopped,
            "idle": self._idle,
            "least": self._least,
            "outputs": self._outputs,
            "draw": self._draw.get_state(),
            "now": {name: snapshot(v) for name, v in self.variables.items()},
            "best": self._best,
            "moments": [
                {name: value.clone() for name, value in adam.get(p, {}).items()}
                for group in self._optimizer.param_groups
                for p in group["params"]
            ],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes back to a `state` of a learning with the same arguments."""
        self.done, self._stopped, self._idle = state["done"], state["stopped"], state["idle"]
        self._least, self._best, self._outputs = state["least"], state["best"], state["outputs"]
        self._draw.set_state(state["draw"])
        for name, variable in self.variables.items():
            restore(variable, state["now"][name])
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        for p, moments in zip(parameters, state["moments"], strict=True):
            if moments:
                self._optimizer.state[p] = {name: value.clone() for name, value in moments.items()}

    def learned(self) -> Learned:
        """The best that was seen, or the start."""
        kept = self._best if self._best is not None else self._first
        for name, variable in self.variables.items():
            restore(variable, kept[name])
        final = {name: v.final() for name, v in self.variables.items()}
        moved, codes = (sum(each) for each in zip(*(v.changed() for v in self.variables.values()), strict=True))
        report = {
            "error_before": self._before,
            "error_after": self._least,
            "tuning_before": self._tuning_before,
            "tuning_after": self._tuning_before if self._best is None else self._judged(self._tuning)[0],
            "iterations": self.done,
            "changed": moved / codes if codes else 0.0,
            "kept": "before" if self._best is None else "after",
        }
        if self._rows is not None and self._rows.shape[1] > 1:
            report |= {"outputs_before": self._rows.mean(0).tolist(), "outputs_after": self._outputs}
        encodings = {name: encoding for name, (_, encoding) in final.items() if encoding is not None}
        return Learned({name: value for name, (value, _) in final.items()}, encodings, report)


def _parted(samples: int, share: float, held_out: Tensor | None, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """The samples to learn on and those to judge by; the same where too few are there to be parted."""
    if held_out is not None:
        kept = torch.ones(samples, dtype=torch.bool)
        kept[held_out] = False
        return kept.nonzero().flatten(), held_out
    everything, count = torch.arange(samples), round(share * samples)
    if count == 0:
        return everything, everything
    mixed = torch.randperm(samples, generator=draw)
    return mixed[count:].sort().values, mixed[:count].sort().values


def _groups(variables: Mapping[str, Variable], rates: Mapping[str, float]) -> dict[str, list[Tensor]]:
    """The parameters by kind, of kinds that have a rate; the others no longer ask for a gradient."""
    found: dict[str, list[Tensor]] = {}
    for variable in variables.values():
        for kind, parameters in variable.parameters().items():
            if rates.get(kind, 0.0) > 0.0:
                found.setdefault(kind, []).extend(parameters)
            else:
                for parameter in parameters:
                    parameter.requires_grad_(False)
    return found


def _optimizer(
    groups: Mapping[str, list[Tensor]], rates: Mapping[str, float], options: LearningOptions
) -> torch.optim.Optimizer:
    given = [{"params": held, "rate": rates[kind]} for kind, held in groups.items()]
    if options.optimizer == "signsgd":
        return SignSGD(given)
    return torch.optim.Adam(given or [{"params": [torch.zeros(0)], "rate": 0.0}], lr=0.0, fused=True)


class SignSGD(torch.optim.Optimizer):
    """p -= rate * sign(gradient)."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure is asked
        """One step along the signs."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad.sign_(), alpha=-group["lr"])
