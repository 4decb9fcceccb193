"""Detours around attention go where that is exact, and stay where it is not."""

from __future__ import annotations

import numpy as np

from qpipe.model import Model
from tests.model.nets import error_of_import, normal, op_types, parsed

MASKED = """net (float[N,2,4,6] q, float[N,2,4,6] k) => (float[N,2,4,4] y)
    <float[N,2,6,4] kr> {{
    s = Shape<end=1>(q)  d = Constant<value_ints=[1,4,4]>()  t = Concat<axis=0>(s, d)  e = Expand(mask, t)
    zero = Constant<value_float=0.0>()  low = Constant<value=float {{-inf}}>()  w = Where(e, zero, low)
    flat = Constant<value_ints=[-1,4,6]>()  four = Constant<value_ints=[-1,2,6,4]>()
    kf = Reshape(k, flat)  kt = Transpose<perm=[0,2,1]>(kf)  kr = Reshape(kt, four)
    m = MatMul(q, kr)  a = Add(m, w)  p = Softmax(a)  n = IsNaN(p)  y = Where(n, zero, p) }}"""


def test_a_mask_that_masks_nothing_goes_with_its_guard() -> None:
    proto = parsed(MASKED.format(), mask=np.ones((1, 1, 4, 4), bool))
    model = Model.from_proto(proto)
    assert op_types(model) == ["Transpose", "MatMul", "Softmax"]
    assert model.outputs[0].name == "y"
    assert error_of_import(proto, model) < 1e-6


def test_a_mask_that_masks_becomes_a_constant_and_keeps_the_guard() -> None:
    mask = np.tril(np.ones((1, 1, 4, 4), bool))
    mask[..., 2, :] = False  # a row that is masked whole: NaN without the guard
    proto = parsed(MASKED.format(), mask=mask)
    model = Model.from_proto(proto)
    assert op_types(model) == ["Transpose", "MatMul", "Add", "Softmax", "IsNaN", "Where"]
    arrays = {"q": normal(3, 2, 4, 6), "k": normal(3, 2, 4, 6, seed=1)}
    found = model.session().run(None, arrays)[0]
    assert not found[:, :, 2].any()
    assert np.isfinite(found).all()
    assert error_of_import(proto, model) < 1e-6


ADDED = """net (float[2,3,4,4] x, float[2,3,4,4] z) => (float[2,3,4,4] y) {
    m = MatMul(x, z)  a = Add(m, mask)  p = Softmax(a)  n = IsNaN(p)  zero = Constant<value_float=0.0>()
    y = Where(n, zero, p) }"""


def test_a_mask_of_zeros_goes_with_its_guard() -> None:
    proto = parsed(ADDED, mask=np.zeros((1, 1, 4, 4), np.float32))
    model = Model.from_proto(proto)
    assert op_types(model) == ["MatMul", "Softmax"]
    assert error_of_import(proto, model) < 1e-6


def test_zeros_that_may_be_a_position_bias_or_a_bias_stay() -> None:
    for shape in ((3, 4, 4), (4,), (1, 4)):
        proto = parsed(ADDED, mask=np.zeros(shape, np.float32))
        assert "Add" in op_types(Model.from_proto(proto))


def test_an_expansion_by_dimensions_of_one_stays_where_nothing_else_brings_them() -> None:
    proto = parsed(
        "net (float c) => (float[1,1] y) { s = Constant<value_ints=[1,1]>()  e = Expand(c, s)  y = Add(e, two) }",
        two=np.float32(2),
    )
    model = Model.from_proto(proto)
    assert model.outputs[0].shape == (1, 1)
    assert model.session().run(None, {"c": np.array(3, np.float32)})[0].tolist() == [[5]]
    assert error_of_import(proto, model) == 0



def test_an_expansion_that_the_reader_needs_stays() -> None:
    proto = parsed(
        "net (float[N,4] x, float[1,4] c) => (float[N,4] y) { s = Shape(x)  e = Expand(c, s)  y = Add(e, c) }"
    )
    model = Model.from_proto(proto)
    assert "Expand" in op_types(model)
    assert error_of_import(proto, model) == 0


def test_an_expansion_that_is_broadcast_anyway_goes() -> None:
    proto = parsed(
        "net (float[N,4] x, float[1,4] c) => (float[N,4] y) { s = Shape(x)  e = Expand(c, s)  y = Add(x, e) }"
    )
    model = Model.from_proto(proto)
    assert op_types(model) == ["Add"]
    assert error_of_import(proto, model) == 0


def test_a_transpose_of_other_axes_by_way_of_a_flattened_batch_stays() -> None:
    proto = parsed(
        """net (float[2,3,4,6] x) => (float[3,2,6,4] y) {
        flat = Constant<value_ints=[6,4,6]>()  back = Constant<value_ints=[3,2,6,4]>()
        f = Reshape(x, flat)  t = Transpose<perm=[0,2,1]>(f)  y = Reshape(t, back) }"""
    )
    model = Model.from_proto(proto)
    assert op_types(model) == ["Reshape", "Transpose", "Reshape"]
    assert error_of_import(proto, model) == 0
