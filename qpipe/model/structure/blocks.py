"""The blocks of a model: the parts, one behind the other, that blockwise methods tune as a whole.

The activations form a chain. Where all that has been computed so far goes on in one value, the chain can be cut: at an
articulation point of the activation graph. What lies between two cuts is a segment; blocks are runs of segments.

    by name           a numbered child of a module list is a block (`model.layers.0`), where it lies between two cuts.
                      Of lists inside lists the innermost counts whose children are alike: `stages.1.layers.0`, but
                      `block.0` of T5, whose `layer.0` attends and whose `layer.1` does not.
    by articulation   a segment with weights is a block, with what follows it and has none; attention (a Softmax between
                      layers) and the segment of several layers behind it are one.

What names leave over between blocks is divided by articulation. Masks, positions and rotary tables follow from no
activation, or from shapes alone, so they are side inputs, not on the chain; what only one block needs of them is
computed inside it.

Source: the blocks of BRECQ (Li et al., arXiv 2102.05426), found in the graph; articulation points: Hopcroft and
Tarjan, Efficient algorithms for graph manipulation (1973). One walk in topological order finds them here, since the
nodes are sorted already: a cut is where one activation alone is still to be read.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from qpipe.model.network.invariants import constant_tensor
from qpipe.model.structure.module_lists import named_pieces

if TYPE_CHECKING:
    from qpipe.model.network.network import Network

_SHAPES = frozenset({"Shape", "Size"})
_ALWAYS_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "LSTM", "GRU", "RNN"})
_PRODUCTS = frozenset({"MatMul", "Einsum"})


@dataclass(frozen=True)
class Block:
    """One block; all fields are names, in the graph's order.

    `input` is the one activation that goes in, `output` the one that comes out: the input of the next block.
    `side_inputs` are the other values that it reads: masks, positions, shapes, inputs of the graph. `weights` are the
    float initializers, of at least one dimension, that its nodes read.
    """

    name: str
    nodes: tuple[str, ...]
    input: str
    output: str
    side_inputs: tuple[str, ...]
    weights: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Segment:
    """The nodes on the chain between two cuts, in the graph's order; `weighted` are those that have weights."""

    start: ir.Value
    end: ir.Value
    nodes: tuple[ir.Node, ...]
    weighted: tuple[ir.Node, ...]


Group = tuple[str | None, list[Segment]]


def find_blocks(model: Network, by_name: bool = True) -> tuple[Block, ...]:
    """The blocks of `model`, in order, disjoint; each one's output is the next one's input. Every layer on the way from
    the first to the last cut is in one; an embedding, a last normalization and side branches are in none.

    `by_name` False goes by articulation points alone, as happens where the nodes say no module names.
    """
    chain = chain_values(model.graph)
    segments = _segments(model.graph, chain)
    pieces = named_pieces(segments) if by_name else [None] * len(segments)
    groups = list(_grouped(segments, pieces))
    return _finished(model.graph, chain, groups)


def chain_values(graph: ir.Graph) -> set[ir.Value]:
    """The float values that follow from the input that the first layer sees: not masks, positions, time steps."""
    main = _main_inputs(graph)
    followed = set(main)
    chain = {value for value in main if _is_float(value)}
    for node in graph:
        if node.op_type in _SHAPES:
            continue
        read = [value for value in node.inputs if value is not None]
        if any(value in followed for value in read):
            followed.update(node.outputs)
        table = constant_tensor(read[0]) if node.op_type == "Gather" and read else None
        embedding = table is not None and table.size > 1 and read[1] in followed
        if embedding or any(value in chain for value in read):
            chain.update(value for value in node.outputs if _is_float(value))
    return chain


def _main_inputs(graph: ir.Graph) -> set[ir.Value]:
    """The inputs of the graph whose values, not just shapes, the first node with weights depends on."""
    first = next((node for node in graph if _weighted(node)), None)
    if first is None:
        return set(graph.inputs)
    seen: set[ir.Value] = set()
    stack: list[ir.Value | None] = list(first.inputs)
    while stack:
        value = stack.pop()
        if value is None or value in seen:
            continue
        seen.add(value)
        producer = value.producer()
        if producer is not None and producer.op_type not in _SHAPES:
            stack += producer.inputs
    return {value for value in graph.inputs if value in seen}


def _weighted(node: ir.Node) -> bool:
    if node.op_type in _ALWAYS_WEIGHTED:
        return True
    return node.op_type in _PRODUCTS and any(v is not None and v.is_initializer() for v in node.inputs)


def _segments(graph: ir.Graph, chain: set[ir.Value]) -> list[Segment]:
    cuts = _cuts(graph, chain)
    position = {node: i for i, node in enumerate(graph)}
    segments = []
    for start, end in itertools.pairwise(cuts):
        found: set[ir.Node] = set()
        stack: list[ir.Value] = [end]
        while stack:
            node = stack.pop().producer()
            if node is not None and node not in found:
                found.add(node)
                stack += [v for v in node.inputs if v is not None and v in chain and v is not start]
        nodes = tuple(sorted(found, key=position.__getitem__))
        segments.append(Segment(start, end, nodes, tuple(filter(_weighted, nodes))))
    return segments


def _cuts(graph: ir.Graph, chain: set[ir.Value]) -> list[ir.Value]:
    """The activations that are, at some time, the only one that is still to be read; in order."""
    outputs = [value for value in graph.outputs if value in chain]
    left = {value: sum(node.op_type not in _SHAPES for node in value.consumers()) for value in chain}
    for value in outputs[:1]:
        left[value] += 1  # it stays to the end; of several outputs the first is the chain's
    live = {value for value in graph.inputs if value in chain and left[value]}
    cuts = list(live) if len(live) == 1 else []
    for node in graph:
        if node.op_type in _SHAPES:
            continue
        for read in set(node.inputs):
            if read in left:
                left[read] -= 1
                if not left[read]:
                    live.discard(read)
        live.update(value for value in node.outputs if left.get(value))
        if len(live) == 1 and not live <= set(cuts[-1:]):
            cuts += live
    return cuts


