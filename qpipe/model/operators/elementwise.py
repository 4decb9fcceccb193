"""Arithmetic, comparison, logic and activation functions, element by element, with numpy's broadcasting."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from qpipe.model.operators.registry import TORCH_DTYPES, Ints, converted, number, operator

_PLAIN: dict[str, Callable[..., Tensor]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Add": torch.add,
    "And": torch.logical_and,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseNot": torch.bitwise_not,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Equal": torch.eq,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "IsNaN": torch.isnan,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Log": torch.log,
    "Mul": torch.mul,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Or": torch.logical_or,
    "Reciprocal": torch.reciprocal,
    "Round": torch.round,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Sqrt": torch.sqrt,
    "Sub": torch.sub,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
    "Where": torch.where,
    "Xor": torch.logical_xor,
}
for _name, _function in _PLAIN.items():
    operator(_name)(_function)


@operator("Identity")
def identity(x: Tensor) -> Tensor:
    """x itself."""
    return x


@operator("Div")
def div(a: Tensor, b: Tensor) -> Tensor:
    """a / b; integers are divided towards zero, as C does."""
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


@operator("Pow", numbers=(1,))
def power(x: Tensor, exponent: Tensor | float | tuple[float, ...]) -> Tensor:
    """x ** exponent in the type of x; a constant scalar exponent is a Python number, which is faster."""
    if isinstance(exponent, tuple):
        exponent = torch.tensor(exponent, device=x.device)
    if isinstance(exponent, Tensor):
        return torch.pow(x, exponent).to(x.dtype)
    if exponent == 2:
        return x * x
    return torch.pow(x, exponent).to(x.dtype)


@operator("Mod")
def mod(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    """The remainder, with the sign of b; with `fmod` with the sign of a."""
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


@operator("Min")
def minimum(*tensors: Tensor) -> Tensor:
    """The smallest of all inputs, element by element."""
    return reduce(torch.minimum, tensors)


@operator("Max")
def maximum(*tensors: Tensor) -> Tensor:
    """The largest of all inputs, element by element."""
    return reduce(torch.maximum, tensors)


@operator("Sum")
def total(*tensors: Tensor) -> Tensor:
    """The sum of all inputs."""
    return reduce(torch.add, tensors)


@operator("Mean")
def mean(*tensors: Tensor) -> Tensor:
    """The mean of all inputs."""
    return reduce(torch.add, tensors) / len(tensors)


@operator("Clip", numbers=(1, 2))
def clip(x: Tensor, low: Tensor | float | None = None, high: Tensor | float | None = None) -> Tensor:
    """x kept within [low, high]; bounds that are Python numbers train three times faster than tensors."""
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        # Not torch.clamp with mixed bounds: it wants both as tensors. ONNX: high wins where low > high.
        x = x if low is None else torch.maximum(x, torch.as_tensor(low, dtype=x.dtype, device=x.device))
        return x if high is None else torch.minimum(x, torch.as_tensor(high, dtype=x.dtype, device=x.device))
    if low is None and high is None:
        return x
    if low is not None and high is not None and low <= high and x.is_floating_point():
        return F.hardtanh(x, low, high)  # the same values; its gradient is one pass instead of four
    return torch.clamp(x, None if low is None else number(low), None if high is None else number(high))


@operator("BitShift")
def bit_shift(x: Tensor, amount: Tensor, *, direction: str) -> Tensor:
    """x shifted by `amount` bits LEFT or RIGHT."""
    return (
        torch.bitwise_left_shift(x, amount) if direction == "LEFT" else torch.bitwise_right_shift(x, amount)
    )


@operator("IsInf")
def is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    """Where x is infinite, with the signs asked for."""
    found = torch.zeros_like(x, dtype=torch.bool)
    if detect_negative:
        found = found | torch.isneginf(x)
    if detect_positive:
        found = found | torch.isposinf(x)
    return found


@operator("Cast")
def cast(x: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """x in the ONNX type `to`. The last attribute concerns a type that is not supported."""
    return converted(x, TORCH_DTYPES[to], saturate)


@operator("CastLike")
def cast_like(x: Tensor, like: Tensor, *, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """x in the type of `like`."""
    return converted(x, like.dtype, saturate)


@operator("Dropout", numbers=(1, 2), many=True)
def dropout(
    x: Tensor, ratio: object = None, training: object = None, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """x unchanged and a mask of ones: inference only."""
    return x, torch.ones_like(x, dtype=torch.bool)


@operator("CumSum", numbers=(1,))
def cum_sum(x: Tensor, axis: Ints, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Running sums along `axis`; exclusive ones start at 0, reverse ones run from the end."""
    dim = int(number(axis))  # type: ignore[arg-type]  # CumSum's axis is not optional
    x = x.flip(dim) if reverse else x
    summed = x.cumsum(dim, dtype=x.dtype)
    if exclusive:
        summed = summed - x
    return summed.flip(dim) if reverse else summed


# Activation functions

for _name, _function in {
    "Mish": F.mish,
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Softsign": F.softsign,
}.items():
    operator(_name)(_function)


@operator("LeakyRelu")
def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    """x where it is positive, alpha x elsewhere."""
    return F.leaky_relu(x, alpha)


@operator("PRelu")
def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """x where it is positive, slope x elsewhere; `slope` broadcasts against x."""
    return torch.where(x >= 0, x, slope * x)


@operator("ThresholdedRelu")
def thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """x where it exceeds alpha, 0 elsewhere."""
    return torch.where(x > alpha, x, torch.zeros_like(x))


@operator("Elu")
def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """x, or alpha (exp(x) - 1) where negative."""
    return F.elu(x, alpha)


@operator("Celu")
def celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """max(0, x) + min(0, alpha (exp(x / alpha) - 1))."""
    return F.celu(x, alpha)


@operator("Selu")
def selu(x: Tensor, *, alpha: float = 1.6732632, gamma: float = 1.0507010) -> Tensor:
    """gamma x, or gamma alpha (exp(x) - 1) where not positive."""
    return gamma * F.elu(x, alpha)


@operator("Softplus")
def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), without overflow."""
    return F.softplus(x, threshold=50.0) if x.dtype == torch.float64 else F.softplus(x)


@operator("HardSigmoid")
def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    """clip(alpha x + beta, 0, 1)."""
    return torch.clamp(alpha * x + beta, 0.0, 1.0)


@operator("HardSwish")
def hard_swish(x: Tensor) -> Tensor:
    """x clip(x / 6 + 1/2, 0, 1)."""
    return F.hardswish(x)


@operator("Gelu")
def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """x Phi(x), exactly or with the tanh approximation."""
    return F.gelu(x, approximate=approximate)


@operator("Shrink")
def shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    """x + bias below -lambd, x - bias above lambd, 0 between."""
    zero = torch.zeros_like(x)
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, zero)).to(x.dtype)


@operator("Softmax")
def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """exp(x) / sum(exp(x)) along `axis`."""
    return torch.softmax(x, axis)


@operator("LogSoftmax")
def log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """log of the softmax along `axis`."""
    return torch.log_softmax(x, axis)


@operator("Hardmax")
def hardmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """1 at the first maximum along `axis`, 0 elsewhere."""
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1.0)
