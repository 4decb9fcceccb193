"""Bounds are Relu or Clip after the import, and compute what they did."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from qpipe.model import Model
from tests.model.nets import error_of_import, op_types, parsed

CONSTANTS = """zero = Constant<value_float=0.0>()  one = Constant<value_float=1.0>()
    two = Constant<value_float=2.0>()  below = Constant<value_float=-0.5>()"""


@pytest.mark.parametrize(
    ("nodes", "wanted"),
    [
        ("y = Max(x, zero)", ["Relu"]),
        ("y = Max(zero, x)", ["Relu"]),
        ("y = Max(x, below)", ["Clip"]),
        ("y = Min(one, x)", ["Clip"]),
        ("y = Clip(x, zero)", ["Relu"]),
        ("a = Max(x, below)  y = Min(a, one)", ["Clip"]),
        ("a = Min(x, one)  y = Max(a, zero)", ["Clip"]),
        ("a = Relu(x)  y = Min(a, two)", ["Clip"]),
        ("a = Relu(x)  y = Relu(a)", ["Relu"]),
        ("a = Clip(x, below, two)  b = Min(a, one)  y = Relu(b)", ["Clip"]),
        ("a = Min(x, below)  y = Max(a, one)", ["Clip", "Clip"]),
        ("a = Relu(x)  b = Min(a, one)  y = Add(a, b)", ["Relu", "Clip", "Add"]),
    ],
)
def test_bounds_by_numbers(nodes: str, wanted: list[str]) -> None:
    proto = parsed(f"net (float[N,4] x) => (float[N,4] y) {{ {CONSTANTS} {nodes} }}")
    model = Model.from_proto(proto)
    assert op_types(model) == wanted
    assert model.outputs[0].name == "y"
    assert error_of_import(proto, model) == 0


def test_bounds_that_are_a_vector_stay() -> None:
    proto = parsed(
        "net (float[N,4] x) => (float[N,4] y) { a = Relu(x)  y = Min(a, c) }",
        c=np.arange(4, dtype=np.float32),
    )
    assert op_types(Model.from_proto(proto)) == ["Relu", "Min"]


def test_integers_stay() -> None:
    proto = parsed(
        "net (int64[N,4] x) => (int64[N,4] y) { zero = Constant<value_int=0>()  y = Max(x, zero) }"
    )
    assert op_types(Model.from_proto(proto)) == ["Max"]


class Clamp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bound = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.clamp(x, 0.0, 6.0).sum(1) + torch.clamp(x, min=0).sum(1)
        return torch.minimum(y, self.bound)


def test_clamp_of_torch_is_clip_and_a_bound_that_is_learned_stays_a_parameter() -> None:
    model = Model.from_torch(Clamp(), torch.randn(2, 3, 4))
    found = op_types(model)
    assert {"Clip", "Relu", "Min"} <= set(found)
    assert "Max" not in found
    assert model.param("bound") == 1.5
