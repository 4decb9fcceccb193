"""ONNX's own backend cases through `Model.from_proto(case.model).to_torch()`, counted per operator.

    python -m tests.conformance            write docs/conformance.md
    python -m tests.conformance --list     only list the cases that did not pass, with their reasons

A case is *passed* when every output has the type, the shape and, within the case's own tolerance, the values
that the case asks for, *by onnxruntime* when that holds and a part of it runs there; *not supported* when the import
refuses it by InputError; *failed* otherwise. Floats of other widths are computed in float32, as `model.floats`
documents.
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
from qpipe.model.simulation.constants import array_of, taken_in
from qpipe.model.simulation.samples import in_type
from qpipe.model.structure.opaque import opaque_nodes

Array = npt.NDArray[Any]
Outcome = Literal["passed", "by onnxruntime", "not supported", "failed"]
KINDS = ("node", "simple", "pytorch-operator", "pytorch-converted")
PAGE = Path(__file__).parents[1] / "docs" / "conformance.md"
HALF_PRECISION = {"float16": 1e-3, "bfloat16": 4e-3}
"""Slack where the case itself was computed in half precision: one rounding is at most 5e-4, or 4e-3, of the value."""


@dataclass(frozen=True)
class Result:
    """What became of one case; `operator` is the one that it is about."""

    kind: str
    name: str
    operator: str
    outcome: Outcome
    reason: str = ""
    outside: str = ""
    """Why the share of whole operators leaves the case out; empty where it counts."""

    @property
    def reasons(self) -> list[str]:
        """What was refused, without the names of nodes and values."""
        clauses = [line[4:] for line in self.reason.splitlines() if line.startswith("  - ")] or [self.reason]
        told = [re.sub(r"^(node|input|initializer) '.*?'( \(op .*?\))?: ", "", clause) for clause in clauses]
        return list(dict.fromkeys(re.sub(r" '.*?'| \(\w+\)", "", clause) for clause in told))


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
        operator = _operator(case.name, protos)
        outside = _outside(operator, case.name, protos[case.name])
        found.append(Result(kind, case.name, operator, outcome, reason, outside))
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
    return ("by onnxruntime" if opaque_nodes(model.graph) else "passed"), ""


def _fed(model: Model, arrays: list[Array]) -> list[torch.Tensor]:
    """`arrays` as a user's data reach the model; integers have the model's type already."""
    for spec, array in zip(model.inputs, arrays, strict=True):
        wanted = array.dtype.name
        assert spec.dtype == wanted, f"the model's input is {spec.dtype} instead of {wanted}"
    named = {spec.name: array for spec, array in zip(model.inputs, arrays, strict=True)}
    return [taken_in(in_type(spec, named[spec.name]), "cpu") for spec in model.inputs]


def _compare(case: Any, model: Model, found: tuple[torch.Tensor, ...], outputs: list[Array]) -> None:
    for spec, tensor, wanted in zip(model.outputs, found, outputs, strict=True):
        array = array_of(tensor)
        dtype = wanted.dtype.name
        assert (array.dtype.name, array.shape) == (dtype, wanted.shape), (
            f"{array.dtype.name}{list(array.shape)} instead of {dtype}{list(wanted.shape)}"
        )
        assert spec.dtype == dtype, f"the model promises {spec.dtype} instead of {dtype}"
        slack = HALF_PRECISION.get(dtype, 0.0)
        with np.errstate(over="ignore"):
            array = array.astype(wanted.dtype)
        if dtype == "bfloat16" or dtype.startswith("float8"):
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


_TEXT = {"StringConcat", "StringNormalizer", "StringSplit", "RegexFullMatch", "TfIdfVectorizer"}
_RANDOM = {
    "Bernoulli",
    "Multinomial",
    "RandomNormal",
    "RandomUniform",
    "RandomNormalLike",
    "RandomUniformLike",
}
_EXOTIC = re.compile(r"FLOAT4|FLOAT8E8M0|U?INT[24]\b")


def _outside(operator: str, name: str, proto: onnx.ModelProto) -> str:
    """What takes a case out of the share: float and integer tensor operators, at inference."""
    if operator.startswith(("ml.", "preview.training.")):
        return "ai.onnx.ml and training"
    if "training" in name:
        return "training"
    nodes = list(_nodes(proto.graph))
    ops = {node.op_type for node in nodes}
    if ops & _RANDOM:
        return "random"
    if "ImageDecoder" in ops:
        return "images"
    values = [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]
    kinds = {value.type.WhichOneof("value") for value in values} - {"tensor_type", None}
    if kinds or any("Sequence" in op or "Optional" in op for op in ops):
        return "sequences, optionals and maps"
    types = {value.type.tensor_type.elem_type for value in values if value.type.HasField("tensor_type")}
    if onnx.TensorProto.STRING in types or ops & _TEXT:
        return "strings"
    types |= {a.i for node in nodes for a in node.attribute if a.name in ("to", "output_dtype")}
    names = [onnx.TensorProto.DataType.Name(number) for number in types]
    return "types narrower than 8 bits, and FLOAT8E8M0" if any(map(_EXOTIC.match, names)) else ""


def _full_name(node: onnx.NodeProto) -> str:
    domain = node.domain.removeprefix("ai.onnx").strip(".")
    return f"{domain}.{node.op_type}" if domain else node.op_type


def whole_operators(found: list[Result]) -> tuple[list[str], list[str]]:
    """The operators that count, and those of them of which every counting case passed."""
    counting: dict[str, list[Result]] = {}
    for result in found:
        if not result.outside:
            counting.setdefault(result.operator, []).append(result)
    passed = [op for op, cases in counting.items() if all(case.outcome == "passed" for case in cases)]
    return sorted(counting), sorted(passed)


def page(found: list[Result]) -> str:
    """docs/conformance.md."""
    total = Counter(result.outcome for result in found)
    counting, whole = whole_operators(found)
    partial = ", ".join(f"`{op}`" for op in counting if op not in whole)
    outside = Counter(result.outside for result in found if result.outside and result.outcome == "not supported")
    left_out = "; ".join(f"{reason} ({count})" for reason, count in sorted(outside.items()))
    rows = [f"| {kind} | {_counts([r for r in found if r.kind == kind])} |" for kind in KINDS]
    operators = sorted({result.operator for result in found}, key=str.lower)
    table = [_row(operator, [r for r in found if r.operator == operator]) for operator in operators]
    return PAGE_TEXT.format(
        version=onnx.__version__,
        opset=onnx.defs.onnx_opset_version(),
        cases=len(found),
        passed=total["passed"],
        runtime=total["by onnxruntime"],
        refused=total["not supported"],
        failed=total["failed"],
        whole=len(whole),
        counting=len(counting),
        share=100 * len(whole) / len(counting),
        partial=partial,
        left_out=left_out,
        kinds="\n".join(rows),
        operators="\n".join(table),
    )


def _counts(cases: list[Result]) -> str:
    outcomes = Counter(case.outcome for case in cases)
    told = ("passed", "by onnxruntime", "not supported", "failed")
    return " | ".join(map(str, (len(cases), *(outcomes[outcome] for outcome in told))))


def _row(operator: str, cases: list[Result]) -> str:
    reasons = Counter(reason for case in cases if case.reason for reason in case.reasons)
    told = "; ".join(f"{reason.rstrip('.')} ({count})" for reason, count in sorted(reasons.items()))
    return f"| {operator} | {_counts(cases)} | {told.replace('|', chr(92) + '|')} |"


PAGE_TEXT = """# Conformance

