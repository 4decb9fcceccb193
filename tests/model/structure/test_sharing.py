"""Shared weights: found, and given apart without a change in what the model computes."""

from __future__ import annotations

import numpy as np

from qpipe.model import Model
from qpipe.model.files.onnx_writer import torch_weights
from qpipe.model.structure.sharing import shared_weights, with_own_weights
from tests.model.nets import normal, parsed


def test_an_embedding_keeps_its_table_and_the_head_gets_a_transposed_copy() -> None:
    proto = parsed(
        "net (int64[N,3] i) => (float[N,3,5] y) { e = Gather(w, i)  t = Transpose(w)  [head] y = MatMul(e, t) }",
        w=normal(5, 4),
    )
    model = Model.from_proto(proto)
    assert shared_weights(model) == {"w": ("e", "head")}
    assert model.layers() == ()
    own = with_own_weights(model)
    assert shared_weights(own) == {}
    (layer,) = own.layers()
    assert layer.weight == "head.weight"
    assert np.array_equal(own.param("head.weight"), normal(5, 4).T)
    assert np.array_equal(torch_weights(own)["head.weight"], normal(5, 4))
    i = np.arange(6).reshape(2, 3) % 5
    assert np.array_equal(own.session().run(None, {"i": i})[0], model.session().run(None, {"i": i})[0])


def test_the_first_of_two_layers_keeps_the_weight() -> None:
    proto = parsed(
        "net (float[N,4] x) => (float[N,4] y) { [one] a = Gemm(x, w, b)  r = Relu(a)  [two] y = Gemm(r, w, b) }",
        w=normal(4, 4),
        b=normal(4),
    )
    own = with_own_weights(Model.from_proto(proto))
    assert [(layer.weight, layer.bias) for layer in own.layers()] == [("w", "b"), ("two.weight", "two.bias")]
    assert np.array_equal(own.param("two.weight"), own.param("w"))


def test_a_model_that_shares_nothing_is_given_back() -> None:
    model = Model.from_proto(
        parsed("net (float[N,4] x) => (float[N,4] y) { y = MatMul(x, w) }", w=normal(4, 4))
    )
    assert with_own_weights(model) is model
