"""AdaRound's own optimization, layer by layer: what is minimized, what counts, and that each option acts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qpipe.methods.rounding.by_gradient import GradientOptions, _posed, round_by_gradient
from qpipe.methods.rounding.walk import Rounded
from qpipe.model import Model
from qpipe.model.structure.layers import find_layers
from qpipe.numerics.grid import quantize_dequantize
from qpipe.numerics.learning.options import beta_at
from tests.methods.rounding.test_by_gram import Memo, batches, model
from tests.model.nets import normal, parsed
from tests.model.quantized import quantized, scheme

OPTIONS: dict[str, Any] = {"iterations": 60, "lr": 3e-2}


def solved(
    net: Model,
    x_hat: list[torch.Tensor],
    x: list[torch.Tensor],
    *,
    positions: int = 9,
    seed: int = 0,
    memo: Memo | None = None,
    **options: Any,
) -> Rounded:
    (layer,) = find_layers(net)
    chosen = GradientOptions(**{**OPTIONS, **options})
    return round_by_gradient(
        net, layer, x_hat, x, options=chosen, positions=positions, seed=seed, memo=memo or Memo()
    )


def relu(net: Model, weight: np.ndarray, inputs: torch.Tensor) -> torch.Tensor:
    b = torch.tensor(net.param("b"))
    return torch.relu(torch.conv2d(inputs.double(), torch.tensor(weight).double(), b.double()))


def test_beta_takes_its_published_value() -> None:
    assert beta_at(8000, 10000, (20.0, 2.0), 0.2) == 4.636038969321072
    options = GradientOptions(iterations=10000).learning(4, None)
    assert options.beta_at(10) is None
    assert options.beta_at(8000) == 4.636038969321072


def test_iterations_depend_on_the_bitwidth_unless_given() -> None:
    assert GradientOptions().iterations_for(8) == 10000
    assert GradientOptions().iterations_for(4) == 15000
    assert GradientOptions(iterations=7).iterations_for(4) == 7


def test_errors_are_those_behind_the_activation_on_the_samples_held_out() -> None:
    """All nine places of each output: rows of them, and every tenth sample, by torch's own convolution."""
    net, x_hat, x = model(), batches(noise=0.1), batches()
    found = solved(net, x_hat, x, iterations=200)
    np.testing.assert_array_equal(quantize_dequantize(found.weight, found.encoding), found.weight)
    assert found.encoding.frozen
    assert found.bias is None
    wanted = relu(net, net.param("w"), torch.cat(x))
    nearest = quantize_dequantize(net.param("w"), net.encodings["w"])
    every = np.arange(len(wanted))
    for names, chosen in (("error", every % 10 == 4), ("tuning", every % 10 != 4)):
        for name, weight in (("before", nearest), ("after", found.weight)):
            wrong = relu(net, weight, torch.cat(x_hat)) - wanted
            error = wrong[chosen].square().sum() / wanted[chosen].square().sum()
            assert found.report[f"{names}_{name}"] == pytest.approx(float(error), rel=1e-4)
    assert found.report["error_after"] < found.report["error_before"]
    assert found.report["kept"] == "gradient"


SHAPES = [
    ("Conv<pads=[1,1,1,1]>(x, w, b)", (6, 4, 3, 3), "4,5,5", 4),
    ("Conv<group=2, strides=[2,2]>(x, w, b)", (6, 2, 3, 3), "4,5,5", 3),
    ("Conv<group=4, pads=[1,0,1,2], dilations=[1,2]>(x, w, b)", (4, 1, 3, 2), "4,5,5", 4),
    ("Conv<group=4, strides=[2]>(x, w, b)", (4, 1, 3), "4,25", 4),
    ("ConvTranspose<strides=[2,2], group=2>(x, w, b)", (4, 3, 3, 3), "4,5,5", 9),
    ("ConvTranspose<group=4>(x, w, b)", (4, 1, 3, 3), "4,5,5", 9),
]


