"""cle: the float model computes what it did, and the ranges that a pair or a triple ends with are equal."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpipe.errors import InputError, StageError
from qpipe.model.network.facts import Spread
from qpipe.stage import Samples
from qpipe.stages.cle import LARGEST_ERROR, bounded, checked, cle, scales

UNEVEN = np.exp(np.random.default_rng(3).normal(size=8) * 1.5).astype(np.float32)


def image(*shape, seed=1):
    return {"x": np.random.default_rng(seed).normal(size=shape).astype(np.float32)}


def uneven(*shape, axis=0, seed=0):
    """A random weight whose channels along `axis` differ in range by a factor of about a hundred."""
    weight = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    factors = np.resize(UNEVEN, shape[axis]).reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return weight * factors


def rows(weight):
    return np.abs(weight).reshape(len(weight), -1).max(axis=1)


def columns(weight):
    return np.abs(weight).swapaxes(0, 1).reshape(weight.shape[1], -1).max(axis=1)


def ops(model):
    return [node.op_type for node in model.graph]


def check_same(run, before, after, feeds, tolerance=5e-6):
    for expected, found in zip(run(before, feeds), run(after, feeds), strict=True):
        assert np.abs(expected - found).max() <= tolerance * np.abs(expected).max()


def pair(network, between, second="Conv(t, v)", params=None, dims="4,6,6"):
    return network(
        f"n (float[N,{dims}] x) => (float y) {{ s = Conv(x, w, b)  {between}  y = {second} }}",
        {"w": uneven(8, 4, 3, 3), "b": (8,), "v": (5, 8, 3, 3), **(params or {})},
    )


def test_a_pair_ends_with_the_geometric_mean_of_its_ranges(network, run):
    model = pair(network, "t = Relu(s)")
    equalized = cle(model)
    wanted = np.sqrt(rows(model.param("w")) * columns(model.param("v")))
    np.testing.assert_allclose(rows(equalized.param("w")), wanted, rtol=1e-5)
    np.testing.assert_allclose(columns(equalized.param("v")), wanted, rtol=1e-5)
    check_same(run, model, equalized, image(2, 4, 6, 6))


def test_a_depthwise_triple_ends_with_the_cube_root(network, run):
    model = network(
        """n (float[N,4,6,6] x) => (float y) {
            s = Conv(x, w, b)  t = Relu(s)
            d = Conv<group=8, pads=[1,1,1,1]>(t, k, c)  e = Relu(d)  y = Conv(e, v) }""",
        {"w": uneven(8, 4, 1, 1), "b": (8,), "k": uneven(8, 1, 3, 3, seed=2), "c": (8,), "v": (5, 8, 1, 1)},
    )
    equalized = cle(model, iterations=1)
    ranges = rows(model.param("w")) * rows(model.param("k")) * columns(model.param("v"))
    for found in (rows(equalized.param("w")), rows(equalized.param("k")), columns(equalized.param("v"))):
        np.testing.assert_allclose(found, np.cbrt(ranges), rtol=1e-5)
    check_same(run, model, equalized, image(2, 4, 6, 6))


@pytest.mark.parametrize(
    "between",
    [
        "t = Relu(s)",
        "t = LeakyRelu<alpha=0.3>(s)",
        "t = PRelu(s, slope)",
        "r = Relu(s)  t = MaxPool<kernel_shape=[2,2], pads=[1,0,1,0]>(r)",
        "r = Relu(s)  t = AveragePool<kernel_shape=[2,2], pads=[1,1,1,1], count_include_pad=1>(r)",
        "r = Pad(s, pads)  t = Relu(r)",
        'r = Pad<mode="reflect">(s, pads)  t = Identity(r)',
        "t = Clip(s, zero, six)",
        "t = Clip(s, minus, six)",
        "t = Clip(s, , six)",
        "t = Clip(s, minus)",
        "r = Min(s, bounds)  t = Max(r, minus)",
        "t = Resize(s, , factors)",
    ],
)
def test_what_lies_between_two_convolutions_keeps_its_function(network, run, between):
    extra = {
        "slope": np.random.default_rng(5).normal(size=(8, 1, 1)).astype(np.float32),
        "pads": np.array([0, 0, 1, 2, 0, 0, 0, 1]),
        "zero": np.array(0, np.float32), "six": np.array(1.5, np.float32),
        "minus": np.array(-0.7, np.float32),
        "bounds": UNEVEN.reshape(8, 1, 1), "factors": np.array([1, 1, 2, 2], np.float32),
    }  # fmt: skip
    model = pair(network, between, params={k: v for k, v in extra.items() if k in between})
    equalized = cle(model)
    assert list(equalized.metadata["cle"]["pairs"]), equalized.metadata["cle"]
    assert np.ptp(np.log(rows(equalized.param("w")))) < np.ptp(np.log(rows(model.param("w"))))
    feeds = image(2, 4, 6, 6)
    if "Clip" in between or "Min" in between:
        unbounded = run(pair(network, "t = Relu(s)"), feeds)[0]
        assert not np.allclose(run(model, feeds)[0], unbounded), (
            "the bounds are not reached: nothing is tested"
        )
    check_same(run, model, equalized, feeds)


@pytest.mark.parametrize(
    ("text", "params"),
    [
        (
            """n (float[N,4,6,6] x) => (float y) {
                s = Conv(x, w, b)  t = Relu(s)  p = GlobalAveragePool(t)  f = Flatten(p)  y = Gemm(f, v) }""",
            {"w": uneven(8, 4, 3, 3), "b": (8,), "v": (8, 5)},
        ),
        (
            """n (float[N,4,6,6] x) => (float y) {
                s = Conv(x, w)  t = Clip(s, zero, one)  f = Flatten(t)  y = Gemm<transB=1>(f, v, b) }""",
            {"w": uneven(8, 4, 3, 3), "b": (5,), "v": (5, 128)},
        ),
        (
            "n (float[N,4] x) => (float y) { s = Gemm(x, w, b)  t = Clip(s, zero, one)  y = Gemm(t, v) }",
            {"w": uneven(4, 8, axis=1), "b": (8,), "v": (8, 5)},
        ),
        (
            """n (float[N,3,4] x) => (float y) {
                m = MatMul(x, w)  s = Add(m, b)  t = Clip(s, zero, one)  y = MatMul(t, v) }""",
            {"w": uneven(4, 8, axis=1), "b": (8,), "v": (8, 5)},
        ),
        (
            """n (float[N,4,6,6] x) => (float y) {
                s = Conv<group=2>(x, w, b)  t = Clip(s, zero, one)
                y = ConvTranspose<group=4, strides=[2,2]>(t, v) }""",
            {"w": uneven(8, 2, 3, 3), "b": (8,), "v": (8, 3, 2, 2)},
        ),
        (
            """n (float[N,4,6,6] x) => (float y) {
                s = ConvTranspose<group=2, pads=[1,1,0,0]>(x, w, b)  t = Clip(s, zero, one)
                y = Conv<group=4>(t, v) }""",
            {"w": uneven(4, 4, 3, 3, axis=1), "b": (8,), "v": (4, 2, 1, 1)},
        ),
        (
            """n (float[N,4,9] x) => (float y) {
                s = Conv(x, w, b)  t = Relu(s)  d = Conv<group=8>(t, k)  y = Conv(d, v) }""",
            {"w": uneven(8, 4, 3), "b": (8,), "k": (16, 1, 2), "v": (5, 16, 1)},
        ),
        (
            """n (float[N,4,5,5,5] x) => (float y) {
                s = Conv(x, w, b)  t = Relu(s)  y = Conv<strides=[1,2,1]>(t, v) }""",
            {"w": uneven(8, 4, 2, 2, 2), "b": (8,), "v": (5, 8, 2, 1, 2)},
        ),
        (
            """n (float[N,4,6,6] x) => (float y) {
                s = Conv(x, w, b)  t = Relu(s)  d = ConvTranspose<group=8, strides=[2,2]>(t, k, c)
                e = Relu(d)  y = Conv(e, v) }""",
            {"w": uneven(8, 4, 3, 3), "b": (8,), "k": (8, 1, 2, 2), "c": (8,), "v": (5, 8, 1, 1)},
        ),
        (
            """n (float[N,4,6,6] x) => (float y) {
                s = ConvTranspose<group=4, strides=[2,2], output_padding=[1,0]>(x, w, b)  t = Relu(s)
                y = Conv<group=2, dilations=[2,1]>(t, v) }""",
            {"w": uneven(4, 1, 2, 2), "b": (4,), "v": (6, 2, 3, 3)},
        ),
        (
            """n (float[N,4] x) => (float y) {
                s = Gemm<transB=1>(x, w, b)  t = Dropout(s)  r = Reshape(t, shape)  a = Relu(r)
                f = Flatten(a)  y = Gemm<transB=1>(f, v) }""",
            {"w": uneven(8, 4), "b": (8,), "v": (5, 8), "shape": np.array([0, 8, 1])},
        ),
        (
            """n (float[N,4,6,6] x) => (float y) {
                s = Conv(x, w, b)  r = Relu(s)  q = Transpose<perm=[0,2,3,1]>(r)  y = MatMul(q, v) }""",
            {"w": uneven(8, 4, 3, 3), "b": (8,), "v": (8, 5)},
        ),
        (
            """n (float[N,4,6,6] x) => (float y) {
                s = Conv(x, w, b)  r = Relu(s)  q = ReduceMean<keepdims=0>(r, axes)  y = Gemm(q, v) }""",
            {"w": uneven(8, 4, 3, 3), "b": (8,), "v": (8, 5), "axes": np.array([2, 3])},
        ),
    ],
)
def test_every_kind_of_layer_and_layout_keeps_its_function(network, run, text, params):
    bounds = {"zero": np.array(0, np.float32), "one": np.array(1, np.float32)}
    model = network(text, {**params, **(bounds if "zero" in text else {})})
    equalized = cle(model)
    assert equalized.metadata["cle"]["pairs"], equalized.metadata["cle"]
    assert not np.allclose(equalized.param("w"), model.param("w"))
    shape = [2, *(int(size) for size in model.inputs[0].shape[1:])]
    check_same(run, model, equalized, image(*shape))


def relu6(network, bound=1.0):
    params = {"zero": np.array(0, np.float32), "six": np.array(bound, np.float32)}
    return pair(network, "t = Clip(s, zero, six)", params=params)


def test_relu6_becomes_relu_and_a_bound_for_each_channel(network):
    model = relu6(network)
    equalized = cle(model)
    assert ops(equalized) == ["Conv", "Relu", "Min", "Conv"]
    scale = rows(model.param("w")) / rows(equalized.param("w"))
    bound = equalized.graph.node(3 - 1).inputs[1].const_value.numpy()
    assert bound.shape == (8, 1, 1)
    np.testing.assert_allclose(bound.reshape(-1), 1 / scale, rtol=1e-5)


def test_relu6_becomes_relu_only_where_no_sample_reaches_it(network, run):
    data = Samples(image(20, 4, 6, 6))
    low = cle(relu6(network, 1.0), data, relu6="replace_if_unused")
    assert ops(low) == ["Conv", "Relu", "Min", "Conv"]
    model = relu6(network, 500.0)
    high = cle(model, data, relu6="replace_if_unused")
    assert ops(high) == ["Conv", "Relu", "Conv"]
    assert high.metadata["cle"]["replaced"]
    check_same(run, model, high, image(2, 4, 6, 6))


def test_replacing_relu6_needs_data(network):
    with pytest.raises(InputError, match="replace_if_unused needs samples"):
        cle(relu6(network), relu6="replace_if_unused")


def test_a_second_run_moves_nothing(network, run):
    once = cle(relu6(network), headroom=1e6)
    twice = cle(once, headroom=1e6)
    np.testing.assert_allclose(twice.param("w"), once.param("w"), rtol=1e-5)
    check_same(run, once, twice, image(2, 4, 6, 6))


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        ("t = Sigmoid(s)", "is not homogeneous"),
        ("t = HardSwish(s)", "is not homogeneous"),
        ("a = Abs(s)  t = Add(s, a)", "is read 2 times, by"),
        ("t = Pad(s, pads, one)", "pads with something else than zero"),
    ],
)
def test_a_layer_that_must_stay_is_listed_with_its_reason(network, run, notes, between, reason):
    extra = {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "one": np.array(1, np.float32)}
    model = pair(network, between, params={k: v for k, v in extra.items() if k in between})
    left = cle(model, ctx=notes)
    assert left is model
    assert any(reason in note for note in notes.notes)
    assert np.array_equal(left.param("w"), model.param("w"))
    check_same(run, model, left, image(2, 4, 6, 6))


def test_an_output_of_the_model_and_a_shared_weight_are_refused(network, notes):
    model = network(
        """n (float[N,4,6,6] x) => (float y, float t) {
            s = Conv(x, w)  t = Relu(s)  u = Conv(t, w)  v = Relu(u)  a = Conv(v, w)  y = Relu(a) }""",
        {"w": uneven(4, 4, 1, 1)},
    )
    assert cle(model, ctx=notes) is model
    reasons = notes.notes[-1].split("; ")
    assert "is an output of the model" in reasons[0]
    assert "is shared" in reasons[1]


def test_a_dead_channel_keeps_a_scale_near_the_others(network, run):
    weight = uneven(8, 4, 3, 3)
    weight[2] = 0
    weight[5] *= 1e-12
    model = pair(network, "t = Relu(s)", params={"w": weight, "b": np.full(8, 3, np.float32)})
    equalized = cle(model, max_scale=20)
    found = equalized.metadata["cle"]["pairs"]
    (report,) = found.values()
    assert report["largest"] / report["smallest"] <= 400
    assert np.abs(equalized.param("b")).max() < 1e3
    check_same(run, model, equalized, image(2, 4, 6, 6))


def test_folded_statistics_are_divided_along(network):
    statistics = {"s": Spread(gamma=np.full(8, 1.0), beta=np.full(8, 2.0))}
    model = pair(network, "t = Relu(s)").with_facts(statistics=statistics)
    equalized = cle(model)
    scale = rows(model.param("w")) / rows(equalized.param("w"))
    np.testing.assert_allclose(equalized.facts.statistics["s"].beta, 2 / scale, rtol=1e-5)
    np.testing.assert_allclose(equalized.param("b"), model.param("b") / scale, rtol=1e-5)


def test_outputs_that_moved_are_a_failure(network, monkeypatch):
    def halve_the_first_layer(editor, layers, links, scales, unused):
        for name in ("w", "b"):
            editor.set_param(name, editor.param(name) / 2)

    monkeypatch.setattr("qpipe.methods.equalization.rescaling.rescale", halve_the_first_layer)
    with pytest.raises(
        StageError,
        match=r"cle changed the model's outputs by 5\.0e-01 \(relative\); that is not float rounding",
    ):
        cle(pair(network, "t = Relu(s)"))


@pytest.mark.parametrize("data", [None, image(2, 4, 6, 6)])
def test_the_outputs_may_move_by_float_rounding_and_no_more(network, data):
    model = pair(network, "t = Relu(s)")

    def moved(share):
        return model.with_params({"v": model.param("v") * (1 + share * LARGEST_ERROR)})

    assert checked(model, moved(0.9), data) == pytest.approx(0.9 * LARGEST_ERROR, rel=1e-2)
    with pytest.raises(StageError, match=r"by 1\.1e-03 \(relative\)"):
        checked(model, moved(1.1), data)


def test_the_source_is_not_touched(network):
    model = relu6(network)
    before = {name: array.copy() for name, array in model.params.items()}
    cle(model)
    assert ops(model) == ["Conv", "Clip", "Conv"]
    assert all(np.array_equal(model.param(name), array) for name, array in before.items())


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 5))
def test_n_layers_in_a_row_end_with_one_range_that_is_their_geometric_mean(seed, count):
    ranges = np.exp(np.random.default_rng(seed).normal(size=(count, 6)))
    found = scales(list(ranges))
    after = [ranges[0] / found[0]]
    after += [ranges[k] * found[k - 1] / found[k] for k in range(1, count - 1)]
    after += [ranges[-1] * found[-1]]
    for one in after:
        np.testing.assert_allclose(one, np.prod(ranges, axis=0) ** (1 / count), rtol=1e-9)


def test_two_layers_get_the_papers_scale():
    first, second = np.array([4.0, 0.5]), np.array([1.0, 2.0])
    (found,) = scales([first, second])
    np.testing.assert_allclose(found, first / np.sqrt(first * second))


def test_scales_are_held_back_where_weights_say_little_and_activations_much():
    scale, ranges = np.array([1.0, 1.2, 0.8, 1e-6]), np.array([1.0, 1.0, 1.0, 1e-6])
    free = bounded(scale, ranges, None, headroom=4, max_scale=1e9)
    np.testing.assert_allclose(free, scale)
    silent = bounded(scale, ranges, np.array([1.0, 1, 1, 0]), headroom=4, max_scale=1e9)
    np.testing.assert_allclose(silent, scale, err_msg="a channel that is always 0 may have any scale")
    held = bounded(scale, ranges, np.ones(4), headroom=4, max_scale=1e9)
    reached = np.mean(1 / scale[:3])
    np.testing.assert_allclose(held, [1, 1.2, 0.8, 1 / (4 * reached)], rtol=1e-6)
    clipped = bounded(scale, ranges, None, headroom=4, max_scale=10)
    assert clipped[3] == pytest.approx(np.cbrt(0.96) / 10, rel=1e-4)


@pytest.mark.parametrize("wired", [True, False])
def test_a_dead_channel_does_not_set_the_range_of_all_activations(network, run, wired):
    weight = uneven(8, 4, 3, 3)
    weight[2] *= 1e-6
    model = pair(network, "t = Relu(s)", params={"w": weight, "b": np.full(8, 3, np.float32)})
    feeds = image(50, 4, 6, 6)

    def reach(model):
        (layer, _) = model.layers()
        largest = (
            model.session(quantized=False, outputs=[layer.activation_output])
            .run(None, feeds)[0]
            .max((0, 2, 3))
        )
        return largest[2] / np.delete(largest, 2).max()

    data = Samples(feeds) if wired else None
    assert reach(cle(model, data, headroom=1e12, max_scale=1e12)) > 20
    equalized = cle(model, data)
    assert reach(equalized) < 8
    check_same(run, model, equalized, feeds)


NORMS = {
    "three readers": (
        """n (float[N,5,8] x) => (float y) {
            l = LayerNormalization<axis=-1>(x, g, b)  q = MatMul(l, q_w)  k = MatMul(l, k_w)  v = MatMul(l, v_w)
            s = Mul(q, k)  y = Add(s, v) }""",
        {"g": uneven(8), "b": (8,), "q_w": (8, 6), "k_w": (8, 6), "v_w": (8, 6)},
        1,
    ),
    "Gemm": (
        """n (float[N,8] x) => (float y) {
            l = LayerNormalization(x, g)  r = Gemm<transB=1>(l, w, c)  y = Relu(r) }""",
        {"g": uneven(8), "w": (6, 8), "c": (6,)},
        1,
    ),
    "the end of an RMS norm": (
        """n (float[N,5,8] x) => (float y) {
            p = Mul(x, x)  a = ReduceMean(p, last)  r = Sqrt(a)  d = Div(x, r)  l = Mul(g, d)
            y = MatMul(l, w) }""",
        {"g": uneven(8), "w": (8, 6), "last": np.array([-1])},
        1,
    ),
    "read by an Add too": (
        """n (float[N,5,8] x) => (float y) {
            l = LayerNormalization(x, g, b)  m = MatMul(l, w)  y = Add(m, l) }""",
        {"g": uneven(8), "b": (8,), "w": (8, 8)},
        0,
    ),
    "a shared scale": (
        """n (float[N,5,8] x) => (float y) {
            l = LayerNormalization(x, g)  m = MatMul(l, w)  o = LayerNormalization(m, g)  y = MatMul(o, v) }""",
        {"g": uneven(8), "w": (8, 8), "v": (8, 8)},
        0,
    ),
}


@pytest.mark.parametrize("wired", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_channels_move_from_a_normalization_into_the_linear_layers_behind_it(network, run, notes, name, wired):
    text, params, count = NORMS[name]
    model = network(text, params)
    feeds = image(*(4, *(int(size) for size in model.inputs[0].shape[1:])))
    equalized = cle(model, Samples(feeds) if wired else None, norms=True, ctx=notes)
    assert len(equalized.metadata["cle"]["norms"] if count else ()) == count, equalized.metadata
    check_same(run, model, equalized, feeds)
    if count:
        assert np.ptp(np.log(np.abs(equalized.param("g")))) < np.ptp(np.log(np.abs(model.param("g"))))
    elif name == "read by an Add too":
        assert any("which is no linear layer" in note for note in notes.notes)
    else:
        assert any("'g' is shared" in note for note in notes.notes)
    assert cle(model) is model
    alone = cle(model, Samples(feeds) if wired else None, norms=True, layers=False)
    assert alone.params.keys() == equalized.params.keys()
    assert all(np.array_equal(alone.param(each), equalized.param(each)) for each in alone.params)


def test_without_layers_only_normalizations_take_part(network):
    model = pair(network, "t = Relu(s)")
    assert cle(model).metadata["cle"]["pairs"]
    assert cle(model, layers=False, norms=True) is model


def test_activations_and_weights_share_a_range_behind_a_normalization(network):
    text, params, _ = NORMS["three readers"]
    model = network(text, params)
    feeds = image(16, 5, 8)
    equalized = cle(model, Samples(feeds), norms=True)
    values = equalized.session(outputs=["l"]).run(None, feeds)[0]
    reach = np.abs(values).max(axis=(0, 1))
    weights = np.max([np.abs(equalized.param(f"{n}_w")).max(axis=1) for n in "qkv"], axis=0)
    assert np.ptp(np.log(reach / weights)) < 1e-4
