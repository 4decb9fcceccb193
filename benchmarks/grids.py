"""Grids and observers at few bits, on four networks: what the defaults (`auto`) are chosen by, and docs/grids.md shows.

    weights       squared error of the weights themselves, by grid and observer, over that of max|w| / qmax
    outputs       the same choices in the network, by nearest rounding and by adaround: hits, or perplexity
    activations   observers of activations, with weights of 8 bits; and both at once

Networks: the built-in one, and those of benchmarks/trained.py. Error is that of the logits, squared, over the float
logits' variance, in percent; perplexity is over float's. Everything runs in the simulation, which the exported file
agrees with (tests/model/qdq/test_mirrored.py).

    OMP_NUM_THREADS=1 python -m benchmarks.grids --folder FOLDER [--nets builtin resnet vit decoder] [--json FILE]
    python -m benchmarks.grids --folder FOLDER --markdown --json FILE …          their tables
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import yaml

from benchmarks.trained import trained, windows
from qpipe.demo import MODEL_PATH
from qpipe.demo.data import load
from qpipe.methods.placement.target import Target
from qpipe.model import Model
from qpipe.model.simulation.run import run
from qpipe.model.structure.operands import find_operands
from qpipe.numerics.grid import quantize_dequantize
from qpipe.numerics.observers import weight_encoding
from qpipe.numerics.scheme import Scheme, TensorScheme
from qpipe.param import coerce
from qpipe.stage import Samples
from qpipe.stages.adaround import adaround
from qpipe.stages.bnf import bnf
from qpipe.stages.calibrate import calibrate
from qpipe.stages.nearest import nearest

Array = npt.NDArray[Any]
Row = dict[str, Any]
NETS = ("builtin", "resnet", "vit", "decoder")
TARGET = Path(__file__).parents[1] / "conf" / "target" / "onnxruntime.yaml"
GRIDS = ("max", "full_range", "signed_max", "asymmetric")
PAIRS = (("max", "minmax"), ("max", "mse"), ("signed_max", "minmax"), ("signed_max", "mse"), ("asymmetric", "mse"))
"""Grids and observers that are tried in the networks; `auto` is signed_max with mse."""
A8 = TensorScheme(8, False, False)


@dataclass(frozen=True)
class Net:
    """A float model, samples to calibrate and tune on, samples to judge on with what is right for each."""

    name: str
    model: Model
    calibration: Samples
    evaluation: Samples
    right: Array


def net(name: str, folder: Path, samples: int, judged: int) -> Net:
    """The network `name`, its BatchNorms folded."""
    model = Model.load(MODEL_PATH) if name == "builtin" else trained(name, folder)
    if name == "decoder":
        (few, _), (rows, following) = windows("calibration", samples // 4), windows("evaluation", judged // 4)
        label = str(model.graph.inputs[0].name)
        return Net(name, bnf(model), Samples({label: few}), Samples({label: rows}), following)
    label = str(model.graph.inputs[0].name)
    calibration, evaluation = load("calibration"), load("evaluation")
    given = Samples({label: calibration["image"][:samples]}), Samples({label: evaluation["image"][:judged]})
    return Net(name, bnf(model), *given, evaluation["labels"][:judged])


def logits(of: Net, model: Model, quantized: bool = True) -> Array:
    """The outputs on the samples to judge on, (rows, classes)."""
    (found,) = run(model, of.evaluation.arrays, batch_size=50, quantized=quantized).values()
    return np.asarray(found.reshape(-1, found.shape[-1]), np.float64)


def score(of: Net, found: Array) -> float:
    """Hits in percent, or the perplexity."""
    right = of.right.reshape(-1)
    if of.name != "decoder":
        return 100.0 * float((found.argmax(-1) == right).mean())
    shifted = found - found.max(-1, keepdims=True)
    chances = shifted[np.arange(len(right)), right] - np.log(np.exp(shifted).sum(-1))
    return float(np.exp(-chances.mean()))


def weight(bits: int, grid: str, observer: str) -> TensorScheme:
    """Per channel; `grid` asymmetric has a zero point of its own."""
    kind: Any = "max" if grid == "asymmetric" else grid
    given: Any = observer
    return TensorScheme(bits, True, grid != "asymmetric", "per_channel", observer=given, grid=kind)


def weight_errors(of: Net) -> Iterator[Row]:
    """Squared error of all weights by grid and observer, over that of grid max by minmax."""
    operands = {operand.weight: operand for operand in find_operands(of.model)}
    for bits in (8, 6, 5, 4, 3, 2):
        found = {}
        for observer in ("minmax", "mse"):
            for grid in GRIDS:
                total = 0.0
                for name, operand in operands.items():
                    w = of.model.param(name)
                    e = weight_encoding(w, weight(bits, grid, observer), operand.channel_axis or 0, name)
                    # Each weight counts alike: the share of its energy that is lost.
                    total += float(np.square(quantize_dequantize(w, e) - w).sum() / np.square(w).sum())
                found[grid, observer] = total
        for (grid, observer), total in found.items():
            ratio = total / found["max", "minmax"]
            yield {"net": of.name, "part": "weights", "bits": bits, "grid": grid, "observer": observer, "ratio": ratio}


def quantized(of: Net, scheme: Scheme, target: Target, tune: bool) -> Model:
    """The network on the scheme's grids, its weights rounded to nearest or tuned."""
    model: Any = calibrate(of.model, of.calibration, scheme=scheme, target=target)
    done: Any = adaround(model, of.calibration) if tune else nearest(model)
    return done  # type: ignore[no-any-return]