@pytest.mark.parametrize(("op", "shape", "sample", "positions"), SHAPES)
def test_rows_and_windows_give_what_the_layer_gives_at_their_places(
    op: str, shape: tuple[int, ...], sample: str, positions: int
) -> None:
    """Targets are cut out of the layer's own outputs; from the rows, the same must come out."""
    channels = 6 if "group=2" in op and "Transpose" in op else shape[0]
    rank = sample.count(",")
    out = ",".join("pqr"[:rank])
    text = f"m (float[N,{sample}] x) => (float[N,{channels},{out}] y) {{ s = {op}  y = PRelu(s, a) }}"
    tensors: dict[str, Any] = {"w": normal(*shape), "b": normal(channels, seed=1)}
    tensors["a"] = normal(channels, *(1,) * rank, seed=2)
    x = [torch.tensor(normal(n, *map(int, sample.split(",")), seed=n)) for n in (3, 4)]
    net = Model.from_proto(parsed(text, **tensors))
    (layer,) = find_layers(net)
    posed = _posed(net, layer, x, x, False, positions, 0)
    assert len(posed.targets) == 7
    found = posed.forward(torch.tensor(net.param("w")), posed.inputs)
    torch.testing.assert_close(found, posed.targets, rtol=1e-4, atol=1e-5)
    places = posed.targets[0].numel() // channels
    whole = layer.op_type == "ConvTranspose" and layer.depthwise
    assert whole or places in (positions, 4), places  # a window of 3 places is one of 4


def test_a_slope_for_every_place_leaves_the_layer_whole() -> None:
    text = "m (float[N,4,5,5] x) => (float[N,6,3,3] y) { s = Conv(x, w, b)  y = PRelu(s, a) }"
    tensors: dict[str, Any] = {"w": normal(6, 4, 3, 3), "b": normal(6, seed=1), "a": normal(6, 3, 3, seed=2)}
    net = quantized(Model.from_proto(parsed(text, **tensors)), {"x": normal(30, 4, 5, 5)}, scheme(weight=3))
    assert [layer.activation for layer in find_layers(net)] != [()]
    found = solved(net, batches(noise=0.1), batches(), positions=2, iterations=0)
    assert found.report == solved(net, batches(noise=0.1), batches(), positions=9, iterations=0).report


def test_every_option_acts() -> None:
    net, x_hat, x = model(), batches(noise=0.3), batches()
    strong = {**OPTIONS, "reg_param": 1.0}
    plain = solved(net, x_hat, x, **strong)
    others: list[dict[str, Any]] = [
        {"iterations": 59}, {"batch_size": 8}, {"lr": 0.1}, {"reg_param": 0.0}, {"warm_start": 0.9},
        {"beta_range": (3.0, 1.0)},
        {"lr_adjust": (0.0, 0.2)}, {"drop_ratio": 0.5}, {"drop_ratio": 0.0}, {"positions": 4}, {"seed": 1},
    ]  # fmt: skip
    for options in others:
        assert solved(net, x_hat, x, **{**strong, **options}).report != plain.report, options
    assert solved(net, x_hat, x, **strong, lr_adjust=(1e9, 0.2)).report == plain.report
    long: dict[str, Any] = {"iterations": 3000, "lr": 0.1}
    assert solved(net, x_hat, x, early_stop=2, **long).report["iterations"] < 3000


def test_what_was_solved_is_found_again_by_all_that_counts() -> None:
    net, memo = model(), Memo()
    x_hat, x = batches(noise=0.1), batches()
    for _ in range(2):
        solved(net, x_hat, x, memo=memo)
    assert len(memo.kept) == 1
    solved(net, x_hat, x, memo=memo, seed=1)
    solved(net, x_hat, batches(seed=3), memo=memo)
    solved(net, x_hat, x, memo=memo, drop_ratio=0.5)
    assert len(memo.kept) == 4
