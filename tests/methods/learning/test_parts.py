"""What is learned together: parts in order, each weight once, a reason for each layer that is in none."""

from __future__ import annotations

import numpy as np
import pytest

from qpipe.errors import InputError
from qpipe.methods.learning.parts import boundary, find_parts
from qpipe.model import Model
from qpipe.model.simulation.constants import host_values
from tests.model.nets import normal, parsed
from tests.model.quantized import quantized


def net(text: str, samples: int = 8, width: int = 4, **tensors: tuple[int, ...]) -> Model:
    arrays = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(tensors.items())}
    return quantized(Model.from_proto(parsed(text, **arrays)), {"x": normal(samples, width)})


RESIDUAL = """m (float[N,4] x) => (float[N,4] y) { a = MatMul(x, w)  r = Relu(a)  b = MatMul(r, v)  t = Relu(b)
    c = MatMul(t, u)  s = Add(c, r)  y = MatMul(s, q) }"""
SQUARE = (4, 4)


def test_blocks_are_parts_and_what_is_in_none_is_one_of_its_own() -> None:
    model = net(RESIDUAL, w=SQUARE, v=SQUARE, u=SQUARE, q=SQUARE)
    parts, left_out = find_parts(model)
    assert [(part.inputs, part.output, part.weights) for part in parts] == [
        (("x",), "r", ("w",)),
        (("r",), "s", ("v", "u")),
        (("s",), "y", ("q",)),
    ]
    assert left_out == {}
    layers, _ = find_parts(model, "per_layer")
    assert [(part.inputs, part.output) for part in layers] == [
        (("x",), "r"), (("r",), "t"), (("t",), "c"), (("s",), "y"),
    ]  # fmt: skip
    (both, last), _ = find_parts(model, together=2)
    assert (both.inputs, both.output, both.weights) == (("x",), "s", ("w", "v", "u"))
    assert last.weights == ("q",)


def test_names_operators_and_shared_weights_leave_others_out_with_a_reason() -> None:
    model = net(RESIDUAL, w=SQUARE, v=SQUARE, u=SQUARE, q=SQUARE)
    name = find_parts(model)[0][1].name
    (part,), left_out = find_parts(model, [name])
    assert part.weights == ("v", "u")
    assert set(left_out.values()) == {"it is in none of the blocks asked for"}
    assert len(left_out) == 2
    none, left_out = find_parts(model, ops=["Conv"])
    assert none == ()
    assert set(left_out.values()) == {"'ops' leaves MatMul out"}
    shared = net("m (float[N,4] x) => (float[N,4] y) { a = MatMul(x, w)  r = Relu(a)  y = MatMul(r, w) }", w=SQUARE)
    assert [part.weights for part in find_parts(shared, "per_layer")[0]] == [("w",)]
    with pytest.raises(InputError, match=r"blocks: the model has no block or layer 'z'. Its blocks: "):
        find_parts(model, ["z"])


def test_what_follows_from_shapes_is_computed_inside() -> None:
    text = """m (float[N,M,4] x) => (float[K,L] y) { n = Shape(x)  a = MatMul(x, w)  r = Relu(a)
        e = Gather(n, order)  b = MatMul(r, v)  c = Reshape(b, e)  y = ReduceSum<keepdims=0>(c, last) }"""
    given = {"order": np.array([1, 0, 2], np.int64), "last": np.array([2], np.int64)}
    model = Model.from_proto(parsed(text, w=normal(4, 4), v=normal(4, 4), **given))
    host = host_values(model.graph)
    assert "e" in {value.name for value in host}
    assert boundary(model.graph, "y", {"r", "e"}, host) == ("x", "r")
