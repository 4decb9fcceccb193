"""x and x^, what the float model and the quantized one so far make of the data, carried from part to part.

Each track holds, for all samples, the values that a later part still reads: before any quantizer, which belongs to
whoever reads them. A value is brought up from those that are held by running what lies between once; what no later part
needs is dropped. So a whole walk costs about one forward pass of each model, and memory is that of the widest cut.

How samples lie in a value is found by running: two units (a unit is one sample, or a batch whose size the file fixed)
alone and together. Where they lie along one axis, units are stacked; where a value is the same for both it has no
samples; anything else is run one unit at a time. In files (`disk`) or in memory: the same numbers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qpipe.errors import InputError
from qpipe.methods.learning.parts import Part, behind, boundary
from qpipe.model.network.parts import block
from qpipe.model.simulation.constants import array_of, host_values, taken_in
from qpipe.model.simulation.module import to_torch
from qpipe.model.simulation.samples import batch_axes, batches, by_sample, sample_count

if TYPE_CHECKING:
    from qpipe.model.network.network import Network

Array = npt.NDArray[Any]
Memory = Literal["auto", "ram", "disk"]
TOGETHER = 32
"""Units that run at once. Fixed, so that results do not depend on a setting."""
PROJECTIONS = 8
"""Random directions of the outputs from which a sensitivity is estimated."""
LARGE = 1 << 30
"""Bytes of a value beyond which `auto` keeps it in a file."""
_ALIKE = 1e-3


@dataclass(frozen=True)
class Layout:
    """Where units lie in a value that holds several: along `axis`, of which each has a run of neighbours, or every
    `n`-th place where they are `interleaved`; `axis` None: the value has no units, it is one for all."""

    axis: int | None
    interleaved: bool = False

    def joined(self, rows: Tensor) -> Tensor:
        """(b, *shape of one) -> as a module takes b units together."""
        if self.axis is None:
            return rows[0]
        place = self.axis + 1 if self.interleaved else self.axis
        return rows.movedim(0, place).flatten(self.axis, self.axis + 1)

    def parted(self, value: Tensor, count: int) -> Tensor:
        """The inverse of `joined`, for `count` units."""
        if self.axis is None:
            return value[None]
        sizes = (-1, count) if self.interleaved else (count, -1)
        place = self.axis + 1 if self.interleaved else self.axis
        shape = (*value.shape[: self.axis], *sizes, *value.shape[self.axis + 1 :])
        return value.reshape(shape).movedim(place, 0)


@dataclass(frozen=True, eq=False)
class Held:
    """A value over all units: `rows` (n, *shape of one), or (1, …) where it is one for all. `layout` None: units go
    one at a time."""

    rows: Array
    layout: Layout | None

    @property
    def shared(self) -> bool:
        """Whether all units have the same."""
        return self.layout is not None and self.layout.axis is None

    def among(self, units: Array) -> Held:
        """The same value of some units."""
        return self if self.shared else Held(self.rows[units], self.layout)

    def of(self, index: Array) -> Any:
        """The rows of these units, on the CPU; text as an array."""
        rows = self.rows if self.shared else self.rows[index]
        return taken_in(rows, "cpu")


def feed(values: Sequence[Held], index: Array, device: str = "cpu", alone: bool = False) -> list[tuple[Any, ...]]:
    """What a module is called with for the units `index`: one call where all can go together, else, or where they are
    to go `alone`, one for each."""
    if not alone and all(value.layout is not None for value in values):
        return [tuple(_on(value.layout.joined(value.of(index)), device) for value in values if value.layout)]
    return [
        tuple(_on(value.of(np.array([i]))[0], device) for value in values)  # as a module takes one unit
        for i in index
    ]


def _on(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


class Track:
    """One model over all units; `held` are the values that are there, by name."""

    def __init__(self, model: Network, quantized: bool, units: int, held: Mapping[str, Held], store: Store) -> None:
        self.model, self.quantized, self.units = model, quantized, units
        self.held = dict(held)
        self._store = store

    def with_model(self, model: Network, units: Array | None = None) -> Track:
        """A track of its own for `model`, from where this one stands, of all units or of some."""
        if units is None:
            return Track(model, self.quantized, self.units, self.held, self._store)
        held = {name: value.among(units) for name, value in self.held.items()}
        return Track(model, self.quantized, len(units), held, self._store)

    def bring(self, names: Sequence[str], layouts: Callable[[str], Layout | None] | None = None) -> None:
        """Computes the values `names`, in this order, where they are not held. `layouts` says how units lie in them;
        without, it is found out."""
        for name in names:
            if name not in self.held:
                inputs = boundary(self.model.graph, name, self.held, host_values(self.model.graph))
                self.bring(inputs, layouts)  # those that are asked for their shape alone may be gone
                self.held[name] = self._computed(name, inputs, layouts)

    def keep(self, names: Collection[str], stops: Collection[str]) -> None:
        """Drops what nothing in `names` follows from, `stops` being what will be held before."""
        graph, host = self.model.graph, host_values(self.model.graph)
        known = {*self.held, *stops}
        needed = {value for name in names for value in behind(graph, name, known, host)}
        self.held = {name: value for name, value in self.held.items() if name in needed}

    def _computed(
        self, name: str, inputs: Sequence[str], layouts: Callable[[str], Layout | None] | None
    ) -> Held:
        given = [self.held[each] for each in inputs]
        run = _run(self._module(inputs, name), given, self._store.device)
        layout = layouts(name) if layouts is not None else _layout(run, given, self.units)
        if layout is not None and layout.axis is None:
            return Held(array_of(run(np.arange(1))[0])[None], layout)
        step = 1 if layout is None or any(value.layout is None for value in given) else TOGETHER
        keeper = None
        for start in range(0, self.units, step):
            index = np.arange(start, min(start + step, self.units))
            value = run(index)[0]
            rows = array_of((value[None] if layout is None else layout.parted(value, len(index))).contiguous())
            if keeper is None:
                keeper = self._store.room((self.units, *rows.shape[1:]), rows.dtype)
            _refuse_ragged(name, rows, keeper)
            keeper[index] = rows
        assert keeper is not None
        keeper.flags.writeable = False
        return Held(keeper, layout)

    def _module(self, inputs: Sequence[str], name: str) -> torch.nn.Module:
        part = block(self.model, inputs, [name])
        encodings = {key: e for key, e in part.encodings.items() if key != name}  # its reader quantizes it
        part = part.with_encodings(encodings)
        return to_torch(part, quantized=self.quantized, device=self._store.device, shared=True)


def _refuse_ragged(name: str, rows: Array, others: Array) -> None:
    if rows.shape[1:] != others.shape[1:]:
        raise InputError(
            f"The value '{name}' has another shape for other samples ({list(rows.shape[1:])} and "
            f"{list(others.shape[1:])}), so what reads it cannot be learned on many. Name the blocks to learn with "
            "`blocks`."
        )


def _run(module: torch.nn.Module, given: Sequence[Held], device: str) -> Callable[..., list[Tensor]]:
    def run(index: Array, together: bool = True) -> list[Tensor]:
        with torch.no_grad():
            if not together:
                return [module(*feed(given, np.array([i]), device)[0]).cpu() for i in index]
            return [module(*call).cpu() for call in feed(given, index, device)]

    return run


def _layout(run: Callable[..., list[Tensor]], given: Sequence[Held], units: int) -> Layout | None:
    """How units lie in what `run` gives, from the first and the last alone and together."""
    if all(value.shared for value in given):
        return Layout(None)
    if units == 1 or any(value.layout is None for value in given):
        return None
    ends = np.array([0, units - 1])
    first, last = run(ends, together=False)
    try:
        (both,) = run(ends)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return None  # a size that the graph has written down
    return layout_of(first, last, both)


def layout_of(first: Tensor, last: Tensor, both: Tensor) -> Layout | None:
    """How two units lie in `both`, given each alone; None where they do not lie along one axis."""
    if first.shape != last.shape or first.ndim != both.ndim:
        return None
    axes = [axis for axis in range(both.ndim) if both.shape[axis] != first.shape[axis]]
    if not axes and _alike(first, both) and _alike(last, both):
        return Layout(None)
    if len(axes) != 1 or both.shape[axes[0]] != 2 * first.shape[axes[0]]:
        return None
    for interleaved in (False, True):
        layout = Layout(axes[0], interleaved)
        if _alike(layout.joined(torch.stack([first, last])), both):
            return layout
    return None


def _alike(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    largest = float(b[b.isfinite()].abs().max()) if b.isfinite().any() else 0.0
    return torch.allclose(a.double(), b.double(), rtol=_ALIKE, atol=_ALIKE * largest, equal_nan=True)


@dataclass(frozen=True)
class Store:
    """Where values of all units lie: in memory, or in files without a name."""

    memory: Memory = "auto"
    device: str = "cpu"

    def room(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An array to be filled."""
        size = int(np.prod(shape)) * dtype.itemsize
        if self.memory == "ram" or (self.memory == "auto" and size <= LARGE) or not size:
            return np.empty(shape, dtype)
        with tempfile.TemporaryFile(prefix="qpipe-") as file:
            return np.asarray(np.memmap(file, dtype, "w+", shape=shape))


