"""What holds for every Model, restored after each edit.

- constants are initializers, never Constant nodes; no initializer is a graph input, none is unused;
- nodes stand in topological order; each node and each value has a name of its own;
- every value has a type and, where inference finds one, a shape;
- the graph says nothing of where it came from: no doc strings, no producer, no stack traces.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from qpipe.model.network.naming import MODULE_CLASS, SCOPE, Names, assign_names, names_of
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


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor that `value` always is: an initializer's, or a Constant node's. None for anything else, and for text
    and sparse numbers, which nothing here computes with."""
    try:
        tensor = None if value is None else ir.convenience.get_const_tensor(value)
    except ValueError:  # a Constant node of sparse numbers
        return None
    return None if tensor is None or tensor.dtype == ir.DataType.STRING else tensor


def constant_of(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """What `constant_tensor` finds, as an array."""
    tensor = constant_tensor(value)
    return None if tensor is None else np.asarray(tensor.numpy())


def constant(node: ir.Node, index: int) -> npt.NDArray[Any] | None:
    """The array that input `index` always is, None where it is no constant or left out."""
    return constant_of(node.inputs[index] if index < len(node.inputs) else None)


def lift_constants(graph: ir.Graph) -> None:
    """Turn each Constant node into an initializer under the name of its output.

    LiftConstantsToInitializersPass would leave one that is an output of the graph, and go into the bodies of loops."""
    nodes = [node for node in graph if node.op_type == "Constant" and node.domain in ("", "ai.onnx")]
    names = names_of(graph) if nodes else Names()
    for node in nodes:
        output = node.outputs[0]
        tensor = constant_tensor(output)
        if tensor is None:
            continue
        value = ir.val(output.name or names.fresh("constant"), const_value=tensor)
        output.replace_all_uses_with(value, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        output.name = None
        graph.register_initializer(value)


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


def permutation(node: ir.Node) -> tuple[int, ...] | None:
    """The permutation of a Transpose; None where it is left out and the rank is unknown."""
    if "perm" in node.attributes:
        return tuple(node.attributes["perm"].as_ints())
    source = node.inputs[0]
    if source is None or source.shape is None:
        return None
    return tuple(reversed(range(len(source.shape))))
