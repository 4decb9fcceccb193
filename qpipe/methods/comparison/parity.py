"""Whether the simulation computes what is deployed: torch with fake-quantize against onnxruntime's QDQ graph.

    unit by unit    each quantized value is computed by both from the same inputs, those of the simulation;
    end to end      both run whole; every quantized value is compared, where one flipped rounding travels on.

Differences are counted in steps of the value's grid. Where two computations round differently though both are
right, the value before rounding lies next to the middle between two codes: how near is measured, and tells
this from a mistake. An integer kernel that scales its sums in float32, such as onnxruntime's QLinearAdd, is
off by 1e-5 steps at 8 bits; the sum of a convolution in float32, another order of which is as good, by up to
0.05 steps at 16 bits.

Unit by unit onnxruntime runs one graph in which every quantized value has been cut: what reads it reads an input
of the graph instead, so that one session, with all optimizations, runs all units side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qpipe.errors import InputError
from qpipe.model.runtime.session import make_session
from qpipe.model.simulation.constants import output_of
from qpipe.model.simulation.module import to_torch, watched

if TYPE_CHECKING:
    from torch import Tensor

    from qpipe.model.network.network import Network

Array = npt.NDArray[Any]
LIMIT = 0.999
"""The share of a unit's values of 8 bits that has to agree exactly; none may be more than one step away."""
TIE = 1e-3
"""In steps: nearer to the middle between two codes than this, no float32 arithmetic of 8 bits decides."""
FLOAT = 1e-4
"""The share of its largest value by which an output may differ where no activation is rounded."""


@dataclass(frozen=True)
class Steps:
    """How far apart two computations of one quantized value are, in steps of its grid.

    `op_types` are those of the nodes between the quantizers in front and this one; `counts` are the numbers
    of elements that differ by 0, 1, 2 and more steps. Of those that differ, `tie_distance` says how far, at
    most, the simulation's value was from the middle between two codes before it was rounded, in steps; None
    where none differs, or the inputs were not the same.
    """

    value: str
    op_types: tuple[str, ...]
    bitwidth: int
    counts: tuple[int, int, int, int]
    largest: int
    tie_distance: float | None = None

    @property
    def elements(self) -> int:
        """How many elements were compared."""
        return sum(self.counts)

    @property
    def agree(self) -> bool:
        """Whether none is more than one step away and, up to 8 bits, at least 99.9 % are equal, or those that
        differ were within `TIE` of the middle between two codes: where one code holds much of a tensor, a
        single such value is more than 0.1 % of it.

        A step of 16 bits comes near the rounding of a float32 sum, whose order is free: there more may differ.
        """
        tied = self.tie_distance is not None and self.tie_distance <= TIE
        return self.largest <= 1 and (self.bitwidth > 8 or self.within(0) >= LIMIT or tied)

    def within(self, steps: int) -> float:
        """The share of elements at most 0, 1 or 2 steps apart; 1.0 where there are none."""
        return sum(self.counts[: steps + 1]) / self.elements if self.elements else 1.0

    def to_json(self) -> dict[str, Any]:
        """Everything above as a JSON value."""
        shares = {f"within_{n}": self.within(n) for n in range(3)}
        return {**asdict(self), "op_types": list(self.op_types), "counts": list(self.counts), **shares}


@dataclass(frozen=True)
class Output:
    """One output of the model, end to end: the largest difference and the largest deployed value, both absolute, and
    how well the directions agree.
    """

    name: str
    max_difference: float
    cosine: float
    largest: float = 0.0

    @property
    def agree(self) -> bool:
        """Whether it differs by no more than two computations in float32 do."""
        return self.max_difference <= FLOAT * self.largest


@dataclass(frozen=True)
class ParityReport:
    """`units` from equal inputs and `end_to_end`, both in the graph's order; `outputs` of the whole model."""

    units: tuple[Steps, ...]
    end_to_end: tuple[Steps, ...]
    outputs: tuple[Output, ...]
    samples: int

    @property
    def agree(self) -> bool:
        """Whether every unit agrees; end to end a flipped rounding may grow. Where weights alone are quantized nothing
        is flipped: there every output agrees."""
        return all(part.agree for part in self.units or self.outputs)

    @property
    def within_one(self) -> float:
        """The share of all elements, unit by unit, at most one step apart."""
        elements = sum(unit.elements for unit in self.units)
        return sum(unit.counts[0] + unit.counts[1] for unit in self.units) / elements if elements else 1.0

    @property
    def tie_distance(self) -> float | None:
        """The largest `tie_distance` of the units."""
        found = [unit.tie_distance for unit in self.units if unit.tie_distance is not None]
        return max(found, default=None)

    @property
    def first(self) -> str | None:
        """The first value in the graph's order that differs end to end; None where none does."""
        return next((tensor.value for tensor in self.end_to_end if tensor.largest > 0), None)

    @property
    def worst(self) -> str | None:
        """The unit with the largest difference, then the largest share that differs."""
        ranked = sorted(self.units, key=lambda unit: (-unit.largest, unit.within(0)))
        return ranked[0].value if ranked and ranked[0].largest > 0 else None

    def to_json(self) -> dict[str, Any]:
        """The whole report as a JSON value."""
        return {
            "agree": self.agree,
            "within_one": self.within_one,
            "first": self.first,
            "worst": self.worst,
            "tie_distance": self.tie_distance,
            "samples": self.samples,
            "units": [unit.to_json() for unit in self.units],
            "end_to_end": [tensor.to_json() for tensor in self.end_to_end],
            "outputs": [asdict(output) for output in self.outputs],
        }


