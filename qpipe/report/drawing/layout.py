"""Where the boxes and lines of a drawn pipeline go: layers from left to right, few crossings, straight lines.

Layer of a node: the longest path to it. An edge over several layers runs through a bend in each layer
between, and the edges of one source share their bends, so that a data set used by many nodes stays one line
until it branches. Order within a layer: barycenters, swept forth and back (Sugiyama, Tagawa, Toda, "Methods
for visual understanding of hierarchical system structures", 1981). Heights: each node as near to its
neighbours' mean as order and gaps allow, by pooling adjacent violators. All of it iterative.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

GAP_X, GAP_Y, BEND_GAP, MARGIN = 56.0, 16.0, 12.0, 20.0
SWEEPS, MANY_ITEMS = 12, 20_000
Item = str | tuple[str, int]  # a node, or the bend of a source's edges in a layer


@dataclass(frozen=True)
class Box:
    """A node's rectangle: `x`, `y` of its centre, in points."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Line:
    """A curve that leaves and arrives level; `straight`: through a layer; `arrow`: it ends at a box."""

    start: tuple[float, float]
    end: tuple[float, float]
    lazy: bool
    arrow: bool
    straight: bool = False


@dataclass(frozen=True)
class Layout:
    boxes: Mapping[str, Box]
    lines: Sequence[Line]
    width: float
    height: float


@dataclass
class _Links:
    """The edges cut at the layers: between items of neighbouring layers only."""

    layers: list[list[Item]]
    after: dict[Item, list[Item]] = field(default_factory=dict)
    before: dict[Item, list[Item]] = field(default_factory=dict)
    lazy: dict[tuple[Item, Item], bool] = field(default_factory=dict)


def layout(
    sizes: Mapping[str, tuple[float, float]],
    edges: Iterable[tuple[str, str]],
    lazy: frozenset[str] = frozenset(),
) -> Layout:
    """Places boxes of the given (width, height); edges into nodes of `lazy` are marked as such.

    The order of `sizes` breaks ties. Errors: ValueError for a cycle.
    """
    pairs = [
        (source, target) for source, target in dict.fromkeys(edges) if source in sizes and target in sizes
    ]
    links = _cut(_ranks(list(sizes), pairs), pairs, lazy)
    if sum(map(len, links.layers)) <= MANY_ITEMS:
        _untangle(links)
    heights = {
        item: sizes[item][1] if isinstance(item, str) else 0.0 for layer in links.layers for item in layer
    }
    middle = _settle(links, heights)
    return _place(links, middle, sizes)


def topological(names: Sequence[str], pairs: Iterable[tuple[str, str]]) -> list[str]:
    """`names` with each after what it needs, otherwise in the given order. Errors: ValueError for a cycle."""
    needs = dict.fromkeys(names, 0)
    users: dict[str, list[str]] = {name: [] for name in names}
    for source, target in pairs:
        needs[target] += 1
        users[source].append(target)
    order = [name for name in names if not needs[name]]
    for name in order:
        for user in users[name]:
            needs[user] -= 1
            if not needs[user]:
                order.append(user)
    if len(order) < len(names):
        stuck = [name for name in names if needs[name]]
        raise ValueError(f"the graph has a cycle through some of: {', '.join(stuck[:5])}")
    return order


def _ranks(names: Sequence[str], pairs: Sequence[tuple[str, str]]) -> dict[str, int]:
    """The layer of each node: its longest path; a source stands right before its first user."""
    ranks = dict.fromkeys(names, 0)
    users: dict[str, list[str]] = {name: [] for name in names}
    for source, target in pairs:
        users[source].append(target)
    fed = {target for _, target in pairs}
    for name in topological(names, pairs):
        for user in users[name]:
            ranks[user] = max(ranks[user], ranks[name] + 1)
    for name in names:
        if name not in fed and users[name]:
            ranks[name] = min(ranks[user] for user in users[name]) - 1
    return ranks


def _cut(ranks: Mapping[str, int], pairs: Sequence[tuple[str, str]], lazy: frozenset[str]) -> _Links:
    layers: list[list[Item]] = [[] for _ in range(max(ranks.values(), default=-1) + 1)]
    for name, rank in ranks.items():
        layers[rank].append(name)
    links = _Links(layers)
    for source, target in pairs:
        path: list[Item] = [
            source,
            *((source, rank) for rank in range(ranks[source] + 1, ranks[target])),
            target,
        ]
        for rank, item in enumerate(path[1:-1], ranks[source] + 1):
            if item not in links.before:
                layers[rank].append(item)
        for here, there in pairwise(path):
            known = links.lazy.get((here, there))
            if known is None:
                links.after.setdefault(here, []).append(there)
                links.before.setdefault(there, []).append(here)
            links.lazy[here, there] = target in lazy and known is not False
    return links


