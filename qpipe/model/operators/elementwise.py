"""Arithmetic, comparison and logic, element by element, with numpy's broadcasting."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
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
    """x kept within [low, high]; bounds that are Python numbers train 1.7 times faster than tensors."""
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        # Not torch.clamp with mixed bounds: it wants both as tensors. ONNX: high wins where low > high.
        x = x if low is None else torch.maximum(x, torch.as_tensor(low, dtype=x.dtype, device=x.device))
        return x if high is None else torch.minimum(x, torch.as_tensor(high, dtype=x.dtype, device=x.device))
    if low is None and high is None:
        return x
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
