"""Rewrite rules for control flow that is decided: If with a constant condition, Loop and Scan with a known
number of passes. The branch that is taken, or the body once for each pass, stands where the node stood.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qpipe.model.network.invariants import constant, constant_of
from qpipe.model.network.naming import fresh_name
from qpipe.model.network.rewriting import add_constant

_BODIES = frozenset({"then_branch", "else_branch", "body"})
LARGEST = 20_000
"""A loop that would become more nodes than this stays a loop, and is refused."""


def inline_decided_if(graph: ir.Graph, node: ir.Node) -> bool:
    """An If whose condition is a constant is the branch that is taken."""
    condition = constant(node, 0) if node.op_type == "If" and not node.domain else None
    if condition is None:
        return False
    branch = node.attributes["then_branch" if condition.all() else "else_branch"].as_graph()
    _hand_over(graph, node, inserted(graph, node, branch, []))
    return True


def unroll_loop(graph: ir.Graph, node: ir.Node) -> bool:
    """A Loop with a constant trip count and no other way to end."""
    if node.op_type != "Loop" or node.domain:
        return False
    body = node.attributes["body"].as_graph()
    passes = _passes(node, body)
    carried_count = len(node.inputs) - 2
    if passes is None or passes * len(body) > LARGEST:
        return False
    if passes == 0 and len(node.outputs) > carried_count:
        return False
    carried = list(node.inputs[2:])
    scans: list[list[ir.Value | None]] = [[] for _ in range(len(body.outputs) - 1 - carried_count)]
    true = add_constant(graph, f"{node.name}_goes_on", np.array(True))
    for number in range(passes):
        count = add_constant(graph, f"{node.name}_pass", np.array(number, np.int64))
        results = inserted(graph, node, body, [count, true, *carried])
        carried = results[1 : 1 + carried_count]
        for scan, value in zip(scans, results[1 + carried_count :], strict=True):
            scan.append(value)
    _hand_over(graph, node, [*carried, *(_stacked(graph, node, scan, 0) for scan in scans)])
    return True


def unroll_scan(graph: ir.Graph, node: ir.Node) -> bool:
    """A Scan over a dimension whose size is known."""
    if node.op_type != "Scan" or node.domain:
        return False
    body = node.attributes["body"].as_graph()
    count = node.attributes["num_scan_inputs"].as_int()
    states, scanned = list(node.inputs[:-count]), list(node.inputs[-count:])
    outputs = len(node.outputs) - len(states)
    axes = node.attributes.get_ints("scan_input_axes", [0] * count)
    passes = _size(scanned[0], axes[0])
    if not passes or passes * len(body) > LARGEST:
        return False
    backwards = node.attributes.get_ints("scan_input_directions", [0] * count)
    reversed_outputs = node.attributes.get_ints("scan_output_directions", [0] * outputs)
    output_axes = node.attributes.get_ints("scan_output_axes", [0] * outputs)
    scans: list[list[ir.Value | None]] = [[] for _ in range(outputs)]
    for number in range(passes):
        slices = [
            _slice(graph, node, value, axis, passes - 1 - number if back else number)
            for value, axis, back in zip(scanned, axes, backwards, strict=True)
        ]
        results = inserted(graph, node, body, [*states, *slices])
        states = results[: len(states)]
        for scan, value in zip(scans, results[len(states) :], strict=True):
            scan.append(value)
    joined = [
        _stacked(graph, node, scan[::-1] if back else scan, axis)
        for scan, back, axis in zip(scans, reversed_outputs, output_axes, strict=True)
    ]
    _hand_over(graph, node, [*states, *joined])
    return True


def _passes(node: ir.Node, body: ir.Graph) -> int | None:
    """How often a Loop's body runs; None where that depends on the data."""
    trips, start = constant(node, 0), constant(node, 1)
    if start is not None and not start.all():
        return 0
    if trips is None or (node.inputs[1] is not None and start is None):
        return None
    value: ir.Value | None = body.outputs[0]
    while value is not None and (producer := value.producer()) is not None and producer.op_type == "Identity":
        value = producer.inputs[0]
    goes_on = constant_of(value)
    fixed = goes_on is not None and bool(goes_on.all())
    return int(trips.item()) if fixed or value is body.inputs[1] else None


def _size(value: ir.Value | None, axis: int) -> int | None:
    if value is None or value.shape is None:
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else None


