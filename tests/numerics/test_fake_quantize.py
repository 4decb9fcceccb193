"""Gradients of fake_quantize against their definitions, and the module that holds one grid."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from qpipe.numerics.fake_quantize import FakeQuantize, fake_quantize
from qpipe.numerics.grid import Encoding, encoding_from_range, quantize_dequantize, same_grid
from qpipe.numerics.scheme import TensorScheme


def _tensor_encoding() -> Encoding:
    return encoding_from_range(-0.7, 1.3, TensorScheme(4, False, False))


def _channel_encoding() -> Encoding:
    scheme = TensorScheme(4, True, False, "per_channel")
    return encoding_from_range([-1.0, -0.1, 0.0], [1.0, 0.4, 2.0], scheme, axis=1)


@pytest.mark.parametrize("e", [_tensor_encoding(), _channel_encoding()], ids=["tensor", "channel"])
def test_the_gradient_passes_inside_the_range_and_stops_outside(e: Encoding) -> None:
    x = torch.linspace(-2, 2, 60).reshape(4, 3, 5).requires_grad_()
    y = FakeQuantize.from_encoding(e)(x)
    y.backward(torch.arange(60.0).reshape(4, 3, 5))
    q = torch.from_numpy(quantize_dequantize(x.detach().numpy(), e))
    step = torch.tensor(e.scale if e.axis is None else e.scale[:, None])
    inside = (q - x.detach()).abs() <= 0.5 * step
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.arange(60.0).reshape(4, 3, 5) * inside)


@pytest.mark.parametrize("axis", [None, 1])
def test_the_gradients_of_scale_and_zero_point_are_those_of_the_learned_step(axis: int | None) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, generator=draw, dtype=torch.float64) * 3
    grad = torch.randn(5, 3, generator=draw, dtype=torch.float64)
    s = torch.full(() if axis is None else (3,), 0.37, dtype=torch.float64, requires_grad=True)
    z = torch.full_like(s, 1.0).requires_grad_()
    fake_quantize(x, s, z, -4, 3, axis).backward(grad)
    u = x / 0.37
    rounded = u.round()
    low, high = rounded < -5, rounded > 2
    ds = torch.where(low, -5.0, torch.where(high, 2.0, rounded - u)) * grad
    dz = torch.where(low | high, -0.37, 0.0) * grad
    assert s.grad is not None
    assert z.grad is not None
    torch.testing.assert_close(s.grad, ds.sum() if axis is None else ds.sum(0))
    torch.testing.assert_close(z.grad, dz.sum() if axis is None else dz.sum(0))


def test_the_gradient_of_a_block_scale_sums_over_its_block() -> None:
    x = torch.tensor([[0.3, 0.4, 0.6, 5.0]])
    s = torch.tensor([[1.0, 1.0]], requires_grad=True)
    fake_quantize(x, s, torch.zeros(1, 2, dtype=torch.int32), -2, 1, axis=1, block_size=2).sum().backward()
    assert s.grad is not None
    torch.testing.assert_close(s.grad, torch.tensor([[-0.7, 0.4 + 1.0]]))


def test_a_disabled_quantizer_lets_the_tensor_through() -> None:
    quantizer = FakeQuantize.from_encoding(_tensor_encoding())
    quantizer.enabled = False
    x = torch.randn(3)
    assert quantizer(x) is x


def test_a_loaded_state_and_a_new_encoding_are_what_runs() -> None:
    one, other = _tensor_encoding(), encoding_from_range(-3.0, 3.0, TensorScheme(4, False, False))
    x = torch.linspace(-4, 4, 50)
    quantizer = FakeQuantize.from_encoding(one)
    quantizer.load_state_dict(FakeQuantize.from_encoding(other).state_dict())
    np.testing.assert_array_equal(quantizer(x).numpy(), quantize_dequantize(x.numpy(), other))
    quantizer.set_encoding(one)
    np.testing.assert_array_equal(copy.deepcopy(quantizer)(x).numpy(), quantize_dequantize(x.numpy(), one))


@pytest.mark.parametrize("e", [_tensor_encoding(), _channel_encoding()], ids=["tensor", "channel"])
def test_learned_scales_come_back_as_an_encoding(e: Encoding) -> None:
    quantizer = FakeQuantize.from_encoding(e)
    assert same_grid(quantizer.encoding, e)
    (scale,) = quantizer.learn_scale()
    x = torch.linspace(-2, 2, 30).reshape(2, 3, 5)
    (quantizer(x) - x).square().sum().backward()
    assert scale.grad is not None
    with torch.no_grad():
        scale -= 1e-3 * scale.grad
    now = quantizer.encoding
    assert not same_grid(now, e)
    np.testing.assert_array_equal(quantizer(x).detach().numpy(), quantize_dequantize(x.numpy(), now))
    quantizer.set_encoding(e)
    assert not list(quantizer.parameters())


def test_learned_zero_points_stay_whole_numbers_in_the_encoding() -> None:
    quantizer = FakeQuantize.from_encoding(_tensor_encoding())
    _, zero_point = quantizer.learn_scale(zero_point=True)
    with torch.no_grad():
        zero_point.add_(0.3)
    x = torch.linspace(-2, 2, 30)
    np.testing.assert_array_equal(
        quantizer(x).detach().numpy(), quantize_dequantize(x.numpy(), quantizer.encoding)
    )
