"""From a placement to encodings: one pass of the float model over the data, then a grid for every quantizer.

Values that must share one grid are seen by one observer, so the grid fits them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qpipe.methods.placement.survival import Survivors
from qpipe.model.simulation.module import to_torch, watched
from qpipe.model.simulation.samples import batches, sample_count
from qpipe.numerics.grid import Encoding
from qpipe.numerics.observers import HistogramObserver, weight_encoding
from qpipe.numerics.scheme import TensorScheme, code_bounds

if TYPE_CHECKING:
    from torch import Tensor

    from qpipe.methods.placement.placement import Placement
    from qpipe.model.network.network import Network

Array = npt.NDArray[Any]
Group = tuple[str, ...]
Observers = dict[Group, HistogramObserver]


def observed_groups(placement: Placement, also: Iterable[str] = ()) -> tuple[Group, ...]:
    """The activations that need data, in groups that share one grid; most groups are one value. `also` are values that
    are watched alone besides.

    A value that is cut down to another one of its group is left out: its range does not count.
    """
    grouped = {name for group in placement.shared for name in group}
    watched = (tuple(name for name in group if name not in placement.follows) for group in placement.shared)
    groups = (*watched, *((name,) for name in placement.activations if name not in grouped))
    return tuple(dict.fromkeys((*groups, *((name,) for name in also))))


def observe(
    model: Network,
    arrays: Mapping[str, Array],
    placement: Placement,
    *,
    batch_size: int,
    also: Sequence[str] = (),
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Observers:
    """An observer per group that has seen all that counts of its values, in one pass of the float simulation.

    Memory is that of one batch and the observers. Raises InputError for data that do not fit, and for a nan,
    with the name of the value.
    """
    observers = {group: HistogramObserver(name=group[0]) for group in observed_groups(placement, also)}
    by_value: dict[str, list[HistogramObserver]] = {}
    for group, observer in observers.items():
        for name in group:
            by_value.setdefault(name, []).append(observer)
    module = to_torch(model, quantized=False, device=device, shared=True)

    def count(name: str, elements: Tensor) -> None:
        for observer in by_value.get(name, ()):
            observer.update(elements)

    total = sample_count(model, arrays)
    done = 0
    for batch in batches(model, arrays, batch_size):
        watched(module, batch.arrays, Survivors(placement.survives, count).see, device)
        done += batch.count
        if progress:
            progress(done, total)
    return observers


def observed(
    model: Network,
    arrays: Mapping[str, Array],
    placement: Placement,
    memo: Callable[..., Any],
    *,
    batch_size: int,
    also: Sequence[str] = (),
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Observers:
    """What `observe` returns, through `memo(name, function, *inputs)`: made once for a model and data."""
    groups = observed_groups(placement, also)
    if not groups:
        return {}

    def run(*_: Any) -> dict[str, Array]:
        found = observe(
            model, arrays, placement, batch_size=batch_size, also=also, device=device, progress=progress
        )
        return pack_observers(found)

    counted = [[list(group) for group in groups], placement.survives]
    states = memo("observers", run, content(model), dict(arrays), counted, batch_size)
    return unpack_observers(groups, states)


def pack_observers(observers: Observers) -> dict[str, Array]:
    """The state of all observers as arrays by name, to be kept."""
    return {
        f"{index}.{name}": array
        for index, observer in enumerate(observers.values())
        for name, array in observer.state().items()
    }


def unpack_observers(groups: Sequence[Group], arrays: Mapping[str, Array]) -> Observers:
    """The observers of `groups` that `pack_observers` took apart."""
    states: list[dict[str, Array]] = [{} for _ in groups]
    for key, array in arrays.items():
        index, _, name = key.partition(".")
        states[int(index)][name] = array
    pairs = zip(groups, states, strict=True)
    return {group: HistogramObserver.from_state(state, name=group[0]) for group, state in pairs}


def activation_encodings(placement: Placement, observers: Observers) -> dict[str, Encoding]:
    """The grid of every activation: fixed by the placement, or over the range of its group's observer."""
    found = dict(placement.fixed)
    for group in observed_groups(placement):
        scheme = placement.activations[group[0]]
        covered = not set(group).isdisjoint(placement.covered)
        encoding = covering(observers[group], scheme) if covered else observers[group].encoding(scheme)
        found.update(dict.fromkeys(group, encoding))
    found.update({name: found[last] for name, last in placement.follows.items()})
    return found


def covering(observer: HistogramObserver, scheme: TensorScheme) -> Encoding:
    """The grid of what a Softmax gives: from 0 to 2^-k, the finest that ends a quarter beyond what was seen, if not
    beyond 1.

    Rows of n scores that are much alike give 1 / n each, for which the steps of [0, 1] are too large; but what is seen
    of probabilities is no bound of theirs. What has other values on its grid has that of its observer.
    """
    low, high = observer.range(replace(scheme, observer="minmax"))
    if low < 0.0 or high > 1.0 + 1e-3:
        return observer.encoding(scheme)
    end = min(0.0, math.ceil(math.log2(1.25 * high))) if high > 0.0 else 0.0
    qmin, _ = code_bounds(scheme.bitwidth, scheme.signed)
    step = np.asarray(2.0 ** (end - scheme.bitwidth), np.float32)
    return Encoding(scheme.bitwidth, scheme.signed, False, step, np.asarray(qmin, np.int32))


def weight_encodings(model: Network, placement: Placement) -> dict[str, Encoding]:
    """The grid of every weight by its observer; a frozen encoding that the model has is kept."""
    found = {}
    for name, (scheme, axis) in placement.weights.items():
        old = model.encodings.get(name)
        found[name] = old if old and old.frozen else weight_encoding(model.param(name), scheme, axis, name)
    return found


def constant_encodings(model: Network, placement: Placement) -> dict[str, Encoding]:
    """The grid of every constant that an activation meets, over its own range."""
    return {
        name: weight_encoding(model.param(name), scheme, 0, name) for name, scheme in placement.constants.items()
    }


def frozen_weights(model: Network) -> dict[str, Encoding]:
    """The grids of weights that stay, whatever a placement says: of tuned ones, and of those that came with a model."""
    return {name: e for name, e in sorted(model.encodings.items()) if e.frozen and name in model.params}


def all_encodings(model: Network, placement: Placement, observers: Observers) -> dict[str, Encoding]:
    """The grid of every tensor that the placement names, and of every weight whose grid stays."""
    found = {**activation_encodings(placement, observers), **constant_encodings(model, placement)}
    return {**found, **frozen_weights(model), **weight_encodings(model, placement)}


def content(model: Network) -> list[Any]:
    """What the float model computes, as values that can be hashed: its graph and tensors, no encodings."""
    meta, blobs = type(model)(model.ir).pack()
    return [meta, {name: np.frombuffer(blob, np.uint8) for name, blob in sorted(blobs.items())}]
