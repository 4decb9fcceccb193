"""Groups, costs and conversions of mixed precision on graphs of their own; the layerwise estimate against numpy."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qpipe.methods.mixing.choices import Choices, fewer_conversions, find_choices
from qpipe.methods.mixing.sensitivity import GramSensitivity, score_alone
from qpipe.methods.mixing.work import measure_work
from qpipe.methods.placement.calibration import (
    activation_encodings,
    observe,
    weight_encodings,
)
from qpipe.methods.placement.placement import place
from qpipe.model import Model
from qpipe.numerics.grid import quantize_dequantize
from qpipe.numerics.scheme import Scheme, TensorScheme
from tests.model.nets import normal, parsed
from tests.model.quantized import ONNXRUNTIME

WEIGHT, ACTIVATION = TensorScheme(4, True, True, "per_channel"), TensorScheme(8, False, False)
WIDTHS = {"w4a8": (4, 8), "w8a8": (8, 8), "w8a16": (8, 16)}


def found(
    model: Model, arrays: dict[str, Any], names: tuple[str, ...] = tuple(WIDTHS)
) -> tuple[Choices, Any]:
    """The choices of a model under the candidates, and the observers of its activations."""
    schemes = {
        name: Scheme(replace(WEIGHT, bitwidth=WIDTHS[name][0]), replace(ACTIVATION, bitwidth=WIDTHS[name][1]))
        for name in names
    }
    placements = {name: place(model, ONNXRUNTIME, scheme) for name, scheme in schemes.items()}
    first = next(iter(placements.values()))
    observers = observe(model, arrays, first, batch_size=8)
    grids = {
        name: {**activation_encodings(p, observers), **weight_encodings(model, p)}
        for name, p in placements.items()
    }
    return find_choices(model, first, grids, arrays), observers


def chain(length: int) -> Model:
    """MatMuls in a row, `x` to `y`, whose weights are `w0`, `w1`, …."""
    values = ["x", *(f"h{i}" for i in range(1, length)), "y"]
    text = "  ".join(f"{b} = MatMul({a}, w{i})" for i, (a, b) in enumerate(itertools.pairwise(values)))
    tensors = {f"w{i}": normal(4, 4, seed=i) for i in range(length)}
    return Model.from_proto(parsed(f"n (float[N,4] x) => (float[N,4] y) {{ {text} }}", **tensors))


X = {"x": normal(12, 4)}


def test_an_attention_counts_products_of_activations_and_ties_their_factors() -> None:
    text = """n (float[N,3,4] x) => (float[N,3,4] y) {
        q = MatMul(x, a)  k = MatMul(x, b)  t = Transpose<perm=[0,2,1]>(k)  s = MatMul(q, t)
        p = Softmax(s)  v = MatMul(x, c)  y = MatMul(p, v) }"""
    model = Model.from_proto(parsed(text, a=normal(4, 5), b=normal(4, 5), c=normal(4, 4)))
    arrays = {"x": normal(6, 3, 4)}
    choices, _ = found(model, arrays)
    by_name = {name: group.name for group in choices.groups for name in group.tensors}
    assert by_name["a"] == by_name["b"] == by_name["c"] == by_name["x"]
    assert by_name["q"] == by_name["t"] == by_name["k"]
    assert by_name["p"] == by_name["v"] != by_name["q"]
    work = measure_work(model, place(model, ONNXRUNTIME, Scheme(WEIGHT, ACTIVATION)), arrays)
    products = {(a, b): times for times, a, b in work.products}
    assert products[("x", "a")] == 3 * 4 * 5
    assert products[("q", "t")] == 3 * 5 * 3
    assert products[("p", "v")] == 3 * 3 * 4


@pytest.mark.parametrize(
    ("layer", "weight", "sample", "out", "multiplications"),
    [
        ("Conv<group=2, strides=[2,2], pads=[1,1,1,1]>(x, w)", (6, 2, 3, 3), (4, 6, 6), 4, 6 * 9 * 2 * 9),
        ("ConvTranspose<strides=[2,2]>(x, w)", (4, 6, 2, 2), (4, 3, 3), 4, 4 * 9 * 6 * 4),
        ("ConvTranspose<group=4, strides=[2,2]>(x, w)", (4, 1, 2, 2), (4, 3, 3), 4, 4 * 9 * 4),
        ("Gemm(x, w)", (8, 6), (8,), 2, 48),
        ("MatMul(x, w)", (8, 6), (5, 8), 3, 240),
    ],
)  # fmt: skip
def test_multiplications_of_every_kind_of_layer(
    layer: str, weight: tuple[int, ...], sample: tuple[int, ...], out: int, multiplications: int
) -> None:
    shape, result = ",".join(map(str, sample)), ",".join("NABC"[:out])
    model = Model.from_proto(
        parsed(f"n (float[N,{shape}] x) => (float[{result}] y) {{ y = {layer} }}", w=normal(*weight))
    )
    placement = place(model, ONNXRUNTIME, Scheme(WEIGHT, ACTIVATION))
    work = measure_work(model, placement, {"x": normal(3, *sample)})
    assert work.products == ((multiplications, "x", "w"),)


def test_the_weight_of_a_node_that_is_no_layer_goes_with_what_it_multiplies() -> None:
    text = """n (float[N,3,5,8] x) => (float[N,3,5,2] y) {
        h = MatMul(x, w)  y = Einsum<equation="bhtd,de->bhte">(h, v) }"""
    model = Model.from_proto(parsed(text, w=normal(3, 8, 4), v=normal(4, 2)))
    choices, _ = found(model, {"x": normal(8, 3, 5, 8)})
    assert [group.tensors for group in choices.groups] == [("w", "x"), ("v", "h"), ("y",)]
    work = measure_work(model, place(model, ONNXRUNTIME, Scheme(WEIGHT, ACTIVATION)), {"x": normal(8, 3, 5, 8)})
    assert work.products == ((3 * 5 * 4 * 8, "x", "w"), (3 * 5 * 2 * 4, "h", "v"))


def test_a_fixed_batch_counts_one_sample() -> None:
    model = Model.from_proto(
        parsed("n (float[4,8] x) => (float[4,6] y) { y = MatMul(x, w) }", w=normal(8, 6))
    )
    work = measure_work(model, place(model, ONNXRUNTIME, Scheme(WEIGHT, ACTIVATION)), {"x": normal(8, 8)})
    assert work.products == ((48, "x", "w"),)
    assert set(work.elements) == {(8, "x"), (6, "y")}


def test_conversions_are_counted_between_neighbours_and_islands_give_way() -> None:
    choices, _ = found(chain(6), X)
    assert [group.name for group in choices.groups] == ["w0", "w1", "w2", "w3", "w4", "w5", "y"]
    narrow, wide = (choices.uniform(name) for name in ("w8a8", "w8a16"))
    island = tuple(wide[i] if i in (2, 3) else narrow[i] for i in range(7))
    assert choices.conversions(narrow) == choices.conversions(wide) == 0
    assert choices.conversions(island) == 2
    assert fewer_conversions(choices, island, lambda choice: True) == narrow
    only_up = fewer_conversions(choices, island, lambda c: all(c[i] == wide[i] for i in (2, 3)))
    assert choices.conversions(only_up) == 0
    assert only_up == wide
    assert fewer_conversions(choices, island, lambda choice: False) == island


def test_merging_keeps_the_bitwidths_of_weights() -> None:
    choices, _ = found(chain(4), X, ("w4a8", "w8a8", "w8a16"))
    start = tuple(
        choices.groups[i].option_of[name] for i, name in enumerate(["w4a8", "w8a16", "w4a8", "w4a8", "w8a8"])
    )
    merged = fewer_conversions(choices, start, lambda choice: True)
    bits = [group.bits[i] for group, i in zip(choices.groups, merged, strict=True)]
    assert bits[:4] == [(4, 8), (8, 8), (4, 8), (4, 8)]


def test_the_estimate_is_the_layerwise_error_on_the_second_moments() -> None:
    model = chain(3)
    choices, observers = found(model, X)
    gram = GramSensitivity(model, X, observers, lambda name, fn, *inputs: fn(*inputs), seed=0)
    scores = score_alone(choices, gram.score, lambda *_: None)
    x = X["x"].astype(np.float64)
    for i in range(3):
        group, w = choices.groups[i], model.param(f"w{i}").astype(np.float64)
        for option, score in enumerate(scores[i]):
            grids = choices.alone(group, option)
            error = quantize_dequantize(w.astype(np.float32), grids[f"w{i}"]).astype(np.float64) - w
            weight_loss = np.sum((x @ error) ** 2) / np.sum((x @ w) ** 2)
            noise = quantize_dequantize(x.astype(np.float32), grids[group.activations[0]]) - x
            input_loss = np.sum(noise**2) / np.sum(x**2)
            # 48 values on a histogram: what the noise of 16 bits adds is known to within its own size.
            assert 10 ** (-score / 10) == pytest.approx(weight_loss + input_loss, rel=0.15)
        x = x @ w


def test_the_estimate_needs_no_pass_of_the_data_when_all_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    import qpipe.methods.mixing.sensitivity as sensitivity

    model, kept = chain(3), {}

    def memo(name: str, fn: Any, *inputs: Any) -> Any:
        key = (name, str(inputs))
        if key not in kept:
            kept[key] = fn(*inputs)
        return kept[key]

    walks: list[int] = []
    walk = sensitivity.Walk
    monkeypatch.setattr(sensitivity, "Walk", lambda *a, **k: walks.append(1) or walk(*a, **k))
    for names in (("w4a8", "w8a8"), ("w4a8", "w8a8"), ("w4a8", "w8a16")):
        choices, observers = found(model, X, names)
        score_alone(choices, GramSensitivity(model, X, observers, memo, seed=0).score, lambda *_: None)
    assert len(walks) == 1
