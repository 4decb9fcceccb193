"""Recurrent layers: RNN, GRU and LSTM, step by step, in every variant of ONNX."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qpipe.model.operators.registry import operator

Activation = Callable[[Tensor], Tensor]
State = tuple[Tensor, ...]


@dataclass(frozen=True)
class Cell:
    """One direction: W (gates H, I), R (gates H, H), biases (gates H,), peepholes (3 H,) or None."""

    w: Tensor
    r: Tensor
    wb: Tensor
    rb: Tensor
    peepholes: Tensor | None
    activations: tuple[Activation, ...]
    flag: int


class Weights(NamedTuple):
    """All directions: W (D, gates H, I), R (D, gates H, H), biases (D, 2 gates H) and peepholes (D, 3 H), or None."""

    w: Tensor
    r: Tensor
    b: Tensor | None
    peepholes: Tensor | None = None


@dataclass(frozen=True)
class Variant:
    """What a layer computes in a step: the names of its activations, for all directions, with their parameters; `flag`
    is the attribute that only one kind of layer has."""

    step: Callable[[Tensor, State, Cell], State]
    names: tuple[str, ...]
    alphas: tuple[float, ...] | None
    betas: tuple[float, ...] | None
    flag: int = 0


def _activation(name: str, alpha: float | None, beta: float | None) -> Activation:
    match name.lower():
        case "relu":
            return torch.relu
        case "tanh":
            return torch.tanh
        case "sigmoid":
            return torch.sigmoid
        case "softsign":
            return F.softsign
        case "softplus":
            return F.softplus
        case "leakyrelu":
            return lambda x: F.leaky_relu(x, 0.01 if alpha is None else alpha)
        case "thresholdedrelu":
            return lambda x: torch.where(x > (1.0 if alpha is None else alpha), x, torch.zeros_like(x))
        case "elu":
            return lambda x: F.elu(x, 1.0 if alpha is None else alpha)
        case "hardsigmoid":
            return lambda x: ((0.2 if alpha is None else alpha) * x + (0.5 if beta is None else beta)).clamp(
                0, 1
            )
        case "scaledtanh":
            return lambda x: (alpha or 1.0) * torch.tanh((1.0 if beta is None else beta) * x)
        case _:
            return lambda x: (alpha or 1.0) * x + (beta or 0.0)


def _rnn_step(x: Tensor, state: State, cell: Cell) -> State:
    return (cell.activations[0](x + F.linear(state[0], cell.r, cell.rb)),)


def _gru_step(x: Tensor, state: State, cell: Cell) -> State:
    f, g = cell.activations
    (h,) = state
    xz, xr, xh = x.chunk(3, -1)
    rz, rr, rh = cell.r.chunk(3)
    bz, br, bh = cell.rb.chunk(3)
    z, r = f(xz + F.linear(h, rz, bz)), f(xr + F.linear(h, rr, br))
    inner = r * F.linear(h, rh, bh) if cell.flag else F.linear(r * h, rh, bh)
    return ((1 - z) * g(xh + inner) + z * h,)


def _lstm_step(x: Tensor, state: State, cell: Cell) -> State:
    f, g, out = cell.activations
    h, c = state
    i, o, forget, candidate = (x + F.linear(h, cell.r, cell.rb)).chunk(4, -1)
    if cell.peepholes is not None:
        pi, po, pf = cell.peepholes.chunk(3)
        i, forget = i + pi * c, forget + pf * c
    i = f(i)
    kept = (1 - i if cell.flag else f(forget)) * c + i * g(candidate)
    o = f(o + po * kept) if cell.peepholes is not None else f(o)
    return o * out(kept), kept


def _run(
    x: Tensor,
    state: State,
    cell: Cell,
    step: Callable[[Tensor, State, Cell], State],
    lengths: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, State]:
    """x (T, N, I) through one direction: all hidden states (T, N, H) and the last state."""
    gates = F.linear(x, cell.w, cell.wb)
    hidden: list[Tensor] = [x] * x.shape[0]
    for t in reversed(range(x.shape[0])) if reverse else range(x.shape[0]):
        new = step(gates[t], state, cell)
        if lengths is None:
            state, hidden[t] = new, new[0]
            continue
        alive = (t < lengths).unsqueeze(-1)
        state = tuple(torch.where(alive, n, s) for n, s in zip(new, state, strict=True))
        hidden[t] = torch.where(alive, new[0], torch.zeros_like(new[0]))
    return torch.stack(hidden), state


def _layer(
    x: Tensor,
    weights: Weights,
    variant: Variant,
    lengths: Tensor | None,
    states: tuple[Tensor | None, ...],
    direction: str,
    layout: int,
) -> tuple[Tensor, ...]:
    """All directions: Y (T, D, N, H) and each last state (D, N, H), batch first with `layout`."""
    x = x.transpose(0, 1) if layout else x
    outputs, finals = [], []
    for d in range(len(weights.w)):
        cell = _cell(weights, variant, d)
        start = tuple(
            x.new_zeros(x.shape[1], cell.r.shape[-1]) if s is None else (s[:, d] if layout else s[d])
            for s in states
        )
        y, final = _run(x, start, cell, variant.step, lengths, direction == "reverse" or d == 1)
        outputs.append(y)
        finals.append(final)
    joined = torch.stack(outputs, 1)
    lasts = [torch.stack(parts) for parts in zip(*finals, strict=True)]
    if layout:
        return (joined.permute(2, 0, 1, 3), *(last.transpose(0, 1) for last in lasts))
    return (joined, *lasts)


def _cell(weights: Weights, variant: Variant, d: int) -> Cell:
    """The weights and activations of direction `d`."""
    w, r, b, peepholes = weights
    zero = w.new_zeros(w.shape[1])
    wb, rb = (zero, zero) if b is None else b[d].chunk(2)
    per = len(variant.names) // len(w)
    functions = tuple(
        _activation(variant.names[i], _nth(variant.alphas, i), _nth(variant.betas, i))
        for i in range(d * per, (d + 1) * per)
    )
    return Cell(w[d], r[d], wb, rb, None if peepholes is None else peepholes[d], functions, variant.flag)


def _nth(values: tuple[float, ...] | None, i: int) -> float | None:
    return values[i] if values and i < len(values) else None


@operator("RNN", many=True)
def rnn(
    x: Tensor, w: Tensor, r: Tensor, b: Tensor | None = None, sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None, *,
    activation_alpha: tuple[float, ...] | None = None, activation_beta: tuple[float, ...] | None = None,
    activations: tuple[str, ...] | None = None, direction: str = "forward", hidden_size: int = 0,
    layout: int = 0,
) -> tuple[Tensor, ...]:  # fmt: skip
    """h' = f(W x + R h + b): Y and Y_h."""
    names = activations or ("Tanh",) * w.shape[0]
    variant = Variant(_rnn_step, names, activation_alpha, activation_beta)
    return _layer(x, Weights(w, r, b), variant, sequence_lens, (initial_h,), direction, layout)


