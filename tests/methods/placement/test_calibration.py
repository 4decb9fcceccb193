"""From observers to grids: what shares one observer, what follows another value, what is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qpipe.keys.hashing import digest
from qpipe.methods.placement.calibration import (
    activation_encodings,
    content,
    covering,
    observe,
    observed,
    observed_groups,
    pack_observers,
    unpack_observers,
    weight_encodings,
)
from qpipe.methods.placement.placement import Placement, place
from qpipe.model import Model
from qpipe.numerics.grid import encoding_from_range, same_grid
from qpipe.numerics.observers import HistogramObserver, weight_encoding
from qpipe.numerics.scheme import TensorScheme
from tests.model.nets import normal, parsed
from tests.model.quantized import ONNXRUNTIME, quantized, scheme

TEXT = """m (float[N,3,8,8] x) => (float[N,4,4,4] y) {
    t = Conv<pads=[1,1,1,1]>(x, w)  r = Relu(t)  m = Min(r, bound)  p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(m)
    s = Softmax<axis=1>(p)  y = Add(p, s) }"""
X = {"x": normal(10, 3, 8, 8)}


def model() -> Model:
    bound = np.full((4, 1, 1), 0.5, np.float32)
    return Model.from_proto(parsed(TEXT, w=normal(4, 3, 3, 3), bound=bound))


def test_a_group_is_seen_by_one_observer_without_what_is_cut_off_or_passed_over_later() -> None:
    placement = place(model(), ONNXRUNTIME, scheme())
    assert placement.shared == (("r", "m", "p"),)
    assert observed_groups(placement) == (("p",), ("x",), ("y",))


def test_grids_are_over_the_values_of_the_group_and_fixed_ones_stay() -> None:
    net = model()
    placement = place(net, ONNXRUNTIME, scheme())
    observers = observe(net, X, placement, batch_size=3)
    found = activation_encodings(placement, observers)
    (pooled,) = net.session(quantized=False, outputs=["p"]).run(None, X)
    wanted = encoding_from_range(pooled.min(), pooled.max(), placement.activations["m"])
    assert all(same_grid(found[name], wanted) for name in ("r", "m", "p"))
    assert same_grid(found["s"], placement.fixed["s"])
    assert set(found) == {"x", "r", "m", "p", "s", "y"}


def test_the_order_and_the_size_of_batches_do_not_count() -> None:
    net = model()
    placement = place(net, ONNXRUNTIME, scheme())
    told: list[tuple[int, int]] = []
    one = observe(net, X, placement, batch_size=3, progress=lambda *at: told.append(at))
    other = observe(net, {"x": X["x"][::-1]}, placement, batch_size=10)
    assert told == [(3, 10), (6, 10), (9, 10), (10, 10)]
    for group in observed_groups(placement):
        # float32 sums of another batch may differ in their last bit
        np.testing.assert_allclose(one[group].state()["numbers"][:2], other[group].state()["numbers"][:2], rtol=1e-6)
        assert one[group].count == other[group].count


def test_observers_are_packed_as_arrays_and_come_back() -> None:
    net = model()
    placement = place(net, ONNXRUNTIME, scheme())
    groups = observed_groups(placement)
    observers = observe(net, X, placement, batch_size=10)
    again = unpack_observers(groups, pack_observers(observers))
    for group in groups:
        assert again[group].name == group[0]
        assert all(np.array_equal(a, again[group].state()[n]) for n, a in observers[group].state().items())


def test_observers_are_remembered_by_what_the_float_model_computes_on_which_data() -> None:
    net, made = model(), dict[str, dict[str, np.ndarray]]()
    placement = place(net, ONNXRUNTIME, scheme())
    fewer = replace(placement, grids=placement.grids[:1], activations={n: placement.activations[n] for n in "rmp"})

    def memo(name: str, fn: Callable[..., Any], *inputs: object) -> Any:
        return made.setdefault(digest(name, list(inputs)), fn(*inputs))

    assert observed(net, X, Placement(), memo, batch_size=4) == {}
    for same in (net, quantized(net, X), net.with_metadata({"notes": ["other words"]})):
        assert tuple(observed(same, X, placement, memo, batch_size=4)) == observed_groups(placement)
    assert len(made) == 1
    other = net.with_params({"w": 2 * net.param("w")})
    for model_, arrays, chosen in ((other, X, placement), (net, {"x": X["x"][1:]}, placement), (net, X, fewer)):
        observed(model_, arrays, chosen, memo, batch_size=4)
    assert len(made) == 4
    assert digest(content(net)) == digest(content(quantized(net, X))) != digest(content(other))


def test_a_weight_that_was_tuned_keeps_its_grid() -> None:
    net = quantized(model(), X)
    placement = place(net, ONNXRUNTIME, scheme(weight=4))
    (wanted, axis) = placement.weights["w"]
    assert same_grid(weight_encodings(net, placement)["w"], weight_encoding(net.param("w"), wanted, axis))
    frozen = replace(net.encodings["w"], frozen=True)
    kept = net.with_encodings({**net.encodings, "w": frozen})
    assert weight_encodings(kept, placement)["w"] is frozen


@pytest.mark.parametrize(
    ("most", "end"), [(0.0101, 1 / 64), (0.19, 0.25), (0.21, 0.5), (0.85, 1.0), (1.0, 1.0), (0.0, 1.0)]
)
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_grid_of_probabilities_ends_at_a_power_of_two_that_leaves_room(most: float, end: float, bits: int) -> None:
    observer = HistogramObserver()
    observer.update(np.array([0.0, most], np.float32))
    found = covering(observer, TensorScheme(bits, False, False, observer="mse"))
    assert (float(found.scale), int(found.zero_point)) == (end / 2**bits, 0)


def test_what_is_no_probability_has_the_grid_of_its_observer() -> None:
    observer = HistogramObserver()
    observer.update(np.array([-0.5, 0.01], np.float32))
    asked = TensorScheme(8, False, False)
    assert same_grid(covering(observer, asked), observer.encoding(asked))
