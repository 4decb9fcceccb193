"""A finite stand-in for minus infinity takes no range: the exported file in onnxruntime, against the float model."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from qpipe.methods.placement.placement import Placement, data_values, place
from qpipe.methods.placement.survival import Link, Survivors, survivals
from qpipe.model import Model
from qpipe.stage import Samples
from qpipe.stages.calibrate import calibrate
from tests.model.nets import normal, parsed
from tests.model.quantized import ONNXRUNTIME, deployed_db, scheme

LOWEST = float(np.finfo(np.float32).min)
STAND_INS = (-1e4, -1e9, LOWEST)
SEEN = np.arange(12)[None, :, None] < np.arange(4, 20)[:, None, None] % 11 + 1
X = {"x": normal(16, 12, 8), "seen": SEEN}
HEAD = "m (float[N,12,8] x, bool[N,12,1] seen) => (float[N,5] y) { t = MatMul(x, w)"
TAIL = "r = ReduceMax<keepdims=0>(s, axis)  y = MatMul(r, v) }"
PARAMS = {"w": normal(8, 8), "v": normal(8, 5, seed=1), "axis": np.array([1])}


def db(text: str, feeds: dict[str, Any], activation: int = 8, **params: Any) -> float:
    """The SQNR of the deployed model with grids of `activation` bits."""
    used = {name: array for name, array in params.items() if f" {name}" in text or f"({name}" in text}
    proto = parsed(text, **used)
    model = calibrate(Model.from_proto(proto), Samples(feeds), scheme=scheme(8, activation), target=ONNXRUNTIME)
    return deployed_db(model, proto, feeds)


@pytest.mark.parametrize("activation", [8, 16])
@pytest.mark.parametrize("low", STAND_INS)
def test_a_stand_in_of_a_pad_before_a_pool_is_as_good_as_minus_infinity(low: float, activation: int) -> None:
    text = """m (float[N,3,9,9] x) => (float[N,5] y) {
        t = Conv<pads=[1,1,1,1]>(x, w)  p = Pad(t, pads, low)  m = MaxPool<kernel_shape=[3,3], strides=[2,2]>(p)
        g = Conv(m, k)  a = GlobalAveragePool(g)  f = Flatten(a)  y = Gemm(f, v) }"""
    params = {"w": normal(4, 3, 3, 3), "k": normal(4, 4, 3, 3, seed=2), "v": normal(4, 5, seed=3)}
    pads = np.array([0, 0, 1, 1, 0, 0, 1, 1])
    feeds = {"x": normal(16, 3, 9, 9)}
    found, wanted = (db(text, feeds, activation, low=np.float32(v), pads=pads, **params) for v in (low, -np.inf))
    assert found == wanted > 30


MASKED = {
    "Where": "s = Where(seen, t, low)",
    "Add": "z = Cast<to=1>(seen)  o = Sub(one, z)  n = Mul(o, low)  s = Add(t, n)",
    "behind a move": "u = Where(seen, t, low)  s = Transpose<perm=[0,1,2]>(u)",
    "behind a factor": "u = Where(seen, t, low)  s = Mul(half, u)",
    "behind an activation": "u = Where(seen, t, low)  s = LeakyRelu<alpha=0.01>(u)",
}


@pytest.mark.parametrize("low", STAND_INS)
@pytest.mark.parametrize("masked", MASKED)
def test_masked_max_pooling_is_as_good_as_with_minus_infinity(masked: str, low: float) -> None:
    constants = {"one": np.float32(1), "half": np.float32(0.5)}
    assert db(f"{HEAD} {MASKED[masked]} {TAIL}", X, low=np.float32(low), **PARAMS, **constants) > 33


@pytest.mark.parametrize("low", STAND_INS)
def test_the_larger_of_two_values_takes_no_range_for_the_other(low: float) -> None:
    text = f"{HEAD} a = Where(seen, t, low)  b = MatMul(x, u)  s = Max(a, b)  {TAIL}"
    assert db(text, X, low=np.float32(low), u=normal(8, 8, seed=5), **PARAMS) > 33


ATTENTION = """m (float[N,12,8] x, bool[N,1,12] seen) => (float[N,12,8] y) {
    q = MatMul(x, w)  k = MatMul(x, u)  kt = Transpose<perm=[0,2,1]>(k)  s = MatMul(q, kt)
    BODY  p = Softmax(b)  o = MatMul(p, x)  y = MatMul(o, v) }"""
SCORES = {
    "Mul": "n = Where(seen, zero, low)  a = Add(s, n)  b = Mul(a, scale)",
    "Div": "n = Where(seen, zero, low)  a = Add(s, n)  b = Div(a, root)",
    "Mul, Reshape": "n = Where(seen, zero, low)  a = Add(s, n)  c = Mul(a, scale)  b = Reshape(c, shape)",
    "Reshape": "n = Where(seen, zero, low)  a = Add(s, n)  b = Reshape(a, shape)",
    "masked_fill": "a = Where(seen, s, low)  b = Mul(a, scale)",
    "Max, as OPT has it": "n = Where(seen, zero, low)  a = Add(s, n)  c = Max(a, lowest)  b = Mul(c, scale)",
    "less its maximum": "n = Where(seen, zero, low)  a = Add(s, n)  m = ReduceMax(a, last)  b = Sub(a, m)",
}


@pytest.mark.parametrize("low", STAND_INS)
@pytest.mark.parametrize("scores", SCORES)
def test_what_happens_to_masked_scores_before_a_softmax_stays_in_float(scores: str, low: float) -> None:
    text = ATTENTION.replace("BODY", SCORES[scores])
    feeds = {"x": 0.7 * X["x"], "seen": SEEN.transpose(0, 2, 1).copy()}
    params = {
        "w": normal(8, 8), "u": normal(8, 8, seed=4), "v": normal(8, 8, seed=1), "zero": np.float32(0),
        "low": np.float32(low), "scale": np.float32(0.35), "root": np.float32(2.8), "lowest": np.float32(LOWEST),
        "shape": np.array([-1, 12, 12]), "last": np.array([2]),
    }  # fmt: skip
    assert db(text, feeds, **params) > 25


def placed(body: str, **params: Any) -> Placement:
    text = f"m (float[N,4] x, bool[N,4] seen) => (float[N,4] y) {{ t = MatMul(x, w)  {body} }}"
    used = {name: value for name, value in params.items() if name in body}
    return place(Model.from_proto(parsed(text, w=normal(4, 4), **used)), ONNXRUNTIME, scheme())


@pytest.mark.parametrize(
    "body",
    [
        "a = Where(seen, t, low)  d = Mul(a, half)  g = Greater(d, half)  c = Cast<to=1>(g)  y = Mul(c, t)",
        "n = Where(seen, half, low)  a = Add(t, n)  i = ArgMax<axis=1>(a)  c = Cast<to=1>(i)  y = Mul(c, t)",
        "n = Where(seen, half, low)  a = Add(t, n)  d = Mul(a, half)  y = LogSoftmax(d)",
    ],
)
def test_a_sum_that_ends_in_a_decision_has_no_grid(body: str) -> None:
    assert not {"a", "d"} & set(placed(body, low=np.float32(-1e9), half=np.float32(0.5)).activations)


def test_a_sum_that_somebody_else_reads_keeps_its_grid() -> None:
    placement = placed("a = Add(t, x)  p = Softmax(a)  y = Mul(a, p)")
    assert {"t", "a"} < set(placement.activations)


def test_all_of_a_value_counts_where_its_place_decides_or_somebody_else_reads_it() -> None:
    """A factor per channel may turn the order round; a second reader sees every element."""
    row, axis = np.array([1, -1, 2, 3], np.float32), np.array([1])
    for body in ("b = Mul(t, row)  y = ReduceMax(b, axis)", "b = Mul(t, half)  m = ReduceMax(b, axis)  y = Add(t, m)"):
        assert "t" not in placed(body, row=row, half=np.float32(0.5), axis=axis).survives
    one = placed("b = Mul(t, half)  y = ReduceMax(b, axis)", half=np.float32(0.5), axis=axis)
    assert one.survives == {"t": (Link("b", factor=0.5),), "b": (Link("y"),)}
    assert one.follows == {"b": "y"}


LINES = {
    "Mul(t, k)": lambda t: t * -3.0, "Mul(k, t)": lambda t: t * -3.0, "Div(t, k)": lambda t: t / -3.0,
    "Add(k, t)": lambda t: t - 3.0, "Sub(t, k)": lambda t: t + 3.0, "Sub(k, t)": lambda t: -3.0 - t,
    "Neg(t)": lambda t: -t, "LeakyRelu<alpha=0.25>(t)": lambda t: np.where(t < 0, t / 4, t),
}  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_the_range_that_counts_of_a_line_goes_back_to_its_input(line: str) -> None:
    placement = placed(f"b = {line}  y = ReduceMax(b, axis)", k=np.float32(-3), axis=np.array([1]))
    (link,) = placement.survives["t"]
    for low, high in ((-2.0, 5.0), (1.0, 4.0), (-7.0, -1.0)):
        ends = link.back(low, high)
        assert ends[0] < ends[1]
        np.testing.assert_allclose(sorted(LINES[line](np.array(ends))), [low, high])


BOUNDED = {
    "Relu(t)": (0, np.inf), "Sigmoid(t)": (-12, 12), "Tanh(t)": (-6, 6), "Clip(t, two, k)": (2, 3),
    "Max(two, t)": (2, np.inf), "Min(t, two)": (-np.inf, 2), "Exp(t)": (-2, np.inf), "Softplus(t)": (-12, np.inf),
}  # fmt: skip


@pytest.mark.parametrize("bounded", BOUNDED)
def test_beyond_where_a_function_is_flat_to_16_bits_nothing_counts(bounded: str) -> None:
    constants = {"two": np.float32(2), "k": np.float32(3)}
    used = {name: value for name, value in constants.items() if name in bounded}
    graph = Model.from_proto(parsed(f"m (float[N] t) => (float[N] y) {{ y = {bounded} }}", **used)).graph
    values = np.array([-1e9, -20, -0.5, 2.5, 10], np.float32)
    found = np.array(seen_by(dict(survivals(graph, data_values(graph))), {"t": values.tolist()})["t"], np.float32)
    assert found.tolist() == np.clip(values, *BOUNDED[bounded]).tolist()
    if "Exp" not in bounded:  # its outputs go on for ever: flat is what is nothing beside the largest
        proto = parsed(f"m (float[N] t) => (float[N] y) {{ y = {bounded} }}", **used)
        run = onnxruntime.InferenceSession(proto.SerializeToString()).run
        wide, narrow = (run(None, {"t": each})[0] for each in (values, found))
        assert np.abs(wide - narrow).max() <= 2.0**-16 * max(1.0, float(np.ptp(wide)))


def seen_by(survives: dict[str, Any], values: dict[str, list[float]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    survivors = Survivors(survives, lambda name, elements: found.update({name: elements.tolist()}))
    for name, value in values.items():
        survivors.see(name, torch.tensor(value))
    return found


def test_what_is_passed_over_counts_once_at_the_end_of_what_does() -> None:
    survives = {"a": (Link("b", factor=10.0),), "b": (Link("r"),), "c": (Link("r"), Link("z"))}
    values = {"a": [-9.0, -8.0, 1.5, 3.0], "b": [-90.0, -80.0, 15.0, 30.0], "c": [-7.0, 5.0, -99.0, 99.0]}
    found = seen_by(survives, {**values, "z": [-7.0], "r": [10.0, 30.0]})
    assert found == {"a": [1.5, 3, 1], "b": [15, 30, 10], "c": [-7, 5, -7, 30], "z": [-7], "r": [10, 30]}


@pytest.mark.parametrize("low", STAND_INS)
@pytest.mark.parametrize(
    "body",
    [
        "a = Where(seen, t, low)  g = Sigmoid(a)  s = Mul(g, x)  r = ReduceMean<keepdims=0>(s, axis)",
        "a = Where(seen, t, low)  u = Add(a, half)  b = Mul(u, half)  s = Relu(b)  r = ReduceMean<keepdims=0>(s, axis)",
        "a = Where(seen, t, low)  u = Mul(a, half)  s = Tanh(u)  r = ReduceMean<keepdims=0>(s, axis)",
        "n = Where(seen, half, low)  a = Add(t, n)  g = Sigmoid(a)  s = Mul(g, x)  r = ReduceMean<keepdims=0>(s, axis)",
    ],
)
def test_what_a_flat_function_makes_nothing_of_takes_no_range(body: str, low: float) -> None:
    text = f"{HEAD}  {body}  y = MatMul(r, v) }}"
    assert db(text, X, low=np.float32(low), half=np.float32(0.5), **PARAMS) > 28


@pytest.mark.parametrize("body", ["p = PRelu(t, k)", "p = LeakyRelu<alpha=0.125>(t)"])
def test_in_front_of_a_pool_the_least_slope_says_how_far_down_a_value_counts(body: str) -> None:
    given = {"k": np.array([0.5, 0.125], np.float32).reshape(2, 1, 1)} if "(t, k)" in body else {}
    text = f"m (float[N,2,1,2] t) => (float[N,2,1,1] y) {{ {body}  y = MaxPool<kernel_shape=[1,2]>(p) }}"
    graph = Model.from_proto(parsed(text, **given)).graph
    survives = survivals(graph, data_values(graph))
    found = seen_by(survives, {"t": [-9.0, -3.0, 2.0, 5.0], "p": [-2.0, -0.375, 2.0, 5.0], "y": [-0.5, 5.0]})
    assert found["t"] == [-3, 2, 5, -4]
