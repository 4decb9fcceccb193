"""Functions written out: what lies inside one, and what only looks like one."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qpipe.methods.placement.placement import data_values
from qpipe.model import Model
from qpipe.model.structure.composite import find_composites, only_consumer
from tests.model.nets import normal, parsed

MARKS = ("Erf", "Sqrt", "Sigmoid", "Tanh", "Softplus")
CONSTANTS: dict[str, Any] = {
    "one": np.float32(1), "half": np.float32(0.5), "two": np.float32(2), "eps": np.float32(1e-6),
    "last": np.array([-1]), "g": normal(8), "b": normal(8, seed=1), "w": normal(8, 8),
}  # fmt: skip


def composites(body: str, outputs: str = "float[N,8] y") -> list[tuple[str, str, str]]:
    """(root, result, names of the outputs inside) of each function in the graph."""
    used = {name: array for name, array in CONSTANTS.items() if any(f"{name}{end}" in body for end in "),")}
    graph = Model.from_proto(parsed(f"m (float[N,8] x) => ({outputs}) {{ {body} }}", **used)).graph
    found = find_composites(graph, data_values(graph), MARKS)
    inside = [sorted(str(node.outputs[0].name) for node in each.nodes) for each in found]
    return [(str(c.root.name), str(c.result.name), " ".join(i)) for c, i in zip(found, inside, strict=True)]


@pytest.mark.parametrize(
    ("body", "root", "result", "inside"),
    [
        ("a = Erf(x)  c = Add(a, one)  d = Mul(x, c)  e = Mul(d, half)  y = MatMul(e, w)", "x", "e", "a c d e"),
        ("a = Sigmoid(x)  g2 = Mul(x, a)  y = MatMul(g2, w)", "x", "g2", "a g2"),
        ("a = Softplus(x)  t = Tanh(a)  g2 = Mul(x, t)  y = MatMul(g2, w)", "x", "g2", "a g2 t"),
        (
            """p = Pow(x, two)  m = ReduceMean(p, last)  e = Add(m, eps)  s = Sqrt(e)  n = Div(x, s)  f = Mul(n, g)
            y = MatMul(f, w)""",
            "x", "f", "e f m n p s",
        ),
        (
            """m = ReduceMean(x, last)  c = Sub(x, m)  q = Mul(c, c)  v = ReduceMean(q, last)  e = Add(v, eps)
            s = Sqrt(e)  n = Div(c, s)  f = Mul(n, g)  h = Add(f, b)  y = MatMul(h, w)""",
            "x", "h", "c e f h m n q s v",
        ),
    ],
)  # fmt: skip
def test_a_function_reaches_from_its_root_to_its_result(body: str, root: str, result: str, inside: str) -> None:
    assert composites(body) == [(root, result, inside)]


def test_a_gate_of_another_value_is_none() -> None:
    assert composites("t = MatMul(x, w)  a = Sigmoid(t)  y = Mul(x, a)") == []


def test_a_function_whose_inside_is_read_elsewhere_is_none() -> None:
    assert composites("a = Sigmoid(x)  m = Mul(x, a)  y = Add(m, a)") == []
    assert composites("a = Sigmoid(x)  y = Mul(x, a)", "float[N,8] y, float[N,8] a") == []
    rms = "p = Pow(x, two)  m = ReduceMean(p, last)  e = Add(m, eps)  s = Sqrt(e)  n = Div(x, s)  f = Mul(n, g)"
    assert composites(f"{rms}  y = MatMul(f, w)") == [("x", "f", "e f m n p s")]
    assert composites(f"{rms}  y = Add(f, m)") == []


def test_a_sum_does_not_close_a_function() -> None:
    assert composites("a = Sigmoid(x)  y = Add(x, a)") == []


def test_a_vector_behind_it_belongs_to_a_norm_and_not_to_a_gelu() -> None:
    assert composites("a = Sigmoid(x)  m = Mul(x, a)  y = Mul(m, g)") == [("x", "m", "a m")]


def test_an_activation_alone_is_no_function_written_out() -> None:
    assert composites("a = Sigmoid(x)  y = MatMul(a, w)") == []


def test_the_only_consumer_of_a_value_reads_it_alone() -> None:
    graph = ir.from_proto(
        parsed("m (float[4] x) => (float[4] y, float[4] b) { a = Add(x, x)  b = Neg(a)  c = Abs(a)  y = Mul(c, c) }")
    ).graph
    assert only_consumer(graph.inputs[0]) is graph[0]
    assert only_consumer(graph[0].outputs[0]) is None
    assert only_consumer(graph[1].outputs[0]) is None
    assert only_consumer(graph[2].outputs[0]) is graph[3]
