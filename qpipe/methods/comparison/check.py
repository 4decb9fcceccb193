"""Whether an import kept what the source computes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qpipe.errors import InputError
from qpipe.mapped import let_go, passing_over
from qpipe.methods.comparison.compare import OWN, first_line, largest_error, relative_error
from qpipe.methods.comparison.inputs import trial_inputs
from qpipe.model.qdq.nodes import computes_codes
from qpipe.model.runtime.session import make_session
from qpipe.model.simulation.module import See, to_torch, watched

if TYPE_CHECKING:
    import onnxruntime
    from torch import Tensor

    from qpipe.model.network.facts import Library
    from qpipe.model.network.network import Network
    from qpipe.model.runtime.options import Mode

Array = npt.NDArray[Any]
TOLERANCE = 1e-4
"""The largest relative error that float arithmetic leaves, usually, between the source and its canonical form."""
WRONG = 1e-2
"""An error above which something else than rounding is at work, usually."""
QUANTIZED_TOLERANCE = 0.05
"""`TOLERANCE` for a model that computes with codes: one that rounds the other way moves what follows by some steps."""

_PASSING_BYTES = 1 << 26
"""Weights that the torch module has looked at before their pages are let go of."""


@dataclass(frozen=True)
class ImportCheck:
    """What three runs of one model gave: its source in onnxruntime, its import there, and its import in torch.

    `onnxruntime` and `torch` are the largest relative errors of the import's outputs, `own` how far the source's
    outputs lie apart without onnxruntime's optimizations and with all of them (0 where nobody had to ask). Where the
    source ran on nothing, `inputs` are None and `reason` says what onnxruntime said. `first_difference` is the first
    node in the graph's order whose value differs: `{"node", "op_type", "value", "error"}`.
    """

    onnxruntime: float = 0.0
    torch: float = 0.0
    own: float = 0.0
    tolerance: float = TOLERANCE
    quantized_tolerance: float = TOLERANCE
    first_difference: Mapping[str, Any] | None = None
    inputs: Mapping[str, Array] | None = None
    reason: str = ""

    @property
    def error(self) -> float:
        """The larger of the two errors."""
        return max(self.onnxruntime, self.torch)

    @property
    def equal(self) -> bool:
        """Whether the import computes what its source does, as far as float arithmetic can tell."""
        own = OWN * self.own
        return self.onnxruntime <= max(self.quantized_tolerance, own) and self.torch <= max(self.tolerance, own)

    @property
    def bar(self) -> float:
        """The error above which the import is wrong, whatever rounding may do: `WRONG`, more where rounding is more."""
        return max(WRONG, self.quantized_tolerance, OWN * self.own)


def verify_import(
    model: Network,
    source: str | Path | bytes,
    seed: int = 0,
    batch: int = 2,
    arrays: Mapping[str, Array] | None = None,
    given: Mapping[str, Array] | None = None,
) -> ImportCheck:
    """Compare what three runs compute from the same inputs: `source` (an ONNX file or its bytes) in onnxruntime,
    `model` in onnxruntime, and `to_torch(model, quantized=False)`.

    The inputs are the first of the samples `arrays`, or made up: the first on which all three run. `given` are those
    of the source's inputs that are constants of the import. A model in QDQ form is compared as it is in onnxruntime; in
    torch, the float model that it was made from. Raises InputError where onnxruntime cannot open the source, for
    samples that do not fit, and where torch runs on nothing that the source runs on."""
    tries, failed = ({**fed, **(given or {})} for fed in trial_inputs(model, arrays, seed, batch)), ""
    while True:
        try:
            inputs, wanted = _run_source(source, tries, model.facts.custom_ops)
        except _NothingRunsError as nothing:
            if failed:
                raise InputError(f"The import runs on nothing that its source runs on: {failed}") from nothing
            if arrays is not None:
                raise InputError(f"onnxruntime cannot run the model on the samples: {nothing}") from nothing
            return ImportCheck(reason=str(nothing))
        try:
            found, floats = _run_import(model, inputs, source)
            computed = _run_torch(model, inputs)
        except Exception as error:  # made up in a size that nobody feeds it, perhaps
            failed = first_line(error)
            continue
        return _compared(model, source, inputs, [(wanted, found), (floats or wanted, computed)])


class _NothingRunsError(Exception):
    """What onnxruntime said of the last inputs."""


def _compared(
    model: Network,
    source: str | Path | bytes,
    inputs: dict[str, Array],
    pairs: Sequence[tuple[list[Array], list[Array]]],
) -> ImportCheck:
    e1, e2 = (largest_error(wanted, found) for wanted, found in pairs)
    tolerance = QUANTIZED_TOLERANCE if any(map(computes_codes, model.graph)) else _rounding(model)
    check = ImportCheck(
        e1,
        e2,
        tolerance=tolerance,
        quantized_tolerance=QUANTIZED_TOLERANCE if model.encodings else tolerance,
        inputs=inputs,
    )
    if check.equal:
        return check
    first = first_difference(model, inputs) if e2 > tolerance else None
    own = max(_own_error(source, inputs, model.facts.custom_ops), _rounding_error(model, inputs, computed=pairs[1][1]))
    return replace(check, own=own, first_difference=first)


def first_difference(model: Network, inputs: Mapping[str, Array]) -> dict[str, Any] | None:
    """The first node whose value in torch is off from that in onnxruntime, given the same inputs."""
    names = [str(output.name) for node in model.graph for output in node.outputs[:1]]
    session = make_session(model, quantized=False, outputs=names)
    fed = {spec.name: inputs[spec.name] for spec in model.inputs}
    wanted = dict(zip(names, session.run(None, fed), strict=True))
    found = _torch_values(model, inputs)
    for node in model.graph:
        name = str(node.outputs[0].name)
        error = relative_error(np.asarray(wanted[name]), found[name]) if name in found else 0.0
        if error > TOLERANCE:
            return {"node": node.name, "op_type": node.op_type, "value": name, "error": error}
    return None


def _run_source(
    source: str | Path | bytes, tries: Iterator[dict[str, Array]], custom_ops: tuple[Library, ...]
) -> tuple[dict[str, Array], list[Array]]:
    """The next inputs that the source runs on and gives something for, and what it gives."""
    session = _source_session(source, custom_ops)
    said = "no inputs of such a size are made up"
    for inputs in tries:
        try:
            outputs = _run_in_passing(session, _fed(session, inputs), source)
        except Exception as error:  # onnxruntime's errors have no common type
            said = first_line(error)
            continue
        if all(output.size for output in outputs):
            return inputs, outputs
        said = "an output is empty"
    raise _NothingRunsError(said)


def _rounding(model: Network) -> float:
    """`TOLERANCE`, or what the narrowest type of an output can hold: a model in float16 rounds all its values to it."""
    finfo: Any = ml_dtypes.finfo
    steps = (float(finfo(spec.dtype).eps) for spec in model.outputs if spec.floating)
    return max(TOLERANCE, OWN * max(steps, default=0.0))


def _source_session(
    source: str | Path | bytes, custom_ops: tuple[Library, ...], mode: Mode = "reference"
) -> onnxruntime.InferenceSession:
    import onnxruntime

    from qpipe.model.runtime.options import session_options, set_lean

    options = session_options(mode, custom_ops=custom_ops)
    set_lean(options)
    given = source if isinstance(source, bytes) else str(source)
    try:
        return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common type
        raise InputError(f"onnxruntime cannot run the model as it is: {first_line(error)}") from error


def _own_error(source: str | Path | bytes, inputs: Mapping[str, Array], custom_ops: tuple[Library, ...]) -> float:
    """How far the source's outputs lie apart without optimizations and with all of them."""
    sessions = [_source_session(source, custom_ops, mode) for mode in ("plain", "deploy")]
    return largest_error(*(_run_in_passing(session, _fed(session, inputs), source) for session in sessions))


