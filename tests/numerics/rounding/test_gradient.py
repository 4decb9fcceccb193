"""AdaRound by gradient: the published check numbers, the loop's promises, and what it reaches on small layers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qpipe.numerics.grid import Encoding, quantize_dequantize
from qpipe.numerics.observers import weight_encoding
from qpipe.numerics.rounding.gradient import (
    GradientOptions,
    GradientResult,
    Rounding,
    beta_at,
    optimize,
    rectified_sigmoid,
    rounding_loss,
    samples_of,
    start_of,
)
from qpipe.numerics.scheme import TensorScheme

V = torch.tensor(np.random.RandomState(0).rand(1, 3, 12, 12))


def test_beta_and_the_rounding_loss_take_the_published_values() -> None:
    options = GradientOptions(iterations=10000)
    assert beta_at(8000, 10000, options.beta_range, options.warm_start) == 4.636038969321072
    assert rounding_loss(V, 10, 10000, options) is None
    late = rounding_loss(V, 8000, 10000, options)
    assert late is not None
    assert float(late) == pytest.approx(4.266156963161077, rel=1e-14)


def test_beta_falls_from_its_start_to_its_end() -> None:
    betas = [beta_at(i, 1000, (20.0, 2.0), 0.2) for i in range(0, 1001, 50)]
    assert betas[0] == betas[4] == 20.0
    assert betas[-1] == pytest.approx(2.0)
    assert betas[4:] == sorted(betas[4:], reverse=True)


def test_iterations_depend_on_the_bitwidth_unless_given() -> None:
    assert GradientOptions().iterations_for(8) == 10000
    assert GradientOptions().iterations_for(4) == 15000
    assert GradientOptions(iterations=7).iterations_for(4) == 7


def test_v_starts_where_h_is_the_fraction() -> None:
    fraction = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(rectified_sigmoid(start_of(fraction)), fraction)


def _weight() -> tuple[Tensor, Encoding]:
    w = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    return torch.tensor(w), weight_encoding(w, TensorScheme(3, True, False, "per_channel", observer="mse"))


def test_a_rounding_starts_soft_at_the_weight_and_hard_at_nearest() -> None:
    w, e = _weight()
    rounding = Rounding(w, e)
    nearest = torch.tensor(quantize_dequantize(w.numpy(), e))
    scale, zero_point = (torch.tensor(v)[:, None] for v in (e.scale, e.zero_point))
    inside = ((w / scale).floor() >= e.qmin - zero_point) & ((w / scale).ceil() <= e.qmax - zero_point)
    assert float(inside.double().mean()) > 0.7
    torch.testing.assert_close(rounding.soft().detach()[inside], w[inside], rtol=1e-5, atol=1e-6)
    assert torch.equal(rounding.nearest(), nearest)
    assert torch.equal(rounding.hard(), nearest)


class _Case:
    """A small layer with a Relu behind it, correlated inputs that the quantized part has shifted a little."""

    def __init__(self, samples: int = 256) -> None:
        draw = torch.Generator().manual_seed(0)
        self.weight = torch.randn(8, 16, generator=draw)
        plain = TensorScheme(3, True, True, "per_channel", observer="minmax", grid="max")
        self.encoding = weight_encoding(self.weight.numpy(), plain)
        x = torch.randn(samples, 6, generator=draw) @ torch.randn(6, 16, generator=draw)
        self.inputs = x + 0.02 * torch.randn(samples, 16, generator=draw)
        self.targets = F.relu(x @ self.weight.T)

    def run(
        self, progress: Callable[[int, int], None] | None = None, seed: int = 0, **options: object
    ) -> GradientResult:
        chosen = {"iterations": 800, "learning_rate": 3e-2, **options}
        return optimize(
            {"w": Rounding(self.weight, self.encoding)},
            lambda weights, x: F.relu(x @ weights["w"].T),
            samples_of(self.inputs, self.targets),
            len(self.inputs),
            options=GradientOptions(**chosen),  # type: ignore[arg-type]
            seed=seed,
            progress=progress,
        )

    def error(self, weight: Tensor) -> float:
        y = F.relu(self.inputs.double() @ weight.double().T)
        return float((y - self.targets).square().sum() / self.targets.double().square().sum())


def test_the_result_is_on_the_grid_and_better_than_nearest() -> None:
    case = _Case()
    result = case.run()
    w = result.weights["w"]
    assert torch.equal(torch.tensor(quantize_dequantize(w.numpy(), case.encoding)), w)
    assert result.report["kept"] == "gradient"
    assert result.report["error_before"] == pytest.approx(
        case.error(torch.tensor(quantize_dequantize(case.weight.numpy(), case.encoding))), rel=1e-5
    )
    assert result.report["error_after"] == pytest.approx(case.error(w), rel=1e-5)
    assert result.report["error_after"] < 0.8 * result.report["error_before"]
    steps = (w - case.weight).abs() / torch.tensor(case.encoding.scale)[:, None]
    assert float(steps.max()) < 1.0 + 1e-5


def test_the_seed_alone_decides() -> None:
    torch.manual_seed(1)
    one = _Case().run(seed=5)
    torch.manual_seed(2)
    other = _Case().run(seed=5)
    assert torch.equal(one.weights["w"], other.weights["w"])
    assert one.report == other.report


def test_a_result_worse_than_nearest_is_dropped_and_said() -> None:
    # A rate so high that the roundings end anywhere.
    result = _Case().run(learning_rate=50.0, iterations=30)
    assert result.report["kept"] == "nearest"
    assert result.report["changed"] == 0.0
    assert torch.equal(result.weights["w"], Rounding(_Case().weight, _Case().encoding).nearest())


def test_early_stop_ends_sooner_and_restores_the_best_it_saw() -> None:
    patient = _Case().run(iterations=4000, early_stop=3, check_every=50)
    assert patient.report["iterations"] < 4000
    # Never stopping, the same steps are taken with and without checks: only the restoring differs.
    wild = {"iterations": 200, "learning_rate": 0.3, "reg_param": 0.0, "batch_size": 1}
    restored, last = _Case().run(early_stop=1000, check_every=10, **wild), _Case().run(**wild)
    assert restored.report["iterations"] == last.report["iterations"] == 200
    assert restored.report["error_after"] < last.report["error_after"]


def test_two_weights_of_a_block_are_learned_together() -> None:
    draw = torch.Generator().manual_seed(0)
    first, second = torch.randn(12, 8, generator=draw), torch.randn(4, 12, generator=draw)
    x = torch.randn(256, 3, generator=draw) @ torch.randn(3, 8, generator=draw)
    scheme = TensorScheme(3, True, True, "per_channel", observer="minmax", grid="max")

    def forward(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return F.relu(x @ weights["a"].T) @ weights["b"].T

    result = optimize(
        {name: Rounding(w, weight_encoding(w.numpy(), scheme)) for name, w in (("a", first), ("b", second))},
        forward,
        samples_of(x, forward({"a": first, "b": second}, x)),
        256,
        options=GradientOptions(iterations=800, learning_rate=3e-2),
    )
    assert set(result.weights) == {"a", "b"}
    assert result.report["error_after"] < 0.6 * result.report["error_before"]


def test_progress_reaches_the_end_and_batches_come_by_index() -> None:
    seen: list[tuple[int, int]] = []
    _Case(samples=10).run(lambda done, total: seen.append((done, total)), iterations=250)
    assert seen[-1] == (250, 250)
    assert 100 <= len(seen) <= 130


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"iterations": 0}, "iterations must be"),
        ({"warm_start": 1.0}, "warm_start"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_options_out_of_range_are_refused(option: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientOptions(**option)  # type: ignore[arg-type]
