"""bnf: the function stays, BatchNormalization goes, the statistics are kept."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpipe.stages.bnf import affine, bnf, fold_before, fold_behind

BN = {"g": (6,), "b": (6,), "m": (6,), "bnvar": (6,)}
NORM = "BatchNormalization({}, g, b, m, bnvar)"


def image(*shape):
    return {"x": np.random.default_rng(1).normal(size=shape).astype(np.float32)}


def ops(model):
    return [node.op_type for node in model.graph]


def check_same(run, before, after, feeds, tolerance=2e-6):
    """Both models agree to float32 rounding, relative to the largest output."""
    for expected, found in zip(run(before, feeds), run(after, feeds), strict=True):
        assert np.abs(expected - found).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize(
    ("layer", "weight", "shape"),
    [
        ("Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w)", (6, 4, 3, 3), (2, 4, 5, 5)),
        ("Conv<group=2, strides=[2,1], pads=[0,1,2,0]>(x, w)", (6, 2, 3, 3), (2, 4, 7, 6)),
        ('Conv<auto_pad="SAME_UPPER", group=2>(x, w)', (6, 2, 3, 3), (2, 4, 7, 6)),
        ("Conv(x, w, c)", (6, 4, 3), (2, 4, 9)),
        ("Conv<dilations=[1,2,1]>(x, w, c)", (6, 4, 2, 2, 2), (2, 4, 5, 5, 5)),
        ("ConvTranspose<group=2, strides=[2,2], output_padding=[1,0]>(x, w)", (4, 3, 3, 3), (2, 4, 5, 5)),
        ("ConvTranspose<group=2, pads=[1,0,1,0]>(x, w, c)", (4, 3, 3, 3), (2, 4, 5, 5)),
    ],
)
def test_a_convolution_takes_the_normalization_behind_it(network, run, layer, weight, shape):
    dims = ",".join(map(str, shape[2:]))
    model = network(
        f"n (float[N,4,{dims}] x) => (float[N,6,{','.join('p' * (i + 1) for i in range(len(shape) - 2))}] y) "
        f"{{ t = {layer}  u = BatchNormalization<epsilon=0.01>(t, g, b, m, bnvar)  y = Relu(u) }}",
        {"w": weight, **({"c": (6,)} if "c)" in layer else {}), **BN},
    )
    folded = bnf(model)
    assert ops(folded) == [layer.partition("<")[0].partition("(")[0], "Relu"]
    check_same(run, model, folded, image(*shape))


@pytest.mark.parametrize("trans", [0, 1])
def test_gemm_and_matmul_take_the_normalization_behind_them(network, run, trans):
    model = network(
        f"""n (float[N,4] x) => (float[N,6] y) {{
            t = Gemm<transB={trans}>(x, w, c)  u = BatchNormalization(t, g, b, m, bnvar)
            r = Relu(u)  s = MatMul(r, v)  y = BatchNormalization(s, g, b, m, bnvar) }}""",
        {"w": (6, 4) if trans else (4, 6), "c": (6,), "v": (6, 6), **BN},
    )
    folded = bnf(model)
    assert ops(folded) == ["Gemm", "Relu", "MatMul", "Add"]
    assert folded.outputs[0].name == "y"
    check_same(run, model, folded, image(5, 4))


def test_a_normalization_of_another_axis_than_the_features_is_not_folded_into_a_matmul(network, run):
    model = network(
        "n (float[N,6,4] x) => (float[N,6,6] y) { t = MatMul(x, w)  y = " + NORM.format("t") + "}",
        {"w": (4, 6), **BN},
    )
    folded = bnf(model)
    assert ops(folded) == ["MatMul", "Mul", "Add"]
    check_same(run, model, folded, image(2, 6, 4))


BETWEEN = {
    "Identity": ("t = Conv(x, w)  i = Identity(t)  u = {bn}(i)", ["Conv", "Relu"]),
    "Dropout": ("t = Conv(x, w)  i = Dropout(t)  u = {bn}(i)", ["Conv", "Relu"]),
    "Reshape": ("t = Conv(x, w)  i = Reshape(t, flat)  u = {bn}(i)", ["Conv", "Reshape", "Relu"]),
    "Transpose": (
        "q = Transpose<perm=[0,2,3,1]>(x)  t = MatMul(q, m6)  i = Transpose<perm=[0,3,1,2]>(t)  u = {bn}(i)",
        ["Transpose", "MatMul", "Add", "Transpose", "Relu"],
    ),
    "channels mixed": (
        "t = Conv(x, w)  i = Reshape(t, mixed)  u = {bn}(i)",
        ["Conv", "Reshape", "Mul", "Add", "Relu"],
    ),
    "Pad": ("t = Conv(x, w)  i = Pad(t, pads)  u = {bn}(i)", ["Conv", "Pad", "Mul", "Add", "Relu"]),
    "depthwise transposed": ("t = ConvTranspose<group=6>(x, k)  u = {bn}(t)", ["ConvTranspose", "Relu"]),
    "a branch": ("t = Conv(x, w)  a = {bn}(t)  u = Add(a, t)", ["Conv", "Mul", "Add", "Add", "Relu"]),
    "a shared weight": (
        "t = Conv(x, w)  a = {bn}(t)  b2 = Relu(a)  c = Conv(b2, w)  u = {bn}(c)",
        ["Conv", "Relu", "Conv", "Relu"],
    ),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_what_lies_between_a_layer_and_its_normalization(network, run, name):
    body, expected = BETWEEN[name]
    extra = {
        "w": (6, 6, 1, 1), "k": (6, 1, 3, 3), "flat": np.array([0, 6, -1]),
        "m6": (6, 6), "mixed": np.array([-1, 6, 2]),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    }  # fmt: skip
    text = body
    while "{bn}(" in text:
        before, _, after = text.partition("{bn}(")
        value, _, rest = after.partition(")")
        text = f"{before}{NORM.format(value)}{rest}"
    model = network(
        f"n (float[N,6,4,4] x) => (float y) {{ {text}  y = Relu(u) }}",
        {**{k: v for k, v in extra.items() if f"{k})" in body}, **BN},
    )
    folded = bnf(model)
    assert ops(folded) == expected
    check_same(run, model, folded, image(2, 6, 4, 4))


def test_a_matmul_with_a_bias_takes_the_normalization_behind_it(network, run):
    model = network(
        "n (float[N,4] x) => (float[N,6] y) { t = MatMul(x, w)  u = Add(t, c)  y = "
        + NORM.format("u")
        + " }",
        {"w": (4, 6), "c": (6,), **BN},
    )
    folded = bnf(model)
    assert ops(folded) == ["MatMul", "Add"]
    check_same(run, model, folded, image(5, 4))


@pytest.mark.parametrize(
    ("behind", "expected"),
    [
        ("y = Conv<group=2>(u, w)", ["Conv"]),
        ("y = Conv<pads=[1,1,1,1]>(u, w)", ["Mul", "Add", "Conv"]),
        ('y = Conv<auto_pad="SAME_LOWER">(u, w)', ["Mul", "Add", "Conv"]),
        ("y = ConvTranspose<group=2>(u, v)", ["Mul", "Add", "ConvTranspose"]),
        (
            "p = GlobalAveragePool(u)  f = Flatten(p)  y = Gemm(f, k)",
            ["GlobalAveragePool", "Flatten", "Gemm"],
        ),
        ("f = Flatten(u)  y = Gemm<transB=1>(f, q, c)", ["Flatten", "Gemm"]),
        (
            "p = AveragePool<kernel_shape=[2,2], pads=[1,0,0,1]>(u)  y = Conv<group=2>(p, w)",
            ["AveragePool", "Conv"],
        ),
        (
            "p = AveragePool<count_include_pad=1, kernel_shape=[2,2], pads=[1,0,0,1]>(u) y = Conv(p, h)",
            ["Mul", "Add", "AveragePool", "Conv"],
        ),
        ("r = Relu(u)  y = Conv<group=2>(r, w)", ["Mul", "Add", "Relu", "Conv"]),
    ],
)
def test_the_layer_behind_takes_what_no_layer_before_can(network, run, behind, expected):
    grouped_conv = (4, 6, 2, 2) if "SAME" in behind or "Conv<pads" in behind else (4, 3, 2, 2)
    model = network(
        f"n (float[N,6,4,4] x) => (float[N,o,p,q] y) {{ u = {NORM.format('x')}  {behind} }}",
        {name: shape for name, shape in {
            "w": grouped_conv, "h": (4, 6, 2, 2), "v": (6, 2, 3, 3), "k": (6, 5), "q": (5, 96), "c": (5,),
            **BN,
        }.items() if f"{name})" in behind or f"{name}," in behind or name in BN},
    )  # fmt: skip
    folded = bnf(model)
    assert ops(folded) == expected
    check_same(run, model, folded, image(3, 6, 4, 4))


def test_a_value_read_twice_keeps_its_normalization_as_mul_and_add(network, run, notes):
    model = network(
        """n (float[N,6,4,4] x) => (float[N,6,4,4] y) {
            t = Conv(x, w)  u = BatchNormalization(t, g, b, m, bnvar)  y = Add(u, t) }""",
        {"w": (6, 6, 1, 1), **BN},
    )
    folded = bnf(model, ctx=notes)
    assert ops(folded) == ["Conv", "Mul", "Add", "Add"]
    assert "is not the data input" in notes.notes[0] or "does not commute" in notes.notes[0]
    assert folded.metadata["bnf"]["written out"]
    check_same(run, model, folded, image(3, 6, 4, 4))


def test_a_model_without_any_passes_unchanged_and_says_so(network, run, notes):
    model = network("n (float[N,6,4,4] x) => (float[N,6,4,4] y) { y = Conv(x, w) }", {"w": (6, 6, 1, 1)})
    folded = bnf(model, ctx=notes)
    assert ops(folded) == ["Conv"]
    assert notes.notes == [
        "There is no BatchNormalization to fold; torch's exporter folds them itself, unless told not to."
    ]


def test_tied_weights_are_folded_one_by_one(network, run):
    model = network(
        """n (float[N,6,4,4] x) => (float[N,6,4,4] y) {
            t = Conv(x, w, c)  u = BatchNormalization(t, g, b, m, bnvar)  r = Relu(u)  y = Conv(r, w, c) }""",
        {"w": (6, 6, 1, 1), "c": (6,), **BN},
    )
    folded = bnf(model)
    check_same(run, model, folded, image(3, 6, 4, 4))
    assert np.array_equal(folded.param("w"), model.param("w")), "the use that was not folded keeps the name"


def test_two_normalizations_in_a_row_fold_into_one_layer(network, run):
    model = network(
        """n (float[N,6,4,4] x) => (float[N,6,4,4] y) {
            t = Conv(x, w)  u = BatchNormalization(t, g, b, m, bnvar)
            y = BatchNormalization(u, b, g, m, bnvar) }""",
        {"w": (6, 6, 1, 1), **BN},
    )
    folded = bnf(model)
    assert ops(folded) == ["Conv"]
    assert list(folded.facts.statistics) == ["y"]
    check_same(run, model, folded, image(3, 6, 4, 4))


def test_statistics_are_kept_under_the_name_of_the_layers_output(network):
    model = network(
        "n (float[N,6,4,4] x) => (float[N,6,4,4] y) { t = Conv(x, w)  y = " + NORM.format("t") + "}",
        {"w": (6, 6, 1, 1), **BN},
    )
    kept = bnf(model).facts.statistics["y"]
    np.testing.assert_array_equal([kept.gamma, kept.beta], [model.param("g"), model.param("b")])
    assert [layer.output for layer in bnf(model).layers()] == ["y"]


def test_the_source_is_not_touched(network):
    model = network(
        "n (float[N,6,4,4] x) => (float[N,6,4,4] y) { t = Conv(x, w)  y = " + NORM.format("t") + "}",
        {"w": (6, 6, 1, 1), **BN},
    )
    weight = model.param("w").copy()
    bnf(model)
    assert ops(model) == ["Conv", "BatchNormalization"]
    assert np.array_equal(model.param("w"), weight)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 3]))
def test_both_foldings_are_the_composition_in_float64(seed, groups):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(groups, 4, 2, 5))
    bias, x = rng.normal(size=4 * groups), rng.normal(size=(groups, 2, 5))

    def layer(weight, bias, x):
        return np.einsum("goik,gik->go", weight, x).reshape(-1) + bias

    outer = affine(*rng.normal(size=(3, 4 * groups)), rng.uniform(0.1, 2, 4 * groups), 1e-5)
    after = outer[0] * layer(weight, bias, x) + outer[1]
    np.testing.assert_allclose(layer(*fold_before(weight, bias, *outer), x), after, rtol=1e-9, atol=1e-9)
    inner = affine(*rng.normal(size=(3, 2 * groups)), rng.uniform(0.1, 2, 2 * groups), 1e-5)
    shifted = inner[0].reshape(groups, 2, 1) * x + inner[1].reshape(groups, 2, 1)
    np.testing.assert_allclose(
        layer(*fold_behind(weight, bias, *inner), x), layer(weight, bias, shifted), rtol=1e-9, atol=1e-9
    )
