"""torch's own database of operators, each through `Model.from_torch(module).to_torch()`, held against the module.

    python -m tests.torch_operators            write docs/torch_operators.md
    python -m tests.torch_operators --list     only list what did not pass, with the reasons

The database is `torch.testing._internal.common_methods_invocations.op_db`, by which torch tests itself: operators, and
for each of them samples of its inputs. The first sample that can be used becomes a small module: its tensors are the
inputs, everything else is part of the module. Where it has no tensors (`eye`), the module has an input beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qpipe.errors import InputError
from qpipe.model import Model
from tests.quick_export import remember

Outcome = Literal["equal", "refused", "wrong", "crashed", "no module"]
PAGE = Path(__file__).parents[1] / "docs" / "torch_operators.md"
TOLERANCE = 1e-4
"""Of the largest value: what float32 sums in another order differ by, and the check of an import allows."""
HALF = {torch.float16: 1e-3, torch.bfloat16: 4e-3}
"""Instead, for what a module returns in half precision, which an import computes in float32: one rounding."""
LOOKED_AT = 100
"""Samples of an operator that are looked at for one that can be used."""


PARTS = 10
"""Into which the database is dealt out, one for the quick tests."""
TITLES: dict[Outcome, str] = {
    "equal": "the import computes what the module does, to 1e-4 of the largest value",
    "refused": "one message says why, before anything was computed with it",
    "no module": "it has no sample of float32 that gives the same tensors every time, or torch cannot run it here",
    "wrong": "the import computes something else and nobody is told",
    "crashed": "an error that is none of ours",
}


class Call(nn.Module):
    """An operator with everything but its tensors decided."""

    def __init__(self, function: Any, spec: pytree.TreeSpec, leaves: list[Any]) -> None:
        super().__init__()
        self.function, self.spec = function, spec
        self.rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def forward(self, *tensors: Tensor) -> Any:
        if not self.places:
            args, kwargs = pytree.tree_unflatten(self.rest, self.spec)
            return tensors[0] + 1, self.function(*args, **kwargs)
        leaves = list(self.rest)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.function(*args, **kwargs)


@dataclass(frozen=True)
class Result:
    """What became of one entry of the database."""

    name: str
    outcome: Outcome
    reason: str = ""
    exports: bool = False
    """Of what was refused: whether `torch.onnx.export` writes it, and onnxruntime computes from it what torch does."""


def entries() -> list[Any]:
    """The entries of the database that have samples of float32, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db

    return sorted((e for e in op_db if torch.float32 in e.dtypes), key=lambda e: str(e.formatted_name))


def module_of(entry: Any) -> tuple[nn.Module, tuple[Tensor, ...], list[Tensor]] | str:
    """The entry's first usable sample as a module, its inputs and what it computes; or why there is none."""
    if str(entry.name).startswith(("empty", "new_empty")):
        return "it returns memory as it was"
    torch.manual_seed(0)
    reason = "it has no sample on tensors with elements"
    samples = entry.sample_inputs("cpu", torch.float32, requires_grad=False)
    for _, sample in zip(range(LOOKED_AT), samples, strict=False):
        leaves, spec = pytree.tree_flatten(((sample.input, *sample.args), dict(sample.kwargs)))
        tensors = tuple(leaf.detach().clone() for leaf in leaves if isinstance(leaf, Tensor))
        if any(t.numel() == 0 or t.layout != torch.strided or t.is_complex() for t in tensors):
            continue
        module = Call(entry.op, spec, leaves).eval()
        tensors = tensors or (torch.ones(3),)
        computed = _computed(module, tensors), _computed(module, tensors)
        if not computed[0] or not all(value.numel() and value.layout == torch.strided for value in computed[0]):
            reason = "it returns no tensor with elements"
            continue
        if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*computed, strict=True)):
            reason = "what it computes is different every time"
            continue
        return module, tensors, computed[0]
    return reason