def inserted(
    graph: ir.Graph, node: ir.Node, body: ir.Graph, inputs: Sequence[ir.Value | None]
) -> list[ir.Value | None]:
    """A copy of `body`'s nodes before `node`, reading `inputs`; the values of its outputs."""
    copy = body.clone(allow_outer_scope_values=True)
    outputs: list[ir.Value | None] = list(copy.outputs)
    copy.outputs.clear()
    for inner, outer in zip(copy.inputs, inputs, strict=True):
        outputs = [outer if value is inner else value for value in outputs]
        if outer is not None:
            inner.replace_all_uses_with(outer)
    for name, value in list(copy.initializers.items()):
        del copy.initializers[name]
        value.name = fresh_name(graph, name)
        graph.register_initializer(value)
    for inner_node in list(copy):
        copy.remove(inner_node)
        inner_node.name = fresh_name(graph, f"{node.name}_{inner_node.name or inner_node.op_type}")
        for output in inner_node.outputs:
            if output.name:
                output.name = fresh_name(graph, output.name)
        graph.insert_before(node, inner_node)
    return outputs


def _slice(graph: ir.Graph, node: ir.Node, value: ir.Value | None, axis: int, index: int) -> ir.Value:
    place = add_constant(graph, f"{node.name}_index", np.array(index, np.int64))
    return _made(graph, node, ir.node("Gather", [value, place], {"axis": axis}), f"{node.name}_slice")


def _stacked(graph: ir.Graph, node: ir.Node, values: Sequence[ir.Value | None], axis: int) -> ir.Value:
    axes = add_constant(graph, f"{node.name}_axis", np.array([axis], np.int64))
    parts = [_made(graph, node, ir.node("Unsqueeze", [value, axes]), f"{node.name}_part") for value in values]
    return _made(graph, node, ir.node("Concat", parts, {"axis": axis}), f"{node.name}_parts")


def _made(graph: ir.Graph, node: ir.Node, new: ir.Node, name: str) -> ir.Value:
    new.outputs[0].name = fresh_name(graph, name)
    new.name = new.outputs[0].name
    graph.insert_before(node, new)
    return new.outputs[0]


def _hand_over(graph: ir.Graph, node: ir.Node, values: Sequence[ir.Value | None]) -> None:
    """Let those who read the outputs of `node` read `values`, and remove `node`; outputs of the model keep
    their names by way of an Identity."""
    for output, value in zip(node.outputs, values, strict=True):
        assert value is not None
        if value.type is None:
            value.type = output.type
        for index, other in enumerate(graph.outputs):
            if other is output:
                kept = ir.node("Identity", [value])
                kept.outputs[0].type, kept.outputs[0].shape = output.type, output.shape
                name, output.name = output.name, None
                kept.outputs[0].name = name
                kept.name = fresh_name(graph, str(name))
                graph.insert_before(node, kept)
                graph.outputs[index] = kept.outputs[0]
        output.replace_all_uses_with(value)
    graph.remove(node, safe=True)
    for name in _BODIES & node.attributes.keys():  # what they read is read no more: it may be needed by nothing else
        for inner in node.attributes[name].as_graph().all_nodes():
            for place in range(len(inner.inputs)):
                inner.replace_input_with(place, None)


def choose_between(graph: ir.Graph, node: ir.Node) -> bool:
    """An If that the data decide is both of its branches and a Where for each output, provided that the
    branches are small, cannot fail on any data, and give equal types and shapes."""
    if node.op_type != "If" or node.domain:
        return False
    branches = [node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
    if any(len(branch) > _SMALL or not _harmless(branch) for branch in branches):
        return False
    # Inference says what is the same in both branches: where their shapes differ it knows none.
    if not all(
        isinstance(o.type, ir.TensorType) and o.shape is not None and o.shape.is_static()
        for o in node.outputs
    ):
        return False
    results = [inserted(graph, node, branch, []) for branch in branches]
    condition = node.inputs[0]
    chosen = [
        _made(graph, node, ir.node("Where", [condition, a, b]), f"{node.name}_chosen")
        for a, b in zip(*results, strict=True)
    ]
    _hand_over(graph, node, chosen)
    return True


_SMALL = 100
_NEVER_FAIL = frozenset(
    {"Abs", "Add", "Sub", "Mul", "Div", "Neg", "Sqrt", "Exp", "Log", "Pow", "Relu", "Sigmoid", "Tanh", "Erf"}
    | {"Min", "Max", "Clip", "Where", "Equal", "Less", "Greater", "Not", "And", "Or", "Cast", "CastLike"}
    | {"Identity", "Constant", "MatMul", "Gemm", "Conv", "Softmax", "ReduceSum", "ReduceMean", "LeakyRelu"}
)
"""Operators whose only demand is on shapes, which inference has checked: what is not chosen may run as well."""


def _harmless(branch: ir.Graph) -> bool:
    return all(
        not node.domain
        and node.op_type in _NEVER_FAIL
        and (node.op_type != "Div" or _is_float(node))  # integers divided by 0 are an error
        for node in branch
    )


def _is_float(node: ir.Node) -> bool:
    return any(v is not None and v.dtype == ir.DataType.FLOAT for v in (*node.inputs, *node.outputs))
