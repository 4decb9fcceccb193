"""What ONNX has no operator for, taken apart where it stands, instead of tracing the whole program a second time.

`run_decompositions`, which torch's exporter asks for, records a program anew, operator by operator: two fifths of the
time that an export takes. A program that writes into no tensor and has no graphs inside needs that at few places: an
operator that the table takes apart, or that torch does not keep whole, is traced alone, on the fake tensors that it was
recorded with, and views that move nothing go. Any other program, and one with an operator that cannot be traced alone,
goes torch's way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

Table = Mapping[Any, Callable[..., Any]]
Part = fx.Graph | fx.Node
"""The operators that make up a node's value, or the node that has it: what is read, or the node itself."""
_aten = torch.ops.aten
_SAME_VALUES = {
    _aten.contiguous.default, _aten.to.dtype, _aten.to.dtype_layout, _aten.to.device, _aten.to.other,
    _aten.reshape.default, _aten.flatten.using_ints,
}  # fmt: skip
"""Where neither type nor layout changes they return what they are given."""
_CHECKS = {
    _aten._assert_async.default, _aten._assert_async.msg, _aten._assert_scalar.default,
    _aten._assert_tensor_metadata.default, _aten.sym_constrain_range_for_size.default,
}  # fmt: skip
_KEPT = ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn", "custom")


@contextlib.contextmanager
def decomposing_in_place() -> Iterator[None]:
    """Programs that are decomposed meanwhile are taken apart where they need it, as far as that can be."""
    whole = ExportedProgram.run_decompositions

    def run_decompositions(self: ExportedProgram, decomp_table: Any = None) -> ExportedProgram:
        parts = _parts(self, decomp_table) if decomp_table is not None and _plain(self) else None
        if parts is None:
            program: ExportedProgram = whole(self, decomp_table)
            return program
        _put_in(self, parts)
        return self

    ExportedProgram.run_decompositions = run_decompositions  # type: ignore[method-assign]
    try:
        yield
    finally:
        ExportedProgram.run_decompositions = whole  # type: ignore[method-assign]


def _plain(program: ExportedProgram) -> bool:
    """Whether nothing is written to, not even by a normalization in training mode, and no operator holds a graph."""
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        return False
    for node in program.graph.nodes:
        if node.op == "get_attr":
            return False
        if node.op == "call_function" and isinstance(node.target, OpOverload):
            if node.target._schema.is_mutable or _trains(node):
                return False
        elif node.op == "call_function" and isinstance(node.target, torch._ops.OperatorBase):
            return False
    return True


def _trains(node: fx.Node) -> bool:
    names = [each.name for each in node.target._schema.arguments]  # type: ignore[union-attr]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    return any(given.get(name) is True for name in ("train", "training", "use_input_stats"))


def _parts(program: ExportedProgram, table: Table) -> dict[fx.Node, Part] | None:
    """By the node that cannot stay, what comes in its place; None where one of them cannot be traced alone."""
    kept = set(torch.export.default_decompositions()) - table.keys()
    parts = {}
    for node in program.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, OpOverload) or node.target in _CHECKS:
            continue
        if node.target in table or (_is_composite(node.target) and node.target not in kept):
            try:
                parts[node] = _simpler(node) or _traced(node, table)
            except Exception:  # of any kind that a trace can end with: torch's own way may know better, or says why
                return None
    return parts


def _is_composite(target: OpOverload) -> bool:
    name = str(target.name())  # type: ignore[no-untyped-call]
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd"))


def _simpler(node: fx.Node) -> fx.Node | None:
    """What one of `_SAME_VALUES` comes to; None where that is not known, and of other operators."""
    given = node.args[0] if node.args else None
    if node.target not in _SAME_VALUES or not isinstance(given, fx.Node):
        return None
    if _layout(given.meta["val"]) == _layout(node.meta["val"]):
        return given
    return node if node.target is _aten.reshape.default else None  # which ONNX has, and no layout decides


def _layout(tensor: Any) -> tuple[Any, ...]:
    """What a view may change; sizes as they are written, since to compare symbols would decide them."""
    return tensor.dtype, tensor.device, str([*tensor.shape]), str([*tensor.stride()])


def _traced(node: fx.Node, table: Table) -> fx.Graph:
    """The operators that `node` is made of, as a graph of what it reads."""
    inputs = node.all_input_nodes

    def compute(*given: Any) -> Any:
        known = dict(zip(inputs, given, strict=True))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    values = [each.meta["val"] for each in inputs]
    mode = torch._guards.detect_fake_mode([node.meta["val"], *values])
    with mode or contextlib.nullcontext(), torch.no_grad():
        graph: fx.Graph = make_fx(compute, decomposition_table=dict(table))(*values).graph
    if not all(each.op in ("placeholder", "output") or _stands_alone(each) for each in graph.nodes):
        raise ValueError(f"{node.target} writes into what it makes, or holds constants.")
    return graph


def _stands_alone(node: fx.Node) -> bool:
    writes = isinstance(node.target, OpOverload) and (node.target._schema.is_mutable or node.target.namespace != "aten")
    return node.op == "call_function" and "val" in node.meta and not writes


def _put_in(program: ExportedProgram, parts: Mapping[fx.Node, Part]) -> None:
    graph = program.graph_module.graph
    for node, part in parts.items():
        if part is not node:
            _replace(program, node, _copied(node, part) if isinstance(part, fx.Graph) else node.args[0])
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _CHECKS:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def _copied(node: fx.Node, part: fx.Graph) -> Any:
    """`part` in front of `node`: what stands for its value, or a list of it."""
    known: dict[fx.Node, Any] = {}
    inputs = iter(node.all_input_nodes)
    with node.graph.inserting_before(node):
        for each in part.nodes:
            if each.op == "output":
                return fx.node.map_arg(each.args[0], known.__getitem__)
            if each.op == "placeholder":
                known[each] = next(inputs)
            else:
                known[each] = node.graph.node_copy(each, known.__getitem__)
                known[each].meta = {name: node.meta[name] for name in _KEPT if name in node.meta}
                known[each].meta["val"] = each.meta["val"]
    raise AssertionError("a graph without an output")


def _replace(program: ExportedProgram, node: fx.Node, new: Any) -> None:
    """`new` where `node` was: a node, or as many as there are parts of a value that is read part by part."""
    if isinstance(new, fx.Node):
        node.replace_all_uses_with(new)
        program.graph_signature.replace_all_uses(node.name, new.name)
    else:
        for user in list(node.users):
            _replace(program, user, new[user.args[1]])
    node.graph.erase_node(node)
