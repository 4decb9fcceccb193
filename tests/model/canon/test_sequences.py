"""Sequences of known length become the tensors that they hold; numbers are onnxruntime's on the source."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qpipe.methods.comparison.check import verify_import
from qpipe.model import Model
from tests.model.nets import parsed

HEAD = "n (float[N,7,4] x) => (float[a,b,c] y)"
BODIES = {
    "a body for each element": (
        (
            "k = Constant<value = int64 {3}>() s = SplitToSequence<axis = 1>(x, k) a = Constant<value = float {2.0}>() "
            "t = SequenceMap<body = b (float[N,l,4] e, float f) => (float[N,l,4] r) { h = Mul(e, f) r = Relu(h) }>"
            "(s, a) y = ConcatFromSequence<axis = 1>(t)"
        ),
        ["Split", "Mul", "Relu", "Mul", "Relu", "Mul", "Relu", "Concat"],
    ),
    "a body for pairs": (
        (
            "k = Constant<value = int64 {3}>() s = SplitToSequence<axis = 1>(x, k) n = Neg(x) "
            "m = SplitToSequence<axis = 1>(n, k) "
            "t, u = SequenceMap<body = b (float[N,l,4] e, float[N,l,4] f) => (float[N,l,4] r, float[N,l,4] q) "
            "{ r = Mul(e, f) q = Add(e, r) }>(s, m) i = Constant<value = int64 {1}>() p = SequenceAt(t, i) "
            "o = SequenceAt(u, i) y = Concat<axis = 2>(p, o)"
        ),
        None,
    ),
    "equal parts and a rest": (
        (
            "k = Constant<value = int64 {3}>() s = SplitToSequence<axis = 1>(x, k) "
            "i = Constant<value = int64 {-1}>() p = SequenceAt(s, i) y = Relu(p)"
        ),
        ["Split", "Relu"],
    ),
    "sizes": (
        (
            "k = Constant<value = int64[3] {1, 4, 2}>() s = SplitToSequence<axis = -2>(x, k) i = "
            "Constant<value = int64 {1}>() "
            "j = Constant<value = int64 {0}>() p = SequenceAt(s, i) q = SequenceAt(s, j) y = Concat<axis = 1>(p, q)"
        ),
        ["Split", "Concat"],
    ),
    "single slices without their dimension": (
        "s = SplitToSequence<axis = 1, keepdims = 0>(x) y0 = ConcatFromSequence<axis = 1, new_axis = 1>(s) y = Neg(y0)",
        None,
    ),
    "one part": (
        (
            "k = Constant<value = int64 {9}>() s = SplitToSequence<axis = 1>(x, k) i = Constant<value = int64 {0}>() "
            "p = SequenceAt(s, i) y = Relu(p)"
        ),
        ["Relu"],
    ),
    "put together, inserted, erased": (
        (
            "a = Relu(x) b = Neg(x) c = Abs(x) e = SequenceEmpty<dtype = 1>() s = SequenceInsert(e, "
            "a) t = SequenceInsert(s, b) "
            "i = Constant<value = int64 {0}>() u = SequenceInsert(t, c, i) v = SequenceErase(u, i) "
            "w = SequenceErase(u) "
            "z = ConcatFromSequence<axis = 2>(v) q = ConcatFromSequence<axis = 2>(w) y = Concat<axis = 0>(z, q)"
        ),
        ["Relu", "Neg", "Abs", "Concat", "Concat", "Concat"],
    ),
    "its length counts": (
        (
            "k = Constant<value = int64 {2}>() s = SplitToSequence<axis = 1>(x, k) l = SequenceLength(s) "
            "o = Constant<value = int64 {1}>() i = Sub(l, o) p = SequenceAt(s, i) y = Relu(p)"
        ),
        ["Split", "Relu"],
    ),
    "an element is an output": (
        (
            "k = Constant<value = int64 {4}>() s = SplitToSequence<axis = 2>(x, k) i = Constant<value = int64 {0}>() "
            "y = SequenceAt(s, i)"
        ),
        None,
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_known_sequence_is_the_tensors_that_it_holds(name: str) -> None:
    body, ops = BODIES[name]
    proto = parsed(f"{HEAD} {{ {body} }}")
    del proto.graph.output[0].type.tensor_type.shape.dim[:]
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    model = Model.from_proto(proto)
    found = [node.op_type for node in model.graph]
    assert ops is None or found == ops
    assert not any("Sequence" in op for op in found)
    assert model.outputs[0].name == "y"
    assert verify_import(model, proto.SerializeToString()).equal


@pytest.mark.parametrize(
    "body",
    [
        (
            "k = Constant<value = int64 {1}>() s = SplitToSequence<axis = 0>(x, k) i = Constant<value = int64 {0}>() "
            "y = SequenceAt(s, i)"
        ),
        (
            "k = Constant<value = int64 {3}>() s = SplitToSequence<axis = 1>(x, k) h = Shape<start = 0, end = 1>(x) "
            "z = Constant<value = int64[0] {}>() i = Reshape(h, z) y = SequenceAt(s, i)"
        ),
    ],
    ids=["as many parts as samples", "whichever the batch says"],
)
def test_what_depends_on_the_data_stays_and_runs(body: str) -> None:
    proto = parsed(f"{HEAD} {{ {body} }}")
    model = Model.from_proto(proto)
    assert any("Sequence" in node.op_type for node in model.graph)
    assert verify_import(model, proto.SerializeToString()).equal


class Gated(nn.Module):
    """Halves of a fused projection, as GLU, GPT-2's qkv and YOLO's C2f take them."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Linear(6, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.fused(x).split([4, 4, 4], dim=-1)
        a, b = (q * k + v).chunk(2, dim=-1)
        first, *rest = torch.unbind(torch.stack([a, b, a - b], 1), 1)
        return torch.nn.functional.glu(torch.cat([first, *rest, first], -1)) * b.tensor_split(2, -1)[0]


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (Gated(), (3, 6)),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.GLU(1), nn.ChannelShuffle(2)), (2, 3, 8, 8)),
    ],
    ids=["fused", "glu"],
)
def test_torch_s_split_and_chunk_are_taken(module: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    model = Model.from_torch(module, (x,))
    with torch.no_grad():
        wanted: Any = module.eval()(x)
    (found,) = model.session().run(None, {model.inputs[0].name: x.numpy()})
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)
    np.testing.assert_allclose(model.to_torch()(x).numpy(), wanted.numpy(), atol=1e-5)
