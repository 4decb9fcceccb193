"""The canonical form: what the source computes, written in one way, with its parameters untouched."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest

from qpipe.errors import InputError
from qpipe.model import Model
from qpipe.model.network.invariants import PERMUTATION, SHAPE
from tests.model.nets import error_of_import, normal, op_types, parsed

EXACT = 1e-6
"""The canonical form reorders no arithmetic; what remains is onnxruntime's own choice of kernels."""


def test_what_computes_nothing_goes() -> None:
    proto = parsed(
        """net (float[N,4] x) => (float[N,4] y) {
        i = Identity(x)  d, mask = Dropout(i)  one = Constant<value_float=1.0>()  m = Mul(d, one)
        p = Transpose<perm=[0,1]>(m)  c = Cast<to=1>(p)  k = Concat<axis=0>(c)
        r = Relu(k)  unread = Exp(r)  y = Identity(r) }"""
    )
    model = Model.from_proto(proto)
    assert op_types(model) == ["Relu"]
    assert model.outputs[0].name == "y"
    assert error_of_import(proto, model) == 0


def test_equal_nodes_are_one_and_equal_parameters_stay_two() -> None:
    proto = parsed(
        """net (float[N,4] x) => (float[N,4] y) {
        a = Relu(x)  b = Relu(x)  c = Mul(a, v)  d = Mul(b, w)  y = Add(c, d) }""",
        v=np.ones(4, np.float32),
        w=np.ones(4, np.float32),
    )
    model = Model.from_proto(proto)
    assert op_types(model) == ["Relu", "Mul", "Mul", "Add"]
    assert set(model.params) == {"v", "w"}


def test_constants_fold_and_parameters_do_not() -> None:
    proto = parsed(
        """net (float[N,4] x) => (float[N,4] y) {
        two = Constant<value_float=2.0>()  three = Constant<value_float=3.0>()  six = Mul(two, three)
        e = Exp(w)  a = Mul(x, e)  y = Mul(a, six) }""",
        w=normal(4),
    )
    model = Model.from_proto(proto)
    assert op_types(model) == ["Exp", "Mul", "Mul"]
    assert np.array_equal(model.param("w"), normal(4))
    assert model.param("six") == 6
    assert error_of_import(proto, model) < EXACT


def test_shape_arithmetic_of_known_dimensions_becomes_a_constant_with_one_dimension_open() -> None:
    proto = parsed(
        """net (float[N,4,6] x) => (float[N,24] y) {
        s = Shape(x)  zero = Constant<value_ints=[0]>()  one = Constant<value_ints=[1]>()
        two = Constant<value_ints=[2]>()
        n = Gather(s, zero)  c = Gather(s, one)  l = Gather(s, two)  cl = Mul(c, l)
        t = Concat<axis=0>(n, cl)  y = Reshape(x, t) }"""
    )
    model = Model.from_proto(proto)
    assert op_types(model) == ["Reshape"]
    assert [list(array) for array in model.params.values()] == [[-1, 24]]
    assert error_of_import(proto, model) == 0


def test_a_transposed_weight_is_stored_transposed_and_says_so() -> None:
    proto = parsed(
        "net (float[N,3,4] x) => (float[N,3,5] y) { t = Transpose(w)  y = MatMul(x, t) }", w=normal(5, 4)
    )
    model = Model.from_proto(proto)
    assert op_types(model) == ["MatMul"]
    assert np.array_equal(model.param("w"), normal(5, 4).T)
    assert json.loads(model.graph.initializers["w"].metadata_props[PERMUTATION]) == [1, 0]
    assert error_of_import(proto, model) < EXACT


def test_a_weight_that_is_read_both_ways_keeps_its_transpose() -> None:
    proto = parsed(
        "net (int64[N] i) => (float[N,5] y) { e = Gather(w, i)  t = Transpose(w)  y = MatMul(e, t) }",
        w=normal(5, 4),
    )
    model = Model.from_proto(proto)
    assert op_types(model) == ["Gather", "Transpose", "MatMul"]
    assert np.array_equal(model.param("w"), normal(5, 4))


def test_a_parameter_that_is_only_reshaped_is_stored_so() -> None:
    proto = parsed(
        """net (float[N,4,6] x) => (float[N,4,6] y) {
        s = Constant<value_ints=[4, 1]>()  r = Reshape(slope, s)  y = PRelu(x, r) }""",
        slope=normal(4),
    )
    model = Model.from_proto(proto)
    assert op_types(model) == ["PRelu"]
    assert model.param("slope").shape == (4, 1)
    assert json.loads(model.graph.initializers["slope"].metadata_props[SHAPE]) == [4]
    assert error_of_import(proto, model) == 0


