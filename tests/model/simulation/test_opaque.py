"""What torch cannot compute runs through onnxruntime: the numbers are onnxruntime's, and the rest is as it was."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from qpipe.methods.comparison.check import verify_import
from qpipe.model import Model
from qpipe.model.structure.opaque import Part, opaque_nodes, units
from tests.model.nets import normal, parsed
from tests.model.quantized import quantized

DECIDED_BY_DATA = """m (float[N,4] x) => (float[N,4] y) {
    a = MatMul(x, w)  s = ReduceSum<keepdims=0>(a)  c = Greater(s, z)
    t = If(c) <then_branch = yes () => (float[N,4] u) { u = MatMul(a, v) },
               else_branch = no () => (float[N,4] e) { e = Softmax(a) }>
    r = Relu(t)  y = MatMul(r, w) }"""
SEQUENCE = """m (float[N,4] x, int64 n) => (float[P,4] y, float[N,4] q) {
    a = MatMul(x, w)  s = SplitToSequence<axis=0>(a, n)  first = SequenceAt(s, i)  b = Relu(first)
    longer = SequenceInsert(s, b)  y = ConcatFromSequence<axis=0>(longer)  q = Neg(a) }"""
TEXT = "m (float[N,4] x) => (float[N,4] y) { s = Cast<to=8>(x)  t = Cast<to=1>(s)  y = Relu(t) }"
LOOP = """m (float[N,4] x, int64 k) => (float[N,4] y) {
    r = Loop(k, on, x) <body = b (int64 i, bool on_, float[N,4] h) => (bool still, float[N,4] o) {
        still = Identity(on_)  o = MatMul(h, w) }>  y = Relu(r) }"""
FOREIGN = "m (float[N,4] x) => (float[N,4] y) { a = MatMul(x, w)  g = com.microsoft.BiasGelu(a, v)  y = MatMul(g, w) }"

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "If": (DECIDED_BY_DATA, {"w": normal(4, 4), "v": normal(4, 4, seed=1), "z": np.float32(0)}, {"x": normal(3, 4)}),
    "sequence": (SEQUENCE, {"w": normal(4, 4), "i": np.array(0)}, {"x": normal(5, 4), "n": np.array(2)}),
    "text": (TEXT, {}, {"x": normal(3, 4)}),
    "Loop": (LOOP, {"w": normal(4, 4) / 2, "on": np.array(True)}, {"x": normal(3, 4), "k": np.array(3)}),
    "com.microsoft": (FOREIGN, {"w": normal(4, 4), "v": normal(4)}, {"x": normal(3, 4)}),
}


def proto_of(name: str) -> onnx.ModelProto:
    text, tensors, _ = CASES[name]
    proto = parsed(text, **tensors)
    if "com.microsoft" in text:
        proto.opset_import.add(domain="com.microsoft", version=1)
    return proto


@pytest.mark.parametrize("name", CASES)
def test_such_a_node_stays_and_the_simulation_runs_it(name: str) -> None:
    proto, given = proto_of(name), CASES[name][2]
    model = Model.from_proto(proto)
    assert opaque_nodes(model.graph)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for sign in (1, -1):  # both branches
        fed = {key: array * sign if array.dtype == np.float32 else array for key, array in given.items()}
        found = model.to_torch()(*(torch.tensor(fed[spec.name]) for spec in model.inputs))
        for wanted, tensor in zip(session.run(None, fed), found if isinstance(found, tuple) else [found], strict=True):
            np.testing.assert_allclose(tensor.numpy(), wanted, rtol=1e-5, atol=1e-6)
    assert verify_import(model, proto.SerializeToString()).equal


def test_types_behind_an_operator_of_onnxruntime_s_are_known() -> None:
    model = Model.from_proto(proto_of("com.microsoft"))
    assert [(spec.name, spec.dtype) for spec in model.outputs] == [("y", "float32")]
    assert [layer.name for layer in model.layers()] == ["a", "y"]


def test_what_passes_texts_and_sequences_runs_together() -> None:
    """The Relu between two operators on one sequence is part of it; what goes in and out are tensors."""
    parts = [unit for unit in units(Model.from_proto(proto_of("sequence")).graph) if isinstance(unit, Part)]
    (part,) = parts
    assert [node.op_type for node in part.nodes] == [
        "SplitToSequence", "SequenceAt", "Relu", "SequenceInsert", "ConcatFromSequence",
    ]  # fmt: skip
    assert [value.name for value in part.inputs] == ["a", "n"]
    assert [value.name for value in part.outputs] == ["y"]


def test_layers_around_it_are_quantized_and_deployed_as_simulated() -> None:
    model = quantized(Model.from_proto(proto_of("If")), {"x": normal(16, 4)})
    assert {"x", "w", "a", "r", "y"} <= set(model.encodings)
    x = normal(3, 4, seed=5)
    simulated = model.to_torch()(torch.tensor(x)).numpy()
    (deployed,) = model.session("deploy").run(None, {"x": x})
    step = float(model.encodings["y"].scale)
    assert np.abs(simulated - deployed).max() <= 1.01 * step
    assert np.abs(simulated - model.session(quantized=False).run(None, {"x": x})[0]).max() > 0


def test_the_module_can_be_copied_and_pickled_and_gives_no_gradient_through_it() -> None:
    module = Model.from_proto(proto_of("If")).to_torch(trainable=["w"])
    x = torch.tensor(normal(3, 4))
    wanted = module(x)
    assert torch.equal(copy.deepcopy(module)(x), wanted)
    (part,) = (each for each in module.modules() if type(each).__name__ == "RuntimePart")
    values = torch.tensor(True), torch.tensor(normal(3, 4))
    again = pickle.loads(pickle.dumps(part))
    assert torch.equal(again(*values)[0], part(*values)[0])
    wanted.sum().backward()
    gradient = module.get_parameter(module.meta["parameters"]["w"]).grad
    assert gradient is not None  # by way of the layer behind
    assert torch.isfinite(gradient).all()
