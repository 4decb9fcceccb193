"""Where quantizers go: the target's table on graphs, each rule with a graph of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qpipe.methods.placement.placement import Placement, place
from qpipe.methods.placement.target import Nodes
from qpipe.model import Model
from qpipe.numerics.grid import same_grid
from qpipe.numerics.metrics import sqnr_db
from qpipe.numerics.observers import weight_encoding
from qpipe.stage import Samples
from qpipe.stages.calibrate import calibrate
from tests.model.nets import normal, parsed
from tests.model.quantized import ONNXRUNTIME, SHIPPED, deployed_db, scheme


def placed(text: str, opset: int = 21, **tensors: Any) -> Placement:
    """The placement of 8-bit grids in the graph."""
    return place(Model.from_proto(parsed(text, opset, **tensors)), ONNXRUNTIME, scheme())


def test_a_layer_has_grids_on_input_weight_and_after_its_activation() -> None:
    placement = placed(
        """n (float[N,3,8,8] x) => (float[N,4,8,8] y) {
        t = Conv<pads=[1,1,1,1]>(x, w, b)  r = Clip(t, low, high)  y = Conv(r, v) }""",
        w=normal(4, 3, 3, 3), b=normal(4), v=normal(4, 4, 1, 1), low=np.float32(0), high=np.float32(6),
    )  # fmt: skip
    assert list(placement.activations) == ["x", "r", "y"]
    assert {name: axis for name, (_, axis) in placement.weights.items()} == {"w": 0, "v": 0}
    assert placement.shared == ()
    assert placement.fixed == {}


def test_a_layer_from_one_channel_to_one_stays_in_float_where_the_target_says_so() -> None:
    model = Model.from_proto(
        parsed(
            "n (float[N,1,1,64] x) => (float[N,4,p,q] y) { t = Conv(x, w)  y = Conv(t, v) }",
            w=normal(1, 1, 1, 8), v=normal(4, 1, 1, 8),
        )
    )  # fmt: skip
    placement = place(model, SHIPPED, scheme())
    assert list(placement.weights) == ["v"]
    assert "one channel" in placement.in_float["w"]
    assert list(placement.activations) == ["t", "y"]
    assert list(place(model, replace(SHIPPED, one_channel=()), scheme()).weights) == ["v", "w"]


def test_no_quantizer_is_fused_away_when_somebody_else_reads_the_value() -> None:
    placement = placed(
        "n (float[N,4] x) => (float[N,4] y) { t = MatMul(x, w)  r = Relu(t)  y = Add(t, r) }", w=normal(4, 4)
    )
    assert list(placement.activations) == ["x", "t", "r", "y"]


def test_a_matmul_and_its_bias_are_one_layer() -> None:
    placement = placed(
        "n (float[N,3,4] x) => (float[N,3,5] y) { t = MatMul(x, w)  u = Add(b, t)  y = Relu(u) }",
        w=normal(4, 5), b=normal(5),
    )  # fmt: skip
    assert list(placement.activations) == ["x", "y"]
    assert placement.weights["w"][1] == 1


def test_both_sides_of_a_product_of_activations_have_grids() -> None:
    placement = placed(
        "n (float[N,3,4] x) => (float[N,3,3] y) { k = Transpose<perm=[0,2,1]>(x)  y = MatMul(x, k) }"
    )
    assert list(placement.activations) == ["x", "k", "y"]
    assert placement.shared == (("x", "k"),)
    assert placement.weights == {}


def test_moved_values_share_a_grid_in_both_directions() -> None:
    placement = placed(
        """n (float[N,3,8,8] x) => (float[N,5] y) {
        e = Exp(x)  p = Pad(e, pads)  m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(p)
        f = Flatten(m)  y = Gemm(f, w) }""",
        pads=np.array([0, 0, 0, 0, 0, 0, 2, 2]), w=normal(75, 5),
    )  # fmt: skip
    # Exp is not quantized, but the Gemm wants its input on a grid, and so do all before it.
    assert placement.shared == (("e", "p", "m", "f"),)
    assert "x" not in placement.activations


def test_what_a_bound_cuts_off_needs_no_code() -> None:
    placement = placed(
        """n (float[N,3,8,8] x) => (float[N,4,8,8] y) {
        t = Conv<pads=[1,1,1,1]>(x, w)  r = Relu(t)  m = Min(r, bound)  y = Conv(m, v) }""",
        w=normal(4, 3, 3, 3), bound=np.ones((4, 1, 1), np.float32), v=normal(4, 4, 1, 1),
    )  # fmt: skip
    assert list(placement.activations) == ["x", "r", "m", "y"]
    assert placement.shared == (("r", "m"),)
    assert placement.follows == {"r": "m"}


def test_a_bound_on_a_value_that_others_read_has_its_own_grid() -> None:
    placement = placed(
        "n (float[N,4] x) => (float[N,4] y) { s = Add(x, x)  m = Min(s, bound)  y = Mul(s, m) }",
        bound=np.ones(4, np.float32),
    )
    assert placement.shared == ()
    assert placement.follows == {}
    assert list(placement.activations) == ["x", "s", "m", "y"]


def test_what_a_concat_alone_reads_is_rounded_once_on_its_grid() -> None:
    text = """n (float[N,3,8,8] x) => (float[N,4,8,8] y) {
        a = Conv(x, w)  r = Relu(a)  b = Conv(x, v)  s = Softmax<axis=1>(b)  t = Transpose<perm=[0,1,3,2]>(b)
        d = Conv(b, u)  c = Concat<axis=1>(r, s, t, b, d)  y = Conv(c, k) }"""
    weights = {name: normal(4, channels, 1, 1) for name, channels in (("w", 3), ("v", 3), ("u", 4), ("k", 20))}
    model = Model.from_proto(parsed(text, **weights))
    found = place(model, replace(SHIPPED, softmax="free"), scheme())
    assert [set(group) for group in found.shared] == [{"r", "d", "c"}, {"b", "t"}], "b has other readers"
    assert found.follows == {"r": "c", "d": "c"}


def test_values_that_are_joined_are_nearer_to_float_on_one_grid() -> None:
    text = """n (float[N,3,9,9] x) => (float[N,4,9,9] y) {
        a = Conv(x, w)  b = Conv(x, v)  c = Concat<axis=1>(a, b)  y = Conv(c, u) }"""
    proto = parsed(text, w=normal(4, 3, 1, 1), v=normal(4, 3, 1, 1, seed=1), u=normal(4, 8, 1, 1, seed=2))
    model, x = Model.from_proto(proto), {"x": normal(16, 3, 9, 9)}
    apart = replace(SHIPPED, bound=tuple(op for op in SHIPPED.bound if op != "Concat"))
    own, shared = (calibrate(model, Samples(x), scheme=scheme(), target=each) for each in (apart, SHIPPED))
    assert deployed_db(shared, proto, x) > deployed_db(own, proto, x) > 25


def test_softmax_has_the_grid_that_its_kernel_assumes() -> None:
    placement = placed(
        "n (float[N,2,4] x) => (float[N,8] y) { p = Softmax(x)  y = Reshape(p, s) }", s=[-1, 8]
    )
    assert list(placement.fixed) == ["p", "y"]
    encoding = placement.fixed["p"]
    assert (float(encoding.scale), int(encoding.zero_point)) == (1 / 256, 0)
    assert placement.activations == {}


def test_masked_scores_and_masks_have_no_grid() -> None:
    placement = placed(
        """n (float[N,3,4] x, bool[N,3,3] seen) => (float[N,3,4] y) {
        k = Transpose<perm=[0,2,1]>(x)  s = MatMul(x, k)  mask = Where(seen, zero, never)
        m = Add(s, mask)  p = Softmax(m)  y = MatMul(p, x) }""",
        zero=np.float32(0), never=np.float32(-3e38),
    )  # fmt: skip
    assert list(placement.activations) == ["x", "k", "s", "y"]
    assert list(placement.fixed) == ["p"]


GELU = """n (float[N,8] x) => (float[N,4] y) {
    a = Div(x, root)  b = Erf(a)  c = Add(b, one)  d = Mul(x, c)  e = Mul(d, half)  y = MatMul(e, w) }"""
RMS = """n (float[N,8] x) => (float[N,4] y) {
    a = Pow(x, two)  b = ReduceMean<keepdims=1>(a, axes)  c = Add(b, eps)  d = Sqrt(c)  e = Reciprocal(d)
    f = Mul(x, e)  g = Mul(weight, f)  y = MatMul(g, w) }"""
LAYER_NORM = """n (float[N,8] x) => (float[N,4] y) {
    m = ReduceMean<keepdims=1>(x, axes)  a = Sub(x, m)  a2 = Mul(a, a)  b = ReduceMean<keepdims=1>(a2, axes)
    c = Add(b, eps)  d = Sqrt(c)  e = Div(a, d)  f = Mul(e, weight)  g = Add(f, shift)  y = MatMul(g, w) }"""
SWISH = "n (float[N,8] x) => (float[N,4] y) { a = Sigmoid(x)  g = Mul(x, a)  y = MatMul(g, w) }"
HARD_SWISH = """n (float[N,8] x) => (float[N,4] y) {
    a = Add(x, three)  b = Clip(a, zero, six)  c = Mul(x, b)  g = Div(c, six)  y = MatMul(g, w) }"""
CONSTANTS = {
    "root": np.float32(1.4142135), "one": np.float32(1), "half": np.float32(0.5), "two": np.float32(2),
    "axes": np.array([-1]), "eps": np.float32(1e-6), "three": np.float32(3), "zero": np.float32(0),
    "six": np.float32(6), "weight": np.ones(8, np.float32), "shift": np.ones(8, np.float32), "w": normal(8, 4),
}  # fmt: skip


def used(text: str) -> dict[str, Any]:
    """The constants that a graph reads."""
    return {name: array for name, array in CONSTANTS.items() if f"{name})" in text or f"{name}," in text}


@pytest.mark.parametrize("text", [GELU, RMS, LAYER_NORM, SWISH, HARD_SWISH])
def test_functions_written_out_run_in_float_inside(text: str) -> None:
    marks = (*ONNXRUNTIME.composite, "Sigmoid", "Clip")
    model = Model.from_proto(parsed(text, **used(text)))
    placement = place(model, replace(ONNXRUNTIME, composite=marks), scheme())
    assert not placement.constants
    assert len(placement.activations) == 3
    assert {"x", "y"} < set(placement.activations)


@pytest.mark.parametrize(("text", "constants"), [(SWISH, set()), (HARD_SWISH, {"three"})])
def test_what_has_integer_kernels_for_each_step_has_a_grid_at_each(text: str, constants: set[str]) -> None:
    placement = placed(text, **used(text))
    assert set(placement.activations) >= {"x", "g", "y"}
    assert set(placement.constants) == constants


def test_a_constant_that_an_activation_of_8_bits_meets_has_a_grid_of_its_own() -> None:
    text = """n (float[N,4,5,5] x) => (float[N,4,5,5] y, float[N,4,5,5] z, float[N,4,5,5] m) {
        a = Add(x, c)  y = Mul(k, a)  z = Div(x, d)  r = Mul(x, e)  s = Mul(r, e)  m = Add(s, never) }"""
    channels = {"c": normal(4, 1, 1), "d": normal(4, 1, 1), "e": normal(4, 1, 1), "k": np.float32(2)}
    graph = Model.from_proto(parsed(text, never=np.full((4, 1, 1), -np.inf, np.float32), **channels))
    found = place(graph, ONNXRUNTIME, scheme()).constants
    assert set(found) == {"c", "k"}, "no kernel for Div; two nodes read e; no grid holds -inf"
    assert {(each.bitwidth, each.signed, each.granularity) for each in found.values()} == {(8, False, "per_tensor")}
    assert not place(graph, ONNXRUNTIME, scheme(activation=16)).constants
    excluded = replace(ONNXRUNTIME, nodes=Nodes(exclude=("c",)))
    assert set(place(graph, excluded, scheme()).constants) == {"k"}


ATTENTION = """n (float[N,6,8] x) => (float[N,6,8] y) {
    l = LayerNormalization<axis=-1>(x, weight, shift)  q = MatMul(l, wq)  k = MatMul(l, wk)  v = MatMul(l, wv)
    kt = Transpose<perm=[0,2,1]>(k)  s = MatMul(q, kt)  half = Mul(s, scale)  p = Softmax(half)  o = MatMul(p, v)
    m = MatMul(o, wo)  b = Add(m, bias)  r = Add(b, x)  n = LayerNormalization<axis=-1>(r, weight, shift)
    h = MatMul(n, wh)  g = Gelu(h)  e = MatMul(g, we)  y = Add(e, r) }"""


def test_what_follows_layers_that_give_floats_stays_in_float_up_to_the_next_layer() -> None:
    weights = {name: normal(8, 8, seed=i) for i, name in enumerate(("wq", "wk", "wv", "wo", "wh", "we"))}
    given = {"weight": CONSTANTS["weight"], "shift": CONSTANTS["shift"], "bias": normal(8), "scale": np.float32(0.35)}
    model = Model.from_proto(parsed(ATTENTION, **weights, **given))
    found = place(model, SHIPPED, scheme())
    assert list(found.activations) == ["l", "q", "k", "v", "kt", "p", "o", "n", "g"], "what a MatMul reads"
    assert (list(found.fixed), found.covered) == ([], ("p",))
    assert not found.constants
    assert set(found.weights) == set(weights)


@pytest.mark.parametrize(
    ("ends", "in_float"),
    [
        ("y = Concat<axis=1>(boxes, scores)", {"y"}),
        ("t = Concat<axis=1>(boxes, scores)  y = Transpose<perm=[0,2,1]>(t)", {"t", "y"}),
        ("t = Concat<axis=1>(boxes, scores)  y = Conv(t, v)", set()),
    ],
)
def test_what_is_joined_as_it_leaves_the_model_stays_in_float(ends: str, in_float: set[str]) -> None:
    before = "boxes = Conv(x, w)  c = Conv(x, w)  scores = Sigmoid(c)"
    text = f"n (float[N,4,9] x) => (float[N,A,B] y) {{ {before}  {ends} }}"
    model = Model.from_proto(parsed(text, w=normal(4, 4, 1), v=normal(4, 8, 1)))
    on_grids = set(place(model, replace(ONNXRUNTIME, float_ends=()), scheme()).activations)
    assert on_grids - set(place(model, ONNXRUNTIME, scheme()).activations) == in_float
    assert {"boxes", "scores"} <= set(place(model, ONNXRUNTIME, scheme()).activations)


def test_a_detector_that_is_deployed_keeps_its_scores() -> None:
    """Boxes of hundreds of pixels do not take the codes of scores below 1."""
    text = """n (float[N,4,30] x) => (float[N,8,30] y) {
        c = Conv(x, w)  boxes = Mul(c, size)  d = Conv(x, v)  scores = Sigmoid(d)
        y = Concat<axis=1>(boxes, scores) }"""
    model = Model.from_proto(parsed(text, w=normal(4, 4, 1), v=normal(4, 4, 1), size=np.float32(300)))
    data = Samples({"x": normal(32, 4, 30)})
    wanted, found = (
        Model.of(each).session(mode="deploy").run(None, data.arrays)[0][:, 4:]
        for each in (model, calibrate(model, data, scheme=scheme(), target=SHIPPED))
    )
    assert sqnr_db(found, wanted) > 30


def test_what_meets_a_value_on_a_grid_is_on_one_and_so_is_what_follows() -> None:
    text = """n (float[N,4,6,6] x) => (float[N,9] z, float[N,4,6,6] y) {
        i = Sub(x, half)  c = Conv(i, w)  p = GlobalAveragePool(c)  f = Flatten(p)  z = Gemm(f, g)
        d = Add(x, c)  t = Tanh(d)  y = Mul(t, three) }"""
    given = {"w": normal(4, 4, 1, 1), "g": normal(4, 9), "half": np.float32(0.5), "three": np.float32(3)}
    found = place(Model.from_proto(parsed(text, **given)), SHIPPED, scheme())
    assert list(found.activations) == ["x", "i", "c", "p", "f", "d", "t", "y"], "the Gemm gives floats"
    alone = "n (float[N,4] x) => (float[N,4] y) { a = Add(x, half)  b = Sigmoid(a)  y = Mul(a, b) }"
    assert not place(Model.from_proto(parsed(alone, half=np.float32(0.5))), SHIPPED, scheme()).grids


LOOKED_UP = """n (int64[N,6] i) => (float[N,6,9] y, float[N,6,2] z) {
    e = Gather(table, i)  o = Gather(loud, i)  s = Gather(few, i)  a = Add(e, o)  b = Add(a, s)
    l = LayerNormalization<axis=-1>(b, weight, shift)  y = MatMul(l, w)  t = Gather(tied, i)  z = MatMul(t, v) }"""


def test_a_table_and_what_is_looked_up_in_it_have_one_grid_where_8_bits_hold_it() -> None:
    loud = normal(1000, 8)
    loud[3] *= 40
    given = {
        "table": normal(1000, 8), "loud": loud, "few": normal(20, 8), "tied": normal(600, 8), "w": normal(8, 9),
        "weight": CONSTANTS["weight"], "shift": CONSTANTS["shift"], "v": normal(8, 2),
    }  # fmt: skip
    found = place(Model.from_proto(parsed(LOOKED_UP, **given)), SHIPPED, scheme())
    assert set(found.constants) == {"table", "tied"}
    assert set(found.fixed) == {"e", "t"}
    assert same_grid(found.fixed["e"], weight_encoding(given["table"], found.constants["table"]))
    assert set(found.in_float) == {"loud", "few"}
    assert not place(Model.from_proto(parsed(LOOKED_UP, **given)), SHIPPED, scheme(activation=16)).constants
    head = 'z = Einsum<equation="nik,jk->nij">(t, tied)'
    tied = LOOKED_UP.replace("z = MatMul(t, v)", head).replace(",2]", ",600]")
    found = place(Model.from_proto(parsed(tied, **{k: v for k, v in given.items() if k != "v"})), SHIPPED, scheme())
    assert set(found.constants) == {"table"}, "a head's weight has the grid of a weight"


def test_a_table_of_positions_that_is_added_in_float_has_half_its_bytes_in_the_file() -> None:
    text = """n (float[N,600,8] x) => (float[N,600,9] y) {
        c = MatMul(x, u)  e = Add(c, table)  a = Add(e, loud)  r = Add(few, a)
        l = LayerNormalization<axis=-1>(r, weight, shift)  y = MatMul(l, w) }"""
    loud = normal(1, 600, 8)
    loud[0, 3] *= 40
    given = {"table": normal(600, 8), "loud": loud, "few": normal(8), "u": normal(8, 8), "w": normal(8, 9)}
    proto = parsed(text, **given, weight=CONSTANTS["weight"], shift=CONSTANTS["shift"])
    model, x = Model.from_proto(proto), {"x": normal(4, 600, 8)}
    assert set(place(model, SHIPPED, scheme()).constants) == {"table"}
    assert not place(model, SHIPPED, scheme(activation=16)).constants
    found = calibrate(model, Samples(x), scheme=scheme(), target=SHIPPED)
    plain = calibrate(model, Samples(x), scheme=scheme(), target=replace(SHIPPED, tables=()))
    assert {"e", "a", "r"}.isdisjoint(found.encodings)
    assert len(found.to_qdq().SerializeToString()) < len(plain.to_qdq().SerializeToString()) - 2 * 4800 + 500
    assert deployed_db(found, proto, x) > deployed_db(plain, proto, x) - 0.05 > 30
    assert Model.from_proto(found.to_qdq()).encodings.keys() == found.encodings.keys()


def test_a_gate_that_comes_from_a_layer_is_no_function_written_out() -> None:
    placement = placed(
        """n (float[N,4,5,5] x) => (float[N,4,5,5] y) {
        g = GlobalAveragePool(x)  c = Conv(g, w)  s = Sigmoid(c)  y = Mul(x, s) }""",
        w=normal(4, 4, 1, 1),
    )
    assert list(placement.activations) == ["x", "g", "c", "s", "y"]


def test_positions_and_integers_have_no_grid() -> None:
    placement = placed(
        """n (int64[N,T] ids, int64[N,T] at) => (float[N,T,4] y) {
        e = Gather(table, ids)  p = Cast<to=1>(at)  u = Unsqueeze(p, axes)  f = MatMul(u, frequencies)
        c = Cos(f)  y = Mul(e, c) }""",
        table=normal(10, 4), axes=np.array([2]), frequencies=normal(1, 4),
    )  # fmt: skip
    assert list(placement.activations) == ["e", "y"]
    assert placement.weights == {}


def test_what_codes_stand_for_has_a_grid_and_the_codes_and_their_scale_have_none() -> None:
    placement = placed(
        """n (float[N,4] x) => (float[N,4] y) { t = MatMul(x, w)  r = Relu(t)
        q, s, z = DynamicQuantizeLinear(r)  d = DequantizeLinear(q, s, z)  y = MatMul(d, v) }""",
        w=normal(4, 4), v=normal(4, 4, seed=1),
    )  # fmt: skip
    assert list(placement.activations) == ["x", "r", "d", "y"]
    assert set(placement.weights) == {"w", "v"}


def test_weights_only_places_nothing_on_activations() -> None:
    model = Model.from_proto(
        parsed("n (float[N,4] x) => (float[N,4] y) { a = MatMul(x, w)  y = Softmax(a) }", w=normal(4, 4))
    )
    placement = place(model, ONNXRUNTIME, scheme(activation=None))
    assert list(placement.weights) == ["w"]
    assert placement.activations == {}
    assert placement.fixed == {}
    assert placement.shared == ()


AXES = [
    ("y = Gemm(x, w)", (8, 6), 1),
    ("y = Gemm<transB=1>(x, w)", (6, 8), 0),
    ("y = MatMul(x, w)", (8, 6), 1),
    ("u = Unsqueeze(x, a)  y = Conv(u, w)", (6, 8, 1), 0),
    ("u = Unsqueeze(x, a)  y = ConvTranspose(u, w)", (8, 6, 1), 1),
    ("u = Unsqueeze(x, a)  y = ConvTranspose<group=8>(u, w)", (8, 1, 1), 0),
]


@pytest.mark.parametrize(("body", "shape", "axis"), AXES)
def test_channels_of_every_kind_of_weight(body: str, shape: tuple[int, ...], axis: int) -> None:
    constants = {"a": np.array([2])} if "Unsqueeze" in body else {}
    placement = placed(f"n (float[N,8] x) => (float y) {{ {body} }}", w=normal(*shape), **constants)
    assert placement.weights["w"][1] == axis


def test_blocks_run_along_the_inputs_where_they_fit_and_channels_serve_otherwise() -> None:
    text = """n (float[N,8,4,4] x) => (float[N,8,4,4] y) {
        a = Conv(x, w)  b = Conv<pads=[1,1,1,1]>(a, v)  y = Conv<group=8>(b, d) }"""
    model = Model.from_proto(parsed(text, w=normal(8, 8, 1, 1), v=normal(8, 8, 3, 3), d=normal(8, 1, 1, 1)))
    weights = place(model, ONNXRUNTIME, scheme(granularity="per_block", block_size=4)).weights
    assert (weights["w"][0].granularity, weights["w"][1]) == ("per_block", 1)
    assert (weights["v"][0].granularity, weights["v"][1]) == ("per_channel", 0)
    assert (weights["d"][0].granularity, weights["d"][1]) == ("per_channel", 0)


def test_excluded_names_stay_in_float() -> None:
    model = Model.from_proto(
        parsed(
            "n (float[N,4] x) => (float[N,4] y) { a = MatMul(x, w)  r = Relu(a)  y = MatMul(r, v) }",
            w=normal(4, 4),
            v=normal(4, 4),
        )
    )
    first = str(model.graph[0].name)
    without = place(model, replace(ONNXRUNTIME, nodes=Nodes((first,))), scheme())
    assert list(without.activations) == ["r", "y"]
    assert list(without.weights) == ["v"]
    assert list(place(model, replace(ONNXRUNTIME, nodes=Nodes(("v",))), scheme()).weights) == ["w"]


def test_what_a_layer_reads_of_integers_is_data() -> None:
    """An image of bytes beside a float input; one-hot classes into a MatMul."""
    found = placed(
        """net (uint8[N,3,8,8] image, float[N,3,8,8] other, int64[N] kind) => (float[N,4,6,6] y, float[N,4,6,6] z,
                                                                               float[N,4] k) {
        f = Cast<to=1>(image)  s = Mul(f, c)  y = Conv(s, w)  z = Conv(other, v)
        h = OneHot(kind, depth, values)  k = MatMul(h, m) }""",
        w=normal(4, 3, 3, 3), v=normal(4, 3, 3, 3), m=normal(5, 4), c=np.float32(1 / 255), depth=np.array(5),
        values=np.array([0, 1], np.float32),
    )  # fmt: skip
    assert set(found.weights) == {"w", "v", "m"}
    assert {"s", "y", "other", "z", "h", "k"} <= set(found.activations)
    assert not {"image", "kind"} & set(found.activations)


def test_angles_of_positions_and_masks_are_no_data() -> None:
    found = placed(
        """net (float[N,T,8] x, int64[N,T] position, int64[N,T] mask) => (float[N,T,4] y) {
        p = Cast<to=1>(position)  q = Unsqueeze(p, two)  angle = MatMul(q, frequencies)  sine = Sin(angle)
        m = Cast<to=1>(mask)  n = Unsqueeze(m, two)
        a = Mul(x, sine)  b = Mul(a, n)  y = MatMul(b, w) }""",
        frequencies=normal(1, 8), w=normal(8, 4), two=np.array([2]),
    )  # fmt: skip
    assert set(found.weights) == {"w"}
    assert {"p", "q", "angle", "m", "n"} & set(found.activations) == set()
    assert {"x", "b", "y"} <= set(found.activations)


def test_sines_of_a_time_that_a_layer_reads_are_data() -> None:
    found = placed(
        """net (int64[N] time) => (float[N,4] y) {
        t = Cast<to=1>(time)  u = Unsqueeze(t, one)  angle = Mul(u, f)  s = Sin(angle)  y = MatMul(s, w) }""",
        f=normal(1, 8), w=normal(8, 4), one=np.array([1]),
    )  # fmt: skip
    assert set(found.weights) == {"w"}
    assert {"s", "y"} <= set(found.activations)
    assert not {"t", "u", "angle"} & set(found.activations)
