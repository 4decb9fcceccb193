"""The choices of mixed precision: which tensors of a model must go together, and what each bitwidth costs.

Two tensors that have a choice belong to one group where they must share a grid, where one is the weight and the
other the input of one layer, and where one operator reads both. A tensor that has the same bitwidth under every
candidate has no choice and binds nobody.

    size      bits of the weights
    bitops    multiplications * bits of the one factor * bits of the other, and for each group of activations
              elements * bits, once: what has no multiplications still moves its values

Both add up over groups. Whatever has no grid counts as 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qpipe.methods.mixing.work import FLOAT_BITS, Array, Work, measure_work
from qpipe.model.structure.families import Joined
from qpipe.model.structure.operands import find_operands

if TYPE_CHECKING:
    import onnx_ir as ir

    from qpipe.methods.placement.placement import Placement
    from qpipe.model.network.network import Network
    from qpipe.model.structure.operands import Operand
    from qpipe.numerics.grid import Encoding

Cost = Literal["bitops", "size"]


@dataclass(frozen=True)
class Group:
    """Tensors that share a candidate.

    `options` are the candidates that differ here, each with the bitwidths of (weights, activations) in `bits`,
    None where the group has none with a choice; `option_of` says which of them serves each candidate. `size` and
    `bitops` are what each option costs.
    """

    name: str
    weights: tuple[str, ...]
    activations: tuple[str, ...]
    options: tuple[str, ...]
    option_of: Mapping[str, int]
    bits: tuple[tuple[int | None, int | None], ...]
    size: tuple[int, ...]
    bitops: tuple[int, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        """All tensors of the group."""
        return (*self.weights, *self.activations)

    def cost(self, kind: Cost) -> tuple[int, ...]:
        """What each option costs."""
        return self.size if kind == "size" else self.bitops


@dataclass(frozen=True)
class Choices:
    """The groups of a model, what no choice changes, and which groups hand values to which.

    `grids` are the encodings of the whole model by candidate; `settled` those of the tensors without a choice.
    `size` and `bitops` are the costs that no choice changes.
    """

    groups: tuple[Group, ...]
    grids: Mapping[str, Mapping[str, Encoding]]
    settled: Mapping[str, Encoding]
    size: int
    bitops: int
    neighbours: tuple[tuple[int, int], ...] = ()

    def rest(self, kind: Cost) -> int:
        """What the tensors without a choice cost."""
        return self.size if kind == "size" else self.bitops

    def encodings(self, choice: Sequence[int]) -> dict[str, Encoding]:
        """The encodings of the whole model when group i has its option `choice[i]`."""
        found = dict(self.settled)
        for group, option in zip(self.groups, choice, strict=True):
            found.update(self.alone(group, option))
        return found

    def alone(self, group: Group, option: int) -> dict[str, Encoding]:
        """The encodings of one group; every other tensor stays float."""
        grids = self.grids[group.options[option]]
        return {name: grids[name] for name in group.tensors if name in grids}

    def uniform(self, candidate: str) -> tuple[int, ...]:
        """The choice that gives every group the same candidate."""
        return tuple(group.option_of[candidate] for group in self.groups)

    def conversions(self, choice: Sequence[int]) -> int:
        """How often a value goes from a group to one whose activations have another bitwidth."""
        bits = [group.bits[i][1] for group, i in zip(self.groups, choice, strict=True)]
        return sum(bits[a] != bits[b] for a, b in self.neighbours if bits[a] and bits[b])


def find_choices(
    model: Network,
    placement: Placement,
    grids: Mapping[str, Mapping[str, Encoding]],
    arrays: Mapping[str, Array],
) -> Choices:
    """The choices that the candidates in `grids` (encodings by candidate) leave; `placement` is that of any of them.

    One batch of `arrays` says how large values are. Raises InputError for data that do not fit.
    """
    bits = {name: tuple(_bits(e, name) for e in grids.values()) for name in _names(grids)}
    open_tensors = {name for name, found in bits.items() if len(set(found)) > 1}
    operands, work = find_operands(model), measure_work(model, placement, arrays)
    tied = _tied(model, placement, operands, [name for name in bits if name in open_tensors])
    groups = tuple(_group(model, names, grids, bits, work) for names in tied)
    settled = {
        name: e for encodings in grids.values() for name, e in encodings.items() if name not in open_tensors
    }
    fixed = {name: found[0] for name, found in bits.items() if name not in open_tensors}
    left = {each.weight: FLOAT_BITS for each in operands if each.weight not in bits}
    return Choices(
        groups,
        grids,
        settled,
        _size(model, {**fixed, **left}),
        work.without(open_tensors).bitops(fixed),
        _neighbours(model, groups, set(bits)),
    )


def _tied(
    model: Network, placement: Placement, operands: Sequence[Operand], names: Sequence[str]
) -> list[list[str]]:
    """The tensors `names`, which have a choice, in groups that must make the same one: those of weights come first."""
    open_tensors, joined = set(names), Joined[str]()

    def join(together: Iterable[str]) -> None:
        first, *others = [name for name in together if name in open_tensors] or [""]
        joined.join(first, others)

    # The factors of a product are never in two groups, so that costs add up.
    for shared in placement.grids:
        join(shared)
    for operand in operands:
        join((operand.weight, operand.input))
    for node in model.graph:
        join(str(value.name) for value in node.inputs if value is not None)
    members: dict[str, list[str]] = {}
    in_order = [name for each in operands for name in (each.input, each.weight)]
    for name in dict.fromkeys((*in_order, *placement.activations, *names)):
        if name in open_tensors:
            members.setdefault(joined.leader(name), []).append(name)
    return list(members.values())


def _group(
    model: Network,
    names: Sequence[str],
    grids: Mapping[str, Mapping[str, Encoding]],
    bits: Mapping[str, tuple[int, ...]],
    work: Work,
) -> Group:
    weights = tuple(name for name in names if name in model.graph.initializers)
    activations = tuple(name for name in names if name not in model.graph.initializers)
    options: dict[tuple[int, ...], str] = {}
    option_of = {}
    for index, candidate in enumerate(grids):
        signature = tuple(bits[name][index] for name in names)
        options.setdefault(signature, candidate)
        option_of[candidate] = list(options).index(signature)
    place = {candidate: index for index, candidate in enumerate(grids)}
    chosen = [{n: found[place[c]] for n, found in bits.items()} for c in options.values()]
    return Group(
        name=(weights or activations)[0],
        weights=weights,
        activations=activations,
        options=tuple(options.values()),
        option_of=option_of,
        bits=tuple(
            (found[weights[0]] if weights else None, found[activations[0]] if activations else None)
            for found in chosen
        ),
        size=tuple(_size(model, {name: found[name] for name in weights}) for found in chosen),
        bitops=tuple(work.of(set(names)).bitops(found) for found in chosen),
    )


def fewer_conversions(
    choices: Choices, choice: tuple[int, ...], allowed: Callable[[tuple[int, ...]], bool]
) -> tuple[int, ...]:
    """`choice` after its islands, the neighbours of one bitwidth, took over the bitwidth around them, as long as
    that leaves fewer conversions and is `allowed`; what leaves fewest is asked first, then what is cheapest."""
    refused: set[tuple[int, ...]] = set()  # not asked again: `allowed` measures the whole model

    def rank(proposal: tuple[int, ...]) -> tuple[int, int]:
        bitops = sum(group.bitops[i] for group, i in zip(choices.groups, proposal, strict=True))
        return choices.conversions(proposal), bitops

    while True:
        proposals = {p for island in _islands(choices, choice) for p in _merged(choices, choice, island)}
        fewer = [p for p in proposals - refused if choices.conversions(p) < choices.conversions(choice)]
        for proposal in sorted(fewer, key=lambda p: (rank(p), p)):
            if allowed(proposal):
                choice = proposal
                break
            refused.add(proposal)
        else:
            return choice


def _islands(choices: Choices, choice: tuple[int, ...]) -> list[set[int]]:
    """Groups that are neighbours and have activations of one bitwidth."""
    import networkx as nx

    bits = [group.bits[i][1] for group, i in zip(choices.groups, choice, strict=True)]
    graph: nx.Graph[int] = nx.Graph()
    graph.add_nodes_from(i for i, width in enumerate(bits) if width)
    graph.add_edges_from((a, b) for a, b in choices.neighbours if bits[a] == bits[b])
    return [set(island) for island in nx.connected_components(graph)]


def _merged(choices: Choices, choice: tuple[int, ...], island: set[int]) -> Iterator[tuple[int, ...]]:
    """`choice` with the island on each bitwidth of its surroundings, weights as they are where that is offered."""
    pairs = [*choices.neighbours, *((b, a) for a, b in choices.neighbours)]
    around = {choices.groups[b].bits[choice[b]][1] for a, b in pairs if a in island and b not in island}
    for width in sorted(width for width in around if width):
        proposal = list(choice)
        for index in island:
            weights = choices.groups[index].bits[choice[index]][0] or 0
            fitting = [
                (abs((w or 0) - weights), -(w or 0), option)
                for option, (w, a) in enumerate(choices.groups[index].bits)
                if a == width
            ]
            if not fitting:
                break
            proposal[index] = min(fitting)[2]
        else:
            yield tuple(proposal)


def _neighbours(model: Network, groups: Sequence[Group], quantized: set[str]) -> tuple[tuple[int, int], ...]:
    """Pairs of groups between which values go: from what an operator reads to what comes out, through what has
    no grid of its own."""
    owner = {name: index for index, group in enumerate(groups) for name in group.activations}
    sources: dict[ir.Value, frozenset[int]] = {}
    pairs: dict[tuple[int, int], None] = {}
    for node in model.graph:
        read = [value for value in node.inputs if value is not None and not value.is_initializer()]
        came: frozenset[int] = frozenset().union(
            *(
                {owner[str(v.name)]} if v.name in owner else sources.get(v, frozenset())
                for v in read
                if v.name in owner or v.name not in quantized
            )
        )
        for output in node.outputs:
            own = owner.get(str(output.name))
            if own is None:
                sources[output] = came
            else:
                pairs.update({(source, own): None for source in came if source != own})
    return tuple(pairs)


def _names(grids: Mapping[str, Mapping[str, Encoding]]) -> list[str]:
    return list(dict.fromkeys(name for encodings in grids.values() for name in encodings))


def _bits(encodings: Mapping[str, Encoding], name: str) -> int:
    return encodings[name].bitwidth if name in encodings else FLOAT_BITS


def _size(model: Network, bits: Mapping[str, int]) -> int:
    return sum(
        model.params[name].size * width for name, width in bits.items() if name in model.graph.initializers
    )
