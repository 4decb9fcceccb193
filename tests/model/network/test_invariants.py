"""What holds of every graph, restored after an edit, and what cannot be restored."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qpipe.model.network.invariants import PERMUTATION, constant_of, constant_tensor, lift_constants, restore
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


def lines(text: str) -> ir.Model:
    return ir.from_proto(parsed(f"g (float[2] x) => (float[2] y) {{ {text} }}", k=np.float32([3, 4])))


@pytest.mark.parametrize(
    ("constant", "wanted"),
    [
        ("value = float[2] {1, 2}", np.float32([1, 2])),
        ("value_float = 0.5", np.float32(0.5)),
        ("value_floats = [1.5, 2.5]", np.float32([1.5, 2.5])),
        ("value_int = 7", np.int64(7)),
        ("value_ints = [7, 8]", np.int64([7, 8])),
        ('value_string = "seven"', None),
    ],
)
def test_the_array_behind_a_constant_node(constant: str, wanted: np.ndarray | None) -> None:
    model = lines(f"c = Constant<{constant}>()  y = Identity(x)")
    found = constant_of(model.graph[0].outputs[0])
    if wanted is None:
        assert found is None
    else:
        assert found is not None
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert np.array_equal(found, wanted)


def test_the_array_behind_an_initializer_and_none_behind_what_is_computed() -> None:
    model = lines("y = Add(x, k)")
    x, k = model.graph[0].inputs
    assert np.array_equal(constant_of(k), [3, 4])
    assert constant_of(x) is None
    assert constant_of(model.graph[0].outputs[0]) is None
    assert constant_of(None) is None


def test_sparse_numbers_are_no_constant() -> None:
    node = ir.node("Constant", [], {"sparse_value": ir.AttrInt64("sparse_value", 1)})
    assert constant_tensor(node.outputs[0]) is None


def test_a_constant_that_is_an_output_becomes_an_initializer_too() -> None:
    model = lines("y = Constant<value_floats = [1.0, 2.0]>()")
    lift_constants(model.graph)
    assert len(model.graph) == 0
    assert np.array_equal(model.graph.initializers["y"].const_value.numpy(), [1, 2])
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_an_initializer_is_no_input_and_none_is_unused() -> None:
    model = lines("y = Identity(x)")
    model.graph.inputs.append(model.graph.initializers["k"])
    restore(model)
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert not model.graph.initializers


def test_a_graph_that_is_in_order_stays_as_it_is() -> None:
    """One of several orders: neither by depth nor by name."""
    model = lines("a = Abs(x)  d = Neg(x)  b = Abs(a)  e = Neg(d)  c = Abs(b)  y = Add(c, e)")
    order = [node.outputs[0].name for node in model.graph]
    restore(model)
    assert [node.outputs[0].name for node in model.graph] == order


def test_a_graph_that_is_not_is_put_in_order() -> None:
    model = lines("a = Abs(x)  b = Abs(a)  y = Add(a, b)")
    nodes = list(model.graph)
    model.graph.remove(nodes[0])
    model.graph.append(nodes[0])
    restore(model)
    assert [node.outputs[0].name for node in model.graph] == ["a", "b", "y"]