def choices() -> Iterator[tuple[str, Scheme]]:
    """What is compared, by the part of the table and the scheme."""
    for bits in (4, 3, 2):
        for grid, observer in PAIRS:
            yield "outputs", Scheme(weight(bits, grid, observer), None)
    for bits in (8, 6, 5):
        for grid, observer in (("max", "minmax"), ("max", "mse"), ("signed_max", "mse")):
            yield "outputs", Scheme(weight(bits, grid, observer), None)
    for bits in (8, 6, 5, 4, 3):
        for observer in ("minmax", "mse", "percentile"):
            given: Any = observer
            yield "activations", Scheme(weight(8, "max", "minmax"), replace(A8, bitwidth=bits, observer=given))
    for grid, observer in (("max", "minmax"), ("max", "mse"), ("signed_max", "mse")):
        given = observer
        yield "both", Scheme(weight(4, grid, observer), replace(A8, bitwidth=4, observer=given))


def outputs(of: Net, target: Target) -> Iterator[Row]:
    """Every choice in the network, by nearest rounding and, where weights have few bits, by adaround."""
    reference = logits(of, of.model, quantized=False)
    variance = np.square(reference - reference.mean(0)).sum()
    float_score = score(of, reference)
    for part, scheme in choices():
        low = scheme.weight.bitwidth <= 4
        for tune in (False, True) if low else (False,):
            begun = time.process_time()
            found = logits(of, quantized(of, scheme, target, tune))
            w, a = scheme.weight, scheme.activation
            yield {
                "net": of.name, "part": part, "bits": w.bitwidth,
                "grid": w.grid if w.symmetric else "asymmetric", "observer": w.observer,
                "activation_bits": a and a.bitwidth, "activation_observer": a and a.observer,
                "rounding": "adaround" if tune else "nearest", "float": float_score, "score": score(of, found),
                "error_percent": 100.0 * float(np.square(found - reference).sum() / variance),
                "cpu_s": time.process_time() - begun,
            }  # fmt: skip


def line(row: Row) -> str:
    """A row of the table."""
    if row["part"] == "weights":
        return f"{row['net']:8} weights  W{row['bits']} {row['grid']:10} {row['observer']:8} {row['ratio']:8.3f}"
    a = f"A{row['activation_bits']} {row['activation_observer']}" if row["activation_bits"] else ""
    said = f"{row['score']:8.2f} of {row['float']:.2f}"
    if row["net"] == "decoder":
        said = f"{row['score']:8.3f} = {row['score'] / row['float']:.4f} of {row['float']:.3f}"
    return (
        f"{row['net']:8} {row['rounding']:8} W{row['bits']} {row['grid']:10} {row['observer']:8} {a:14} {said} "
        f"{row['error_percent']:9.3f} %"
    )


def said_score(row: Row) -> str:
    """Hits, or perplexity over float's, with the error of the logits in percent."""
    score = f"{row['score'] / row['float']:.3f}" if row["net"] == "decoder" else f"{row['score']:.1f}"
    return f"{score} ({row['error_percent']:.3g})"


def tables(rows: list[Row]) -> Iterator[str]:
    """The rows as tables of Markdown, a line for each choice, a column for each network and rounding."""
    nets = list(dict.fromkeys(row["net"] for row in rows))
    for part in ("weights", "outputs", "activations", "both"):
        cells: dict[str, dict[str, str]] = {}
        for row in (row for row in rows if row["part"] == part):
            a = f", A{row['activation_bits']} {row['activation_observer']}" if row.get("activation_bits") else ""
            label = f"W{row['bits']} {row['grid']}, {row['observer']}{a}"
            column = row["net"] if part in ("weights", "activations") else f"{row['net']}, {row['rounding']}"
            cells.setdefault(label, {})[column] = f"{row['ratio']:.2f}" if part == "weights" else said_score(row)
        every = [f"{n}, {r}" for n in nets for r in ("nearest", "adaround")]
        columns = nets if part in ("weights", "activations") else every
        yield f"\n| {part} | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}"
        yield from (f"| {label} | {' | '.join(of.get(c, '') for c in columns)} |" for label, of in cells.items())


def measured(names: Iterable[str], arguments: argparse.Namespace, said: Callable[[Row], None]) -> list[Row]:
    """All rows of the networks, each passed to `said` once it is known."""
    with TARGET.open() as file:
        target: Target = coerce(yaml.safe_load(file), Target, "target")
    rows: list[Row] = []
    for name in names:
        of = net(name, arguments.folder, arguments.samples, arguments.judged)
        for made in (weight_errors(of), outputs(of, target)):
            for row in made:
                rows.append(row)
                said(row)
    return rows


def main() -> None:
    """Reads the command line; prints the table, and writes the rows as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where trained networks lie, or come to lie")
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=NETS)
    parser.add_argument("--samples", type=int, default=256, help="to calibrate and tune on (default 256)")
    parser.add_argument("--judged", type=int, default=600, help="to judge on (default 600)")
    parser.add_argument("--json", type=Path, nargs="+", help="where rows go; with --markdown where they come from")
    parser.add_argument("--markdown", action="store_true", help="print the tables of rows that were measured before")
    arguments = parser.parse_args()
    if arguments.markdown:
        print("\n".join(tables([row for path in arguments.json for row in json.loads(path.read_text())])))
        return
    torch.set_num_threads(1)
    rows = measured(arguments.nets, arguments, lambda row: print(line(row), flush=True))
    if arguments.json:
        arguments.json[0].write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