class Carry:
    """Both tracks in front of a part."""

    def __init__(
        self,
        model: Network,
        reference: Network,
        arrays: Mapping[str, Array],
        parts: Sequence[Part],
        *,
        memory: Memory = "auto",
        device: str = "cpu",
        also: Sequence[str] = (),
    ) -> None:
        """`also` are values that are needed at the end. Raises InputError for data that do not fit."""
        store = self._store = Store(memory, device)
        held, units = _taken(model, arrays, store)
        self.float = Track(reference, False, units, held, store)
        self.quantized = Track(model, True, units, held, store)
        self.units, self.device = units, device
        self._axes, self._count = batch_axes(model), sample_count(model, arrays)
        self._fed = self._axes.size or 1
        self._parts, self._also = list(parts), tuple(also)

    def watch_outputs(self) -> list[str]:
        """The outputs of the float model that are numbers of one shape for all units; they are held until the end."""
        found = []
        for spec in self.float.model.outputs:
            try:
                self.float.bring([spec.name] if spec.floating else [])
            except InputError:  # as many boxes as there are
                continue
            if spec.floating and not self.float.held[spec.name].shared:
                found.append(spec.name)
        self._also = (*self._also, *found)
        return found

    def before(self, part: Part) -> tuple[list[Held], list[Held], Held]:
        """x^, x, and y, the float model's output of `part`; the values of the parts that are over are let go."""
        self.float.bring([*part.inputs, part.output])
        self.quantized.bring(part.inputs, self._layout)
        x_hat, x = ([track.held[name] for name in part.inputs] for track in (self.quantized, self.float))
        return x_hat, x, self.float.held[part.output]

    def after(self, part: Part, model: Network | None) -> None:
        """Goes on behind `part`, which is as `model` has it from now on; None: the quantized track stays as it is."""
        if model is not None:
            self.quantized.model = model
        self.quantized.bring([part.output], self._layout)
        self._parts.remove(part)
        needed = [*self._also, *(name for later in self._parts for name in later.inputs)]
        stops = [*(later.output for later in self._parts)]
        for track in (self.float, self.quantized):
            track.keep(needed, stops)

    def inside(self, name: str, model: Network) -> tuple[Held, Held]:
        """x^ and x of a value inside the part that comes next; x^ as `model` gives it."""
        self.float.bring([name])
        ahead = self.quantized.with_model(model)
        ahead.bring([name], self._layout)
        return ahead.held[name], self.float.held[name]

    def outputs(self, part: Part, model: Network, names: Sequence[str], units: Array) -> dict[str, Array]:
        """The outputs `names` of these units, (units, *shape of one) each: what the float model makes of what `part`
        gives as it is in `model`. So only this part, and those before it, count."""
        ahead = self.quantized.with_model(model, units)
        ahead.bring([part.output], self._layout)
        rest = Track(self.float.model, False, len(units), ahead.held, self._store)
        rest.bring(names, self._layout)
        return {name: rest.held[name].rows for name in names}

    def float_outputs(self, names: Sequence[str], units: Array) -> dict[str, Array]:
        """The same of the float model."""
        self.float.bring(names)
        return {name: self.float.held[name].among(units).rows for name in names}

    def samples(self, units: Array) -> Array:
        """Which samples of the data these units hold, in order: what fills up a batch of a fixed size is left out."""
        places = np.asarray(units)[:, None] * self._fed + np.arange(self._fed)
        return np.asarray(places[places < self._count])

    def by_sample(self, outputs: Mapping[str, Array], units: Array) -> dict[str, Array]:
        """Outputs by unit as outputs by sample, (samples, ...) each. Raises InputError for one that does not tell
        samples apart."""
        names = [spec.name for spec in self.float.model.outputs]
        counts = np.minimum(self._fed, self._count - np.asarray(units) * self._fed)
        found = {}
        for name, rows in outputs.items():
            axis, parts = self._axes.outputs[names.index(name)], []
            for row, count in zip(rows, counts, strict=True):
                part = by_sample(row, axis, self._fed)
                if part is None:
                    raise InputError(f"The output '{name}' does not tell its samples apart, so that it has no score.")
                parts.append(part[:count])
            found[name] = np.concatenate(parts)
        return found

    def sensitivity(self, name: str, outputs: Sequence[str], seed: int) -> Held:
        """g over all units, of the shape of the float value `name`: the root of the diagonal of J^T J, J the derivative
        of the model's outputs in it, as the mean of `PROJECTIONS` random projections estimates it; mean square 1."""
        return _sensitivity(self.float, name, outputs, seed, self.device)

    def _layout(self, name: str) -> Layout | None:
        self.float.bring([name])
        return self.float.held[name].layout


