"""Where channels lie: in a weight, and behind each operator; held against what onnxruntime's numbers do."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from qpipe.model import Model
from qpipe.model.structure.channels import (
    Blocked,
    Channels,
    bias_vector,
    follow,
    grouped,
    own,
    passed,
    set_bias,
    ungrouped,
)
from qpipe.model.structure.layers import find_layers
from tests.model.nets import normal, op_types, parsed


@pytest.mark.parametrize("groups", [1, 2])
def test_a_grouped_weight_has_output_o_of_group_j_as_row_j_o(groups: int) -> None:
    conv = normal(4, 6 // groups, 3, 2)
    found = grouped(conv, groups, 0)
    assert found.shape == (groups, 4 // groups, 6 // groups, 6)
    for j, o, i in np.ndindex(found.shape[:3]):
        np.testing.assert_array_equal(found[j, o, i], conv[j * (4 // groups) + o, i].reshape(-1))
    transposed = normal(6, 4 // groups, 3, 2)
    found = grouped(transposed, groups, 1)
    assert found.shape == (groups, 4 // groups, 6 // groups, 6)
    for j, o, i in np.ndindex(found.shape[:3]):
        np.testing.assert_array_equal(found[j, o, i], transposed[j * (6 // groups) + i, o].reshape(-1))
    np.testing.assert_array_equal(ungrouped(found, transposed.shape, 1), transposed)


MOVES = [
    ("abcd", "Relu(x)", []),
    ("abcd", "MaxPool<kernel_shape=[2,2]>(x)", []),
    ("abcd", "GlobalAveragePool(x)", []),
    ("abcd", "Transpose<perm=[0,2,3,1]>(x)", []),
    ("abcd", "Transpose<perm=[1,0,2,3]>(x)", []),
    ("ab", "Flatten(x)", []),
    ("abc", "Reshape(x, s)", [0, 3, 20]),
    ("ab", "Reshape(x, s)", [2, 60]),
    ("ab", "ReduceMean<keepdims=0>(x, s)", [2, 3]),
    ("abc", "ReduceMax<keepdims=0>(x, s)", [0]),
    ("abcd", "ReduceSum(x, s)", [-1]),
    ("abcdef", "Unsqueeze(x, s)", [0, 2]),
    ("abcd", "Pad(x, s)", [0, 0, 1, 1, 0, 0, 0, 2]),
    ("abcd", "Resize(x, , s)", [1.0, 1.0, 2.0, 2.0]),
]


def of(op: str, dims: str, given: list[Any]) -> onnx.ModelProto:
    """x (2, 3, 4, 5) -> y of so many dimensions; s is what is given."""
    constants = {"s": np.array(given, np.float32 if isinstance(given[0], float) else np.int64)} if given else {}
    return parsed(f"m (float[2,3,4,5] x) => (float[{','.join(dims)}] y) {{ y = {op} }}", **constants)


@pytest.mark.parametrize(("dims", "op", "given"), MOVES)
def test_channels_lie_where_the_numbers_of_one_alone_come_out(dims: str, op: str, given: list[Any]) -> None:
    proto = of(op, dims, given)
    model = Model.from_proto(proto)
    found = passed(model.graph[0], Channels(1))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for channel in range(3):
        x = np.zeros((2, 3, 4, 5), np.float32)
        x[:, channel] = 1
        (y,) = session.run(None, {"x": x})
        others = tuple(axis for axis in range(y.ndim) if axis != found.axis)
        alone = np.arange(3) == channel
        np.testing.assert_array_equal((y != 0).any(axis=others), found.spread(alone))


@pytest.mark.parametrize(
    ("op", "given"),
    [
        ("Reshape(x, s)", [2, 4, 3, 5]),
        ("Pad(x, s)", [0, 1, 0, 0, 0, 0, 0, 0]),
        ("ReduceMean(x, s)", [1]),
        ("Softmax(x)", []),
        ("DepthToSpace<blocksize=1>(x)", []),
    ],
)
def test_what_mixes_channels_is_not_passed(op: str, given: list[Any]) -> None:
    model = Model.from_proto(of(op, "abcd", given))
    with pytest.raises(Blocked):
        passed(model.graph[0], Channels(1))


def test_a_flatten_that_cuts_elsewhere_interleaves_channels() -> None:
    model = Model.from_proto(of("Flatten<axis=2>(x)", "ab", []))
    with pytest.raises(Blocked, match="mixes channels"):
        passed(model.graph[0], Channels(1))


def test_gathered_takes_the_largest_of_each_channel_and_spread_repeats_it() -> None:
    channels = Channels(1, 3)
    np.testing.assert_array_equal(channels.gathered(np.array([1.0, 5, 2, 0, -1, -2])), [5, 0])
    np.testing.assert_array_equal(channels.spread(np.array([7.0, 8])), [7, 7, 7, 8, 8, 8])


WAYS = {
    "t = Relu(s)  y = Conv(t, v)": (["Relu"], "Conv"),
    "t = Relu(s)  f = Flatten(t)  y = Gemm(f, g)": (["Relu", "Flatten"], "Gemm"),
    "y = Relu(s)": ([], "'y' is an output of the model"),
    "a = Neg(s)  y = Add(a, s)": ([], "is read 2 times, by"),
    "y = Add(b, s)": ([], "is not the data input of"),
    "t = Tanh(s)  y = Conv(t, v)": ([], "no Tanh"),
    "q = Transpose<perm=[0,2,3,1]>(s)  r = Relu(q)  y = Conv(r, u)": ([], "does not take the channels for its inputs"),
}


@pytest.mark.parametrize("body", WAYS)
def test_the_way_ends_at_the_one_layer_that_reads_the_channels(body: str) -> None:
    steps, wanted = WAYS[body]
    tensors = {"w": normal(4, 3, 1, 1), "v": normal(2, 4, 1, 1), "g": normal(4 * 25, 2), "u": normal(2, 5, 1, 1)}
    tensors |= {"b": normal(1, 4, 1, 1)}
    used = {name: each for name, each in tensors.items() if name == "w" or f"{name})" in body or f"({name}," in body}
    model = Model.from_proto(
        parsed(f"m (float[N,3,5,5] x) => (float[p,q,r,t4] y) {{ s = Conv(x, w)  {body} }}", **used)
    )
    ends = {model.graph.node(layer.name) for layer in find_layers(model)}

    def admits(node: Any) -> str | None:
        return "no Tanh" if node.op_type == "Tanh" else None

    value = model.graph[0].outputs[0]
    if "'" in wanted or " " in wanted:
        with pytest.raises(Blocked, match=wanted):
            follow(value, 1, ends, admits)
    else:
        way = follow(value, 1, ends, admits)
        assert [step.node.op_type for step in way.steps] == steps
        assert way.end.op_type == wanted


def test_a_layer_gets_a_weight_and_a_bias_of_its_own() -> None:
    text = "m (float[N,4] x) => (float[N,4] y) { a = Gemm(x, w, b)  y = Gemm(a, w, b) }"
    model = Model.from_proto(parsed(text, w=normal(4, 4), b=normal(4)))
    editor = model.edit()
    first, second = find_layers(model)
    mine = own(editor, first)
    assert {mine.weight, mine.bias} & {second.weight, second.bias} == set()
    assert own(editor, mine) == mine
    editor.set_param(mine.weight, 0 * model.param("w"))
    np.testing.assert_array_equal(editor.model().param("w"), model.param("w"))


@pytest.mark.parametrize("layer", ["Conv(x, w)", "ConvTranspose<group=2>(x, w)", "MatMul(t, m)"])
def test_a_new_bias_is_added_to_the_output_of_the_same_name(layer: str) -> None:
    linear = "MatMul" in layer
    body = f"t = Transpose<perm=[0,2,3,1]>(x)  y = {layer}" if linear else f"y = {layer}"
    weight = {"m": normal(4, 6)} if linear else {"w": normal(*(4, 3, 1, 1) if "group" in layer else (6, 4, 1, 1))}
    model = Model.from_proto(parsed(f"m (float[N,4,3,3] x) => (float[p,q,r,s] y) {{ {body} }}", **weight))
    editor = model.edit()
    (old,) = find_layers(model)
    bias = np.arange(6.0)
    new = set_bias(editor, old, bias)
    np.testing.assert_array_equal(bias_vector(editor, new), bias)
    made = editor.model()
    assert find_layers(made)[0].output == old.output == "y"
    x = {"x": normal(2, 4, 3, 3)}
    (before,), (after,) = (each.session(quantized=False).run(None, x) for each in (model, made))
    along = bias if linear else bias.reshape(6, 1, 1)
    np.testing.assert_allclose(after, before + along, rtol=1e-5, atol=1e-5)
    assert op_types(made)[-1] == ("Add" if linear else op_types(model)[-1])
