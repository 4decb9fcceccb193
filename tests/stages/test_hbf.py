"""hbf: a channel's constant moves on, the function stays where no activation falls below it."""

from __future__ import annotations

import numpy as np
import pytest

from qpipe.errors import InputError
from qpipe.model.network.facts import Spread
from qpipe.stage import Samples
from qpipe.stages.hbf import absorbed, hbf

BETA = np.array([3.0, 0.5, 5.0, 0.0])
GAMMA = np.array([0.5, 0.5, -1.0, 1.0])


def model_with(network, between="t = Relu(s)", second="y = Conv(t, v, c)", **extra):
    """Conv, `between`, `second`; on inputs in 0..1 the first layer's channels stay above beta."""
    bounds = {"zero": np.array(0, np.float32), "six": np.array(4, np.float32)}
    model = network(
        f"n (float[N,2,5,5] x) => (float y) {{ s = Conv(x, w, b)  {between}  {second} }}",
        {
            "w": np.abs(np.random.default_rng(0).normal(size=(4, 2, 1, 1)).astype(np.float32)),
            "b": BETA.astype(np.float32), "v": (3, 4, 2, 2), "c": (3,), **extra,
            **(bounds if "six" in between else {}),
        },
    )  # fmt: skip
    return model.with_facts(statistics={"s": Spread(GAMMA, BETA)})


def positive(*shape):
    return {"x": np.random.default_rng(1).random(shape).astype(np.float32)}


def test_the_constant_is_what_lies_three_deviations_below_the_mean():
    np.testing.assert_allclose(absorbed(GAMMA, BETA, 3), [1.5, 0, 2, 0])


@pytest.mark.parametrize(
    ("between", "second"),
    [
        ("t = Relu(s)", "y = Conv(t, v, c)"),
        ("t = Relu(s)", "y = Conv(t, v)"),
        ("t = Clip(s, zero, six)", "y = Conv(t, v, c)"),
        ("r = Relu(s)  t = Min(r, bound)", "y = Conv(t, v, c)"),
        ("r = Relu(s)  t = MaxPool<kernel_shape=[2,2]>(r)", "y = Conv(t, v, c)"),
        ("r = AveragePool<kernel_shape=[2,2], pads=[0,1,1,0]>(s)  t = Relu(r)", "y = Conv(t, v, c)"),
        ("t = Relu(s)", "p = GlobalAveragePool(t)  f = Flatten(p)  y = Gemm(f, k)"),
        ("t = Relu(s)", "f = Flatten(t)  y = Gemm<transB=1>(f, q, c)"),
        ("i = Identity(s)  t = Relu(i)", "y = Conv<group=2>(t, g)"),
        ("t = Relu(s)", "r = Reshape(t, flat)  y = Conv(r, o, c)"),
        ("t = Relu(s)", "h = Transpose<perm=[0,2,3,1]>(t)  m = MatMul(h, k)  y = Add(m, c)"),
    ],
)
def test_above_the_constant_the_outputs_stay(network, run, between, second):
    extra = {
        "k": (4, 3),
        "q": (3, 100),
        "g": (4, 2, 2, 2),
        "o": (3, 4, 2),
        "flat": np.array([0, 4, -1]),
        "bound": np.array([9, 2, 2.5, 1], np.float32).reshape(4, 1, 1),
    }
    model = model_with(
        network,
        between,
        second,
        **{k: v for k, v in extra.items() if any(f"{k}{end}" in between + second for end in ",)")},
    )
    folded = hbf(model)
    feeds = positive(3, 2, 5, 5)
    expected, found = run(model, feeds)[0], run(folded, feeds)[0]
    assert np.abs(expected - found).max() <= 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(folded.param("b"), BETA - [1.5, 0, 2, 0], rtol=1e-6)
    np.testing.assert_allclose(folded.facts.statistics["s"].beta, [1.5, 0.5, 3, 0])


@pytest.mark.parametrize(
    ("between", "second", "reason"),
    [
        ("t = Relu(s)", "y = Conv<pads=[1,1,1,1]>(t, v, c)", "pads with zeros"),
        ("t = Relu(s)", "y = ConvTranspose(t, z)", "pads with zeros"),
        ("t = LeakyRelu(s)", "y = Conv(t, v, c)", "does not commute with a constant"),
        ("t = Identity(s)", "y = Conv(t, v, c)", "no Relu lies between"),
    ],
)
def test_where_it_would_be_wrong_it_is_left(network, run, between, second, reason):
    model = model_with(network, between, second, **({"z": (4, 3, 2, 2)} if "z" in second else {}))
    left = hbf(model)
    assert any(reason in why for why in left.metadata["hbf"]["left"].values())
    feeds = positive(3, 2, 5, 5)
    assert np.array_equal(run(model, feeds)[0], run(left, feeds)[0])


def test_what_moved_is_measured_on_the_data(network, notes):
    model = model_with(network)
    data = Samples({"x": -5 * positive(20, 2, 5, 5)["x"]})
    assert hbf(model, data, ctx=notes).metadata["hbf"]["largest_relative_error"] > 0.01
    assert "1 layers handed a constant on; the outputs moved by" in notes.notes[0]
    assert hbf(model, Samples(positive(20, 2, 5, 5))).metadata["hbf"]["largest_relative_error"] < 1e-5


def test_a_model_without_statistics_is_refused(network):
    model = network("n (float[N,4] x) => (float[N,5] y) { y = MatMul(x, w) }", {"w": (4, 5)})
    with pytest.raises(InputError, match="Put bnf before"):
        hbf(model)