@operator("GRU", many=True)
def gru(
    x: Tensor, w: Tensor, r: Tensor, b: Tensor | None = None, sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None, *,
    activation_alpha: tuple[float, ...] | None = None, activation_beta: tuple[float, ...] | None = None,
    activations: tuple[str, ...] | None = None, direction: str = "forward", hidden_size: int = 0,
    layout: int = 0, linear_before_reset: int = 0,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gated recurrent unit: Y and Y_h."""
    names = activations or ("Sigmoid", "Tanh") * w.shape[0]
    variant = Variant(_gru_step, names, activation_alpha, activation_beta, linear_before_reset)
    return _layer(x, Weights(w, r, b), variant, sequence_lens, (initial_h,), direction, layout)


@operator("LSTM", many=True)
def lstm(
    x: Tensor, w: Tensor, r: Tensor, b: Tensor | None = None, sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None, initial_c: Tensor | None = None, p: Tensor | None = None, *,
    activation_alpha: tuple[float, ...] | None = None, activation_beta: tuple[float, ...] | None = None,
    activations: tuple[str, ...] | None = None, direction: str = "forward", hidden_size: int = 0,
    input_forget: int = 0, layout: int = 0,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The long short-term memory: Y, Y_h and Y_c."""
    names = activations or ("Sigmoid", "Tanh", "Tanh") * w.shape[0]
    variant = Variant(_lstm_step, names, activation_alpha, activation_beta, input_forget)
    return _layer(x, Weights(w, r, b, p), variant, sequence_lens, (initial_h, initial_c), direction, layout)
