"""The same arithmetic on a CUDA device as on the CPU; skipped where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qpipe.numerics.fake_quantize import FakeQuantize
from qpipe.numerics.grid import encoding_from_range, quantize_dequantize
from qpipe.numerics.learning.optimize import learn
from qpipe.numerics.learning.options import LearningOptions
from qpipe.numerics.learning.roundings import ROUNDINGS, RoundingName, start
from qpipe.numerics.learning.variables import Free
from qpipe.numerics.observers import HistogramObserver, weight_encoding
from qpipe.numerics.rounding.gram import GramOptions, solve
from qpipe.numerics.rounding.moments import LayerMoments
from qpipe.numerics.rounding.rows import RowGrid
from qpipe.numerics.rounding.unfold import Unfold, sample_positions
from qpipe.numerics.scheme import TensorScheme

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("channels", [False, True])
def test_fake_quantize_on_cuda_equals_numpy_bit_for_bit(channels: bool) -> None:
    x = np.random.default_rng(0).normal(0, 3, (64, 1000)).astype(np.float32)
    scheme = TensorScheme(8, False, False, "per_channel" if channels else "per_tensor")
    bound = np.linspace(0.7, 3, 64) if channels else 2.9
    e = encoding_from_range(-bound, 0.9 * bound, scheme, axis=0)
    quantizer = FakeQuantize.from_encoding(e).cuda()
    assert quantizer(torch.tensor(x).cuda()).cpu().numpy().tobytes() == quantize_dequantize(x, e).tobytes()


def test_an_observer_takes_tensors_from_cuda() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    one, other = HistogramObserver(), HistogramObserver()
    one.update(x)
    other.update(x.cuda())
    np.testing.assert_array_equal(one.state()["counts"], other.state()["counts"])


def test_rows_moments_and_solver_run_on_cuda_and_repeat_their_bits() -> None:
    draw = torch.Generator().manual_seed(0)
    unfold = Unfold("conv", kernel_shape=(3, 3), pads=(1, 1, 1, 1), groups=2)
    weight, x = torch.randn(8, 4, 3, 3, generator=draw), torch.relu(torch.randn(64, 8, 9, 9, generator=draw))

    def run(device: str) -> tuple[torch.Tensor, float]:
        rows = unfold.weight_rows(weight.to(device))
        moments = LayerMoments(2, 36, rows, device)
        where = sample_positions(81, 25, 0, 64, seed=0)
        inputs = unfold.rows(x.to(device), where)
        moments.update(inputs * 1.02, inputs, samples=64)
        scale = rows.abs().amax(-1, keepdim=True) / 7
        grid = RowGrid(scale, torch.zeros_like(scale), -8, 7)
        result = solve(rows, grid, moments.fit, moments.held_out, None, GramOptions(scale_search=True))
        return result.values.cpu(), float(result.report["error_after"])

    on_cuda, on_cpu = run("cuda"), run("cpu")
    assert torch.equal(on_cuda[0], run("cuda")[0])
    assert on_cuda[1] == pytest.approx(on_cpu[1], rel=0.05)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_weights_are_learned_on_cuda_and_repeat_their_bits(rounding: RoundingName) -> None:
    draw = torch.Generator().manual_seed(0)
    w, b = torch.randn(12, 16, generator=draw), torch.randn(12, generator=draw)
    x = torch.randn(200, 4, generator=draw) @ torch.randn(4, 16, generator=draw)
    e = weight_encoding(w.numpy(), TensorScheme(3, True, True, "per_channel", observer="mse"))
    rates = {"weight": 2e-2, "scale": 1e-3, "bias": 1e-3}

    def run(device: str) -> tuple[torch.Tensor, float]:
        given, target = x.to(device), torch.relu(x @ w.T + b).to(device)
        found = learn(
            {"w": start(rounding, w.to(device), w.to(device), e, learn_scale=True), "b": Free(b.to(device))},
            lambda v, batch, draw: torch.relu(batch @ v["w"].T + v["b"]),
            lambda index, draw: (given[index.to(device)], target[index.to(device)]),
            200, options=LearningOptions(iterations=150, rates=rates, reg_param=1.0),
        )  # fmt: skip
        return found.values["w"].cpu(), found.report["error_after"]

    on_cuda, on_cpu = run("cuda"), run("cpu")
    assert torch.equal(on_cuda[0], run("cuda")[0])
    assert on_cuda[1] == pytest.approx(on_cpu[1], rel=0.2)
