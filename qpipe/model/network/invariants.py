"""What holds for every Model, restored after each edit.

- constants are initializers, never Constant nodes; no initializer is a graph input, none is unused;
- nodes stand in topological order; each node and each value has a name of its own;
- every value has a type and, where inference finds one, a shape;
- the graph says nothing of where it came from: no doc strings, no producer, no stack traces.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from qpipe.model.network.naming import MODULE_CLASS, SCOPE, assign_names
from qpipe.model.network.shapes import complete, infer_shapes

OPSET = 21
"""int4, 16-bit integers and block scales begin here; from 23 on, Attention hides where quantizers go."""
IR_VERSION = 10
PERMUTATION = "permutation"
"""Key in an initializer's metadata: the permutation that was applied to the parameter that its name names."""
SHAPE = "torch_shape"
"""Key in an initializer's metadata: the shape that the parameter had; its numbers are the same."""
_KEPT = (SCOPE, MODULE_CLASS, PERMUTATION, SHAPE)


def restore(model: ir.Model) -> None:
    """Bring `model` back into the form above, in place. Raises ValueError for a graph that has a cycle, a
    value that nothing produces, or an operator set that is not the canonical one."""
    graph = model.graph
    lift_constants(graph)
    common.RemoveInitializersFromInputsPass()(model)
    graph.sort()  # a graph that is in order stays as it is, so that an edit does not reshuffle the nodes
    remove_dead_nodes(model)
    assign_names(model)
    _forget_origins(model)
    if model.opset_imports.get("") != OPSET:
        raise ValueError(f"a model must use opset {OPSET}, got {model.opset_imports.get('')}.")
    _check_sources(graph)
    if not complete(model):
        infer_shapes(model)


def lift_constants(graph: ir.Graph) -> None:
    """Turn each Constant node into an initializer under the name of its output."""
    for node in list(graph):
        if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
            continue
        output = node.outputs[0]
        tensor = constant_tensor(node)
        if tensor is None:
            continue
        value = ir.Value(
            name=output.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy())
        )
        value.const_value = tensor
        output.replace_all_uses_with(value, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        output.name = None
        if not value.name:
            value.name = fresh_initializer_name(graph, "constant")
        graph.register_initializer(value)


def constant_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    """What a Constant node holds; None for sparse and string constants."""
    for key, attribute in node.attributes.items():
        if key == "value":
            return attribute.as_tensor()
        if key in ("value_float", "value_floats"):
            numbers = attribute.as_float() if key == "value_float" else attribute.as_floats()
            return ir.tensor(numbers, dtype=ir.DataType.FLOAT)
        if key in ("value_int", "value_ints"):
            integers = attribute.as_int() if key == "value_int" else attribute.as_ints()
            return ir.tensor(integers, dtype=ir.DataType.INT64)
    return None


def fresh_initializer_name(graph: ir.Graph, wanted: str) -> str:
    """`wanted`, or the first of `wanted_1`, `wanted_2`, … that no value of the graph has."""
    taken = ir.convenience.create_value_mapping(graph)
    name, number = wanted, 0
    while name in taken:
        number += 1
        name = f"{wanted}_{number}"
    return name


def _forget_origins(model: ir.Model) -> None:
    model.doc_string = model.producer_name = model.producer_version = model.domain = None
    model.model_version = None
    model.ir_version = IR_VERSION
    model.metadata_props.clear()
    model.graph.name = "model"
    for graph in model.graphs():
        graph.doc_string = None
        graph.metadata_props.clear()
        for item in [*graph, *graph.initializers.values(), *graph.inputs]:
            _strip(item)
        for node in graph:
            for output in node.outputs:
                _strip(output)


def _strip(item: ir.Node | ir.Value) -> None:
    item.doc_string = None
    for key in [key for key in item.metadata_props if key not in _KEPT]:
        del item.metadata_props[key]


def _check_sources(graph: ir.Graph) -> None:
    inputs = set(graph.inputs)
    for node in graph:
        for value in node.inputs:
            if value is None or value in inputs or value.is_initializer():
                continue
            producer = value.producer()
            if producer is None or producer.graph is not graph:
                raise ValueError(f"node {node.name!r} reads {value.name!r}, which nothing produces.")
    for output in graph.outputs:
        if output.producer() is None and output not in inputs and not output.is_initializer():
            raise ValueError(f"nothing in the graph produces its output {output.name!r}.")


def remove_dead_nodes(model: ir.Model) -> None:
    """Remove the nodes whose outputs nobody reads, and the initializers that nothing reads, in place."""
    common.RemoveUnusedNodesPass()(model)
