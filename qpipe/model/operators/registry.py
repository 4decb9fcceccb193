"""The table of operators: ONNX operator -> the function on torch tensors that computes it.

A function takes the ONNX inputs positionally (None where an optional one is absent) and the ONNX attributes
as keyword arguments. It returns one tensor, or a tuple when the operator has several outputs. `numbers` names
the inputs by position that steer the computation (a shape, axes, bounds): a constant there arrives as a
Python number or a nested tuple, anything else as a tensor that the function reads with `ints` or `number`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Ints = Tensor | int | tuple[int, ...] | None
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Operator:
    """How one ONNX operator is computed.

    `numbers` are the inputs that become Python numbers. With `many` the function always returns a tuple of
    outputs; `more` is the keyword that makes it return one, set where a node uses outputs beyond the first.
    `unsigned` computes it with uint16, uint32 and uint64, which torch can hold but hardly compute with.
    """

    function: Callable[..., Any]
    numbers: frozenset[int] = frozenset()
    many: bool = False
    more: str = ""
    unsigned: Callable[..., Any] | None = None


OPERATORS: dict[str, Operator] = {}
"""By operator name, in ONNX's default domain."""


def operator(
    name: str, *, numbers: tuple[int, ...] = (), many: bool = False, more: str = ""
) -> Callable[[Function], Function]:
    """Enters the decorated function into the table under `name`; see `Operator` for the rest."""

    def enter(function: Function) -> Function:
        OPERATORS[name] = Operator(function, frozenset(numbers), many, more)
        return function

    return enter


def ints(value: Ints) -> tuple[int, ...]:
    """`value` as a tuple of Python ints; a lone number is a tuple of one. Raises TypeError for None."""
    if isinstance(value, Tensor):
        return tuple(int(v) for v in value.reshape(-1).tolist())
    if isinstance(value, int):
        return (value,)
    if value is None:
        raise TypeError("integers were expected, and the input is absent.")
    return tuple(value)


def number(value: Tensor | float | tuple[float, ...]) -> float:
    """`value`, which holds one element, as a Python number (an int where it is one)."""
    if isinstance(value, Tensor):
        return value.reshape(-1)[0].item()
    while isinstance(value, tuple):
        value = value[0]
    return value


# ONNX's TensorProto.DataType, for the types that torch computes in.
TORCH_DTYPES: dict[int, torch.dtype] = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    4: torch.uint16,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    12: torch.uint32,
    13: torch.uint64,
    14: torch.complex64,
    15: torch.complex128,
    16: torch.bfloat16,
    17: torch.float8_e4m3fn,
    18: torch.float8_e4m3fnuz,
    19: torch.float8_e5m2,
    20: torch.float8_e5m2fnuz,
}

FLOAT8 = frozenset({torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz})


def converted(x: Tensor, dtype: torch.dtype, saturate: int = 1) -> Tensor:
    """x in `dtype`, as the table of float8 conversions of ONNX's Cast says. In an 8-bit float what is too large is the
    largest number, or without `saturate` infinite, or nan in a type without infinity."""
    if dtype not in FLOAT8 or x.dtype in FLOAT8:
        return x.to(dtype)
    wide = x.to(torch.float32)
    if saturate:
        largest = torch.finfo(dtype).max
        return wide.clamp(-largest, largest).to(dtype)
    if dtype == torch.float8_e4m3fn:  # where torch saturates; 464 lies between 448 and the number that would follow
        wide = torch.where(wide.abs() > 464, torch.nan, wide)
    return wide.to(dtype)
