"""Rules that are no layer's: what goes, and what only looks as if it computed nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qpipe.model.canon import plain_forms
from qpipe.model.network.invariants import lift_constants
from qpipe.model.network.rewriting import apply
from qpipe.model.network.shapes import infer_shapes
from tests.model.nets import normal, parsed

Rule = Callable[[ir.Graph, ir.Node], bool]


def after(rule: Rule, body: str, shape: str = "N,4", out: str = "N,4", **tensors: Any) -> ir.Graph:
    """The graph after the rule was offered every node once; the result goes through a Neg to the output."""
    text = f"m (float[{shape}] x) => (float[{out}] y) {{ {body}  y = Neg(z) }}"
    model = ir.from_proto(parsed(text, **tensors))
    lift_constants(model.graph)
    infer_shapes(model)
    apply(model.graph, (rule,))
    return model.graph


def ops(graph: ir.Graph) -> list[str]:
    return [node.op_type for node in graph][:-1]


@pytest.mark.parametrize(
    ("body", "tensors"),
    [
        ("z = Identity(x)", {}),
        ("z = Dropout(x)", {}),
        ("z = Sum(x)", {}),
        ("z = Clip(x)", {}),
        ("z = Cast<to=1>(x)", {}),
        ("z = Transpose<perm=[0,1]>(x)", {}),
        ("z = Reshape(x, s)", {"s": [0, 4]}),
        ("z = Slice(x, a, b, c)", {"a": [0], "b": [4], "c": [1]}),
        ("z = Pad(x, s)", {"s": [0, 0, 0, 0]}),
    ],
)
def test_a_node_that_gives_back_its_input_goes(body: str, tensors: dict[str, Any]) -> None:
    assert ops(after(plain_forms.skip_nothing, body, **tensors)) == []


@pytest.mark.parametrize(
    ("body", "shape", "tensors"),
    [
        ("z, mask = Dropout(x)  u = Not(mask)  v = Cast<to=1>(u)  w = Add(v, x)", "N,4", {}),
        ("z = Dropout(x, r, t)", "N,4", {"r": np.float32(0.5), "t": np.array(True)}),
        ("z = Slice(x, a, b, c, d)", "N,4", {"a": [3], "b": [-9], "c": [1], "d": [-1]}),
        ("z = Transpose<perm=[1,0]>(x)", "4,4", {}),
        ("z = Reshape(x, s)", "2,2", {"s": [4, 1]}),
        ("z = Pad(x, s)", "N,4", {"s": [0, 1, 0, -1]}),
        ("z = Max(x, x)", "N,4", {}),
    ],
)
def test_what_only_looks_like_that_stays(body: str, shape: str, tensors: dict[str, Any]) -> None:
    graph = after(plain_forms.skip_nothing, body, shape, "p,q", **tensors)
    assert ops(graph)[0] == body.partition("= ")[2].partition("(")[0].partition("<")[0]


NEUTRAL = {"zero": np.zeros(4, np.float32), "one": np.ones(4, np.float32)}


@pytest.mark.parametrize("body", ["Add(x, zero)", "Add(zero, x)", "Sub(x, zero)", "Mul(one, x)", "Div(x, one)"])
def test_adding_zeros_and_multiplying_by_ones_goes(body: str) -> None:
    rule = partial(plain_forms.skip_neutral, frozenset())
    used = {name: array for name, array in NEUTRAL.items() if name in body}
    assert ops(after(rule, f"z = {body}", **used)) == []


@pytest.mark.parametrize(
    ("body", "parameters", "tensors"),
    [
        ("Sub(zero, x)", (), NEUTRAL),
        ("Div(one, x)", (), NEUTRAL),
        ("Add(x, zero)", {"zero"}, NEUTRAL),  # a parameter may change
        ("Mul(x, zero)", (), NEUTRAL),
        ("Add(x, zero)", (), {"zero": np.zeros((3, 1, 4), np.float32)}),  # makes more of it
    ],
)
def test_what_is_not_neutral_stays(body: str, parameters: Collection[str], tensors: dict[str, Any]) -> None:
    rule = partial(plain_forms.skip_neutral, frozenset(parameters))
    used = {name: array for name, array in tensors.items() if name in body}
    assert ops(after(rule, f"z = {body}", out="p,N,4" if "Add" in body and not parameters else "N,4", **used)) == [
        body.partition("(")[0]
    ]


@pytest.mark.parametrize(
    ("op", "shape", "wanted"),
    [
        ("Shape(x)", "2,3,4", [2, 3, 4]),
        ("Shape<start=1, end=3>(x)", "N,3,4", [3, 4]),
        ("Shape<start=-1>(x)", "N,3,4", [4]),
        ("Size(x)", "2,3,4", 24),
        ("Shape(x)", "N,3,4", None),
        ("Size(x)", "N,3,4", None),
    ],
)
def test_shapes_whose_numbers_are_known_are_constants(op: str, shape: str, wanted: Any) -> None:
    rule = plain_forms.known_size if op.startswith("Size") else plain_forms.known_shape
    graph = after(rule, f"s = {op}  z = Cast<to=1>(s)", shape, "p")
    value = graph[-2].inputs[0]
    if wanted is None:
        assert not value.is_initializer()
    else:
        np.testing.assert_array_equal(value.const_value.numpy(), wanted)


@pytest.mark.parametrize(("out", "wanted"), [("N,12", [-1, 12]), ("2,12", [2, 12]), ("N,M", None)])
def test_a_computed_shape_with_at_most_one_open_size_is_a_constant(out: str, wanted: list[int] | None) -> None:
    text = f"m (float[N,3,4] x, int64[2] s) => (float[{out}] y) {{ y = Reshape(x, s) }}"
    model = ir.from_proto(parsed(text))
    apply(model.graph, (plain_forms.known_reshape,))
    target = model.graph[0].inputs[1]
    assert (target.const_value.numpy().tolist() if target.is_initializer() else None) == wanted


@pytest.mark.parametrize("first", [(0, 2, 1), (1, 2, 0), (2, 0, 1)])
def test_two_transposes_are_one_that_does_both(first: tuple[int, ...]) -> None:
    second = (1, 2, 0)
    body = f"a = Transpose<perm={list(first)}>(x)  z = Transpose<perm={list(second)}>(a)"
    graph = after(plain_forms.merge_transposes, body, "2,3,4", "p,q,r")
    merged = graph[-2].attributes["perm"].as_ints()
    x = normal(2, 3, 4)
    np.testing.assert_array_equal(x.transpose(merged), x.transpose(first).transpose(second))
    assert graph[-2].inputs[0] is graph.inputs[0]


@pytest.mark.parametrize(("target", "merged"), [([2, 12], True), ([-1, 6], True), ([0, 12], False)])
def test_a_reshape_of_a_reshape_needs_the_last_only_unless_it_copies_a_size(target: list[int], merged: bool) -> None:
    body = "a = Reshape(x, s)  z = Reshape(a, t)"
    graph = after(plain_forms.merge_reshapes, body, "2,3,4", "p,q", s=[6, 4], t=target)
    assert (graph[-2].inputs[0] is graph.inputs[0]) == merged


def test_a_cast_like_something_of_a_known_type_is_a_cast() -> None:
    graph = after(plain_forms.cast_like_to_cast, "a = Cast<to=7>(x)  z = CastLike(a, x)")
    assert ops(graph) == ["Cast", "Cast"]
    assert graph[1].attributes["to"].as_int() == ir.DataType.FLOAT


def test_inputs_left_out_at_the_end_are_not_written() -> None:
    graph = ir.from_proto(parsed("m (float[4] x) => (float[4] y) { y = Clip(x, lo, ) }", lo=np.float32(0))).graph
    graph[0].resize_inputs(3)
    apply(graph, (plain_forms.trim_inputs,))
    assert len(graph[0].inputs) == 2