def parity(
    model: Network, inputs: Mapping[str, Array], *, batch_size: int = 16, threads: int | None = None
) -> ParityReport:
    """Simulation and deployment of `model` compared over all samples of `inputs`.

    Memory is that of all quantized values of one batch, four times. Raises InputError for a model without
    encodings, or inputs that do not fit.
    """
    from qpipe.model.simulation.samples import batches

    _refuse_unfit(model)
    names = quantized_values(model)
    tally = _Tally(model, names)
    cut = make_session(_cut(model, names), mode="deploy", threads=threads) if names else None
    wanted = [*names, *(name for name in tally.outputs if name not in names)]
    deployed = make_session(model, mode="deploy", outputs=wanted, threads=threads)
    simulated = to_torch(model, shared=True)
    for batch in batches(model, inputs, batch_size):
        fed = {spec.name: array for spec, array in zip(model.inputs, batch.arrays, strict=True)}
        unrounded: dict[str, Array] = {}
        values = simulate(simulated, batch.arrays, set(wanted), unrounded)
        # The padding of the last batch of a fixed size repeats samples: comparing those again does no harm.
        if cut:
            unit_inputs = {**fed, **{given(name): values[name] for name in names}}
            tally.add_units(values, _run(cut, names, unit_inputs), unrounded)
        tally.add_whole(values, _run(deployed, wanted, fed))
        tally.samples += batch.count
    return tally.report()


def _refuse_unfit(model: Network) -> None:
    """Raises InputError for a model without encodings, and for one that cannot be written as QDQ."""
    from qpipe.model.qdq.writer import storage

    if not model.encodings:
        raise InputError("The model has no encodings, so there is nothing to compare. Calibrate it first.")
    for encoding in model.encodings.values():
        storage(encoding)


def quantized_values(model: Network) -> tuple[str, ...]:
    """The values with a grid that nodes produce, in the graph's order; not what nobody reads of a node's outputs."""
    produced = [
        output
        for node in model.graph
        for index, output in enumerate(node.outputs)
        if index == 0 or output.uses() or output.is_graph_output()
    ]
    return tuple(str(output.name) for output in produced if output.name in model.encodings)


