"""What is known before a graph runs: host values, and constants as torch has them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch

from qpipe.model.simulation.constants import (
    array_of,
    host_constant,
    host_values,
    keywords,
    literal,
    shared_tensor_of,
    statistics,
    tensor_of,
)
from tests.model.nets import normal, parsed


def test_what_follows_from_shapes_and_small_integers_is_computed_on_the_cpu() -> None:
    text = """m (float[N,4] x) => (float[N,4] y) {
        s = Shape(x)  n = Gather(s, i)  m2 = Mul(n, two)  f = Cast<to=1>(m2)  g = Mul(f, scale)  y = Mul(x, g)
        v = Mul(f, w) }"""
    tensors = {"i": np.array(0), "two": np.array(2), "scale": np.float32(2), "w": normal(4)}
    graph = ir.from_proto(parsed(text, **tensors)).graph
    found = {str(value.name) for value in host_values(graph)}
    assert found == {"s", "n", "m2", "f", "g"}  # a vector of floats is a parameter: no host value follows from it


def test_many_integers_are_no_host_constant() -> None:
    text = "m (float[N,4] x) => (int64[N] y) { s = Shape(x)  y = Mul(s, big) }"
    graph = ir.from_proto(parsed(text, big=np.arange(65))).graph
    assert {str(value.name) for value in host_values(graph)} == {"s"}


def test_running_means_and_variances_are_statistics_and_no_parameters() -> None:
    text = "m (float[N,4] x) => (float[N,4] y) { y = BatchNormalization(x, g, b, mean, var) }"
    graph = ir.from_proto(parsed(text, g=normal(4), b=normal(4), mean=normal(4), var=normal(4))).graph
    assert {value.name for value in statistics(graph)} == {"mean", "var"}


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"])
def test_types_that_numpy_borrows_go_through_their_bits(name: str) -> None:
    array = np.array([0.5, -1.5, 96.0]).astype(getattr(ml_dtypes, name))
    tensor = tensor_of(array)
    assert tensor.dtype == getattr(torch, name)
    assert tensor.float().tolist() == [0.5, -1.5, 96.0]
    assert array_of(tensor).dtype == array.dtype
    assert array_of(tensor).tobytes() == array.tobytes()


def test_a_shared_tensor_is_the_array_itself_and_any_other_a_copy() -> None:
    array = normal(3, 4)
    shared, own = shared_tensor_of(array), tensor_of(array)
    array[0, 0] = 7
    assert shared[0, 0] == 7 != own[0, 0]
    turned = array.T
    assert torch.equal(shared_tensor_of(turned), torch.tensor(turned.copy()))


def test_attributes_become_what_python_and_fx_take() -> None:
    text = """m (int64[2] s) => (float[a,b] y, float[a,b] z) {
        y = ConstantOfShape<value=float[1] {1.5}>(s)  z = Pad<mode="edge">(y, s) }"""
    graph = ir.from_proto(parsed(text)).graph
    assert keywords(graph[0].attributes["value"]) == [("value", 1.5), ("dtype", int(ir.DataType.FLOAT))]
    assert keywords(graph[1].attributes["mode"]) == [("mode", "edge")]
    assert literal([1, [2, [3]]]) == (1, (2, (3,)))


def test_a_constant_made_without_gradients_serves_with_them() -> None:
    host_constant.cache_clear()
    with torch.inference_mode():
        host_constant(0.5, torch.float32)
    x = torch.ones(3, requires_grad=True)
    (x * host_constant(0.5, torch.float32)).sum().backward()  # type: ignore[no-untyped-call]  # torch's
    assert x.grad is not None
    assert x.grad.tolist() == [0.5] * 3


def test_places_of_a_resize_made_without_gradients_serve_with_them() -> None:
    from qpipe.model.operators.resize import _taps, resize

    _taps.cache_clear()
    x = torch.ones(1, 1, 2, 2, requires_grad=True)
    for mode in ("nearest", "linear"):
        with torch.inference_mode():
            resize(torch.ones(1, 1, 2, 2), None, (1.0, 1.0, 2.0, 2.0), mode=mode)
        found = resize(x, None, (1.0, 1.0, 2.0, 2.0), mode=mode)
        (grad,) = torch.autograd.grad(found.sum(), x)
        assert float(grad.sum()) == pytest.approx(16.0)
