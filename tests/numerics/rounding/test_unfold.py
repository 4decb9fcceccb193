"""Rows times weight rows are the layer's outputs, as torch's own convolutions give; sampled positions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qpipe.numerics.rounding.unfold import Unfold, sample_positions

CONVOLUTIONS: list[tuple[int, dict[str, Any]]] = [
    (1, {"kernel_shape": (3,), "strides": (2,), "pads": (1, 1)}),
    (2, {"kernel_shape": (3, 3)}),
    (2, {"kernel_shape": (3, 2), "strides": (2, 1), "pads": (1, 0, 1, 0), "dilations": (1, 2)}),
    (2, {"kernel_shape": (3, 3), "pads": (1, 1, 1, 1), "groups": 2}),
    (2, {"kernel_shape": (3, 3), "pads": (1, 1, 1, 1), "groups": 4}),
    (3, {"kernel_shape": (2, 3, 1), "pads": (1, 1, 0, 1, 1, 0), "strides": (1, 2, 1)}),
]


def _random(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(len(shape)).normal(size=shape))


def _outputs(unfold: Unfold, x: Tensor, weight: Tensor) -> Tensor:
    """(samples, O, positions) by way of rows."""
    y = torch.einsum("gmk,grk->mgr", unfold.rows(x), unfold.weight_rows(weight))
    return y.reshape(x.shape[0], -1, y.shape[1] * y.shape[2]).transpose(1, 2)


@pytest.mark.parametrize(("rank", "attributes"), CONVOLUTIONS)
def test_a_convolution_is_its_rows_times_its_weight(rank: int, attributes: dict[str, Any]) -> None:
    unfold = Unfold("conv", **attributes)
    x = _random(2, 4, *(7, 6, 5)[:rank])
    weight = _random(8, 4 // unfold.groups, *unfold.kernel_shape)
    conv = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    expected = conv(x, weight, None, unfold.strides, unfold.pads[:rank], unfold.dilations, unfold.groups)
    assert unfold.output_shape(tuple(x.shape)) == expected.shape[2:]
    torch.testing.assert_close(_outputs(unfold, x, weight), expected.flatten(2))
    again = unfold.weight_from_rows(unfold.weight_rows(weight), tuple(weight.shape))
    assert torch.equal(again, weight)


@pytest.mark.parametrize(("rank", "attributes"), CONVOLUTIONS)
@pytest.mark.parametrize("extra", [0, 1])
def test_a_transposed_convolution_is_its_rows_times_its_weight(
    rank: int, attributes: dict[str, Any], extra: int
) -> None:
    padding = tuple(min(extra, s - 1) for s in attributes.get("strides", (1,) * rank))
    unfold = Unfold("conv_transpose", output_padding=padding, **attributes)
    x = _random(2, 4, *(7, 6, 5)[:rank])
    weight = _random(4, 6 // max(1, unfold.groups // 2), *unfold.kernel_shape)
    conv = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    expected = conv(
        x, weight, None, unfold.strides, unfold.pads[:rank], padding, unfold.groups, unfold.dilations
    )
    assert unfold.output_shape(tuple(x.shape)) == expected.shape[2:]
    torch.testing.assert_close(_outputs(unfold, x, weight), expected.flatten(2))
    again = unfold.weight_from_rows(unfold.weight_rows(weight), tuple(weight.shape))
    assert torch.equal(again, weight)


def test_pads_may_differ_at_both_ends() -> None:
    unfold = Unfold("conv", kernel_shape=(3, 3), strides=(2, 2), pads=(0, 1, 1, 2))
    x, weight = _random(1, 3, 8, 8), _random(5, 3, 3, 3)
    expected = F.conv2d(F.pad(x, (1, 2, 0, 1)), weight, stride=2)
    torch.testing.assert_close(_outputs(unfold, x, weight), expected.flatten(2))


@pytest.mark.parametrize("axis", [0, 1])
def test_a_linear_layer_takes_the_last_axis(axis: int) -> None:
    unfold = Unfold("linear", weight_axis=axis)
    x, weight = _random(2, 5, 3, 4), _random(6, 4)
    stored = weight if axis == 0 else weight.T
    expected = (x @ weight.T).reshape(2, 15, 6).transpose(1, 2)
    torch.testing.assert_close(_outputs(unfold, x, stored), expected)
    assert torch.equal(unfold.weight_from_rows(unfold.weight_rows(stored), tuple(stored.shape)), stored)
    flat = _random(7, 4)
    torch.testing.assert_close(unfold.rows(flat)[0], flat)


def test_chosen_positions_are_rows_of_all() -> None:
    unfold = Unfold("conv", kernel_shape=(3, 3), pads=(1, 1, 1, 1), groups=2)
    x = _random(3, 4, 6, 5)
    positions = sample_positions(30, 7, first=0, samples=3, seed=1)
    every = unfold.rows(x).reshape(2, 3, 30, -1)
    some = unfold.rows(x, positions).reshape(2, 3, 7, -1)
    for sample in range(3):
        assert torch.equal(some[:, sample], every[:, sample, torch.tensor(positions[sample])])


def test_positions_depend_on_the_seed_and_the_sample_not_on_the_batch() -> None:
    whole = sample_positions(1000, 25, first=0, samples=64, seed=3)
    parts = [sample_positions(1000, 25, first=i, samples=16, seed=3) for i in range(0, 64, 16)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert np.any(whole != sample_positions(1000, 25, first=0, samples=64, seed=4))
    assert len({tuple(row) for row in whole}) == 64
    assert all(len(set(row)) == 25 for row in whole)
    assert 0 <= whole.min() <= whole.max() < 1000


def test_every_position_is_as_likely() -> None:
    counts = np.bincount(sample_positions(35, 7, 0, 20_000, seed=0).ravel(), minlength=35)
    assert np.all(np.abs(counts / 20_000 - 0.2) < 0.015)


def test_few_positions_are_all_taken() -> None:
    np.testing.assert_array_equal(sample_positions(4, 16, 5, 2, seed=0), [[0, 1, 2, 3]] * 2)


def test_attributes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="pads of a kernel with 2 dimensions has 4 numbers"):
        Unfold("conv", kernel_shape=(3, 3), pads=(1, 1))
    with pytest.raises(ValueError, match="cannot have a kernel"):
        Unfold("conv")