def unit_op_types(model: Network, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """For each value the operators between the quantizers in front of it and its own, in order."""
    cuts, inside = set(names), dict[str, dict[str, str]]()
    found = {}
    for node in model.graph:
        before: dict[str, str] = {}
        for value in node.inputs:
            if value is not None and value.name not in cuts:
                before.update(inside.get(str(value.name), {}))
        before[str(node.name)] = node.op_type
        for output in node.outputs:
            inside[str(output.name)] = before
            if output.name in cuts:
                found[str(output.name)] = tuple(before.values())
    return found


def simulate(
    module: Any, arrays: tuple[Array, ...], names: set[str], unrounded: dict[str, Array] | None = None
) -> dict[str, Array]:
    """The values called `names` in one run of a module of `to_torch`, as their readers see them; `unrounded`
    takes what the quantizers among them got."""
    found: dict[str, Array] = {}

    def see(name: str, value: Tensor) -> None:
        if name in names:
            if unrounded is not None and name in found:
                unrounded[name] = found[name]
            found[name] = output_of(value)

    watched(module, arrays, see)
    return found


def given(name: str) -> str:
    """The input of the cut graph that stands for the value `name`."""
    return f"{name}__given"


def _cut(model: Network, names: tuple[str, ...]) -> Network:
    """`model` with an input in place of each value of `names` for those that read it."""
    import onnx_ir as ir

    editor = model.edit()
    outputs = set(editor.graph.outputs)
    produced = {str(output.name): output for node in editor.graph for output in node.outputs}
    for name in names:
        value = produced[name]
        entry = ir.Value(name=given(name), type=value.type, shape=value.shape)
        editor.graph.inputs.append(entry)
        for use in tuple(value.uses()):
            use.node.replace_input_with(use.idx, entry)
        if value not in outputs:
            editor.graph.outputs.append(value)
        editor.encodings[given(name)] = editor.encodings[name]
    return _with_encodings(editor)


def _with_encodings(editor: Any) -> Network:
    """The edited model; encodings of inputs that the edit added count."""
    encodings = dict(editor.encodings)
    editor.encodings = {}
    model: Network = editor.model().with_encodings(encodings)
    return model


def _run(session: Any, names: Any, fed: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    taken = {entry.name for entry in session.get_inputs()}
    arrays = {name: np.asarray(array, order="C") for name, array in fed.items() if name in taken}
    # Asked for nothing, a session returns everything.
    found = session.run(list(names), arrays) if names else []
    yield from zip(names, found, strict=True)


class _Count:
    """Counts the steps between two arrays of the value `name`, batch after batch."""

    def __init__(self, name: str, op_types: tuple[str, ...], model: Network) -> None:
        self.name, self.op_types = name, op_types
        self.scale = np.asarray(model.encodings[name].scale, np.float64)
        self.bitwidth = model.encodings[name].bitwidth
        self.counts, self.largest = np.zeros(4, np.int64), 0
        self.tie_distance: float | None = None

    def add(self, ours: Array, theirs: Array, unrounded: Array | None = None) -> None:
        """All of one shape; `unrounded` is ours before it was rounded."""
        steps = np.rint(np.abs(ours.astype(np.float64) - theirs) / self.scale)
        steps = np.where(np.isnan(steps), np.inf, steps).clip(0, 2**31)
        self.counts += np.bincount(np.minimum(steps, 3).astype(np.int64).reshape(-1), minlength=4)
        self.largest = max(self.largest, int(steps.max(initial=0)))
        if unrounded is not None and (apart := steps > 0).any():
            codes = unrounded[apart].astype(np.float64) / self.scale
            distance = float(np.abs(np.abs(codes - np.rint(codes)) - 0.5).max())
            self.tie_distance = max(distance, self.tie_distance or 0.0)

    def steps(self) -> Steps:
        """What was counted."""
        zero, one, two, more = (int(count) for count in self.counts)
        counts = (zero, one, two, more)
        return Steps(self.name, self.op_types, self.bitwidth, counts, self.largest, self.tie_distance)


class _Difference:
    """The largest difference and the cosine between two arrays, batch after batch."""

    def __init__(self, name: str) -> None:
        self.name, self.apart, self.largest = name, 0.0, 0.0
        self.products = np.zeros(3)

    def add(self, ours: Array, theirs: Array) -> None:
        """Both of one shape."""
        a, b = ours.astype(np.float64).reshape(-1), theirs.astype(np.float64).reshape(-1)
        self.apart = max(self.apart, float(np.abs(a - b).max(initial=0.0)))
        self.largest = max(self.largest, float(np.abs(b).max(initial=0.0)))
        self.products += np.array([a @ b, a @ a, b @ b])

    def output(self) -> Output:
        """What was found; two vectors of zeros point the same way."""
        dot, ours, theirs = self.products
        norm = float(np.sqrt(ours * theirs))
        return Output(self.name, self.apart, float(dot / norm) if norm else 1.0, self.largest)


class _Tally:
    """What has been counted over batches: of units, of quantized values end to end, and of the model's outputs."""

    def __init__(self, model: Network, names: tuple[str, ...]) -> None:
        op_types = unit_op_types(model, names)
        self.units = {name: _Count(name, op_types[name], model) for name in names}
        self.whole = {name: _Count(name, op_types[name], model) for name in names}
        self.outputs = {spec.name: _Difference(spec.name) for spec in model.outputs}
        self.samples = 0

    def add_units(
        self,
        values: Mapping[str, Array],
        deployed: Iterable[tuple[str, Array]],
        unrounded: Mapping[str, Array],
    ) -> None:
        """One batch of what the simulation and the deployed units computed from the same inputs."""
        for name, theirs in deployed:
            self.units[name].add(values[name], theirs, unrounded.get(name))

    def add_whole(self, values: Mapping[str, Array], deployed: Iterable[tuple[str, Array]]) -> None:
        """One batch of what both computed end to end."""
        for name, theirs in deployed:
            if name in self.whole:
                self.whole[name].add(values[name], theirs)
            if name in self.outputs:
                self.outputs[name].add(values[name], theirs)

    def report(self) -> ParityReport:
        """All that was counted."""
        return ParityReport(
            tuple(count.steps() for count in self.units.values()),
            tuple(count.steps() for count in self.whole.values()),
            tuple(difference.output() for difference in self.outputs.values()),
            self.samples,
        )
