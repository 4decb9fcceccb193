"""Pieces by the names of torch modules: children of a list, whole stretches of the chain, alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qpipe.model.network.naming import MODULE_CLASS, SCOPE
from qpipe.model.structure.module_lists import named_pieces


@dataclass(frozen=True)
class Stretch:
    """A part of the chain: nodes by their scopes; those that end with * have weights."""

    nodes: Sequence[ir.Node]
    weighted: Sequence[ir.Node]


def part(*scopes: str, of: str = "") -> Stretch:
    nodes = [ir.node("Relu", [ir.Value(name="x")]) for _ in scopes]
    for node, scope in zip(nodes, scopes, strict=True):
        node.metadata_props[SCOPE] = scope.rstrip("*")
        if of:
            node.metadata_props[MODULE_CLASS] = of
    return Stretch(nodes, [node for node, scope in zip(nodes, scopes, strict=True) if scope.endswith("*")])


def test_children_of_a_list_are_pieces_and_what_stands_outside_is_none() -> None:
    parts = [part("stem*"), part("layers.0.conv*"), part("layers.0.act"), part("layers.1.conv*"), part("head*")]
    assert named_pieces(parts) == [None, "layers.0", "layers.0", "layers.1", None]


def test_names_without_numbers_give_no_pieces() -> None:
    assert named_pieces([part("stem*"), part("body.conv*"), part("head*")]) == [None, None, None]


def test_a_nameless_part_between_those_of_a_child_is_its_own() -> None:
    parts = [part("layers.0.a*"), part(""), part("layers.0.b*"), part("layers.1.a*")]
    assert named_pieces(parts) == ["layers.0", "layers.0", "layers.0", "layers.1"]


def test_a_list_of_which_one_child_is_torn_is_not_divided() -> None:
    torn = [part("layers.0.a*"), part("other*"), part("layers.0.b*"), part("layers.1.a*")]
    assert named_pieces(torn) == [None] * 4
    shared = [part("layers.0.a*", "layers.1.a*"), part("layers.1.b*")]
    assert named_pieces(shared) == [None, None]


def test_a_list_inside_each_child_divides_it_further() -> None:
    parts = [part(f"stages.{i}.blocks.{j}.conv*") for i in range(2) for j in range(2)]
    assert named_pieces(parts) == [f"stages.{i}.blocks.{j}" for i in range(2) for j in range(2)]
    mixed = [part("stages.0.blocks.0.conv*"), part("stages.1.conv*")]
    assert named_pieces(mixed) == ["stages.0", "stages.1"]


def test_children_of_several_classes_are_no_list_of_blocks() -> None:
    alike = [part("layers.0*", of="Block"), part("layers.1*", of="Block")]
    assert named_pieces(alike) == ["layers.0", "layers.1"]
    unlike = [part("layers.0*", of="Conv2d"), part("layers.1*", of="Linear")]
    assert named_pieces(unlike) == [None, None]


def test_ten_children_come_in_the_order_of_their_numbers() -> None:
    parts = [part(f"layers.{i}*") for i in range(12)]
    assert named_pieces(parts) == [f"layers.{i}" for i in range(12)]
    assert named_pieces([part("layers.1*"), part("layers.10*")]) == ["layers.1", "layers.10"]
