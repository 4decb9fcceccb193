"""Schemes: what replaces a part of one leaves the rest as it is."""

from __future__ import annotations

import pytest

from qpipe.numerics.scheme import Scheme, TensorScheme, with_granularity

BLOCKS = Scheme(
    TensorScheme(4, True, True, "per_block", block_size=32, observer="mse"), TensorScheme(8, False, False)
)


def test_another_granularity_of_weights_changes_nothing_else() -> None:
    assert with_granularity(BLOCKS, None) == with_granularity(BLOCKS, "per_block") == BLOCKS
    assert with_granularity(BLOCKS, "per_channel") == Scheme(
        TensorScheme(4, True, True, "per_channel", observer="mse"), BLOCKS.activation
    )


def test_weights_without_a_block_size_cannot_be_quantized_per_block() -> None:
    with pytest.raises(ValueError, match="needs a block_size"):
        with_granularity(with_granularity(BLOCKS, "per_tensor"), "per_block")
