"""One layer rounded: what comes out lies on a frozen grid, and what was solved is found again by all that counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from qpipe.keys.hashing import digest
from qpipe.methods.rounding.by_gram import Rounded, round_by_gram
from qpipe.model import Model
from qpipe.model.structure.layers import find_layers
from qpipe.numerics.grid import quantize_dequantize, same_grid
from qpipe.numerics.rounding.gram import GramOptions
from qpipe.numerics.scheme import Grid
from tests.model.nets import normal, parsed
from tests.model.quantized import quantized, scheme

X = {"x": normal(60, 4, 5, 5)}


class Memo:
    """Keeps what was made, and counts it."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def __call__(self, name: str, fn: Callable[..., Any], *inputs: Any) -> Any:
        key = digest(name, list(inputs))
        if key not in self.kept:
            self.kept[key] = fn(*inputs)
        return self.kept[key]


def model(bias: bool = True, power_of_two: bool = False, grid: Grid = "max") -> Model:
    given = "x, w, b" if bias else "x, w"
    text = f"m (float[N,4,5,5] x) => (float[N,6,p,q] y) {{ s = Conv({given})  y = Relu(s) }}"
    tensors = {"w": normal(6, 4, 3, 3), "b": normal(6, seed=1)}
    net = Model.from_proto(parsed(text, **{name: tensors[name] for name in given.replace(" ", "").split(",")[1:]}))
    wanted = scheme(weight=4)
    net = quantized(net, X, replace(wanted, weight=replace(wanted.weight, observer="minmax", grid=grid)))
    if power_of_two:
        w = net.encodings["w"]
        net = net.with_encodings({**net.encodings, "w": replace(w, scale=2.0 ** np.ceil(np.log2(w.scale)))})
    return net


def batches(seed: int = 0, noise: float = 0.0) -> list[torch.Tensor]:
    drawn = [torch.tensor(normal(30, 4, 5, 5, seed=seed + i)) for i in range(2)]
    return [batch + noise * torch.tensor(normal(30, 4, 5, 5, seed=9)) for batch in drawn]


def by_gram(net: Model, x_hat: list[torch.Tensor], x: list[torch.Tensor], memo: Memo, **options: Any) -> Rounded:
    (layer,) = find_layers(net)
    given = {"positions": 9, "seed": 0, **{n: options.pop(n) for n in ("positions", "seed") if n in options}}
    return round_by_gram(net, layer, x_hat, x, options=GramOptions(**options), memo=memo, **given)


def test_a_rounded_weight_lies_on_its_grid_which_is_frozen() -> None:
    net, x = model(), batches()
    found = by_gram(net, batches(noise=0.1), x, Memo())
    assert found.encoding.frozen
    assert same_grid(found.encoding, net.encodings["w"])
    np.testing.assert_array_equal(quantize_dequantize(found.weight, found.encoding), found.weight)
    assert found.report["error_after"] < found.report["error_before"]
    assert found.bias is not None
    assert found.bias.shape == (6,)


def test_a_layer_without_a_bias_gets_none_and_one_that_may_not_move_stays() -> None:
    assert by_gram(model(bias=False), batches(noise=0.1), batches(), Memo()).bias is None
    assert by_gram(model(), batches(noise=0.1), batches(), Memo(), update_bias=False).bias is None


def test_scales_that_are_all_powers_of_two_stay_so_when_they_are_searched() -> None:
    net = model(power_of_two=True)
    found = by_gram(net, batches(noise=0.1), batches(), Memo(), scale_search=True)
    assert bool(np.all(np.frexp(found.encoding.scale)[0] == 0.5))
    free = by_gram(model(), batches(noise=0.1), batches(), Memo(), scale_search=True)
    assert not np.array_equal(free.encoding.scale, model().encodings["w"].scale)


def test_the_sign_of_a_scale_moves_with_it_where_it_is_free() -> None:
    """Every scale with the wrong sign to begin with: the search turns some, as the closed form of each row says."""
    net = model(grid="signed_max")
    w = net.encodings["w"]
    turned = net.with_encodings({**net.encodings, "w": replace(w, zero_point=-1 - w.zero_point)})
    assert w.free_sign
    found = by_gram(turned, batches(noise=0.1), batches(), Memo(), scale_search=True)
    assert (found.encoding.zero_point != turned.encodings["w"].zero_point).any()
    assert found.encoding.free_sign
    np.testing.assert_array_equal(quantize_dequantize(found.weight, found.encoding), found.weight)
    kept = by_gram(turned, batches(noise=0.1), batches(), Memo())
    np.testing.assert_array_equal(kept.encoding.zero_point, turned.encodings["w"].zero_point)
    assert found.report["error_after"] < kept.report["error_after"]
    plain = by_gram(model(), batches(noise=0.1), batches(), Memo(), scale_search=True)
    assert not plain.encoding.zero_point.any()


def test_a_solution_is_found_again_by_weight_grid_data_and_options() -> None:
    net, memo = model(), Memo()
    x_hat, x = batches(noise=0.1), batches()
    by_gram(net, x_hat, x, memo)
    by_gram(net, x_hat, x, memo)
    by_gram(net.with_metadata({"notes": ["other words"]}), x_hat, x, memo)
    assert len(memo.kept) == 1
    grids = {**net.encodings, "w": replace(net.encodings["w"], scale=2 * net.encodings["w"].scale)}
    others: list[tuple[Model, list[torch.Tensor], dict[str, Any]]] = [
        (net.with_params({"w": net.param("w") * 1.1}), x_hat, {}),
        (net.with_params({"b": net.param("b") + 1}), x_hat, {}),
        (net.with_encodings(grids), x_hat, {}),
        (net, batches(noise=0.2), {}),
        (net, x_hat, {"positions": 4}),
        (net, x_hat, {"positions": 4, "seed": 1}),
        (net, x_hat, {"beam": 2}),
    ]
    for count, (other, inputs, options) in enumerate(others, 2):
        by_gram(other, inputs, x, memo, **options)
        assert len(memo.kept) == count
