"""Operators that are written in our own form: on other data than the example's, and with an open batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qpipe.model import Model
from qpipe.model.torch_export.fidelity import difference
from qpipe.model.torch_export.translations import TRANSLATIONS


class Part(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.function(x, y)


CALLS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "amax of all": lambda x, y: x.amax(),
    "amax of two": lambda x, y: x.amax((1, -1), keepdim=True),
    "amin of all": lambda x, y: x.amin(keepdim=True),
    "aminmax": lambda x, y: torch.aminmax(x),
    "prod": lambda x, y: (x[:, :1, :2].prod(), x[:, :1, 0].prod(dtype=torch.float32)),
    "fmax": torch.fmax,
    "fmin": torch.fmin,
    "hypot": torch.hypot,
    "median": lambda x, y: x.median(),
    "median along": lambda x, y: x.median(1, keepdim=True),
    "median of samples": lambda x, y: x.median(0),
    "kthvalue": lambda x, y: x.kthvalue(3),
    "kthvalue along": lambda x, y: x.kthvalue(1, -2, keepdim=True),
}


def two(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 4, 5, generator=generator), torch.randn(count, 4, 5, generator=generator)


def outputs(returned: Any) -> list[Tensor]:
    return list(returned) if isinstance(returned, tuple) else [returned]


@pytest.mark.parametrize("call", CALLS)
def test_our_own_form_computes_what_torch_does_for_any_batch(call: str) -> None:
    module = Part(CALLS[call])
    model = Model.from_torch(module, two(3))
    assert {entry.shape[0] for entry in model.inputs} == {"batch"}
    x, y = two(6)
    wanted = outputs(module(x, y))
    found = outputs(model.to_torch()(x, y))
    fed = dict(zip([entry.name for entry in model.inputs], (x.numpy(), y.numpy()), strict=True))
    deployed = [torch.as_tensor(array) for array in model.session().run(None, fed)]
    assert difference(wanted, found) < 1e-6
    assert difference(wanted, deployed) < 1e-6


def test_fmax_and_fmin_take_the_one_that_is_a_number() -> None:
    x, y = (torch.tensor(row) for row in ([1.0, float("nan"), 3.0], [float("nan"), 2.0, 5.0]))
    for call in (torch.fmax, torch.fmin):
        model = Model.from_torch(Part(call), two(3))
        x3, y3 = (row.repeat(20).reshape(3, 4, 5) for row in (x, y))
        assert torch.equal(model.to_torch()(x3, y3), call(x3, y3))


class Bags(nn.Module):
    def __init__(self, mode: str, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bag = nn.EmbeddingBag(20, 6, mode=mode, **settings)

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        y: Tensor = self.bag(ids, offsets)
        return y


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("settings", [{}, {"include_last_offset": True}, {"padding_idx": 3}, {"padding_idx": -1}])
def test_bags_of_any_size_are_summed_without_a_loop(mode: str, settings: dict[str, Any]) -> None:
    module = Bags(mode, **settings).eval()
    ids = torch.tensor([3, 4, 4, 9, 3, 1, 19, 0])
    model = Model.from_torch(module, (ids, torch.tensor([0, 2, 3, 8])))
    assert not {"Loop", "If"} & {node.op_type for node in model.graph}
    offsets = torch.tensor([0, 0, 5, 8])  # the first is empty
    for given in (ids, ids.flip(0)):
        assert difference([module(given, offsets)], [model.to_torch()(given, offsets)]) < 1e-6


def test_bags_with_weights_of_their_own() -> None:
    ids = torch.tensor([[2, 1], [0, 2], [1, 1]])
    module = Part(lambda x, y: F.embedding_bag(ids, x[:, 0], per_sample_weights=y[:3, 0, :2], mode="sum"))
    model = Model.from_torch(module, two(3))
    x, y = two(3)
    assert difference([module(x * 2, y)], [model.to_torch()(x * 2, y)]) < 1e-6


def test_every_translation_has_the_arguments_of_torchs_operator() -> None:
    import inspect

    for operator, function in TRANSLATIONS.items():
        wanted = [argument.name for argument in operator._schema.arguments]  # type: ignore[attr-defined]
        assert [*inspect.signature(function).parameters][: len(wanted)] == wanted, operator
