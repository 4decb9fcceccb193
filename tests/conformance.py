"""ONNX's own backend cases through `Model.from_proto(case.model).to_torch()`, counted per operator.

    python -m tests.conformance            write docs/conformance.md
    python -m tests.conformance --list     every case that did not pass, with its reason

A case is *passed* when every output has the type, the shape and, within the case's own tolerance, the values
that the case asks for; *not supported* when the import refuses it by InputError; *failed* otherwise. Floats of
other widths are computed in float32, as `model.floats` documents: such inputs are converted on the way in, as
`model.run` does with a user's data, and what comes out is rounded to the type that the case asks for.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import numpy_helper

from qpipe.errors import InputError
from qpipe.model.model import Model
from qpipe.model.run import fitting

Array = npt.NDArray[Any]
Outcome = Literal["passed", "not supported", "failed"]
KINDS = ("node", "simple", "pytorch-operator", "pytorch-converted")
PAGE = Path(__file__).parents[1] / "docs" / "conformance.md"
HALF_PRECISION = {"float16": 1e-3, "bfloat16": 1e-2}
"""Slack where the case itself was computed in half precision: one rounding is 5e-4, or 4e-3, of the value."""
WIDTHS = frozenset({"float16", "bfloat16", "float64"})


@dataclass(frozen=True)
class Result:
    """What became of one case; `operator` is the one that it is about."""

    kind: str
    name: str
    operator: str
    outcome: Outcome
    reason: str = ""


def results(kinds: Iterable[str] = KINDS) -> list[Result]:
    """Every case of these kinds, run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.loader import load_model_tests

        cases = [(kind, case) for kind in kinds for case in load_model_tests(kind=kind)]
    protos = {case.name: _proto(case) for _, case in cases}
    found = []
    for kind, case in cases:
        outcome, reason = run(case, protos[case.name])
        found.append(Result(kind, case.name, _operator(case.name, protos), outcome, reason))
    return found


def run(case: Any, proto: onnx.ModelProto) -> tuple[Outcome, str]:
    """One case: its outcome and, unless it passed, the reason."""
    try:
        model = Model.from_proto(proto)
        module = model.to_torch()
    except InputError as error:
        return "not supported", str(error)
    except Exception as error:
        return "failed", f"import: {type(error).__name__}: {error}"
    for inputs, outputs in _data(case):
        try:
            fed = _fed(model, inputs)
        except InputError as error:
            return "not supported", str(error)
        try:
            with torch.no_grad():
                found = module(*fed)
            _compare(case, model, found if isinstance(found, tuple) else (found,), outputs)
        except Exception as error:
            return "failed", f"{type(error).__name__}: {str(error).strip()}"
    return "passed", ""


def _fed(model: Model, arrays: list[Array]) -> list[torch.Tensor]:
    """`arrays` as a user's data reach the model; integers have the model's type already."""
    for spec, array in zip(model.inputs, arrays, strict=True):
        wanted = "float32" if array.dtype.name in WIDTHS else array.dtype.name
        assert spec.dtype == wanted, f"the model's input is {spec.dtype} instead of {wanted}"
    # numpy does not count bfloat16, which it borrows from ml_dtypes, among the floats.
    plain = [a.astype(np.float32) if a.dtype.name == "bfloat16" else a for a in arrays]
    named = {spec.name: array for spec, array in zip(model.inputs, plain, strict=True)}
    return [torch.tensor(array) for array in fitting(model, named)]


def _compare(case: Any, model: Model, found: tuple[torch.Tensor, ...], outputs: list[Array]) -> None:
    for spec, tensor, wanted in zip(model.outputs, found, outputs, strict=True):
        array = tensor.numpy()
        dtype = wanted.dtype.name
        computed = "float32" if dtype in WIDTHS else dtype
        assert (array.dtype.name, array.shape) == (computed, wanted.shape), (
            f"{array.dtype.name}{list(array.shape)} instead of {computed}{list(wanted.shape)}"
        )
        assert spec.dtype == computed, f"the model promises {spec.dtype} instead of {computed}"
        slack = HALF_PRECISION.get(dtype, 0.0)
        with np.errstate(over="ignore"):
            array = array.astype(wanted.dtype)
        if dtype == "bfloat16":
            array, wanted = array.astype(np.float32), wanted.astype(np.float32)
        np.testing.assert_allclose(array, wanted, rtol=max(case.rtol, slack), atol=max(case.atol, slack))


def _proto(case: Any) -> onnx.ModelProto:
    return case.model if case.model is not None else onnx.load(Path(case.model_dir) / "model.onnx")


def _data(case: Any) -> Iterator[tuple[list[Any], list[Any]]]:
    if case.data_sets is not None:
        for inputs, outputs in case.data_sets:
            yield _arrays(inputs), _arrays(outputs)
        return
    for folder in sorted(Path(case.model_dir).glob("test_data_set_*")):
        yield _read(folder, "input"), _read(folder, "output")


def _arrays(values: Iterable[Any]) -> list[Any]:
    """Types that numpy has not come as TensorProto."""
    return [numpy_helper.to_array(v) if isinstance(v, onnx.TensorProto) else np.asarray(v) for v in values]


def _read(folder: Path, what: str) -> list[Array]:
    files = sorted(folder.glob(f"{what}_*.pb"), key=lambda path: int(path.stem.rsplit("_", 1)[1]))
    return [numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes())) for path in files]


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for part in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
                yield from _nodes(part)


def _operator(name: str, protos: dict[str, onnx.ModelProto]) -> str:
    """The operator that a case is about: of an expanded one the one that was expanded, of several the one
    whose name is in the case's name, else the first."""
    base = re.sub(r"_expanded.*$", "", name)
    ops = [_full_name(node) for node in _nodes(protos.get(base, protos[name]).graph)]
    told = re.sub(r"\W|_", "", base).lower()
    named = [op for op in ops if op.rsplit(".", 1)[-1].lower() in told]
    others = [op for op in ops if op != "Constant"]
    return max(named, key=len) if named else (others or ops)[0]


def _full_name(node: onnx.NodeProto) -> str:
    domain = node.domain.removeprefix("ai.onnx").strip(".")
    return f"{domain}.{node.op_type}" if domain else node.op_type


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--list", action="store_true", help="list the cases that did not pass; write nothing")
    chosen = parser.parse_args()
    found = results()
    if chosen.list:
        for result in found:
            if result.outcome != "passed":
                reason = " ".join(result.reason.split())
                print(f"{result.outcome} | {result.operator} | {result.kind}/{result.name} | {reason}")
    print(dict(Counter(result.outcome for result in found)))


if __name__ == "__main__":
    main()
