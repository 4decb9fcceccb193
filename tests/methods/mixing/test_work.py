"""What a model computes for one sample, counted by hand."""

from __future__ import annotations

from qpipe.methods.mixing.work import FLOAT_BITS, Work

WORK = Work(((100, "x", "w"), (20, "h", "v"), (5, "h", "k")), ((8, "x"), (4, "h"), (2, "y")))


def test_bit_operations_are_products_of_both_factors_and_each_grid_once() -> None:
    bits = {"x": 8, "w": 4, "h": 16, "v": 8, "k": 16, "y": 8}
    products = 100 * 8 * 4 + 20 * 16 * 8 + 5 * 16 * 16
    assert WORK.bitops(bits) == products + 8 * 8 + 4 * 16 + 2 * 8


def test_what_has_no_grid_counts_as_float() -> None:
    assert Work(((3, "x", "w"),), ((2, "x"),)).bitops({"w": 8}) == 3 * FLOAT_BITS * 8 + 2 * FLOAT_BITS


def test_what_a_group_has_to_do_with_and_the_rest_are_all() -> None:
    bits = {"x": 8, "w": 4, "h": 16, "v": 8, "k": 16, "y": 8}
    for names in ({"h", "v", "k"}, {"x", "w"}, {"y"}, set[str]()):
        assert WORK.of(names).bitops(bits) + WORK.without(names).bitops(bits) == WORK.bitops(bits)
    assert WORK.of({"h"}).products == WORK.products[1:]
    assert WORK.of({"h"}).elements == ((4, "h"),)
