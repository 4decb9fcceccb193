"""uint16, uint32 and uint64, which torch can hold, move and compare for equality, and little else.

Arithmetic goes through int64, whose sums and products have the same bits; what depends on the order goes
through int64 with the top bit of a uint64 flipped, which keeps the order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from qpipe.model.operators.registry import OPERATORS

WIDE = frozenset({torch.uint16, torch.uint32, torch.uint64})
_TOP = -(1 << 63)
_AS_THEY_ARE = (
    *("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Concat", "Split", "Slice"),
    *("Expand", "Tile", "Where", "Gather", "Shape", "Size", "ConstantOfShape", "Cast", "CastLike", "Pad"),
    *("Equal", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "TopK", "QuantizeLinear", "DequantizeLinear"),
)
_SAME_BITS = ("Add", "Sub", "Mul", "Sum", "Pow", "BitwiseNot")
_ORDERED = ("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Min", "Max")


def signed(x: Tensor) -> Tensor:
    """x in int64: the same number, or of a uint64 the same bits."""
    if x.dtype == torch.uint64:
        return x.view(torch.int64)
    return x.to(torch.int64) if x.dtype in WIDE else x


def unsigned(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The low bits of the int64 x in an unsigned type."""
    return x.view(torch.uint64) if dtype == torch.uint64 else x.to(dtype)


def _same_bits(function: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    def compute(*tensors: Tensor, **attributes: int) -> Tensor:
        result = function(*map(signed, tensors), **attributes)
        dtype = tensors[0].dtype
        return unsigned(result, dtype) if dtype in WIDE else result

    return _named(compute, f"unsigned_{name}", f"{name} of unsigned numbers, as their bits give it.")


def _ordered(function: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    def compute(*tensors: Tensor) -> Tensor:
        dtype = tensors[0].dtype
        flip = _TOP if dtype == torch.uint64 else 0
        result = function(*(signed(x) ^ flip for x in tensors))
        return result if result.dtype == torch.bool else unsigned(result ^ flip, dtype)

    return _named(compute, f"unsigned_{name}", f"{name} of unsigned numbers.")


def _named(function: Callable[..., Tensor], name: str, text: str) -> Callable[..., Tensor]:
    function.__name__ = function.__qualname__ = name  # torch.fx writes it into the code of a module
    function.__doc__ = text
    return function


def divided(a: Tensor, b: Tensor) -> Tensor:
    """a / b rounded down. Of uint64s half of a is divided first, so that the sign stays out of it."""
    n, d = signed(a), signed(b)
    if a.dtype != torch.uint64:
        return unsigned(torch.div(n, d, rounding_mode="trunc"), a.dtype)
    one = torch.where(d == 0, d, torch.ones_like(d))  # only to keep the division by a large d harmless
    small = torch.where(d > 0, d, one)
    half = torch.bitwise_right_shift(n, 1) & ~_TOP
    quotient = torch.div(half, small, rounding_mode="trunc") << 1
    rest = n - quotient * small
    quotient = quotient + ((rest ^ _TOP) >= (small ^ _TOP))
    large = ((n ^ _TOP) >= (d ^ _TOP)).to(torch.int64)
    return unsigned(torch.where(d < 0, large, quotient), a.dtype)


def remainder(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    """a - b floor(a / b); of unsigned numbers both forms of Mod are the same."""
    return unsigned(signed(a) - signed(divided(a, b)) * signed(b), a.dtype)


def shifted(x: Tensor, amount: Tensor, *, direction: str) -> Tensor:
    """x shifted by `amount` bits LEFT or RIGHT, zeros coming in; all bits are gone where that many are asked."""
    n, by = signed(x), signed(amount)
    near = by.clamp(0, 63)
    if direction == "LEFT":
        moved = torch.bitwise_left_shift(n, near)
    else:
        ones = torch.bitwise_left_shift(torch.full_like(near, -1), (64 - near).clamp(max=63))
        moved = torch.bitwise_right_shift(n, near) & torch.where(near == 0, -1, ~ones)
    return unsigned(torch.where((by < 0) | (by > 63), 0, moved), x.dtype)


for _name in _AS_THEY_ARE:
    OPERATORS[_name] = replace(OPERATORS[_name], unsigned=OPERATORS[_name].function)
for _name in _SAME_BITS:
    OPERATORS[_name] = replace(OPERATORS[_name], unsigned=_same_bits(OPERATORS[_name].function, _name))
for _name in _ORDERED:
    OPERATORS[_name] = replace(OPERATORS[_name], unsigned=_ordered(OPERATORS[_name].function, _name))
_OWN: dict[str, Callable[..., Tensor]] = {"Div": divided, "Mod": remainder, "BitShift": shifted}
for _name, _function in _OWN.items():
    OPERATORS[_name] = replace(OPERATORS[_name], unsigned=_function)
