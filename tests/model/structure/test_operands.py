"""The constants that data are multiplied by, and their axes: turning up one channel turns up one part of the output."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest

from qpipe.model import Model
from qpipe.model.structure.operands import computed_factors, find_operands
from tests.model.nets import normal, parsed

Axes = tuple[int | None, int | None, int]
CASES: dict[str, tuple[str, tuple[int, ...], Axes]] = {
    "MatMul": ("(float[5,6,8] x) => (float[5,6,3] y) { y = MatMul(x, w) }", (8, 3), (1, 0, 8)),
    "MatMul of rank 3": (
        "(float[5,4,6,8] x) => (float[5,4,6,3] y) { y = MatMul(x, w) }", (4, 8, 3), (2, 1, 8)
    ),
    "MatMul on the left": ("(float[5,8,3] x) => (float[5,6,3] y) { y = MatMul(w, x) }", (6, 8), (0, 1, 8)),
    "MatMul by a vector": ("(float[5,6,8] x) => (float[5,6] y) { y = MatMul(x, w) }", (8,), (None, 0, 8)),
    "MatMul, transposed": (
        "(float[5,8] x) => (float[5,3] y) { t = Transpose<perm=[1,0]>(w)  y = MatMul(x, t)  z = Neg(w) }",
        (3, 8), (0, 1, 8),
    ),
    "Gemm": ("(float[5,8] x) => (float[5,3] y) { y = Gemm(x, w) }", (8, 3), (1, 0, 8)),
    "Gemm with a bias per row": ("(float[5,8] x) => (float[5,3] y) { y = Gemm<transB=1>(x, w, b) }", (3, 8), (0, 1, 8)),
    "Gemm, the constant on the left": ("(float[8,3] x) => (float[5,3] y) { y = Gemm(w, x) }", (5, 8), (0, 1, 8)),
        "Einsum": (
        '(float[5,6,8] x) => (float[5,6,4,3] y) { y = Einsum<equation="btd,dhe->bthe">(x, w) }', (8, 4, 3), (2, 0, 8)
    ),
    "Einsum over two axes": (
        '(float[5,6,4,3] x) => (float[5,6,8] y) { y = Einsum<equation="bthe,dhe->btd">(x, w) }',
        (8, 4, 3), (0, None, 12),
    ),
    "Einsum with dots": (
        '(float[5,6,8] x) => (float[5,6,3] y) { y = Einsum<equation="...d,de->...e">(x, w) }', (8, 3), (1, 0, 8)
    ),
    "Einsum, an axis for each sample": (
        '(float[5,8] x) => (float[5,3] y) { y = Einsum<equation="bd,bde->be">(x, w) }', (5, 8, 3), (2, 1, 8)
    ),
    "Conv with a computed bias": (
        "(float[5,8,4,4] x) => (float[5,3,2,2] y) { c = Neg(b)  y = Conv(x, w, c) }", (3, 8, 3, 3), (0, None, 72)
    ),
    "Conv, pointwise": ("(float[5,8,4,4] x) => (float[5,3,4,4] y) { y = Conv(x, w) }", (3, 8, 1, 1), (0, 1, 8)),
    "ConvTranspose": (
        "(float[5,8,4,4] x) => (float[5,3,6,6] y) { y = ConvTranspose(x, w) }", (8, 3, 3, 3), (1, None, 72)
    ),
    "ConvTranspose, depthwise": (
        "(float[5,8,4,4] x) => (float[5,8,6,6] y) { y = ConvTranspose<group=8>(x, w) }", (8, 1, 3, 3), (0, None, 9)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_constant_operand_is_found_with_the_axes_of_its_channels_and_of_its_sums(name: str) -> None:
    text, shape, (channel, inner, products) = CASES[name]
    more: dict[str, Any] = {"b": normal(5, 1) if "Gemm" in text else normal(3)} if "b)" in text else {}
    proto = parsed(f"m {text}", w=normal(*shape), **more)
    (operand,) = find_operands(Model.from_proto(proto))
    assert (operand.weight, operand.shape) == ("w", shape)
    assert (operand.channel_axis, operand.inner_axis, operand.inner) == (channel, inner, products)
    if channel is None:
        return
    # Twice the weights of one channel: some outputs, the product alone, are twice what they were, the others the same.
    turned = normal(*shape)
    turned[(slice(None),) * channel + (1,)] *= 2
    outputs = []
    for weight in (normal(*shape), turned):
        each = parsed(f"m {text}", w=weight, **{n: np.zeros_like(a) for n, a in more.items()})
        sizes = [dim.dim_value for dim in each.graph.input[0].type.tensor_type.shape.dim]
        session = onnxruntime.InferenceSession(each.SerializeToString())
        outputs.append(session.run(["y"], {"x": normal(*sizes, seed=3)})[0])
    ratio = outputs[1] / outputs[0]
    doubled = np.isclose(ratio, 2, rtol=1e-3)
    assert (doubled | np.isclose(ratio, 1, rtol=1e-3)).all()
    assert 0 < doubled.mean() < 1


def test_what_is_no_constant_operand_is_none_and_what_is_computed_is_named() -> None:
    text = """m (float[5,8] x) => (float[5,5] y) {
        g = Mul(v, s)  a = Einsum<equation="bd,de->be">(x, g)  k = Transpose<perm=[1,0]>(x)  y = MatMul(a, k) }"""
    model = Model.from_proto(parsed(text, v=normal(8, 8), s=normal(8, 1)))
    assert find_operands(model) == ()
    assert computed_factors(model) == {"g": "a"}
