"""The walk through a module, node by node: its values, what it holds, and parameters replaced on the way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qpipe.model import Model
from qpipe.model.simulation.stream import Stream
from tests.model.nets import normal, parsed
from tests.model.qdq.test_writer import X, cnn
from tests.model.quantized import quantized
from tests.model.simulation.test_module import attention


def halves(array: np.ndarray) -> list[tuple[np.ndarray]]:
    """Two batches of different sizes."""
    return [(array[:6],), (array[6:],)]


def node(model: Model, output: str) -> str:
    """The name of the node that makes the value `output`."""
    return next(str(n.name) for n in model.graph if any(v.name == output for v in n.outputs))


@pytest.mark.parametrize("with_grids", [False, True])
def test_a_walk_to_the_end_is_the_forward_pass(with_grids: bool) -> None:
    module = quantized(cnn(), X).to_torch(quantized=with_grids)
    outputs = Stream(module, halves(X["x"])).finish()
    with torch.no_grad():
        for (batch,), output in zip(halves(X["x"]), outputs, strict=True):
            assert torch.equal(output, module(torch.tensor(batch)))


def test_shape_arithmetic_follows_each_batch() -> None:
    module = attention().to_torch()
    batches = [(normal(2, 5, 8),), (normal(3, 4, 8),)]
    outputs = Stream(module, batches).finish()
    assert [tuple(output.shape) for output in outputs] == [(2, 5, 8), (3, 4, 8)]


def test_values_are_those_that_readers_see() -> None:
    model = quantized(cnn(), X)
    stream = Stream(model.to_torch(), halves(X["x"]))
    stream.advance(node(model, "p"))
    c = torch.cat(stream.value("c")).numpy()
    codes = c / model.encodings["c"].scale
    np.testing.assert_allclose(codes, np.rint(codes), atol=1e-3)
    with pytest.raises(KeyError, match="has not been computed yet"):
        stream.value("p")
    stream.advance(node(model, "s"))  # what reads it
    p = torch.cat(stream.value("p")).numpy()
    np.testing.assert_array_equal(p, model.session(outputs=["p"]).run(None, X)[0])


def test_a_value_is_held_until_its_last_reader_has_run() -> None:
    model = cnn()
    stream = Stream(model.to_torch(quantized=False), halves(X["x"]))
    stream.advance(node(model, "s"))
    for name in ("x", "a", "c", "d"):
        with pytest.raises(KeyError, match="not held any more"):
            stream.value(name)
    assert len(stream.value("r")) == 2  # the sum still reads it
    assert set(stream._values) == {stream._node_of("r"), stream._node_of("p")}


def test_a_replaced_parameter_counts_from_the_next_node_on() -> None:
    model = quantized(cnn(), X)
    twice = (model.param("w3") * 2).astype(np.float32)
    stream = Stream(model.to_torch(), halves(X["x"]))
    stream.advance(node(model, "p"))
    stream.set_parameter("w3", twice)
    changed = torch.cat(stream.finish())
    expected = model.with_params({"w3": twice}).to_torch()(torch.tensor(X["x"]))
    assert torch.equal(changed, expected.detach())


def test_a_parameter_replaced_too_late_changes_nothing_before() -> None:
    proto = parsed(
        "n (float[N,4] x) => (float[N,4] y) { a = MatMul(x, w)  y = MatMul(a, w) }", w=normal(4, 4)
    )
    model = Model.from_proto(proto)
    x = normal(6, 4)
    stream = Stream(model.to_torch(), [(x,)])
    stream.advance(node(model, "y"))
    stream.set_parameter("w", np.eye(4, dtype=np.float32))
    np.testing.assert_allclose(stream.finish()[0].numpy(), x @ model.param("w"), rtol=1e-5, atol=1e-6)


def test_weights_can_be_read_like_values() -> None:
    model = quantized(cnn(), X)
    stream = Stream(model.to_torch(), halves(X["x"]))
    (w,) = stream.value("w1")
    assert tuple(w.shape) == (8, 3, 3, 3)


def test_unknown_names_are_refused() -> None:
    stream = Stream(cnn().to_torch(), halves(X["x"]))
    with pytest.raises(KeyError, match="no node 'nowhere'"):
        stream.advance("nowhere")
    with pytest.raises(KeyError, match="no value 'nothing'"):
        stream.value("nothing")
    with pytest.raises(KeyError, match="no parameter 'none'"):
        stream.set_parameter("none", 0)


def test_what_a_stream_returns_can_be_trained_on() -> None:
    model = cnn()
    module = model.to_torch(trainable=["w1"])
    stream = Stream(module, halves(X["x"]))
    stream.advance(node(model, "d"))
    value = stream.value("r")[0]
    assert not value.requires_grad
    weight = torch.nn.Parameter(torch.ones(()))
    (value * weight).sum().backward()
    assert weight.grad is not None
