"""The loop: same seed, same bits; the start is kept where nothing is better; what each option does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qpipe.numerics.fake_quantize import fake_quantize
from qpipe.numerics.grid import Encoding, quantize_dequantize
from qpipe.numerics.learning.losses import by_sample, features, mse
from qpipe.numerics.learning.optimize import Learned, Learning, SignSGD, learn
from qpipe.numerics.learning.options import LearningOptions
from qpipe.numerics.learning.roundings import start
from qpipe.numerics.learning.variables import Free, Step, Variable
from qpipe.numerics.observers import weight_encoding
from qpipe.numerics.scheme import TensorScheme


class Case:
    """Two layers with a Relu between, 3 bits, correlated inputs; the target is the float network."""

    def __init__(self, samples: int = 200) -> None:
        draw = torch.Generator().manual_seed(0)
        self.samples = samples
        self.weights = {"a": torch.randn(12, 8, generator=draw), "b": torch.randn(4, 12, generator=draw)}
        self.bias = torch.randn(12, generator=draw)
        self.x = torch.randn(samples, 3, generator=draw) @ torch.randn(3, 8, generator=draw)
        scheme = TensorScheme(3, True, True, "per_channel", observer="mse")
        self.encodings = {name: weight_encoding(w.numpy(), scheme) for name, w in self.weights.items()}
        self.targets = self.forward({**self.weights, "bias": self.bias}, self.x, None)

    @staticmethod
    def forward(values: Mapping[str, Tensor], x: Tensor, draw: Any) -> Tensor:
        return F.relu(x @ values["a"].T + values["bias"]) @ values["b"].T

    def batches(self, index: Tensor, draw: Any) -> tuple[Tensor, Tensor]:
        return self.x[index], self.targets[index]

    def variables(self, rounding: Any = "ste_weight") -> dict[str, Variable]:
        found: dict[str, Variable] = {
            name: start(rounding, w, w, self.encodings[name], learn_scale=True)
            for name, w in self.weights.items()
        }
        return {**found, "bias": Free(self.bias)}

    def learning(self, seed: int = 0, **options: Any) -> Learning:
        given = {"iterations": 60, "rates": {"weight": 2e-2, "scale": 1e-3, "bias": 1e-3}, **options}
        return Learning(
            self.variables(), self.forward, self.batches, self.samples, options=LearningOptions(**given), seed=seed
        )

    def run(self, seed: int = 0, **options: Any) -> Learned:
        learning = self.learning(seed, **options)
        learning.run()
        return learning.learned()


def same(one: Learned, other: Learned) -> bool:
    return one.report == other.report and all(torch.equal(v, other.values[n]) for n, v in one.values.items())


def test_learning_lowers_the_error_on_samples_it_did_not_see_and_ends_on_the_grid() -> None:
    case = Case()
    found = case.run(iterations=200)
    assert found.report["kept"] == "after"
    assert found.report["error_after"] < 0.7 * found.report["error_before"]
    assert found.report["tuning_after"] < 0.7 * found.report["tuning_before"]
    assert 0.0 < found.report["changed"] < 1.0
    for name, encoding in found.encodings.items():
        assert np.array_equal(quantize_dequantize(found.values[name].numpy(), encoding), found.values[name].numpy())
    assert set(found.encodings) == {"a", "b"}
    assert not torch.equal(found.values["bias"], case.bias)


def test_the_seed_alone_decides() -> None:
    torch.manual_seed(1)
    one = Case().run(seed=5)
    torch.manual_seed(2)
    assert same(one, Case().run(seed=5))
    assert not same(one, Case().run(seed=6))


def test_what_goes_on_from_a_state_ends_with_the_same_bits() -> None:
    whole, first, second = Case().learning(), Case().learning(), Case().learning()
    whole.run()
    first.run(23)
    second.load(first.state())
    first.run(40)
    assert second.done == 23
    second.run()
    assert same(whole.learned(), second.learned())


def test_without_an_iteration_or_a_gain_the_start_is_kept() -> None:
    case = Case()
    for found in (case.run(iterations=0), case.run(rates={"weight": 300.0, "bias": 10.0}), case.run(rates={})):
        assert found.report["kept"] == "before"
        assert found.report["error_after"] == found.report["error_before"]
        assert found.report["tuning_after"] == found.report["tuning_before"]
        assert found.report["changed"] == 0.0
        assert torch.equal(found.values["bias"], case.bias)
        for name, w in case.weights.items():
            nearest = quantize_dequantize(w.numpy(), case.encodings[name])
            assert np.array_equal(found.values[name].numpy(), nearest)


def test_a_kind_without_a_rate_stays() -> None:
    case = Case()
    found = case.run(rates={"weight": 2e-2})
    assert torch.equal(found.values["bias"], case.bias)
    assert np.array_equal(found.encodings["a"].scale, case.encodings["a"].scale)
    found = case.run(rates={"scale": 1e-2, "weight": 0.0})
    assert found.report["changed"] == 0.0
    assert not np.array_equal(found.encodings["a"].scale, case.encodings["a"].scale)


def test_errors_are_those_of_samples_held_out_and_of_the_others() -> None:
    case, held = Case(), torch.arange(0, 200, 7)
    learning = Learning(
        case.variables(), case.forward, case.batches, 200, held_out=held, options=LearningOptions(iterations=0)
    )
    report = learning.learned().report
    y = case.forward({n: v.hard() for n, v in case.variables().items()}, case.x, None).double()
    error, energy = (y - case.targets).square().sum(1), case.targets.double().square().sum(1)
    rest = torch.tensor([i for i in range(200) if i % 7])
    for name, index in (("error_before", held), ("tuning_before", rest)):
        assert report[name] == pytest.approx(float(error[index].sum() / energy[index].sum()), rel=1e-5)


def test_samples_held_out_are_not_learned_on() -> None:
    case, seen = Case(), set()

    def batches(index: Tensor, draw: Any) -> tuple[Tensor, Tensor]:
        if draw is not None:
            seen.update(index.tolist())
        return case.batches(index, draw)

    held = torch.arange(10)
    learn(case.variables(), case.forward, batches, 200, held_out=held, options=LearningOptions(iterations=100))
    assert seen == set(range(10, 200))


def test_the_best_of_all_looks_comes_out_and_patience_ends_sooner() -> None:
    wild: dict[str, Any] = {"rates": {"weight": 0.03}, "schedule": "constant", "batch_size": 2, "iterations": 150}
    often = Case().run(check_every=1, **wild)
    assert often.report["error_after"] < Case().run(check_every=150, **wild).report["error_after"]
    patient = Case().run(check_every=1, early_stop=3, **wild)
    assert patient.report["iterations"] < 150


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("cosine", [0.5 * (1 + math.cos(math.pi * t / 4)) for t in range(4)]),
        ("linear", [1.0, 0.75, 0.5, 0.25]),
        ("constant", [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_a_schedule_scales_every_rate(schedule: Any, shares: list[float]) -> None:
    options = LearningOptions(iterations=4, schedule=schedule)
    assert [options.share_of_rate(t) for t in range(4)] == pytest.approx(shares)
    # By SignSGD each step's length is the rate itself; the gradient of a bias alone, always upward.
    bias = Free(torch.zeros(1))
    x, far = torch.zeros(4, 1), torch.full((4, 1), 9.0)
    options = LearningOptions(4, schedule=schedule, optimizer="signsgd", rates={"bias": 0.1}, hold_out=0.0)
    learn({"bias": bias}, lambda v, x, draw: v["bias"] + x, lambda i, draw: (x[i], far[i]), 4, options=options)
    assert float(bias.hard()) == pytest.approx(0.1 * sum(shares), rel=1e-6)


def test_signsgd_goes_by_the_sign() -> None:
    p = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    p.grad = torch.tensor([1e-9, -5.0, 0.0])
    optimizer = SignSGD([{"params": [p], "lr": 0.5}])
    optimizer.step()
    assert p.tolist() == [0.5, 2.5, 3.0]


@pytest.mark.parametrize("apart", [False, True])
def test_where_the_judge_tells_outputs_apart_none_is_given_away(apart: bool) -> None:
    """One number that both outputs are: it gains nine times as much at the first as it costs at the second."""
    x = torch.randn(40, 1, generator=torch.Generator().manual_seed(0))
    targets = (x + 3.0, x)

    def judge(outputs: Any, wanted: Any) -> tuple[Tensor, Tensor]:
        rows = by_sample(outputs, wanted, [1.0, 9.0])
        return (rows if apart else rows.sum()), torch.tensor(float(len(rows)))

    found = learn(
        {"b": Free(torch.zeros(1))}, lambda v, x, draw: (x + v["b"], x + v["b"]),
        lambda i, draw: (x[i], tuple(t[i] for t in targets)), 40, judge=judge,
        loss=features([1.0, 9.0]), options=LearningOptions(40, rates={"bias": 0.1}, hold_out=0.25),
    )  # fmt: skip
    assert found.report["kept"] == ("before" if apart else "after")
    assert found.report.get("outputs_after") == (pytest.approx([9.0, 0.0]) if apart else None)


def test_lr_adjust_takes_the_other_rate_above_the_threshold() -> None:
    case = Case()
    plain, other = case.run(iterations=20), case.run(iterations=20, rates={"weight": 5e-2, "scale": 1e-3, "bias": 1e-3})
    assert same(case.run(iterations=20, lr_adjust=(1e6, 5e-2)), plain)
    assert same(case.run(iterations=20, lr_adjust=(1e-9, 5e-2)), other)
    y = case.forward({n: v.hard() for n, v in case.variables().items()}, case.x, None)
    near = float(mse()(y, case.targets))
    assert same(case.run(iterations=20, lr_adjust=(2 * near, 5e-2)), plain)
    assert same(case.run(iterations=20, lr_adjust=(near / 2, 5e-2)), other)


def test_a_batch_in_parts_takes_the_same_step() -> None:
    whole, parts = Case().run(iterations=5), Case().run(iterations=5, at_once=5)
    for name, value in whole.values.items():
        torch.testing.assert_close(value, parts.values[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(whole.values["bias"], Case().bias)


@pytest.mark.parametrize(("reg_param", "least", "most"), [(0.0, 0.5, 1.0), (1.0, 0.0, 0.05)])
def test_the_penalty_decides_the_roundings(reg_param: float, least: float, most: float) -> None:
    """The share of weights that are on neither side after the last step."""
    case = Case()
    rates = {"weight": 3e-2}
    options = LearningOptions(iterations=600, rates=rates, schedule="constant", reg_param=reg_param)
    variables = {**case.variables("rectified_sigmoid"), "bias": Free(case.bias)}
    learning = Learning(variables, case.forward, case.batches, 200, options=options)
    learning.run()
    between = [abs(v.value().detach() - v.hard()) for name, v in variables.items() if name in case.weights]
    steps = [torch.tensor(case.encodings[name].scale)[:, None] for name in case.weights]
    undecided = torch.cat([(each / step).flatten() > 0.05 for each, step in zip(between, steps, strict=True)])
    assert least <= float(undecided.double().mean()) <= most


def test_in_order_takes_the_samples_one_batch_after_the_other() -> None:
    seen: list[list[int]] = []
    case = Case(10)

    def batches(index: Tensor, draw: Any) -> tuple[Tensor, Tensor]:
        if draw is not None:
            seen.append(index.tolist())
        return case.batches(index, draw)

    options = LearningOptions(iterations=3, batch_size=4, hold_out=0.0, sampling="in_order")
    learn(case.variables(), case.forward, batches, 10, options=options)
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]


def test_progress_reaches_the_end() -> None:
    seen: list[tuple[int, int]] = []
    case = Case()
    learn(
        case.variables(), case.forward, case.batches, 200, options=LearningOptions(iterations=250),
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen[-1] == (250, 250)
    assert 100 <= len(seen) <= 130


def test_a_step_is_learned_beside_the_weights() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(300, 16, generator=draw).abs()
    grid = Encoding(4, False, False, np.array(0.9), np.array(0))  # far too wide

    def forward(values: Mapping[str, Tensor], batch: Tensor, draw: Any) -> Tensor:
        return fake_quantize(batch, values["s"], torch.tensor(0), 0, 15)

    options = LearningOptions(iterations=300, rates={"act_scale": 3e-2})
    found = learn({"s": Step(grid, 16)}, forward, lambda i, draw: (x[i], x[i]), 300, options=options)
    factors = np.float32(0.9) * np.geomspace(0.05, 1, 400).astype(np.float32)
    errors = [float((forward({"s": torch.tensor(s)}, x, None) - x).square().sum() / x.square().sum()) for s in factors]
    assert found.report["error_after"] < 1.1 * min(errors)
    assert float(found.encodings["s"].scale) == pytest.approx(float(factors[int(np.argmin(errors))]), rel=0.1)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"iterations": -1}, "iterations must be"),
        ({"warm_start": 1.0}, "warm_start"),
        ({"batch_size": 0}, "batch_size"),
        ({"hold_out": 1.0}, "hold_out"),
        ({"rates": {"weight": -1.0}}, "learning rate"),
    ],
)
def test_options_out_of_range_are_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearningOptions(**option)