def _grouped(segments: Sequence[Segment], pieces: Sequence[str | None]) -> Iterator[Group]:
    """Runs of segments that are blocks, named where their module list named them."""
    start = 0
    while start < len(segments):
        end = start + 1
        while end < len(segments) and pieces[end] == pieces[start]:
            end += 1
        if pieces[start] is not None:
            yield pieces[start], list(segments[start:end])
        else:
            yield from ((None, group) for group in _by_articulation(segments[start:end], start > 0))
        start = end


def _by_articulation(segments: Sequence[Segment], follows: bool) -> list[list[Segment]]:
    """Each segment with weights, and what belongs to it. What has no weights and stands in front of all of them goes to
    the first, where another block is in front of that."""
    groups: list[list[Segment]] = []
    waiting: list[Segment] = []
    for segment in segments:
        if not segment.weighted:
            (groups[-1] if groups else waiting).append(segment)
        elif groups and _feeds_forward(groups[-1], segment):
            groups[-1].append(segment)
        else:
            groups.append([*(waiting if follows else []), segment])
            waiting = []
    return _without_tails(groups)


def _feeds_forward(block: Sequence[Segment], segment: Segment) -> bool:
    """Whether `block` is attention alone, and `segment` the layers behind it that go around by a residual."""
    if sum(bool(part.weighted) for part in block) != 1 or len(segment.weighted) < 2:
        return False
    return any(_attends(part) for part in block) and not _attends(segment)


def _attends(segment: Segment) -> bool:
    return len(segment.weighted) > 1 and any(node.op_type == "Softmax" for node in segment.nodes)


def _without_tails(groups: list[list[Segment]]) -> list[list[Segment]]:
    """What follows some blocks of many layers, and not all of them, is not their own, such as a last normalization: it
    goes to the next block, or to none."""
    many = [i for i, group in enumerate(groups) if any(len(part.weighted) > 1 for part in group)]
    if len(many) < 2:
        return groups
    tails = {i: _tail(groups[i]) for i in many}
    alike = (len(set(map(_form, parts))) == 1 for parts in zip(*tails.values(), strict=False))
    own = sum(1 for _ in itertools.takewhile(bool, alike))
    for i, tail in tails.items():
        extra = tail[own:]
        groups[i] = groups[i][: len(groups[i]) - len(extra)]
        if i + 1 < len(groups):
            groups[i + 1] = [*extra, *groups[i + 1]]
    return groups


def _tail(group: Sequence[Segment]) -> list[Segment]:
    """The segments without weights at its end."""
    count = next(i for i, part in enumerate(reversed(group)) if part.weighted)
    return list(group[len(group) - count :])


def _form(segment: Segment) -> tuple[str, ...]:
    return tuple(node.op_type for node in segment.nodes)


def _finished(graph: ir.Graph, chain: set[ir.Value], groups: Sequence[Group]) -> tuple[Block, ...]:
    """The groups with weights as blocks; those without go to the block in front of them, where there is one behind."""
    kept: list[Group] = []
    for i, (name, group) in enumerate(groups):
        if any(part.weighted for part in group):
            kept.append((name, group))
        elif kept and any(part.weighted for _, later in groups[i + 1 :] for part in later):
            kept[-1][1].extend(group)
    owners = _owners(graph, chain, [group for _, group in kept])
    members: list[list[ir.Node]] = [[] for _ in kept]
    for node in graph:
        if node in owners:
            members[owners[node]].append(node)
    return tuple(_block(name, group, nodes) for (name, group), nodes in zip(kept, members, strict=True))


def _owners(graph: ir.Graph, chain: set[ir.Value], groups: Sequence[Sequence[Segment]]) -> dict[ir.Node, int]:
    """The number of the block that each node is in; beside the chain, where one block alone reads what it makes."""
    owners = {node: i for i, group in enumerate(groups) for part in group for node in part.nodes}
    starts = [group[0].start for group in groups]
    made = [{value for part in group for node in part.nodes for value in node.outputs} for group in groups]
    for node in reversed(list(graph)):
        readers = {owners.get(reader, -1) for output in node.outputs for reader in output.consumers()}
        if node in owners or len(readers) != 1 or any(value in chain for value in node.outputs):
            continue
        owner = readers.pop()
        inside = all(
            value not in chain or value is starts[owner] or value in made[owner]
            for value in node.inputs
            if value is not None
        )
        if owner >= 0 and inside and not any(value.is_graph_output() for value in node.outputs):
            owners[node] = owner
    return owners


def _block(name: str | None, group: Sequence[Segment], nodes: Sequence[ir.Node]) -> Block:
    start, end = group[0].start, group[-1].end
    made = {output for node in nodes for output in node.outputs}
    read = _unique(value for node in nodes for value in node.inputs if value is not None)
    weights = [
        v for v in read if v.is_initializer() and _is_float(v) and v.shape is not None and len(v.shape)
    ]
    side = [v for v in read if not v.is_initializer() and v is not start and v not in made]
    first = next(node for part in group for node in part.weighted)
    return Block(
        name or str(first.name),
        tuple(str(node.name) for node in nodes),
        str(start.name),
        str(end.name),
        tuple(str(value.name) for value in side),
        tuple(str(value.name) for value in weights),
    )


def _unique(values: Iterable[ir.Value]) -> list[ir.Value]:
    return list(dict.fromkeys(values))


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()
