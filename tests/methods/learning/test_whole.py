"""A whole network as a function of what is learned: what is learned, and a state that is kept and comes back."""

from __future__ import annotations

import json

import numpy as np
import torch

from qpipe.methods.learning.whole import learnable, packed, unpacked
from qpipe.model import Model
from qpipe.numerics.grid import Encoding
from tests.model.nets import normal, parsed


def grid(scale: float, bits: int = 8) -> Encoding:
    return Encoding(bits, False, False, np.float32(scale), np.int32(3))


def test_what_a_target_prescribes_is_not_learned() -> None:
    text = """m (float[N,4,8,8] x, int64[N] i) => (float[N,6] y, float[N,5] e) {
        t = Conv<pads=[1,1,1,1]>(x, w, b)  r = Relu(t)  m = MaxPool<kernel_shape=[2,2]>(r)
        g = GlobalAveragePool(m)  f = Flatten(g)  s = Softmax(f)  y = MatMul(s, v)  e = Gather(table, i) }"""
    proto = parsed(text, w=normal(6, 4, 3, 3), b=normal(6), v=normal(6, 6), table=normal(9, 5))
    model = Model.from_proto(proto)
    grids = {"x": 0.11, "r": 0.3, "m": 0.3, "s": 2.0**-8, "y": 0.7, "table": 0.013, "e": 0.013, "w": 0.1}
    found = learnable(model.with_encodings({name: grid(scale) for name, scale in grids.items()}))
    assert found.weights == ("w",)  # v has no grid
    assert found.biases == ("b",)
    assert found.steps == {"x": ("x",), "r": ("r", "m"), "y": ("y",)}  # not Softmax's, not the table's


def test_a_state_comes_back_from_arrays_and_json() -> None:
    state = {"done": 3, "least": 0.25, "best": None, "now": {"a.b": {"weight": [torch.randn(2, 3)]}}, "moments": [{}]}
    state["moments"] = [{"step": torch.tensor(3.0), "exp_avg": torch.randn(4)}, {}]
    found = packed(state)
    tree = json.loads(json.dumps(found.pop("tree")))
    back = unpacked({"tree": tree, **found})
    assert (back["done"], back["least"], back["best"]) == (3, 0.25, None)
    assert torch.equal(back["now"]["a.b"]["weight"][0], state["now"]["a.b"]["weight"][0])  # type: ignore[index]
    assert torch.equal(back["moments"][0]["exp_avg"], state["moments"][0]["exp_avg"])
    assert back["moments"][1] == {}
