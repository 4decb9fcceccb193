"""The shorter way through torch's exporter: the same model, and nothing replaced that is not as it is known."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn
from torch.onnx._internal.exporter import _building, _dispatching, _registration
from torch.onnx._internal.fx.passes import type_promotion

from qpipe.model.torch_export import exporter, shortcuts

ENTRY, INTERPRETER = _registration.OnnxDecompMeta, type_promotion._TypePromotionInterpreter


class Promoting(nn.Module):
    """Numbers of several types meet, one of them how many samples there are."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        y = self.linear(x + n) * x.shape[0] + n.to(torch.float16)
        return torch.where(n > 1, y, n) ** 2, torch.cat([n / 3, x.half().float()], 1).sum() - n.sum() * 0.5


@pytest.mark.slow
def test_the_shorter_way_leads_to_the_same_model(monkeypatch: pytest.MonkeyPatch) -> None:
    module, example = Promoting(), (torch.randn(2, 4), torch.arange(8).reshape(2, 4))
    short = exporter.from_torch(module, example)
    monkeypatch.setattr(exporter, "shortcuts", contextlib.nullcontext)
    whole = exporter.from_torch(module, example)
    assert "Cast" in {node.op_type for node in whole.graph}  # a type was promoted
    (meta, blobs), (wanted, wanted_blobs) = short.pack(), whole.pack()
    assert meta == wanted
    assert {name: bytes(blob) for name, blob in blobs.items()} == {
        name: bytes(blob) for name, blob in wanted_blobs.items()
    }


def test_what_was_replaced_is_back_afterwards() -> None:
    made, step = ENTRY.__post_init__, INTERPRETER.run_node
    with contextlib.suppress(KeyError), shortcuts.shortcuts():
        assert ENTRY.__post_init__ is not made
        assert INTERPRETER.run_node is not step
        raise KeyError
    assert ENTRY.__post_init__ is made
    assert INTERPRETER.run_node is step
    assert "call_function" not in vars(INTERPRETER)


def reading_signatures(node: object, registry: object) -> object:
    return registry.signature  # type: ignore[attr-defined]


def never_working_it_out(self: object, function: object, args: object, kwargs: object) -> None:
    """As an exporter does that has a signature for every function."""


def test_nothing_is_replaced_where_torch_goes_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shortcuts._signatures() is not None
    with monkeypatch.context() as patch:
        patch.setattr(_dispatching, "dispatch", reading_signatures)
        assert shortcuts._signatures() is None
    with monkeypatch.context() as patch:
        patch.setattr(_building.OpRecorder, "eval_function", never_working_it_out)
        assert shortcuts._signatures() is None
    with monkeypatch.context() as patch:
        patch.delattr(_registration, "OnnxDecompMeta")
        assert shortcuts._signatures() is None
    assert shortcuts._promotion() is not None
    monkeypatch.setattr(INTERPRETER, "run_node", lambda self, node, more: None)
    assert shortcuts._promotion() is None
