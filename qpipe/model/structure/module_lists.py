"""Module lists, as the names of torch modules show them: `model.layers.0` and `model.layers.1` are children of one.

A child is a piece where whole segments of the activations' chain, one behind the other, are its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import onnx_ir as ir

from qpipe.model.network.naming import MODULE_CLASS, SCOPE

if TYPE_CHECKING:
    Pieces = dict[str, tuple[int, int]]


class Part(Protocol):
    """A stretch of the chain."""

    @property
    def nodes(self) -> Sequence[ir.Node]:
        """Its nodes."""

    @property
    def weighted(self) -> Sequence[ir.Node]:
        """Those that have weights."""


def named_pieces(parts: Sequence[Part]) -> list[str | None]:
    """For each part of the chain the child of a module list that it belongs to; None where there is none."""
    tree = _Tree(parts)
    names: list[str | None] = [None] * len(parts)
    for piece in tree.chosen(""):
        first, last = tree.spans[piece]
        names[first : last + 1] = [piece] * (last + 1 - first)
    return names


class _Tree:
    """The numbered children by the list that they are in, and the parts of the chain that each one owns."""

    def __init__(self, parts: Sequence[Part]) -> None:
        scopes = [
            [_scope(node) for node in part.weighted] or [s for n in part.nodes if (s := _scope(n))]
            for part in parts
        ]
        self.prefixes = {p for part in parts for node in part.nodes for p in _numbered(_scope(node))}
        self.classes = {
            _scope(node): str(node.metadata_props[MODULE_CLASS])
            for part in parts
            for node in part.nodes
            if MODULE_CLASS in node.metadata_props
        }
        self.spans: Pieces = {}
        self.broken: set[str] = set()
        for prefix in self.prefixes:
            self._add(prefix, parts, scopes)

    def _add(self, prefix: str, parts: Sequence[Part], scopes: Sequence[Sequence[str]]) -> None:
        """The span of parts that `prefix` owns; broken where a part with weights is not its own alone."""
        own = [bool(named) and all(_under(name, prefix) for name in named) for named in scopes]
        touched = [i for i, part in enumerate(parts) if any(_under(_scope(n), prefix) for n in part.weighted)]
        if not touched:
            return
        owned = [i for i, mine in enumerate(own) if mine]
        first, last = min(owned, default=0), max(owned, default=-1)
        others = any(parts[i].weighted and not own[i] for i in range(first, last + 1))
        if others or not all(own[i] for i in touched):
            self.broken.add(prefix)
        else:
            self.spans[prefix] = (first, last)

    def chosen(self, outer: str) -> list[str]:
        """The pieces inside the child `outer`; none where no list in it can be divided."""
        found: list[str] = []
        for children in self._lists(outer):
            if not self._divides(children):
                continue
            pieces = [child for child in children if child in self.spans]
            deeper = [self.chosen(piece) for piece in pieces]
            found += [name for names in deeper for name in names] if all(deeper) else pieces
        return found

    def _lists(self, outer: str) -> Iterator[list[str]]:
        """The lists right inside the child `outer`, each as its children."""
        lists: dict[str, list[str]] = {}
        for prefix in sorted(self.prefixes, key=lambda p: [(len(t), t) for t in p.split(".")]):
            enclosing = [*_numbered(prefix)][:-1]
            if (enclosing[-1] if enclosing else "") == outer:
                lists.setdefault(prefix.rpartition(".")[0], []).append(prefix)
        yield from lists.values()

    def _divides(self, children: Sequence[str]) -> bool:
        """Whether some child is a piece, none is torn, and all of which the class is known are of one."""
        classes = {self.classes[child] for child in children if child in self.classes}
        return (
            any(child in self.spans for child in children)
            and not any(child in self.broken for child in children)
            and len(classes) < 2
        )


def _scope(node: ir.Node) -> str:
    return str(node.metadata_props.get(SCOPE, ""))


def _numbered(scope: str) -> Iterator[str]:
    """Its beginnings that end with a number, the shortest first."""
    parts = scope.split(".")
    for count, part in enumerate(parts, 1):
        if part.isdigit():
            yield ".".join(parts[:count])


def _under(scope: str, prefix: str) -> bool:
    return scope == prefix or scope.startswith(f"{prefix}.")
