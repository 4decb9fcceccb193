"""A module's values are seen as they are computed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qpipe.model import Model
from qpipe.model.simulation.module import watched
from tests.model.nets import normal, parsed
from tests.model.quantized import quantized

TEXT = """net (float[N,4] x) => (float[N,4] y, float[N,2] z) {
    a = MatMul(x, w)
    y = Relu(a)
    z, rest = Split<axis = 1, num_outputs = 2>(y)
}"""


def model() -> Model:
    return Model.from_proto(parsed(TEXT, w=normal(4, 4)))


def test_every_value_is_seen_once_and_in_order() -> None:
    seen: list[str] = []
    x = normal(3, 4)
    outputs = watched(model().to_torch(), [x], lambda name, value: seen.append(name))
    assert seen == ["x", "w", "a", "y", "z"]  # nobody reads the rest
    expected = model().to_torch()(torch.tensor(x))
    assert all(torch.equal(found, wanted) for found, wanted in zip(outputs, expected, strict=True))


def test_a_quantized_value_is_seen_before_and_after_it_is_rounded() -> None:
    x = normal(64, 4)
    net = quantized(model(), {"x": x})
    seen: dict[str, list[Tensor]] = {}
    watched(net.to_torch(), [x], lambda name, value: seen.setdefault(name, []).append(value))
    before, after = seen["y"]
    step = float(net.encodings["y"].scale)
    assert len(seen["w"]) == 2
    assert not torch.equal(before, after)
    torch.testing.assert_close(after / step, (after / step).round(), atol=1e-4, rtol=0)
    assert float((before - after).abs().max()) <= 0.5001 * step


def test_no_value_takes_part_in_a_gradient() -> None:
    net = model().to_torch(trainable=["w"])
    (y, _) = watched(net, [normal(3, 4)], lambda name, value: None)
    assert y.is_inference()


def test_one_output_comes_as_a_tuple_too() -> None:
    net = Model.from_proto(parsed("n (float[N,2] x) => (float[N,2] y) { y = Neg(x) }"))
    (y,) = watched(net.to_torch(), [np.ones((1, 2), np.float32)], lambda name, value: None)
    assert y.tolist() == [[-1.0, -1.0]]
