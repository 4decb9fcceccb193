"""Whether an import kept what the source computes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qpipe.errors import InputError
from qpipe.mapped import let_go, passing_over
from qpipe.methods.comparison.compare import random_inputs, relative_error
from qpipe.model.qdq.nodes import computes_codes
from qpipe.model.runtime.session import make_session
from qpipe.model.simulation.module import to_torch
from qpipe.model.simulation.watching import See, watched

if TYPE_CHECKING:
    import onnxruntime
    from torch import Tensor

    from qpipe.model.network.network import Network

Array = npt.NDArray[Any]
TOLERANCE = 1e-4
"""The largest relative error of float arithmetic that may lie between the source and its canonical form."""
QUANTIZED_TOLERANCE = 0.05
"""The same for a model that computes with codes: one that rounds the other way moves what follows by some steps."""

_PASSING_BYTES = 1 << 26
"""Weights that the torch module has looked at before their pages are let go of."""


def verify_import(
    model: Network, source: str | Path | bytes, seed: int = 0, batch: int = 2
) -> dict[str, Any]:
    """Compare what three runs compute from the same random inputs: `source` (an ONNX file or its bytes) in
    onnxruntime, `model` in onnxruntime, and `to_torch(model, quantized=False)`.

    `{"onnxruntime": e1, "torch": e2, "tolerance": …, "equal": …, "first_difference": None or {…}}`: the
    errors are the largest over the outputs of max |a - b| / max |a|. Where torch is off, `first_difference`
    is the first node in the graph's order whose value differs: `{"node", "op_type", "value", "error"}`. A model
    in QDQ form is compared as it is in onnxruntime; in torch, the float model that it was made from."""
    inputs = random_inputs(model, seed, batch)
    wanted = _run_source(source, inputs)
    found = make_session(model).run(None, inputs) if model.encodings else _run_lean(model, inputs, source)
    e1 = max(map(relative_error, wanted, found), default=0.0)
    floats = make_session(model, quantized=False).run(None, inputs) if model.encodings else wanted
    e2 = max(map(relative_error, floats, _run_torch(model, inputs)), default=0.0)
    float_tolerance = QUANTIZED_TOLERANCE if any(map(computes_codes, model.graph)) else TOLERANCE
    equal = e1 <= (QUANTIZED_TOLERANCE if model.encodings else float_tolerance) and e2 <= float_tolerance
    return {
        "onnxruntime": e1,
        "torch": e2,
        "tolerance": float_tolerance,
        "equal": equal,
        "first_difference": None if e2 <= float_tolerance else first_difference(model, inputs),
    }


def first_difference(model: Network, inputs: Mapping[str, Array]) -> dict[str, Any] | None:
    """The first node whose value in torch is off from that in onnxruntime, given the same inputs."""
    names = [str(output.name) for node in model.graph for output in node.outputs[:1]]
    session = make_session(model, quantized=False, outputs=names)
    wanted = dict(zip(names, session.run(None, dict(inputs)), strict=True))
    found = _torch_values(model, inputs)
    for node in model.graph:
        name = str(node.outputs[0].name)
        error = relative_error(np.asarray(wanted[name]), found[name]) if name in found else 0.0
        if error > TOLERANCE:
            return {"node": node.name, "op_type": node.op_type, "value": name, "error": error}
    return None


def _run_source(source: str | Path | bytes, inputs: Mapping[str, Array]) -> list[Array]:
    import onnxruntime

    from qpipe.model.runtime.options import session_options, set_lean

    options = session_options()
    set_lean(options)
    given = source if isinstance(source, bytes) else str(source)
    try:
        session = onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
        feeds = {item.name: _as_type(inputs[item.name], item.type) for item in session.get_inputs()}
        return _run_in_passing(session, feeds, source)
    except Exception as error:  # onnxruntime's errors have no common type
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"onnxruntime cannot run the model as it is: {first}") from error


def _run_lean(model: Network, inputs: Mapping[str, Array], source: str | Path | bytes) -> list[Array]:
    session = make_session(model, quantized=False, lean=True)
    return _run_in_passing(session, dict(inputs), source)


def _run_in_passing(
    session: onnxruntime.InferenceSession, feeds: dict[str, Array], source: str | Path | bytes
) -> list[Array]:
    """What the session computes; the weights that it mapped from beside `source` do not stay in memory."""
    with contextlib.nullcontext() if isinstance(source, bytes) else passing_over(Path(source).parent):
        return [np.asarray(array) for array in session.run(None, feeds)]


def _as_type(array: Array, declared: str) -> Array:
    """`array` in the source's own float type, where the import converted it."""
    types = {"tensor(float16)": np.float16, "tensor(double)": np.float64}
    return array.astype(types[declared]) if declared in types else array


def _run_torch(model: Network, inputs: Mapping[str, Array]) -> list[Array]:
    """What the torch module computes. The pages of weights are let go of every so often: each is looked at once."""
    weights, used = dict(model.params), 0

    def pass_over(name: str, value: Tensor) -> None:
        nonlocal used
        if name in weights:
            used += value.nbytes
        elif used > _PASSING_BYTES:
            used = 0
            for array in weights.values():
                let_go(array)

    return [np.asarray(tensor.numpy()) for tensor in _watched(model, inputs, pass_over)]


def _torch_values(model: Network, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Every value as the torch module computes it, by its name."""
    values: dict[str, Array] = {}

    def keep(name: str, value: Tensor) -> None:
        values[name] = value.numpy()

    _watched(model, inputs, keep)
    return values


def _watched(model: Network, inputs: Mapping[str, Array], see: See) -> tuple[Tensor, ...]:
    module = to_torch(model, quantized=False, shared=True)
    return watched(module, [inputs[spec.name] for spec in model.inputs], see)