def _rounding_error(model: Network, inputs: Mapping[str, Array], computed: list[Array]) -> float:
    """How far what torch computed in float32 lies from the same in float64; 0 where torch has no answer in it."""
    try:
        exact = _run_torch(model, inputs, double=True)
    except Exception:  # a node that is float32 by definition, beside one that now is not
        return 0.0
    error = largest_error(exact, computed)
    return error if math.isfinite(error) else 0.0


def _fed(session: onnxruntime.InferenceSession, inputs: Mapping[str, Array]) -> dict[str, Array]:
    return {item.name: _as_type(inputs[item.name], item.type) for item in session.get_inputs()}


def _run_import(
    model: Network, inputs: dict[str, Array], source: str | Path | bytes
) -> tuple[list[Array], list[Array]]:
    """What the import computes in onnxruntime, and for a quantized model what it computes in float."""
    fed = {spec.name: inputs[spec.name] for spec in model.inputs}
    if not model.encodings:
        return _run_in_passing(make_session(model, quantized=False, lean=True), fed, source), []
    quantized, floats = (make_session(model, quantized=each).run(None, fed) for each in (True, False))
    return quantized, floats


def _run_in_passing(
    session: onnxruntime.InferenceSession, feeds: dict[str, Array], source: str | Path | bytes
) -> list[Array]:
    """What the session computes; the weights that it mapped from beside `source` do not stay in memory."""
    with contextlib.nullcontext() if isinstance(source, bytes) else passing_over(Path(source).parent):
        return [np.asarray(array) for array in session.run(None, feeds)]


def _as_type(array: Array, declared: str) -> Array:
    """`array` in the source's own float type, where the import converted it."""
    types = {"tensor(float16)": np.float16, "tensor(bfloat16)": ml_dtypes.bfloat16, "tensor(double)": np.float64}
    return array.astype(types[declared]) if declared in types else array


def _run_torch(model: Network, inputs: Mapping[str, Array], double: bool = False) -> list[Array]:
    """What the torch module computes, in float32 or in float64. The pages of weights are let go of every so often: each
    is looked at once."""
    weights, used = dict(model.params), 0

    def pass_over(name: str, value: Tensor) -> None:
        nonlocal used
        if name in weights:
            used += value.nbytes
        elif used > _PASSING_BYTES:
            used = 0
            for array in weights.values():
                let_go(array)

    return [np.asarray(tensor.numpy()) for tensor in _watched(model, inputs, pass_over, double)]


def _torch_values(model: Network, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Every value as the torch module computes it, by its name."""
    values: dict[str, Array] = {}

    def keep(name: str, value: Tensor) -> None:
        values[name] = value.numpy()

    _watched(model, inputs, keep)
    return values


def _watched(model: Network, inputs: Mapping[str, Array], see: See, double: bool = False) -> tuple[Tensor, ...]:
    module = to_torch(model, quantized=False, shared=not double)
    arrays = [inputs[spec.name] for spec in model.inputs]
    if double:
        arrays = [array.astype(np.float64) if array.dtype == np.float32 else array for array in arrays]
    return watched(module.double() if double else module, arrays, see)