def _sensitivity(track: Track, name: str, outputs: Sequence[str], seed: int, device: str) -> Held:
    graph, y = track.model.graph, track.held[name]
    host = host_values(graph)
    behind_it = {out: boundary(graph, out, track.held, host) for out in outputs if out != name}
    behind_it = {out: inputs for out, inputs in behind_it.items() if name in inputs}
    own = float(name in outputs)  # an output's derivative in itself is 1
    if not behind_it:
        return Held(np.ones_like(y.rows), y.layout)
    inputs = tuple(dict.fromkeys(each for found in behind_it.values() for each in found))
    track.bring(inputs)
    module = to_torch(block(track.model, inputs, list(behind_it)), quantized=False, device=device)
    given = [track.held[each] for each in inputs]
    alone = any(value.layout is None for value in (*given, y))
    draw = torch.Generator().manual_seed(seed)
    rows = np.empty(y.rows.shape, np.float32)
    for start in range(0, track.units, 1 if alone else TOGETHER):
        index = np.arange(start, min(start + (1 if alone else TOGETHER), track.units))
        (call,) = feed(given, index, device, alone)
        found = _squared_gradient(module, call, inputs.index(name), draw).cpu()
        rows[index] = array_of(found[None] if alone or y.layout is None else y.layout.parted(found, len(index)))
    rows += own
    g = np.sqrt(rows)
    return Held(np.asarray(g / max(float(np.sqrt(np.mean(rows))), 1e-30), np.float32), y.layout)


