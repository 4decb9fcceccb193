"""The canonical form: one way to write a model down, in which every stage finds what it looks for.

    functions inlined                    opset 21                        float32
    decided If, Loop, Scan written out
    constants folded, parameters not     nodes that compute nothing out  equal nodes merged
    BatchNormalization kept              Transpose(W) stored             pads, group, kernel_shape written out
    every node and value named           shapes inferred                 unsupported nodes refused, all listed

Parameters keep the names and values that the source gives them; equal ones are not merged.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import replace

import onnx_ir as ir
from onnx_ir.passes import common

from qpipe.model.canon import attention_forms, bound_forms, layer_forms, plain_forms, sequences, unrolling
from qpipe.model.canon.floats import to_float32
from qpipe.model.canon.folding import fold_constants, fold_quantized, fold_weights
from qpipe.model.canon.opsets import to_canonical_opset
from qpipe.model.canon.refusals import check_supported, refuse_unfit
from qpipe.model.network.facts import Library
from qpipe.model.network.invariants import lift_constants, remove_dead_nodes, restore
from qpipe.model.network.naming import assign_names
from qpipe.model.network.network import Network
from qpipe.model.network.rewriting import Rule, apply
from qpipe.model.network.shapes import believe_graph, infer_shapes
from qpipe.model.qdq.nodes import scale_sources, standard_nodes
from qpipe.model.qdq.operator_form import unreadable, write_out
from qpipe.model.qdq.reader import left_on_codes, read_activations, skip_clips
from qpipe.model.qdq.weights import Grids, read_weights
from qpipe.model.runtime.types import learn_types
from qpipe.model.structure.opaque import opaque_nodes

SIMPLIFICATIONS: tuple[Rule, ...] = (
    plain_forms.trim_inputs,
    plain_forms.cast_like_to_cast,
    *sequences.RULES,
    unrolling.inline_decided_if,
    unrolling.unroll_loop,
    unrolling.unroll_scan,
    plain_forms.known_shape,
    plain_forms.known_dimension,
    plain_forms.known_size,
    plain_forms.known_reshape,
    plain_forms.merge_transposes,
    plain_forms.merge_reshapes,
    plain_forms.skip_nothing,
    attention_forms.expand_later,
    attention_forms.expand_never,
    attention_forms.transpose_directly,
    attention_forms.mask_of_zeros,
    attention_forms.unguarded_softmax,
    layer_forms.transpose_parameter,
    layer_forms.reshape_parameter,
    layer_forms.explicit_attributes,
    layer_forms.pad_into_conv,
    layer_forms.gemm_input_first,
    layer_forms.mean_as_pool,
)
_ROUNDS = 10
"""Folding makes shapes known and known shapes make constants; the deepest chain seen took 4 rounds."""


def canonical_network(source: ir.Model, custom_ops: tuple[Library, ...] = ()) -> Network:
    """`source`, which is used up, in canonical form, with the encodings that its QDQ nodes say and notes on what was
    changed. Raises InputError for what cannot be taken, all of it listed."""
    model, notes, grids = canonicalize(source, custom_ops=custom_ops)
    facts = replace(grids.facts(), custom_ops=custom_ops)
    return Network(model, grids.encodings, {"notes": notes} if notes else {}, facts)


def canonicalize(
    model: ir.Model,
    parameters: Collection[str] | None = None,
    keep_types: bool = True,
    custom_ops: tuple[Library, ...] = (),
) -> tuple[ir.Model, list[str], Grids]:
    """The canonical form of `model`, which is used up, sentences about what was changed on the way, and the
    grids that its QDQ nodes said.

    `parameters` are the initializers that folding leaves alone; by default all of floats that are no scalar.
    `keep_types` leaves inputs and outputs of float16 and double what they are. `custom_ops` are libraries that
    onnxruntime is to know.
    Raises InputError for what cannot be taken, all of it listed."""
    model, notes, declared = _in_one_dialect(model, keep_types)
    graph, grids = model.graph, Grids()
    # Defaults that a caller may override; before IR version 4 all initializers had to be inputs.
    common.RemoveInitializersFromInputsPass()(model)
    named = _float_parameters(graph) if parameters is None else parameters  # before Constant nodes become initializers
    kept = frozenset(named) - scale_sources(graph)
    lift_constants(graph)
    graph.sort()
    _name_dynamic_dimensions(graph)
    assign_names(model)
    notes += write_out(graph)
    skip_clips(graph)
    read_weights(graph, grids)  # the rules look for weights among the float initializers
    simplify(model, kept | grids.names)
    notes += write_out(graph)  # whose scales had to be folded first
    notes += fold_quantized(model)
    while read_weights(graph, grids):  # scales that had to be folded first
        simplify(model, kept | grids.names)
    while apply(graph, (unrolling.choose_between,)):  # only now it is known what cannot be decided
        simplify(model, kept | grids.names)
    read_activations(graph, grids)  # not earlier: the Identity that stands for a rounding would be taken out
    notes += fold_weights(model)
    layer_forms.drop_made_up_biases(graph, kept | grids.names)
    remove_dead_nodes(model)
    restore(model)
    infer_shapes(model)
    opaque = opaque_nodes(graph)
    complaint = learn_types(model, custom_ops) if opaque else None
    for value in model.graph.outputs:
        if value.shape is None:  # what nobody finds is as the file says
            value.shape = declared.get(str(value.name))
    check_supported(model, complaint)
    return model, [*notes, *grids.notes, *left_on_codes(graph), *_left_opaque(opaque)], grids


def _left_opaque(nodes: Sequence[ir.Node]) -> list[str]:
    """One sentence for each reason: the nodes are as many as the model has layers."""
    found: dict[str, list[str]] = {}
    for node in nodes:
        reason = unreadable(node)
        why = f"torch cannot compute {{}}: {reason}." if reason else "torch cannot compute {}."
        found.setdefault(why, []).append(f"'{node.name}' ({node.op_type})")
    told = []
    for why, names in found.items():
        few = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        told.append(f"{why.format(few)} It stays as it is, and runs through onnxruntime.")
    return told


def _in_one_dialect(model: ir.Model, keep_types: bool) -> tuple[ir.Model, list[str], dict[str, ir.Shape]]:
    """`model` without functions, in the canonical opset and in float32, its QDQ nodes ONNX's own, sentences about
    what that changed, and the shapes that its outputs are said to have. Raises InputError for what cannot be."""
    if model.functions:
        model = common.InlinePass()(model).model
        model.functions.clear()
    refuse_unfit(model)
    declared = believe_graph(model)
    model = to_canonical_opset(model)
    standard_nodes(model)
    return model, to_float32(model, keep_types), declared


def simplify(model: ir.Model, parameters: Collection[str]) -> None:
    """Fold, rewrite and merge until nothing changes, in place."""
    rules: tuple[Rule, ...]
    rules = (
        *SIMPLIFICATIONS,
        functools.partial(plain_forms.skip_neutral, frozenset(parameters)),
        functools.partial(bound_forms.bound_as_clip, frozenset(parameters)),
    )
    for _ in range(_ROUNDS):
        infer_shapes(model)
        changed = apply(model.graph, rules)
        changed |= fold_constants(model, parameters)
        changed |= common.CommonSubexpressionEliminationPass()(model).modified
        remove_dead_nodes(model)
        if not changed:
            return


def _float_parameters(graph: ir.Graph) -> list[str]:
    return [
        name
        for name, value in graph.initializers.items()
        if value.const_value is not None
        and value.const_value.dtype == ir.DataType.FLOAT
        and len(value.const_value.shape)
    ]


def _name_dynamic_dimensions(graph: ir.Graph) -> None:
    """A dimension of an input that is open and has no name is the batch, or `<input>_dim<axis>`."""
    for value in graph.inputs:
        if value.shape is None:
            continue
        dims: list[int | str | None] = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
        named = [_dimension_name(value, axis) if dim is None else dim for axis, dim in enumerate(dims)]
        value.shape = ir.Shape(named)


def _dimension_name(value: ir.Value, axis: int) -> str:
    return "batch" if axis == 0 else f"{value.name}_dim{axis}"