def _untangle(links: _Links) -> None:
    """Reorders the layers by barycenters and keeps the order with the fewest crossings that was seen."""
    best, fewest = [list(layer) for layer in links.layers], _crossings(links)
    for sweep in range(SWEEPS):
        if not fewest:
            break
        forth = sweep % 2 == 0
        neighbours = links.before if forth else links.after
        sequence = range(1, len(links.layers)) if forth else range(len(links.layers) - 2, -1, -1)
        for rank in sequence:
            beside = {item: at for at, item in enumerate(links.layers[rank - 1 if forth else rank + 1])}
            own = {item: at for at, item in enumerate(links.layers[rank])}
            links.layers[rank].sort(key=_Barycenter(neighbours, beside, own))
        crossings = _crossings(links)
        if crossings < fewest:
            best, fewest = [list(layer) for layer in links.layers], crossings
    links.layers[:] = best


@dataclass(frozen=True)
class _Barycenter:
    """The mean place of an item's neighbours; one without any keeps its own."""

    neighbours: Mapping[Item, Sequence[Item]]
    beside: Mapping[Item, int]
    own: Mapping[Item, int]

    def __call__(self, item: Item) -> float:
        near = self.neighbours.get(item, ())
        if not near:
            return self.own[item] * len(self.beside) / len(self.own)
        return sum(self.beside[other] for other in near) / len(near)


def _crossings(links: _Links) -> int:
    """How many pairs of links cross: the inversions of their ends, layer by layer."""
    count = 0
    for here, there in pairwise(links.layers):
        at = {item: index for index, item in enumerate(there)}
        seen: list[int] = []
        for item in here:
            ends = sorted(at[other] for other in links.after.get(item, ()))
            count += sum(len(seen) - bisect_left(seen, end + 1) for end in ends)
            for end in ends:
                insort(seen, end)
    return count


def _settle(links: _Links, heights: Mapping[Item, float], rounds: int = 8) -> dict[Item, float]:
    """The y of each item's middle: each layer in turn is drawn towards its neighbours."""
    middle: dict[Item, float] = {}
    for layer in links.layers:
        middle |= dict(zip(layer, _pool([0.0] * len(layer), layer, heights), strict=True))
    for turn in range(rounds):
        forth = turn % 2 == 0
        for layer in links.layers if forth else reversed(links.layers):
            wanted = [_wanted(item, links, middle, forth, last=turn >= rounds - 2) for item in layer]
            middle |= dict(zip(layer, _pool(wanted, layer, heights), strict=True))
    return middle


def _wanted(item: Item, links: _Links, middle: Mapping[Item, float], forth: bool, last: bool) -> float:
    before, after = links.before.get(item, []), links.after.get(item, [])
    near = before + after if last else (before or after) if forth else (after or before)
    return sum(middle[other] for other in near) / len(near) if near else middle[item]


def _pool(wanted: Sequence[float], layer: Sequence[Item], heights: Mapping[Item, float]) -> list[float]:
    """The places nearest to `wanted` (least squares) that keep the order and the gaps."""
    offsets, offset = [], 0.0
    for index, item in enumerate(layer):
        if index:
            previous = layer[index - 1]
            gap = GAP_Y if heights[item] and heights[previous] else BEND_GAP
            offset += (heights[item] + heights[previous]) / 2 + gap
        offsets.append(offset)
    pools: list[tuple[float, int]] = []  # (sum, count), means not decreasing
    for want, offset in zip(wanted, offsets, strict=True):
        total, count = want - offset, 1
        while pools and pools[-1][0] * count >= total * pools[-1][1]:
            total, count = total + pools[-1][0], count + pools[-1][1]
            pools.pop()
        pools.append((total, count))
    means = [total / count for total, count in pools for _ in range(count)]
    return [mean + offset for mean, offset in zip(means, offsets, strict=True)]


def _place(links: _Links, middle: Mapping[Item, float], sizes: Mapping[str, tuple[float, float]]) -> Layout:
    """Columns from left to right, and the lines between them."""
    top = min(
        (y - sizes[item][1] / 2 if isinstance(item, str) else y for item, y in middle.items()), default=0.0
    )
    boxes: dict[str, Box] = {}
    span: dict[Item, tuple[float, float]] = {}
    lines: list[Line] = []
    left = MARGIN
    for layer in links.layers:
        width = max((sizes[item][0] for item in layer if isinstance(item, str)), default=0.0)
        for item in layer:
            span[item] = (left, left + width)
            y = middle[item] - top + MARGIN
            if isinstance(item, str):
                boxes[item] = Box(left + width / 2, y, width, sizes[item][1])
            elif width:
                lazy = all(links.lazy[item, other] for other in links.after[item])
                lines.append(Line((left, y), (left + width, y), lazy, arrow=False, straight=True))
        left += width + GAP_X
    for (here, there), lazy in links.lazy.items():
        start = (span[here][1], middle[here] - top + MARGIN)
        lines.append(
            Line(start, (span[there][0], middle[there] - top + MARGIN), lazy, isinstance(there, str))
        )
    bottom = max((box.y + box.height / 2 for box in boxes.values()), default=0.0)
    bottom = max([bottom, *(line.end[1] for line in lines)])
    return Layout(boxes, lines, max(left - GAP_X, MARGIN) + MARGIN, bottom + MARGIN)
