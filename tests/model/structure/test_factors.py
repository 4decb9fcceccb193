"""Factors and shifts by constants go into the layers beside them: fewer nodes, the same function."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from qpipe.model import Model
from qpipe.model.structure.factors import fold_factors

PARAMS: dict[str, tuple[int, ...]] = {
    "w": (6, 4, 3, 3), "d": (6, 1, 3, 3), "v": (5, 6, 1, 1), "b": (6,), "h": (6,), "e": (5,), "k": (1, 6, 1, 1),
    "q11": (6, 6, 1, 1), "m": (6, 5), "t": (4, 6, 3, 3), "g": (1, 1, 5), "q": (6, 6),
}  # fmt: skip
NUMBERS = {"two": 2.0, "six": 6.0, "half": 0.5, "three": 3.0, "minus": -2.0, "nil": 0.0}


def network(body: str, x: str) -> Model:
    rng = np.random.default_rng(0)
    text = f'<ir_version: 10, opset_import: ["": 21]> n (float[N,{x}] x) => (float y) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    read = {name for node in proto.graph.node for name in node.input}
    arrays: dict[str, Any] = {name: rng.normal(size=shape) for name, shape in PARAMS.items()}
    arrays |= {name: np.array(number) for name, number in NUMBERS.items()}
    for name in sorted(read & arrays.keys()):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(arrays[name].astype(np.float32), name))
    if "rows" in read:
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0, 36, -1]), "rows"))
    return Model.from_proto(proto)


def computed(model: Model, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    import onnx_ir as ir

    blob = ir.to_proto(model.ir).SerializeToString()
    found: np.ndarray[Any, Any] = onnxruntime.InferenceSession(blob).run(None, {"x": x})[0]
    return found


CONV = "Conv<pads=[1,1,1,1]>(x, w, b)"
DEPTHWISE = "Conv<group=6, pads=[1,1,1,1]>(s, d, h)"
CASES = {
    "a factor and a shift": (f"c = {CONV}  f = Mul(two, c)  s = Add(f, half)  y = Relu(s)", ["Conv", "Relu"]),
    "for each channel": (f"c = {CONV}  f = Div(c, k)  s = Sub(f, k)  y = Relu(s)", ["Conv", "Relu"]),
    "a bias of its own": ("c = Conv(x, w)  s = Add(c, k)  y = Relu(s)", ["Conv", "Relu"]),
    "transposed": ("c = ConvTranspose(x, t, b)  f = Mul(c, k)  y = Relu(f)", ["ConvTranspose", "Relu"]),
    "behind": (
        f"c = {CONV}  r = Sigmoid(c)  f = Div(r, six)  s = Add(f, half)  y = Conv(s, v, e)",
        ["Conv", "Sigmoid", "Conv"],
    ),
    "behind, padded": (
        f"c = {CONV}  r = Sigmoid(c)  f = Div(r, six)  p = Mul(f, minus)  s = Sub(p, half)  y = {DEPTHWISE}",
        ["Conv", "Sigmoid", "Sub", "Conv"],
    ),
    "a gate": (f"c = {CONV}  y = HardSigmoid<alpha=0.3, beta=0.4>(c)", ["Conv", "Clip"]),
    "a gate, its bias apart": ("c = Conv(x, w)  s = Add(c, k)  y = HardSigmoid(s)", ["Conv", "Clip"]),
    "a gate that another reads too": (
        f"c = {CONV}  o = HardSigmoid(c)  y = Mul(c, o)", ["Conv", "HardSigmoid", "Mul"]
    ),
    "on two ways, past a product with a gate": (
        (
            f"c = {CONV}  r = Sigmoid(c)  s = Div(r, six)  p = GlobalAveragePool(s)  o = Conv(p, q11, h)  "
            "z = Sigmoid(o)  n = Mul(s, z)  y = Conv(n, v, e)"
        ),
        ["Conv", "Sigmoid", "GlobalAveragePool", "Conv", "Sigmoid", "Mul", "Conv"],
    ),
    "on two ways, one of which ends elsewhere": (
        f"c = {CONV}  r = Sigmoid(c)  s = Div(r, six)  p = Conv(s, q11, h)  y = Add(s, p)",
        ["Conv", "Sigmoid", "Div", "Conv", "Add"],
    ),
    "on two ways that meet in a product": (
        f"c = {CONV}  r = Sigmoid(c)  s = Div(r, six)  p = GlobalAveragePool(s)  n = Mul(s, p)  y = Conv(n, v, e)",
        ["Conv", "Sigmoid", "Div", "GlobalAveragePool", "Mul", "Conv"],
    ),
    "past a Relu": (
        f"c = {CONV}  r = Sigmoid(c)  f = Mul(r, two)  p = Relu(f)  y = Conv(p, v)",
        ["Conv", "Sigmoid", "Relu", "Conv"],
    ),
}  # fmt: skip
STAY = {
    "read twice": f"c = {CONV}  f = Mul(c, two)  y = Add(f, c)",
    "a negative factor before a Relu": f"c = {CONV}  r = Sigmoid(c)  f = Mul(r, minus)  p = Relu(f)  y = Conv(p, v)",
    "a factor for each channel, behind": f"c = {CONV}  r = Sigmoid(c)  f = Mul(r, k)  y = Conv(f, v)",
    "a factor of nothing, behind": f"c = {CONV}  r = Sigmoid(c)  f = Mul(r, nil)  y = Conv(f, v)",
    "a shift into zeros": f"c = {CONV}  r = Sigmoid(c)  s = Add(r, two)  y = {DEPTHWISE}",
    "a weight of two layers": f"c = {CONV}  f = Mul(c, two)  r = Conv<pads=[1,1,1,1]>(x, w)  y = Add(f, r)",
}  # fmt: skip


@pytest.mark.parametrize("name", [*CASES, *STAY])
def test_the_function_stays_and_the_nodes_go(name: str) -> None:
    model = network(CASES[name][0] if name in CASES else STAY[name], "4,6,6")
    editor = model.edit()
    gone = fold_factors(editor)
    folded = editor.model()
    before, after = ([node.op_type for node in each.graph] for each in (model, folded))
    assert after == (CASES[name][1] if name in CASES else before)
    assert len(gone) == len(before) - len(after)
    x = np.random.default_rng(1).normal(size=(2, 4, 6, 6)).astype(np.float32)
    expected = computed(model, x)
    np.testing.assert_allclose(computed(folded, x), expected, atol=3e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("c = MatMul(x, m)  s = Add(c, e)  f = Mul(s, half)  y = Relu(f)", ["MatMul", "Add", "Relu"]),
        ("c = MatMul(x, m)  s = Add(c, e)  f = Mul(s, g)  y = Relu(f)", ["MatMul", "Add", "Relu"]),
        ("c = MatMul(x, m)  s = Add(c, half)  y = Relu(s)", ["MatMul", "Add", "Relu"]),
        (
            "c = MatMul(x, q)  s = Add(c, b)  p = Transpose<perm=[0,2,1]>(s)  f = Mul(p, half)  y = Softmax(f)",
            ["MatMul", "Add", "Transpose", "Softmax"],
        ),
        ("r = Sigmoid(x)  f = Mul(r, half)  c = MatMul(f, m)  y = Add(c, e)", ["Sigmoid", "MatMul", "Add"]),
    ],
)
def test_products_take_them_too(body: str, expected: list[str]) -> None:
    model = network(body, "3,6")
    editor = model.edit()
    fold_factors(editor)
    folded = editor.model()
    assert [node.op_type for node in folded.graph] == expected
    x = np.random.default_rng(1).normal(size=(2, 3, 6)).astype(np.float32)
    np.testing.assert_allclose(computed(folded, x), computed(model, x), rtol=1e-5, atol=1e-6)


def test_what_a_layer_gives_afterwards_has_the_name_of_those_numbers() -> None:
    editor = network(f"c = {CONV}  f = Mul(two, c)  s = Add(f, half)  y = Relu(s)", "4,6,6").edit()
    fold_factors(editor)
    assert [layer.output for layer in editor.model().layers()] == ["s"]
