"""Shared parameters: one initializer that several nodes read, and how each layer gets one of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from qpipe.model.network.invariants import PERMUTATION, permutation
from qpipe.model.network.naming import SCOPE

if TYPE_CHECKING:
    from qpipe.model.network.network import Editor, Network

_WITH_BIAS = ("weight", "bias")
_SLOTS: dict[str, tuple[str, ...]] = {
    "Conv": _WITH_BIAS,
    "ConvTranspose": _WITH_BIAS,
    "Gemm": _WITH_BIAS,
    "MatMul": ("weight",),
}


@dataclass(frozen=True)
class _Use:
    """A layer that reads a parameter at input `index`, by way of a Transpose if `perm` is given."""

    node: ir.Node
    index: int
    perm: tuple[int, ...] | None

    @property
    def slot(self) -> str | None:
        """`weight` or `bias`; None where the node is no layer, or the input is its data."""
        slots = _SLOTS.get(self.node.op_type, ()) if not self.node.domain else ()
        return slots[self.index - 1] if 1 <= self.index <= len(slots) else None


def shared_weights(model: Network) -> dict[str, tuple[str, ...]]:
    """The parameters that a layer shares with another reader: name -> the nodes that read it."""
    shared = {}
    for name, value in sorted(model.graph.initializers.items()):
        uses = _uses(value)
        if len(uses) > 1 and any(use.slot for use in uses):
            shared[name] = tuple(dict.fromkeys(str(use.node.name) for use in uses))
    return shared


def with_own_weights(model: Network) -> Network:
    """The model in which no layer shares its weight or bias; what it computes is the same.

    Who is no layer keeps the parameter, else the first layer does; the others get a copy, called
    `<module or node>.weight`."""
    shared = shared_weights(model)
    if not shared:
        return model
    editor = model.edit()
    for name in shared:
        uses = _uses(editor.graph.initializers[name])
        layers = [use for use in uses if use.slot]
        for use in layers if len(layers) < len(uses) else layers[1:]:
            _give_copy(editor, use, name)
    return editor.model()


def _uses(value: ir.Value) -> list[_Use]:
    found = []
    for use in value.uses():
        perm = permutation(use.node) if use.node.op_type == "Transpose" and not use.node.domain else None
        if perm is None or use.node.outputs[0].is_graph_output():
            found.append(_Use(use.node, use.idx, None))
        else:
            found += [_Use(then.node, then.idx, perm) for then in use.node.outputs[0].uses()]
    return found


def _give_copy(editor: Editor, use: _Use, name: str) -> None:
    array = editor.param(name)
    wanted = f"{use.node.metadata_props.get(SCOPE) or use.node.name}.{use.slot}"
    copy = editor.add_param(wanted, array if use.perm is None else array.transpose(use.perm))
    copy.metadata_props.update(editor.graph.initializers[name].metadata_props)
    if use.perm is not None:
        done = json.loads(copy.metadata_props.get(PERMUTATION, json.dumps(list(range(array.ndim)))))
        copy.metadata_props[PERMUTATION] = json.dumps([done[axis] for axis in use.perm])
    use.node.replace_input_with(use.index, copy)
    if name in editor.encodings and use.perm is None:
        editor.encodings[str(copy.name)] = editor.encodings[name]
