"""What is learned together: blocks, or single layers, as parts of the graph between a few values.

    auto          the blocks of the network (`find_blocks`); each layer that is in none is a part of its own
    per_layer     each layer with the activation that follows it
    [names]       these blocks or layers alone

A part begins at values that come for each sample and ends in one. What follows from shapes alone is computed inside it,
whoever else reads it, so that a part runs on any number of samples.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import onnx_ir as ir

from qpipe.errors import InputError
from qpipe.model.simulation.constants import host_values
from qpipe.model.structure.blocks import Block, find_blocks
from qpipe.model.structure.layers import Layer, find_layers, refused_layers
from qpipe.model.structure.opaque import is_opaque, read_values

if TYPE_CHECKING:
    from qpipe.model.network.network import Network

Blocks = Literal["auto", "per_layer"] | list[str]
"""How a network is divided; see above."""


@dataclass(frozen=True)
class Part:
    """The nodes between `inputs`, the activation first, and `output`; all are names of values. `layers` are those whose
    weights are learned here, in order."""

    name: str
    inputs: tuple[str, ...]
    output: str
    layers: tuple[Layer, ...]

    @property
    def weights(self) -> tuple[str, ...]:
        """The initializers that are learned here; one that several of its layers share once."""
        return tuple(dict.fromkeys(layer.weight for layer in self.layers))


def find_parts(
    model: Network, blocks: Blocks = "auto", *, ops: Collection[str] | None = None, together: int = 1
) -> tuple[tuple[Part, ...], dict[str, str]]:
    """The parts of `model` in the order in which they run, and the reason for each layer that is in none, by its name.

    `ops` are the operators whose weights are learned (None: all); `together` makes one part of so many blocks that
    follow one another. A weight that several layers share is learned in the first part that has it. Errors: InputError
    for a name that is no block or layer.
    """
    layers, left_out = learnable_layers(model, ops)
    known = {layer.name: layer for layer in layers}
    found = () if blocks == "per_layer" else find_blocks(model)
    if not isinstance(blocks, str):
        _refuse_unknown(blocks, [block.name for block in found], [layer.name for layer in find_layers(model)])
        found = tuple(block for block in found if block.name in blocks)
    opaque = {str(node.name) for node in model.graph if is_opaque(node)}
    runs = [run for run in _runs(found, together) if not opaque & {name for block in run for name in block.nodes}]
    inside = {name for run in runs for block in run for name in block.nodes}
    named = [layer for layer in layers if isinstance(blocks, str) or layer.name in blocks]
    alone = [layer for layer in named if layer.name not in inside]
    parts = [*(_of_blocks(model, run, known) for run in runs), *(_of_layer(model, layer) for layer in alone)]
    parts = _in_order(model, [part for part in parts if part.layers])
    if not isinstance(blocks, str):
        taken = {layer.name for part in parts for layer in part.layers}
        left_out |= {layer.name: "it is in none of the blocks asked for" for layer in layers if layer.name not in taken}
    return _each_weight_once(parts), left_out


def learnable_layers(model: Network, ops: Collection[str] | None = None) -> tuple[tuple[Layer, ...], dict[str, str]]:
    """The layers whose weights have a grid, in order, and the reason for each other one, by its name."""
    chosen: list[Layer] = []
    refused = refused_layers(model)
    for layer in find_layers(model):
        if layer.weight not in model.encodings:
            refused[layer.name] = "its weight has no encoding"
        elif ops is not None and layer.op_type not in ops:
            refused[layer.name] = f"'ops' leaves {layer.op_type} out"
        else:
            chosen.append(layer)
    return tuple(chosen), refused


def boundary(graph: ir.Graph, wanted: str, stops: Collection[str], host: Collection[ir.Value]) -> tuple[str, ...]:
    """The values among `stops`, the inputs of the graph, and those that are asked for their shape, that the value
    `wanted` is computed from, in the order of the graph. `host` are those that follow from shapes alone: they are
    computed anew, also where they are stops."""
    value = ir.convenience.create_value_mapping(graph, include_subgraphs=False)[wanted]
    found: set[ir.Value] = set()
    seen: set[ir.Value] = {value}
    stack = [(value, False)]
    while stack:
        current, asked = stack.pop()
        producer = current.producer()
        stop = asked or (current is not value and current.name in stops)
        if (stop and current not in host) or producer is None:
            found.add(current)
        else:
            fresh = [read for read in read_values(producer) if read not in seen and not read.is_initializer()]
            seen.update(fresh)
            stack += [(read, producer.op_type in ("Shape", "Size")) for read in fresh]
    order = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    return tuple(str(value.name) for value in order if value in found)


def behind(graph: ir.Graph, wanted: str, known: Collection[str], host: Collection[ir.Value]) -> set[str]:
    """The values among `known`, and the inputs of the graph, that `wanted` is or is computed from."""
    found: set[str] = set()
    seen, stack = {wanted}, [wanted]
    while stack:
        name = stack.pop()
        before = () if name in known else boundary(graph, name, known, host)
        found.update({name} if name in known else ())
        fresh = [each for each in before if each not in seen]
        seen.update(fresh)
        stack += fresh
    return found


def _runs(blocks: Sequence[Block], together: int) -> list[tuple[Block, ...]]:
    """Blocks that follow one another, at most `together` in each run."""
    runs: list[tuple[Block, ...]] = []
    for block in blocks:
        if runs and len(runs[-1]) < together and runs[-1][-1].output == block.input:
            runs[-1] = (*runs[-1], block)
        else:
            runs.append((block,))
    return runs


def _of_blocks(model: Network, run: Sequence[Block], known: dict[str, Layer]) -> Part:
    nodes = {name for block in run for name in block.nodes}
    made = {str(output.name) for name in nodes for output in model.graph.node(name).outputs}
    stops = {run[0].input, *(side for block in run for side in block.side_inputs if side not in made)}
    name = run[0].name if len(run) == 1 else f"{run[0].name} to {run[-1].name}"
    layers = tuple(layer for name, layer in known.items() if name in nodes)
    return _part(model, name, run[0].input, stops, run[-1].output, layers)


def _of_layer(model: Network, layer: Layer) -> Part:
    return _part(model, layer.name, layer.input, {layer.input}, layer.activation_output, (layer,))


def _part(model: Network, name: str, first: str, stops: set[str], output: str, layers: tuple[Layer, ...]) -> Part:
    inputs = boundary(model.graph, output, stops, host_values(model.graph))
    ordered = sorted(inputs, key=lambda value: value != first)  # stable: the activation, then the others
    return Part(name, tuple(ordered), output, layers)


def _in_order(model: Network, parts: Iterable[Part]) -> list[Part]:
    """By where they end: what a part reads of another is there before it begins."""
    place = {str(output.name): i for i, node in enumerate(model.graph) for output in node.outputs}
    return sorted(parts, key=lambda part: place[part.output])


def _each_weight_once(parts: Iterable[Part]) -> tuple[Part, ...]:
    seen: set[str] = set()
    kept = []
    for part in parts:
        layers = tuple(layer for layer in part.layers if layer.weight not in seen)
        seen.update(part.weights)
        if layers:
            kept.append(replace(part, layers=layers))
    return tuple(kept)


def _refuse_unknown(names: Sequence[str], blocks: Sequence[str], layers: Sequence[str]) -> None:
    from qpipe.param import listed, nearest

    for name in names:
        if name not in blocks and name not in layers:
            raise InputError(
                f"blocks: the model has no block or layer {name!r}.{nearest(name, [*blocks, *layers])} "
                f"Its blocks: {listed(blocks)}."
            )
