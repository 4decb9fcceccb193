"""A torch module held against its import: what the export lost is refused, with the operator and its place."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qpipe.errors import InputError
from qpipe.model import Model
from qpipe.model.torch_export.exporter import from_torch
from qpipe.model.torch_export.fidelity import check as held
from qpipe.model.torch_export.fidelity import difference


def check(module: nn.Module, example: Any, model: Any, samples: Any = None, deployed: bool = False) -> float:
    error = held(module, example, model, samples, deployed)
    assert error is not None
    return error


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Part(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def inside(function: Callable[[Tensor], Any]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), Part(function), nn.ReLU())


class OwnDivisor(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2, divisor_override=3)


class OwnStatistics(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, torch.zeros(3), torch.ones(3), training=True)


LOST = {"avg_pool2d": OwnDivisor, "batch_norm": OwnStatistics}


@pytest.mark.parametrize("operator", LOST)
def test_what_the_export_lost_is_refused_with_the_operator_and_its_place(operator: str) -> None:
    module = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), LOST[operator](), nn.ReLU())
    place = rf"It lost something of {operator} in its part '1' at `return F\.{operator}"
    with pytest.raises(InputError, match=rf"^The export of Sequential .* off by [0-9.e-]+ \(relative\)\. {place}"):
        Model.from_torch(module, X)
    assert module.training  # as it was


class Told(nn.Module):
    """An operator that is lost, between inputs that are no tensors."""

    def forward(self, size: int, x: Tensor, y: Tensor | None, divisor: int) -> Tensor:
        return F.avg_pool2d(x, size, divisor_override=divisor)


def test_constants_among_the_inputs_do_not_hide_the_operator() -> None:
    with pytest.raises(InputError, match=r"It lost something of avg_pool2d at `return F\.avg_pool2d"):
        Model.from_torch(Told(), (2, X, None, 3))


class Overflowing(nn.Module):
    """In float32 it is infinite, in float64 it is not: no rounding, so no excuse for its import."""

    def forward(self, x: Tensor) -> Tensor:
        y = (x + 3.3e38) * 2
        return y if torch.compiler.is_compiling() else -y


def test_an_overflow_is_no_rounding() -> None:
    with pytest.raises(InputError, match="its outputs are of another shape, or not finite elsewhere"):
        Model.from_torch(Overflowing(), X)


def test_an_operator_that_is_lost_without_effect_is_taken() -> None:
    module = inside(lambda x: F.avg_pool2d(x, 2, divisor_override=4))
    model = Model.from_torch(module, X)
    assert check(module, X, model, deployed=True) < 1e-6


def test_numbers_that_python_took_out_of_a_tensor_are_told_apart_from_operators() -> None:
    def scaled(x: Tensor) -> Tensor:
        return x if torch.compiler.is_compiling() else x * 2

    with pytest.raises(InputError, match=r"off by 5\.0e-01 .*or changes from call to call, is a constant in it"):
        Model.from_torch(inside(scaled), X)


class ByLength(nn.Module):
    """It adds one where the values are large, which no example shows."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.sum(1)
        return y if torch.compiler.is_compiling() or x.abs().max() < 10 else y + 100


def test_samples_show_what_the_example_does_not() -> None:
    module = ByLength()
    model = from_torch(module, X)
    name = model.inputs[0].name
    small, large = (np.full((6, 3, 8, 8), value, np.float32) for value in (1.0, 20.0))
    assert check(module, X, model, {name: small}) < 1e-6
    with pytest.raises(InputError, match="is a constant in it"):
        check(module, X, model, {name: large})
    assert check(module, X, model, {name: large[:, :2]}) < 1e-6  # no samples of this model: others say so


class Nested(nn.Module):
    """Its inputs lie in a list and a dict, and it writes into one."""

    def forward(self, pair: list[Tensor], more: dict[str, Tensor]) -> dict[str, Any]:
        pair[0].add_(1)
        return {"sum": pair[0] + pair[1], "more": (more["a"] * 2, None)}


def test_inputs_in_containers_are_held_in_the_order_of_the_models_inputs() -> None:
    example = ([torch.randn(2, 3), torch.randn(2, 3)], {"a": torch.randn(4)})
    kept = example[0][0].clone()
    model = Model.from_torch(Nested(), example)
    assert check(Nested(), example, model, deployed=True) < 1e-6
    assert torch.equal(kept, example[0][0])


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, -1, 3) if len(x) == 2 else x.view(1, -1, 3)


def test_a_batch_of_one_that_the_export_made_two_is_held_as_two() -> None:
    model = Model.from_torch(Fixed(), torch.randn(1, 6))
    assert check(Fixed(), torch.randn(1, 6), model) < 1e-6


class Cancelling(nn.Module):
    """What it returns is little more than what its own two sums of 192 terms round off."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Parameter(torch.randn(192, 4))
        self.second = nn.Parameter(1e-5 * torch.randn(192, 4) - self.first.detach())

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.first + x.flatten(1).flip(1) @ self.second.flip(0)


def test_a_source_that_rounds_coarsely_itself_is_taken() -> None:
    model = Model.from_torch(Cancelling(), X)
    assert check(Cancelling(), X, model, deployed=True) > 1e-4
    half = Part(lambda x: (x.half() * 3).float())
    assert 1e-4 < check(half, X, Model.from_torch(half, X)) < 1e-3


class InHalf(nn.Module):
    """Its code names a type, and does not run in another one."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.eye(8, dtype=torch.float16)


def test_code_that_runs_in_half_precision_alone_is_taken_and_said_to_be_unchecked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qpipe.stage import Context
    from qpipe.stages.load_model import load_model

    module = InHalf().half()
    assert held(module, X.half(), Model.from_torch(module, X.half())) is None
    (tmp_path / "half_nets.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x @ torch.eye(8, dtype=torch.float16)\n"
        "def build():\n"
        "    return Net(), torch.ones(2, 3, 8, 8).half()\n"
    )
    monkeypatch.chdir(tmp_path)
    notes: list[str] = []

    class Noting(Context):
        def note(self, text: str) -> None:
            notes.append(text)

    load_model(factory="half_nets:build", ctx=Noting())
    assert "does not run in float32" in notes[-1]


def test_a_difference_is_relative_to_the_largest_value_and_infinite_for_other_places() -> None:
    a = torch.tensor([1.0, -4.0, float("inf")])
    assert difference([a], [a + torch.tensor([0.0, 0.4, 0.0])]) == pytest.approx(0.1, rel=1e-6)
    assert difference([a], [-a]) == float("inf")
    assert difference([a], [a[:2]]) == difference([a], []) == float("inf")
    assert difference([torch.tensor([1 + 2j])], [torch.tensor([[1.0, 2.0]])]) == 0


def test_the_stage_refuses_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qpipe.stages.load_model import load_model

    (tmp_path / "lossy_nets.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return torch.nn.functional.avg_pool2d(x, 2, divisor_override=3)\n"
        "def build():\n"
        "    return Net(), torch.ones(2, 3, 8, 8)\n"
    )
    monkeypatch.chdir(tmp_path)
    place = re.escape("avg_pool2d at `return torch.nn.functional.avg_pool2d(x, 2, divisor_override=3)`")
    with pytest.raises(InputError, match=rf"It lost something of {place}"):
        load_model(factory="lossy_nets:build")
