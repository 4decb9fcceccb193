"""Programs that are taken apart where they need it: the same numbers as torch's own way, which is not gone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from qpipe.model import Model
from qpipe.model.torch_export.decomposition import decomposing_in_place
from qpipe.model.torch_export.fidelity import check


class Attending(nn.Module):
    """A convolution, its norm, attention with a mask that is computed, views of what is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)).flatten(2).transpose(1, 2).contiguous()
        q = y.to(torch.float64).to(torch.float32).reshape(-1, y.shape[1], 2, 4).transpose(1, 2)
        steps = torch.arange(y.shape[1], device=x.device)
        mask = (steps[:, None] >= steps[None, :]) & (torch.diff(steps, prepend=steps[:1]) < 2)
        y = nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        a, b = y.transpose(1, 2).reshape(-1, y.shape[2], 8).chunk(2, 1)
        found: Tensor = self.out(torch.cat([a, b], 1)).min(1).values
        return found


class Writing(nn.Module):
    """Writes into what it makes, and into its input."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y[:, 0] += 1.0
        x.add_(1.0)
        return y * x


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How often torch's own way was gone."""
    gone: list[str] = []
    way = ExportedProgram.run_decompositions

    def run(self: ExportedProgram, table: Any = None) -> ExportedProgram:
        gone.append(type(self).__name__)
        program: ExportedProgram = way(self, table)
        return program

    monkeypatch.setattr(ExportedProgram, "run_decompositions", run)
    return gone


def test_a_program_that_writes_nothing_is_not_traced_again_and_computes_the_same(whole: list[str]) -> None:
    torch.manual_seed(0)
    module = Attending().eval()
    with torch.no_grad():
        module.norm.running_mean.normal_()  # type: ignore[operator, union-attr]
    example = torch.randn(2, 3, 6, 6)
    model = Model.from_torch(module, example)
    assert whole == []
    assert model.inputs[0].shape[0] == "batch"
    error = check(module, example, model, {"x": torch.randn(3, 3, 6, 6).numpy()}, deployed=True)
    assert error is not None
    assert error < 1e-5


def test_a_program_that_writes_goes_torchs_own_way(whole: list[str]) -> None:
    example = torch.randn(2, 3)
    model = Model.from_torch(Writing(), example)
    assert whole != []
    error = check(Writing(), example, model, deployed=True)
    assert error is not None
    assert error < 1e-5


def test_torchs_own_way_is_put_back() -> None:
    before = ExportedProgram.run_decompositions
    with decomposing_in_place():
        assert ExportedProgram.run_decompositions is not before
    assert ExportedProgram.run_decompositions is before
