"""Shapes: what is inferred, and what the graph's own word counts against it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from qpipe.methods.comparison.check import verify_import
from qpipe.model import Model
from qpipe.model.network.shapes import complete, infer_shapes
from tests.model.nets import normal, parsed


def inferred(text: str, **tensors: Any) -> dict[str, str]:
    """The shapes of all values after inference, as text."""
    model = ir.from_proto(parsed(text, **tensors))
    infer_shapes(model)
    return {str(value.name): str(value.shape) for node in model.graph for value in node.outputs}


def test_names_of_dimensions_pass_through() -> None:
    text = "m (float[batch,4] x) => (float[rows,q] y) { a = MatMul(x, w)  y = Relu(a) }"
    assert inferred(text, w=normal(4, 6)) == {"a": "[batch,6]", "y": "[rows,6]"}


def test_a_number_beats_a_name_and_the_graphs_name_beats_none() -> None:
    text = "m (float[N,4] x, float[T,4] z) => (float[rows,columns] y) { y = Concat<axis=0>(x, z) }"
    assert inferred(text) == {"y": "[rows,4]"}
    assert inferred("m (float[2,4] x) => (float[rows,4] y) { y = Relu(x) }") == {"y": "[2,4]"}


def test_a_size_that_inference_made_up_a_name_for_stays_open() -> None:
    text = "m (float[N,4] x, float[T,4] z) => (float[p,q] y) { a = Concat<axis=0>(x, z)  y = Relu(a) }"
    assert inferred(text) == {"a": "[None,4]", "y": "[p,4]"}


def test_behind_a_group_normalization_shapes_are_known() -> None:
    text = "m (float[N,4,5] x) => (float[N,p,q] y) { a = GroupNormalization<num_groups=2>(x, b, b)  y = Relu(a) }"
    assert inferred(text, b=normal(4)) == {"a": "[N,4,5]", "y": "[N,4,5]"}


def test_a_transposed_convolution_has_the_shape_that_it_asks_for() -> None:
    """onnx gives [N,6] where the output is smaller than the input."""
    for sizes in ((4, 3), (9, 11)):
        layer = f"ConvTranspose<group=2, output_shape={list(sizes)}>(x, w)"
        text = f"m (float[N,4,5,6] x) => (float[N,p,q,r] y) {{ a = {layer} y = Relu(a) }}"
        found = inferred(text, w=normal(4, 3, 2, 2))
        assert {name: found[name] for name in "ay"} == dict.fromkeys("ay", f"[N,6,{sizes[0]},{sizes[1]}]")


def test_where_inference_fails_what_was_known_stays() -> None:
    text = "m (float[2,4] x) => (float[2,6] y) { a = MatMul(x, w)  y = Relu(a) }"
    assert inferred(text, w=normal(5, 6))["y"] == "[2,6]"


def test_a_graph_is_complete_once_every_value_has_a_type_and_a_shape() -> None:
    model = ir.from_proto(parsed("m (float[2,4] x) => (float[2,4] y) { a = Abs(x)  y = Relu(a) }"))
    assert not complete(model)
    infer_shapes(model)
    assert complete(model)
    model.graph[0].outputs[0].type = None
    assert not complete(model)


def test_what_the_graph_computes_beats_what_the_file_declares() -> None:
    """A recognizer of captchas declares two dimensions for an output of three: the Reshape before it was taken out."""
    text = """m (float[N,4,6] x) => (float[N,24] y) {
        s = Shape<end=1>(x)  t = Concat<axis=0>(s, one, rest)  y = Reshape(x, t) }"""
    proto = parsed(text, one=np.array([1]), rest=np.array([24]))
    proto.graph.value_info.append(onnx.helper.make_tensor_value_info("t", onnx.TensorProto.INT64, [9]))
    model = Model.from_proto(proto)
    assert model.session().run(None, {"x": normal(2, 4, 6)})[0].shape == (2, 1, 24)
    assert verify_import(model, proto.SerializeToString()).equal


def test_a_declared_size_inside_stays_where_inference_finds_none() -> None:
    proto = parsed("m (float[N,4] x, int64[2] s) => (float[p,q] y) { a = Reshape(x, s)  y = Relu(a) }")
    proto.graph.value_info.append(onnx.helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, ["rows", 8]))
    assert [tuple(spec.shape) for spec in Model.from_proto(proto).outputs] == [("p", 8)]


def test_a_size_of_minus_one_is_open() -> None:
    proto = parsed("m (float[7,3,5] x) => (float[7,3,5] y) { a = Relu(x)  y = Neg(a) }")
    proto.graph.value_info.append(onnx.helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, [-1, 3, -1]))
    for value in (proto.graph.input[0], proto.graph.output[0]):
        for axis in (0, 2):
            value.type.tensor_type.shape.dim[axis].dim_value = -1
    model = Model.from_proto(proto)
    assert model.inputs[0].shape == ("batch", 3, "x_dim2")
    assert verify_import(model, model.to_qdq().SerializeToString()).equal
    assert model.session().run(None, {"x": normal(2, 3, 4)})[0].shape == (2, 3, 4)