def _squared_gradient(module: torch.nn.Module, call: tuple[Any, ...], place: int, draw: torch.Generator) -> Tensor:
    value = call[place].detach().requires_grad_()
    found = module(*call[:place], value, *call[place + 1 :])
    outputs = [o for o in (found if isinstance(found, tuple) else (found,)) if o.requires_grad]
    if not outputs:
        raise InputError("fisher_diag: torch cannot differentiate what lies behind a part. Set loss: mse.")
    total = torch.zeros_like(value)
    for turn in range(PROJECTIONS):
        drawn = [torch.randn(o.shape, generator=draw).to(o.device) for o in outputs]
        (g,) = torch.autograd.grad(outputs, value, drawn, retain_graph=turn + 1 < PROJECTIONS)
        total += g.square()
    return total / PROJECTIONS


def _taken(model: Network, arrays: Mapping[str, Array], store: Store) -> tuple[dict[str, Held], int]:
    """The inputs of the graph over all units, as values that are held."""
    axes = batch_axes(model)
    found = [batch.arrays for batch in batches(model, arrays, 1)]
    held = {}
    for place, spec in enumerate(model.inputs):
        rows = np.stack([batch[place] for batch in found])
        axis = axes.inputs[place]
        same = axis is None and bool((rows == rows[:1]).all())
        layout = Layout(axis) if axis is not None else (Layout(None) if same else None)
        held[spec.name] = Held(rows[:1] if same else rows, layout)
    return held, len(found)
