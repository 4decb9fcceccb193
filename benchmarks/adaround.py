"""Rounding to nearest, and both of adaround's solvers, on the built-in model: what they cost and what is left
of the logits, side by side in one run.

Weights of 4 bits per output channel on minmax scales, alone (W4) and with activations of 8 bits (W4A8). The error is
that of the logits on the evaluation images, squared, over the float logits' variance: the rounding's own where the
activations stay float. CPU seconds are those of the stage as a whole: streams, moments and all.

    OMP_NUM_THREADS=1 python benchmarks/adaround.py                        about forty minutes on one core
    OMP_NUM_THREADS=1 python benchmarks/adaround.py --iterations 500       a minute; the gradient is not at its best
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from qpipe.demo import MODEL_PATH
from qpipe.demo.data import load
from qpipe.methods.placement.target import Target
from qpipe.model import Model
from qpipe.model.simulation.run import run
from qpipe.numerics.metrics import top1
from qpipe.numerics.scheme import Scheme, TensorScheme
from qpipe.param import coerce
from qpipe.stage import Samples
from qpipe.stages.adaround import adaround
from qpipe.stages.bnf import bnf
from qpipe.stages.calibrate import calibrate
from qpipe.stages.nearest import nearest

WEIGHT = TensorScheme(4, True, True, "per_channel", observer="minmax", grid="max")
SCHEMES = {"W4": Scheme(WEIGHT, None), "W4A8": Scheme(WEIGHT, TensorScheme(8, False, False))}
TARGET = Path(__file__).parents[1] / "conf" / "target" / "onnxruntime.yaml"
FASTER = 50
"""The claim: the closed form's error is not larger than the gradient's, at this fraction of its CPU time."""

Solver = Callable[[Model, Samples], Model]


def solvers(arguments: argparse.Namespace) -> dict[str, Solver]:
    """What is compared, by the name in the table."""
    return {
        "nearest": lambda model, _: nearest(model),
        "gram": lambda model, data: adaround(model, data, seed=arguments.seed),
        "gram, scale search": lambda model, data: adaround(
            model, data, seed=arguments.seed, scale_search=True
        ),
        f"gradient, {arguments.iterations} iterations": lambda model, data: adaround(
            model, data, seed=arguments.seed, solver="gradient", iterations=arguments.iterations
        ),
    }


def samples(split: str, limit: int | None = None) -> Samples:
    """The built-in data, the first `limit` images."""
    arrays = load(split)
    labels = arrays.pop("labels")
    every = Samples(arrays, labels)
    return every if limit is None else every.head(limit)


def measure(model: Model, quantized: Model, test: Samples) -> dict[str, float]:
    """Squared error of the logits over the float logits' variance, in percent, and the share of hits."""
    (reference,) = run(model, test.arrays, batch_size=100, quantized=False).values()
    (logits,) = run(quantized, test.arrays, batch_size=100).values()
    error = np.square(logits - reference, dtype=np.float64).sum()
    variance = np.square(reference - reference.mean(axis=0), dtype=np.float64).sum()
    assert test.labels is not None
    return {"error_percent": 100.0 * float(error / variance), "top1": 100.0 * top1(logits, test.labels)}


def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One record per scheme and solver."""
    model = bnf(Model.load(arguments.model))
    calibration, test = samples("calibration", arguments.samples), samples("evaluation")
    target = coerce(yaml.safe_load(TARGET.read_text()), Target, "target")
    records = []
    for name in arguments.schemes:
        calibrated = calibrate(model, calibration, scheme=replace(SCHEMES[name], name=name), target=target)
        for solver, solve in solvers(arguments).items():
            start = time.process_time()
            rounded = solve(calibrated, calibration)
            seconds = time.process_time() - start
            record = {"scheme": name, "solver": solver, **measure(model, rounded, test), "cpu_s": seconds}
            records.append(record)
            if not arguments.json:
                print(line(record), flush=True)
    return records


def line(record: dict[str, Any]) -> str:
    """A record as a line of the table."""
    return (
        f"{record['scheme']:6} {record['solver']:28} {record['error_percent']:9.3f} {record['top1']:7.2f} "
        f"{record['cpu_s']:9.2f}"
    )


def claim(records: list[dict[str, Any]], scheme: str) -> dict[str, Any]:
    """How gram compares with the gradient: the ratio of their errors and of their times, and whether it holds."""
    found = {
        record["solver"].partition(",")[0]: record
        for record in reversed(records)
        if record["scheme"] == scheme
    }
    gram, gradient = found["gram"], found["gradient"]
    error = gram["error_percent"] / gradient["error_percent"]
    faster = gradient["cpu_s"] / gram["cpu_s"]
    return {
        "scheme": scheme,
        "error_ratio": error,
        "faster": faster,
        "holds": error <= 1.0 and faster >= FASTER,
    }


def main() -> None:
    """Reads the command line; prints the table, or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iterations", type=int, default=10000, help="of the gradient (default 10000)")
    parser.add_argument("--samples", type=int, default=1000, help="to calibrate and tune on (default 1000)")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, default=MODEL_PATH)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.json:
        print(f"{'scheme':6} {'solver':28} {'error %':>9} {'top1 %':>7} {'CPU s':>9}")
    records = compare(arguments)
    claims = [claim(records, scheme) for scheme in arguments.schemes]
    if arguments.json:
        said = {**vars(arguments), "model": str(arguments.model)}
        print(json.dumps({"arguments": said, "records": records, "claims": claims}, indent=1))
        return
    for found in claims:
        print(
            f"{found['scheme']}: gram's error is {found['error_ratio']:.2f} of the gradient's, "
            f"{found['faster']:.0f} times faster"
        )


if __name__ == "__main__":
    main()
