"""Links: pairs of layers between which channels may be rescaled, since f(a x) = a f(x) for all that separates them.

`find_links` gives for each layer the one that it can be rescaled against, or the reason why its outputs must
stay as they are. `rescale_bounds` then divides what does not scale by itself, the bounds of Clip, Min and Max
on the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qpipe.model.network.invariants import constant_of
from qpipe.model.structure.channels import RESHAPES, Blocked, Step, Way, dims, follow

if TYPE_CHECKING:
    from qpipe.model.network.network import Array, Editor
    from qpipe.model.structure.layers import Layer

Vector = NDArray[np.float64]

_POOLS = frozenset(
    ("AveragePool", "MaxPool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax")
)
HOMOGENEOUS = RESHAPES | _POOLS | {"Relu", "LeakyRelu", "PRelu"}
"""Operators that may be passed as they are. Clip, Min, Max, Pad and Resize may under conditions (`admits`)."""


@dataclass(frozen=True, eq=False)
class Link:
    """Two layers, by name, whose channels may be rescaled between them, and the way from one to the other."""

    first: str
    second: str
    way: Way


def find_links(editor: Editor, layers: Mapping[str, Layer]) -> tuple[dict[str, Link], dict[str, str]]:
    """The links by their first layer, and for each other layer the reason why its outputs must stay as they are."""
    heads = {editor.node(name) for name in layers}
    links: dict[str, Link] = {}
    refused: dict[str, str] = {}
    for name, layer in layers.items():
        output = editor.node(layer.add or name).outputs[0]
        axis = len(dims(output)) - 1 if layer.op_type == "MatMul" else 1
        try:
            way = follow(output, axis, heads, admits)
            second = layers[str(way.end.name)]
            for weight in (layer.weight, second.weight):
                if len(editor.graph.initializers[weight].uses()) > 1:
                    raise Blocked(f"the weight '{weight}' is shared")
            links[name] = Link(name, second.name, way)
        except Blocked as reason:
            refused[name] = str(reason)
    return links, refused


def admits(node: ir.Node) -> str | None:
    """Why `node` may not stand between two layers that are equalized, or None."""
    bounds = [value for value in node.inputs[1:] if value is not None]
    if node.op_type in ("Clip", "Min", "Max"):
        if len(node.inputs) > 2 and node.op_type != "Clip":
            return f"'{node.name}' ({node.op_type}) compares more than two values"
        if any(constant_of(bound) is None for bound in bounds):
            return f"'{node.name}' ({node.op_type}) has bounds that are computed in the graph"
        return None if dims(node.inputs[0]) else f"the rank of '{node.name}' is not known"
    if node.op_type == "Pad":
        fill = constant_of(node.inputs[2]) if len(node.inputs) > 2 else None
        constant_mode = node.attributes.get_string("mode", "constant") == "constant"
        absent = len(node.inputs) < 3 or node.inputs[2] is None
        if not constant_mode or absent or (fill is not None and not fill.any()):
            return None
        return f"'{node.name}' (Pad) pads with something else than zero"
    if node.op_type == "Resize":
        extrapolates = (
            node.attributes.get_string("coordinate_transformation_mode", "") == "tf_crop_and_resize"
        )
        return f"'{node.name}' (Resize) fills in a constant" if extrapolates else None
    if node.op_type in HOMOGENEOUS:
        return None
    return f"'{node.name}' ({node.op_type}) is not homogeneous"


def chains(links: Mapping[str, Link], layers: Mapping[str, Layer]) -> list[list[Link]]:
    """Links in rows: one after the other while the layer between them is depthwise, with one filter per channel."""

    def passes(name: str) -> bool:
        layer = layers[name]
        return layer.depthwise and layer.channels == layer.groups

    reached = {link.second for link in links.values()}
    rows = []
    for start in links.values():
        if start.first in reached and passes(start.first):
            continue  # it stands inside the row of another
        row = [start]
        while passes(row[-1].second) and row[-1].second in links:
            row.append(links[row[-1].second])
        rows.append(row)
    return rows


def bounds(node: ir.Node) -> tuple[Array | None, Array | None]:
    """The lower and the upper bound of a Clip, Min or Max; None where it has none, or an infinite one."""
    found = [constant_of(value) for value in (*node.inputs[1:], None, None)[:2]]
    lower, upper = {"Clip": found, "Max": [found[0], None], "Min": [None, found[0]]}[node.op_type]
    return _finite(lower), _finite(upper)


def _finite(bound: Array | None) -> Array | None:
    return bound if bound is not None and bool(np.isfinite(bound).any()) else None


def along(step: Step, vector: Vector) -> Vector:
    """`vector` (C,) in the shape that broadcasts against the output of `step`."""
    rank = len(dims(step.node.inputs[0]))
    return step.channels.spread(vector).reshape(-1, *(1,) * (rank - 1 - step.channels.axis))


def set_bounds(editor: Editor, node: ir.Node, lower: Array | None, upper: Array | None) -> None:
    """Give a Clip, Min or Max other bounds. A Clip stays one where they are single numbers; else it becomes
    Relu, or Max, and Min.
    """
    if node.op_type != "Clip":
        bound = upper if node.op_type == "Min" else lower
        if bound is not None:
            node.replace_input_with(1, editor.add_param(f"{node.name}.bound", bound.astype(np.float32)))
        return
    given = [bound for bound in (lower, upper) if bound is not None]
    if given and all(bound.ndim == 0 for bound in given):
        node.resize_inputs(3)
        for index, key, bound in ((1, "min", lower), (2, "max", upper)):
            new = None if bound is None else editor.add_param(f"{node.name}.{key}", bound.astype(np.float32))
            node.replace_input_with(index, new)
        return
    parts: list[tuple[str, Array | None]] = []
    if lower is not None:
        parts.append(("Max", lower) if lower.any() else ("Relu", None))
    if upper is not None:
        parts.append(("Min", upper))
    replace_clip(editor, node, parts)


def rescale_bounds(editor: Editor, step: Step, scale: Vector, unused: bool) -> None:
    """Divide the bounds of a Clip, Min or Max by `scale` (C,); `unused` leaves out a Clip's upper bound."""
    vector = scale[0] if np.all(scale == scale[0]) else along(step, scale)
    lower, upper = bounds(step.node)
    set_bounds(
        editor,
        step.node,
        None if lower is None else np.asarray(lower / vector),
        None if upper is None or unused else np.asarray(upper / vector),
    )


def replace_clip(editor: Editor, clip: ir.Node, parts: Sequence[tuple[str, Array | None]]) -> None:
    """Put nodes, one for each operator and its constant, in the place of `clip`; the last output takes its name."""
    output, value = clip.outputs[0], clip.inputs[0]
    assert value is not None
    for op_type, bound in parts:
        name = f"{clip.name}_{op_type.lower()}"
        extra = [] if bound is None else [editor.add_param(f"{name}.bound", bound.astype(np.float32))]
        node = ir.node(op_type, [value, *extra], name=name, metadata_props=dict(clip.metadata_props))
        editor.graph.insert_before(clip, node)
        value = node.outputs[0]
        value.name, value.type, value.shape = f"{output.name}_{op_type.lower()}", output.type, output.shape
    output.replace_all_uses_with(value)
    editor.graph.remove(clip, safe=True)
    if parts:
        output.name, value.name = None, output.name
