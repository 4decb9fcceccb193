"""Names are kept where they are good, and made where they are not."""

from __future__ import annotations

import onnx_ir as ir

from qpipe.model.network.naming import Names, assign_names


def test_fresh_names_count_up_past_those_that_are_taken() -> None:
    names = Names(["a", "a_1"])
    assert [names.fresh("a"), names.fresh("a"), names.fresh("b")] == ["a_2", "a_3", "b"]


def test_good_names_stay_whatever_is_made_before_them() -> None:
    x = ir.Value(name="x", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes = [ir.node("Relu", [x]) for _ in range(4)]
    graph = ir.Graph([x], [node.outputs[0] for node in nodes[:1]], nodes=nodes)
    for node, name, output in zip(nodes, ("n", "", "n", ""), ("v", "v", "", "x"), strict=True):
        node.name, node.outputs[0].name = name, output
    assign_names(ir.Model(graph, ir_version=10))
    assert [node.name for node in nodes] == ["n", "v_1", "n_1", "x_1"]
    assert [node.outputs[0].name for node in nodes] == ["v", "v_1", "n_1_out", "x_1"]


def test_an_optional_output_that_nobody_reads_stays_unnamed() -> None:
    x = ir.Value(name="x", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.Node("", "Dropout", [x], num_outputs=2)
    graph = ir.Graph([x], [node.outputs[0]], nodes=[node])
    node.outputs[0].name = node.outputs[1].name = ""
    assign_names(ir.Model(graph, ir_version=10))
    assert node.outputs[0].name
    assert not node.outputs[1].name


def test_a_name_that_was_released_is_handed_out_again() -> None:
    names = Names(["a", "a_1", "a_2"])
    assert names.fresh("a") == "a_3"
    names.release("a_1")
    assert [names.fresh("a") for _ in range(2)] == ["a_1", "a_4"]