def _computed(module: nn.Module, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    leaves = pytree.tree_leaves(module(*(tensor.clone() for tensor in tensors)))
    return [leaf.detach().resolve_conj().resolve_neg() for leaf in leaves if isinstance(leaf, Tensor)]


def part(number: int) -> list[Any]:
    """Every tenth entry."""
    return entries()[number::PARTS]


def results(chosen: Iterable[Any]) -> list[Result]:
    """Every one of these entries, run: in a thread, whose stack is short, since every sample notes the stack below it,
    which takes as long as all the rest where that is pytest's."""
    remember()
    with ThreadPoolExecutor(1) as thread:
        return list(thread.map(run, chosen))


def run(entry: Any) -> Result:
    """One entry through import and simulation."""
    name = str(entry.formatted_name)
    with quiet():
        try:
            found = module_of(entry)
        except Exception as error:  # the database's own: an operator that this build of torch lacks
            found = f"torch cannot run its sample: {type(error).__name__}"
        if isinstance(found, str):
            return Result(name, "no module", found)
        module, tensors, wanted = found
        try:
            simulated = Model.from_torch(module, tuple(t.clone() for t in tensors)).to_torch()
            with torch.no_grad():
                returned = simulated(*(fitting(t) for t in tensors))
        except InputError as error:
            said = str(error)
            # What is drawn may come out right by chance.
            hopeless = said.startswith("ONNX has no operator") or "draws random numbers" in said
            exports = not hopeless and exports_right(module, tensors, wanted)
            return Result(name, "refused", said, exports)
        except Exception as error:
            return Result(name, "crashed", f"{type(error).__name__}: {error}")
        off = difference(wanted, list(returned) if isinstance(returned, tuple) else [returned])
        return Result(name, "wrong", off) if off else Result(name, "equal")


def fitting(tensor: Tensor) -> Tensor:
    """As the import takes it: floats are float32."""
    return tensor.float() if tensor.is_floating_point() else tensor.clone()


def difference(wanted: list[Tensor], found: list[Tensor]) -> str:
    """How what was found differs; empty where it does not."""
    if len(wanted) != len(found):
        return f"{len(found)} outputs instead of {len(wanted)}"
    for a, b in zip(wanted, found, strict=True):
        a = torch.view_as_real(a) if a.is_complex() else a
        if a.shape != b.shape:
            return f"shape {tuple(b.shape)} instead of {tuple(a.shape)}"
        if a.is_floating_point() != b.is_floating_point() or (a.dtype == torch.bool) != (b.dtype == torch.bool):
            return f"{b.dtype} instead of {a.dtype}"
        x, y = a.double(), b.double()
        finite = x.isfinite()
        if not torch.equal(x[~finite].nan_to_num(3.0), y[~finite].nan_to_num(3.0)) or not y[finite].isfinite().all():
            return "other values are finite"
        scale = max(float(x[finite].abs().max()), 1e-12) if finite.any() else 1.0
        error = float((x[finite] - y[finite]).abs().max()) / scale if finite.any() else 0.0
        if error > HALF.get(a.dtype, TOLERANCE):
            return f"off by {error:.1e}"
    return ""


def exports_right(module: nn.Module, tensors: tuple[Tensor, ...], wanted: list[Tensor]) -> bool:
    """Whether `torch.onnx.export` writes the module, and onnxruntime computes from it what torch does."""
    try:
        program = torch.onnx.export(module, tensors, dynamo=True, verbose=False)
        assert program is not None
        return not difference(wanted, list(program(*tensors)))
    except Exception:  # whatever the exporter and onnxruntime raise: it does not export right
        return False


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """torch's exporter and its database print and warn of things of their own."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        logging.disable(disabled)


def row(result: Result) -> str:
    """One line of the table: the first sentence of a refusal, without names of nodes and the code of `Call`."""
    clauses = [line[4:] for line in result.reason.splitlines() if line.startswith("  - ")]
    told = [re.sub(r"^(node|input|initializer) '.*?' \(op (\w+).*?\): ", r"\2: ", clause) for clause in clauses]
    reason = "; ".join(dict.fromkeys(told)) or re.sub(r",? which Call calls at `.*?`|,? at `.*?`", "", result.reason)
    first = reason if clauses else re.split(r"(?<=\w)\. ", reason)[0]
    first = first.replace("torch cannot export Call to ONNX: it", "torch cannot export it and").replace("Call", "it")
    lost = re.search(r"It lost something of \w+", reason)
    said = f"{lost[0][0].lower()}{lost[0][1:]}, says the export" if lost else first.rstrip(".")
    if result.exports:
        said += " (torch.onnx.export writes it)"
    return f"| {result.name} | {result.outcome} | {said.replace('|', chr(92) + '|')} |"


def versions() -> str:
    """What the page was written with."""
    import onnx
    import onnxruntime
    import onnxscript

    found = ((each.__name__, each.__version__.partition("+")[0]) for each in (torch, onnx, onnxscript, onnxruntime))
    return ", ".join(f"{name} {version}" for name, version in found)


def page(found: list[Result]) -> str:
    """docs/torch_operators.md."""
    total = Counter(result.outcome for result in found)
    counts = ", ".join(f"{total[outcome]} {outcome}" for outcome in TITLES)
    lacking = sum(result.reason.startswith("ONNX has no operator") for result in found)
    exports = sum(result.exports for result in found)
    legend = "\n".join(f"- *{outcome}*: {title}." for outcome, title in TITLES.items())
    rows = "\n".join(row(result) for result in sorted(found, key=lambda each: each.name))
    return PAGE_TEXT.format(
        versions=versions(),
        entries=len(found),
        counts=counts,
        lacking=lacking,
        exports=exports,
        legend=legend,
        rows=rows,
    )


PAGE_TEXT = """# torch's operators

torch's own database of operators, `torch.testing._internal.common_methods_invocations.op_db`: the first usable sample
of float32 of each entry as a small module, through `Model.from_torch(module).to_torch()`, held against the module.
Written by `python -m tests.torch_operators`; `tests/model/torch_export/test_torch_operators.py` runs all of it.

{versions}: **{entries} entries, {counts}**.

{legend}

Of what is refused, ONNX has no operator for {lacking}. Refused although `torch.onnx.export` writes it and onnxruntime
computes from that what torch does: {exports}.

| entry | | why |
|---|---|---|
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--list", action="store_true", help="list the entries that are not equal; write nothing")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    found = results(entries())
    if chosen.list:
        for result in found:
            if result.outcome != "equal":
                print(f"{result.outcome} | {result.name} | {result.exports} | {' '.join(result.reason.split())}")
    else:
        PAGE.write_text(page(found))
    print(dict(Counter(result.outcome for result in found)))


if __name__ == "__main__":
    main()