def test_batch_normalization_stays_with_its_parameters() -> None:
    proto = parsed(
        "net (float[N,3,8,8] x) => (float[N,4,6,6] y) { c = Conv(x, w)  y = BatchNormalization(c, g, b, m, v) }",
        w=normal(4, 3, 3, 3),
        g=normal(4),
        b=normal(4),
        m=normal(4),
        v=np.ones(4, np.float32),
    )
    model = Model.from_proto(proto)
    assert op_types(model) == ["Conv", "BatchNormalization"]
    assert set(model.params) == {"w", "g", "b", "m", "v"}


CONVOLUTIONS = {
    "same_upper": 'Conv<auto_pad="SAME_UPPER", strides=[2,2]>',
    "same_lower": 'Conv<auto_pad="SAME_LOWER", strides=[2,1]>',
    "valid": 'Conv<auto_pad="VALID">',
    "nothing": "Conv",
    "transposed_same": 'ConvTranspose<auto_pad="SAME_UPPER", strides=[2,2]>',
    "transposed_lower": 'ConvTranspose<auto_pad="SAME_LOWER", strides=[2,3]>',
    "transposed_valid": 'ConvTranspose<auto_pad="VALID", strides=[2,2], output_padding=[1,0]>',
}


@pytest.mark.parametrize("call", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_convolutions_say_their_pads_groups_and_kernel(call: str) -> None:
    proto = parsed(
        f"net (float[N,3,9,10] x) => (float[N,3,h,k] y) {{ y = {call}(x, w) }}", w=normal(3, 3, 3, 4)
    )
    model = Model.from_proto(proto)
    attributes = model.graph[0].attributes
    assert {"pads", "group", "kernel_shape", "strides", "dilations"} <= set(attributes)
    assert "auto_pad" not in attributes
    assert attributes["group"].as_int() == 1
    assert error_of_import(proto, model) < EXACT


def test_the_same_padding_of_an_unknown_size_stays_a_mode() -> None:
    call = 'Conv<auto_pad="SAME_UPPER", strides=[2,2]>'
    proto = parsed(
        f"net (float[N,3,h,w0] x) => (float[N,3,a,b] y) {{ y = {call}(x, w) }}", w=normal(3, 3, 3, 3)
    )
    layer = Model.from_proto(proto).layers()[0]
    assert layer.auto_pad == "SAME_UPPER"


@pytest.mark.parametrize("pool", ["MaxPool", "AveragePool"])
def test_pools_say_their_pads(pool: str) -> None:
    call = f'{pool}<auto_pad="SAME_UPPER", kernel_shape=[3,3], strides=[2,2]>'
    proto = parsed(f"net (float[N,3,8,9] x) => (float[N,3,4,5] y) {{ y = {call}(x) }}")
    model = Model.from_proto(proto)
    assert list(model.graph[0].attributes["pads"].as_ints()) == [0, 1, 1, 1]
    assert error_of_import(proto, model) < EXACT


def test_zeros_padded_before_a_convolution_are_its_own() -> None:
    proto = parsed(
        """net (float[N,3,8,8] x) => (float[N,4,9,9] y) {
        p = Constant<value_ints=[0,0,1,0,0,0,0,1]>()  q = Pad(x, p)  y = Conv<pads=[1,1,1,1]>(q, w) }""",
        w=normal(4, 3, 3, 3),
    )
    model = Model.from_proto(proto)
    assert op_types(model) == ["Conv"]
    assert list(model.graph[0].attributes["pads"].as_ints()) == [2, 1, 1, 2]
    assert error_of_import(proto, model) < EXACT


def test_padding_with_ones_stays() -> None:
    proto = parsed(
        """net (float[N,3,8,8] x) => (float[N,4,8,8] y) {
        p = Constant<value_ints=[0,0,1,1,0,0,1,1]>()  one = Constant<value_float=1.0>()
        q = Pad(x, p, one)  y = Conv(q, w) }""",
        w=normal(4, 3, 3, 3),
    )
    assert op_types(Model.from_proto(proto)) == ["Pad", "Conv"]


def test_a_gemm_leaves_the_transposing_of_its_input_to_a_transpose() -> None:
    proto = parsed("net (float[4,N] x) => (float[N,5] y) { y = Gemm<transA=1>(x, w) }", w=normal(4, 5))
    model = Model.from_proto(proto)
    assert op_types(model) == ["Transpose", "Gemm"]
    assert error_of_import(proto, model) < EXACT


def test_an_if_that_is_decided_is_its_branch() -> None:
    proto = parsed(
        """net (float[N,4] x) => (float[N,4] y) {
        c = Constant<value=bool {1}>()
        z = If (c) <
            then_branch = yes () => (float[N,4] t) { t = Mul(x, w) },
            else_branch = no () => (float[N,4] e) { e = Relu(x) }>
        y = Relu(z) }""",
        w=normal(4),
    )
    model = Model.from_proto(proto)
    assert op_types(model) == ["Mul", "Relu"]
    assert error_of_import(proto, model) == 0


def test_functions_are_inlined() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 21, "mine": 1]>
        net (float[N,4] x) => (float[N,4] y) { a = mine.twice(x)  y = mine.twice(a) }
        <opset_import: ["": 21], domain: "mine"> twice (u) => (v) { v = Add(u, u) }"""
    )
    model = Model.from_proto(proto)
    assert op_types(model) == ["Add", "Add"]
    assert not model.ir.functions


def test_every_name_is_there_unique_and_stable() -> None:
    proto = parsed("net (float[N,4] x) => (float[N,4] y) { a = Relu(x)  b = Exp(a)  y = Add(a, b) }")
    proto.graph.node[0].name = proto.graph.node[1].name = "same"
    model = Model.from_proto(proto)
    assert [node.name for node in model.graph] == ["same", "same_1", "y"]
    assert Model.from_proto(proto).pack() == model.pack()


def test_initializers_that_are_inputs_too_are_no_inputs() -> None:
    proto = parsed("net (float[N,4] x, float[4] w) => (float[N,4] y) { y = Mul(x, w) }", w=normal(4))
    assert [spec.name for spec in Model.from_proto(proto).inputs] == ["x"]


def test_open_dimensions_get_names() -> None:
    proto = parsed("net (float[?,4,?] x) => (float[?,4,?] y) { y = Relu(x) }")
    assert Model.from_proto(proto).outputs[0].shape == ("batch", 4, "x_dim2")


@pytest.mark.parametrize("kind", ["FLOAT16", "DOUBLE", "BFLOAT16"])
def test_other_floats_become_float32_and_the_notes_say_so(kind: str) -> None:
    proto = parsed("net (float[N,4] x) => (float[N,4] y) { c = Cast<to=1>(x)  a = Mul(c, w)  y = Relu(a) }")
    dtype = getattr(onnx.TensorProto, kind)
    proto.graph.initializer.append(onnx.helper.make_tensor("w", dtype, [4], [1.0, 2.0, -3.0, 0.5]))
    proto.graph.node[0].attribute[0].i = dtype
    for value in [proto.graph.input[0], proto.graph.output[0]]:
        value.type.tensor_type.elem_type = dtype
    model = Model.from_proto(proto)
    outside = {"FLOAT16": "float16", "DOUBLE": "float64", "BFLOAT16": "bfloat16"}[kind]
    assert model.inputs[0].dtype == model.outputs[0].dtype == outside
    assert op_types(model) == ["Cast", "Mul", "Relu", "Cast"]
    assert model.param("w").dtype == np.float32
    assert kind.lower() in model.metadata["notes"][0]


def test_everything_that_cannot_be_taken_is_listed_at_once() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 21, "com.example": 1]>
        net (float[N,4] x, bool b) => (float[N,4] y) {
        [first] a = com.example.Special(x)
        [second] z = If (b) <then_branch = yes () => (float[N,4] t) { t = Relu(a) },
                             else_branch = no () => (float[N,4] e) { e = Exp(a) }>
        y = Relu(z) }"""
    )
    with pytest.raises(InputError) as caught:
        Model.from_proto(proto)
    message = str(caught.value)
    assert "2 parts" in message
    assert "node 'first' (op Special, domain com.example): torch cannot compute it" in message
    assert "node 'second' (op If, domain ai.onnx): torch cannot compute it" in message


def test_a_model_that_computes_on_integer_codes_says_so() -> None:
    proto = parsed(
        "net (uint8[N,4] x) => (int32[N,3] y) { y = MatMulInteger(x, w) }", w=np.zeros((4, 3), np.int8)
    )
    (note,) = Model.from_proto(proto).metadata["notes"]
    assert note.startswith("1 node such as 'y' (MatMulInteger) compute with codes")
