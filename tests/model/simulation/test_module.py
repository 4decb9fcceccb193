"""ONNX as a torch.fx module: its names, its parameters, where things are computed, and its quantizers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from qpipe.model import Model
from qpipe.model.simulation.constants import host_constant, host_values
from qpipe.model.simulation.module import sanitize, value_nodes
from qpipe.model.simulation.stream import Stream
from qpipe.numerics.fake_quantize import FakeQuantize
from qpipe.numerics.grid import Encoding, quantize_dequantize
from tests.model.nets import Mobile, UNet, exported, normal, parsed
from tests.model.quantized import quantized, scheme

ATTENTION = """net (float[N,T,8] x) => (float[N,T,8] y) {
    shape = Shape(x)  n = Gather<axis=0>(shape, zero)  t = Gather<axis=0>(shape, one)
    n1 = Unsqueeze(n, axes)  t1 = Unsqueeze(t, axes)  split = Concat<axis=0>(n1, t1, heads)
    r = Reshape(x, split)  q = Transpose<perm=[0,2,1,3]>(r)  k = Transpose<perm=[0,2,3,1]>(r)
    s = MatMul(q, k)  range = Range(zero, t, one)  row = Unsqueeze(range, axes)  col = Unsqueeze(range, last)
    seen = LessOrEqual(row, col)  mask = Where(seen, nothing, never)  m = Add(s, mask)  p = Softmax(m)
    v = MatMul(p, q)  back = Transpose<perm=[0,2,1,3]>(v)  joined = Concat<axis=0>(n1, t1, eight)
    y = Reshape(back, joined) }"""


def attention() -> Model:
    """Causal self-attention whose reshapes and mask follow from the shape of x."""
    return Model.from_proto(
        parsed(
            ATTENTION,
            zero=np.int64(0),
            one=np.int64(1),
            axes=np.array([0]),
            last=np.array([1]),
            heads=np.array([2, 4]),
            eight=np.array([8]),
            nothing=np.float32(0),
            never=np.float32(-np.inf),
        )
    )


def test_one_onnx_node_is_one_fx_node_of_its_name() -> None:
    _, model = exported(Mobile)
    module = model.to_torch()
    found = {node.meta["onnx_name"]: node for node in module.graph.nodes if "onnx_name" in node.meta}
    assert list(found) == [node.name for node in model.graph]
    for name, node in found.items():
        assert node.name == sanitize(name)
    for onnx_node in model.graph:
        assert found[str(onnx_node.name)].meta["outputs"] == (onnx_node.outputs[0].name,)


def test_parameters_are_parameters_and_statistics_are_buffers() -> None:
    _, model = exported(Mobile)
    module = model.to_torch(trainable=["classifier.1.weight"])
    attributes = module.meta["parameters"]
    trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trainable == {attributes["classifier.1.weight"]} == {"classifier_1_weight"}
    assert "features_1_running_mean" in dict(module.named_buffers())
    assert "features_1_weight" in dict(module.named_parameters())
    for name, attribute in attributes.items():
        np.testing.assert_array_equal(getattr(module, attribute).detach().numpy(), model.param(name))


def test_a_trainable_name_that_is_no_parameter_is_refused() -> None:
    _, model = exported(Mobile)
    with pytest.raises(ValueError, match=r"no float parameter 'classifier\.weight'"):
        model.to_torch(trainable=["classifier.weight"])


def test_training_the_module_leaves_the_model_alone() -> None:
    _, model = exported(Mobile)
    before = model.param("classifier.1.weight").copy()
    module = model.to_torch(trainable=["classifier.1.weight"])
    with torch.no_grad():
        module.classifier_1_weight.mul_(2)
    np.testing.assert_array_equal(model.param("classifier.1.weight"), before)


@pytest.mark.parametrize("net", [Mobile, UNet])
def test_values_and_gradients_are_those_of_the_torch_module(net: type[nn.Module]) -> None:
    source, model = exported(net)
    source.zero_grad()
    x = torch.tensor(normal(2, 3, 32, 32))
    names = [name for name in model.params if name in dict(source.named_parameters())]
    module = model.to_torch(trainable=names)
    ours, theirs = module(x), source(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for name in names:
        expected = source.get_parameter(name).grad
        found = module.get_parameter(module.meta["parameters"][name]).grad
        assert expected is not None
        error = (found.reshape(expected.shape) - expected).norm() / expected.norm()
        assert error < 1e-4, name


def test_shape_arithmetic_stays_on_the_host_and_the_batch_dynamic() -> None:
    model = attention()
    host = {str(value.name) for value in host_values(model.graph)}
    assert "mask" in host
    assert not host & {"r", "s", "m", "y"}
    module = model.to_torch()
    for shape in ((1, 5, 8), (3, 2, 8)):
        x = normal(*shape)
        expected = model.session(quantized=False).run(None, {"x": x})[0]
        np.testing.assert_allclose(module(torch.tensor(x)).numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("simulated", [False, True])
def test_no_operator_waits_for_the_device(simulated: bool) -> None:
    # The meta device has no values: whatever reads one of them there fails, and so does what mixes it with the CPU's.
    module = quantized(attention(), {"x": normal(2, 5, 8)}).to_torch(quantized=simulated).to("meta")
    assert module(torch.empty(4, 3, 8, device="meta")).shape == (4, 3, 8)


def test_bounds_of_clip_are_python_numbers() -> None:
    proto = parsed(
        "n (float[N,4] x) => (float[N,4] y) { y = Clip(x, low, high) }", low=np.float32(0), high=np.float32(6)
    )
    module = Model.from_proto(proto).to_torch()
    (call,) = [node for node in module.graph.nodes if "onnx_name" in node.meta]
    assert call.args[1:] == (0.0, 6.0)
    assert list(module.parameters()) == []


def test_several_outputs_come_out_in_order_with_their_values_named() -> None:
    proto = parsed(
        "n (float[N,6] x) => (float[N,2] a, float[N,4] c) { a, b = Split<axis=1>(x, s)  c = Relu(b) }",
        s=np.array([2, 4]),
    )
    module = Model.from_proto(proto).to_torch()
    x = normal(3, 6)
    a, c = module(torch.tensor(x))
    np.testing.assert_array_equal(a.numpy(), x[:, :2])
    np.testing.assert_array_equal(c.numpy(), np.maximum(x[:, 2:], 0))
    assert {"x", "a", "b", "c"} <= set(value_nodes(module))


def test_names_that_collide_or_that_python_refuses_stay_apart() -> None:
    proto = parsed(
        "n (float[N,4] input) => (float[N,4] y) { a = Mul(input, w)  y = Mul(a, v) }",
        w=normal(4, seed=1),
        v=normal(4, seed=2),
    )
    # ONNX text has no dots in names; torch's parameters have.
    for tensor, name in zip(proto.graph.initializer, ("w.x", "w_x"), strict=True):
        tensor.name = name
    proto.graph.node[0].input[1], proto.graph.node[1].input[1] = "w.x", "w_x"
    model = Model.from_proto(proto)
    module = model.to_torch()
    attributes = module.meta["parameters"]
    assert len(set(attributes.values())) == 2
    x = normal(2, 4)
    expected = x * model.param("w.x") * model.param("w_x")
    np.testing.assert_allclose(module(torch.tensor(x)).numpy(), expected, rtol=1e-6)


def test_the_module_can_be_copied_and_run_again() -> None:
    model = quantized(attention(), {"x": normal(2, 5, 8)})
    module = model.to_torch()
    twin = copy.deepcopy(module)
    x = torch.tensor(normal(2, 3, 8, seed=3))
    assert torch.equal(module(x), twin(x))


def test_a_chain_of_a_thousand_nodes_is_no_recursion() -> None:
    body = "  ".join(f"v{i + 1} = {('Sin', 'Relu')[i % 2]}(v{i})" for i in range(1200))
    model = Model.from_proto(parsed(f"n (float[N,4] v0) => (float[N,4] v1200) {{ {body} }}"))
    x = normal(3, 4)
    model = quantized(model, {"v0": x})
    expected = model.to_torch()(torch.tensor(x))
    assert torch.equal(Stream(model.to_torch(), [(x,)]).finish()[0], expected)
    assert len(model.to_qdq().graph.node) > 1200


def test_host_constants_are_shared_and_typed() -> None:
    assert host_constant((1, 2), torch.int64) is host_constant((1, 2), torch.int64)
    assert host_constant(3, torch.int32).dtype == torch.int32


LAYER = "n (float[N,3,6,6] x) => (float[N,4,6,6] y) { t = Conv<pads=[1,1,1,1]>(x, w, b)  y = Relu(t) }"


def test_quantizers_sit_behind_values_on_weights_and_on_biases() -> None:
    model = quantized(
        Model.from_proto(parsed(LAYER, w=normal(4, 3, 3, 3), b=normal(4))), {"x": normal(8, 3, 6, 6)}
    )
    module = model.to_torch()
    names = [node.name for node in module.graph.nodes]
    for name in ("x__quantizer", "w__quantizer", "b__quantizer", "y__quantizer"):
        assert name in names
    assert "t__quantizer" not in names  # the Relu is fused
    assert isinstance(module.get_submodule("y__quantizer"), FakeQuantize)
    assert module.meta["quantizers"] == {"x": "x__quantizer", "w": "w__quantizer", "y": "y__quantizer"}


def test_the_simulation_is_numpy_in_float64_rounded_onto_the_grids() -> None:
    # A 1x1 convolution, so that the reference is one matrix product in float64.
    proto = parsed(
        "n (float[N,3,4,4] x) => (float[N,5,4,4] y) { y = Conv(x, w, b) }", w=normal(5, 3, 1, 1), b=normal(5)
    )
    x = normal(16, 3, 4, 4)
    model = quantized(Model.from_proto(proto), {"x": x})
    e = model.encodings
    xq = quantize_dequantize(x, e["x"]).astype(np.float64)
    wq = quantize_dequantize(model.param("w"), e["w"]).astype(np.float64)
    step = (e["x"].scale * e["w"].scale).astype(np.float64)
    bias = np.rint(model.param("b") / step) * step
    total = np.einsum("nchw,oc->nohw", xq, wq[:, :, 0, 0]) + bias[:, None, None]
    expected = quantize_dequantize(total.astype(np.float32), e["y"])
    found = model.to_torch()(torch.tensor(x)).numpy()
    assert np.mean(found != expected) <= 0.001
    assert np.abs(found - expected).max() <= float(e["y"].scale) * 1.001


def test_values_that_are_only_moved_are_not_rounded_twice_but_keep_their_name() -> None:
    proto = parsed(
        """n (float[N,3,8,8] x) => (float[N,64] y) {
        t = Conv<pads=[1,1,1,1]>(x, w)  r = Relu(t)  m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
        y = Flatten(m) }""",
        w=normal(4, 3, 3, 3),
    )
    module = quantized(Model.from_proto(proto), {"x": normal(4, 3, 8, 8)}).to_torch()
    assert {name: module.meta["quantizers"][name] for name in ("r", "m", "y")} == dict.fromkeys(
        ("r", "m", "y"), "r__quantizer"
    )
    assert [node.name for node in module.graph.nodes if node.op == "call_module"] == [
        "x__quantizer",
        "w__quantizer",
        "r__quantizer",
    ]
    assert module.get_submodule("m__quantizer") is module.get_submodule("r__quantizer")


def test_a_tied_weight_is_rounded_once() -> None:
    proto = parsed(
        "n (float[N,4] x) => (float[N,4] y) { a = MatMul(x, w)  y = MatMul(a, w) }", w=normal(4, 4)
    )
    module = quantized(Model.from_proto(proto), {"x": normal(8, 4)}).to_torch()
    assert [node.name for node in module.graph.nodes].count("w__quantizer") == 1
    assert sum(1 for node in module.graph.nodes if node.name.startswith("w__quantizer")) == 1


def test_weights_learn_through_the_quantizers() -> None:
    proto = parsed(LAYER, w=normal(4, 3, 3, 3), b=normal(4))
    model = quantized(Model.from_proto(proto), {"x": normal(8, 3, 6, 6)}, scheme(weight=4))
    module = model.to_torch(trainable=["w", "b"])
    learned = module.get_submodule("w__quantizer").learn_scale()
    module(torch.tensor(normal(2, 3, 6, 6))).square().mean().backward()
    for parameter in (module.w, module.b, *learned):
        assert parameter.grad is not None
        assert float(parameter.grad.abs().sum()) > 0


def test_a_bias_is_simulated_on_the_scale_of_its_layer_even_when_that_is_learned() -> None:
    proto = parsed(LAYER, w=normal(4, 3, 3, 3), b=normal(4))
    model = quantized(Model.from_proto(proto), {"x": normal(8, 3, 6, 6)})
    module = model.to_torch()
    x = torch.tensor(normal(2, 3, 6, 6))
    before = module(x)
    coarse = Encoding(8, False, False, np.float32(4.0), np.int32(128))
    module.get_submodule("x__quantizer").set_encoding(coarse)
    step = torch.tensor(model.encodings["w"].scale) * 4.0
    values = {}

    class Watcher(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            values[n.name] = super().run_node(n)
            return values[n.name]

    Watcher(module).run(x)
    codes = values["b__quantizer"] / step
    torch.testing.assert_close(codes, codes.round(), atol=1e-5, rtol=0)
    assert not torch.equal(before, module(x))