ONNX's own backend cases, each through the path that a user's model takes: `Model.from_proto(case.model).to_torch()`,
with the case's own tolerance. Written by `python -m tests.conformance`; `tests/model/test_conformance.py` runs all
cases and compares them with this page.

onnx {version}, opset {opset}: **{cases} cases, {passed} passed, {runtime} by onnxruntime, {refused} not
supported, {failed} failed**.

- *passed*: every output has the type, the shape and the values that the case asks for. float16, bfloat16 and double
  are computed in float32, as the import says in the model's notes, and what comes out is held to 1e-3 (float16) or
  4e-3 (bfloat16) where the case's tolerance is tighter.
- *by onnxruntime*: the same, but torch cannot compute a part, which stays in the graph and runs through onnxruntime.
- *not supported*: refused by one message with all reasons before anything was computed.
- *failed*: anything else.

Of {counting} operators on tensors of floats, integers and booleans, {whole} pass every case ({share:.1f} %).
Not whole: {partial}.

The cases of QuantizeLinear, DequantizeLinear, QLinearConv and the like take their scales as data, so that these stay
operators here, computed on integers. In a model whose scales are constants they become a float graph with encodings.

Not counted are cases of types and kinds that are not meant to be supported; of these, not supported:
{left_out}.

| kind | cases | passed | by onnxruntime | not supported | failed |
|---|---|---|---|---|---|
{kinds}

A case counts for the operator that it is about; `_expanded` cases, which spell out an operator's definition, for that
operator. The last column says why cases were refused, and how many.

| operator | cases | passed | by onnxruntime | not supported | failed | reasons |
|---|---|---|---|---|---|---|
{operators}
"""


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
    else:
        PAGE.write_text(page(found))
    print(dict(Counter(result.outcome for result in found)))


if __name__ == "__main__":
    main()
