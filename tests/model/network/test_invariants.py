"""What holds of every graph, restored after an edit, and what cannot be restored."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qpipe.model.network.invariants import PERMUTATION, constant_tensor, fresh_initializer_name, restore
from qpipe.model.network.naming import SCOPE
from tests.model.nets import normal, parsed


def graph_of(text: str, **tensors: Any) -> ir.Model:
    return ir.from_proto(parsed(text, **tensors))


def restored(text: str, **tensors: Any) -> ir.Model:
    model = graph_of(text, **tensors)
    restore(model)
    return model


def test_constants_are_initializers_and_what_nobody_reads_is_gone() -> None:
    model = restored(
        """m (float[N,4] x) => (float[N,4] y) {
        two = Constant<value_float=2.0>()  y = Mul(x, two)  unread = Mul(x, w) }""",
        w=normal(4), v=normal(4),
    )  # fmt: skip
    assert [node.op_type for node in model.graph] == ["Mul"]
    assert list(model.graph.initializers) == ["two"]
    assert model.graph.initializers["two"].const_value.numpy() == 2.0


def test_a_constant_that_the_model_returns_stays_an_output() -> None:
    model = restored("m (float[N,4] x) => (float[N,4] y, float c) { y = Relu(x)  c = Constant<value_float=2.0>() }")
    assert [value.name for value in model.graph.outputs] == ["y", "c"]
    assert model.graph.outputs[1].is_initializer()


def test_nodes_stand_in_order_and_those_that_do_stay_where_they_are() -> None:
    model = graph_of("m (float[N,4] x) => (float[N,4] y) { b = Exp(x)  a = Abs(x)  y = Add(a, b) }")
    restore(model)
    assert [node.op_type for node in model.graph] == ["Exp", "Abs", "Add"]
    last = model.graph[2]
    model.graph.remove(last)
    model.graph.insert_before(model.graph[0], last)
    restore(model)
    assert model.graph[2].op_type == "Add"


def test_the_graph_says_nothing_of_where_it_came_from() -> None:
    model = graph_of("m (float[N,4] x) => (float[N,4] y) { y = Relu(x) }")
    model.producer_name, model.doc_string, model.graph.name = "a tool", "a note", "its name"
    node = model.graph[0]
    node.doc_string = "a stack trace"
    node.metadata_props.update({SCOPE: "layer.0", "pkg.torch.onnx.stack_trace": "…"})
    model.graph.inputs[0].metadata_props[PERMUTATION] = "[1, 0]"
    restore(model)
    assert (model.producer_name, model.doc_string, node.doc_string) == (None, None, None)
    assert node.metadata_props == {SCOPE: "layer.0"}
    assert model.graph.inputs[0].metadata_props == {PERMUTATION: "[1, 0]"}
    assert model.graph.name == "model"


def test_another_opset_is_refused() -> None:
    model = ir.from_proto(parsed("m (float[N,4] x) => (float[N,4] y) { y = Relu(x) }", 20))
    with pytest.raises(ValueError, match="must use opset 21, got 20"):
        restore(model)


def test_a_value_that_nothing_produces_is_refused_by_name() -> None:
    model = graph_of("m (float[N,4] x) => (float[N,4] y) { y = Relu(x) }")
    model.graph[0].replace_input_with(0, ir.Value(name="lost"))
    with pytest.raises(ValueError, match="reads 'lost', which nothing produces"):
        restore(model)
    model = graph_of("m (float[N,4] x) => (float[N,4] y) { y = Relu(x) }")
    model.graph.outputs.append(ir.Value(name="nowhere"))
    with pytest.raises(ValueError, match="nothing in the graph produces its output 'nowhere'"):
        restore(model)


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("value_float=1.5", np.array(1.5, np.float32)),
        ("value_floats=[1.0, 2.0]", np.array([1, 2], np.float32)),
        ("value_int=3", np.array(3)),
        ("value_ints=[3, 4]", np.array([3, 4])),
        ("value=int8[2] {5, 6}", np.array([5, 6], np.int8)),
    ],
)
def test_a_constant_node_holds_what_it_says(said: str, wanted: np.ndarray[Any, Any]) -> None:
    tensor = constant_tensor(graph_of(f"m () => (float y) {{ y = Constant<{said}>() }}").graph[0])
    assert tensor is not None
    assert tensor.numpy().dtype == wanted.dtype
    np.testing.assert_array_equal(tensor.numpy(), wanted)


def test_a_fresh_name_is_that_of_no_value() -> None:
    graph = graph_of("m (float[4] x) => (float[4] y) { x_1 = Abs(x)  y = Add(x_1, w) }", w=normal(4)).graph
    assert fresh_initializer_name(graph, "x") == "x_2"
    assert fresh_initializer_name(graph, "w") == "w_1"
    assert fresh_initializer_name(graph, "z") == "z"
