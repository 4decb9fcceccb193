"""The zoo of `tests/zoo.py`, W8A8 per channel: how far onnxruntime and the simulation agree, and what simulating costs.

    OMP_NUM_THREADS=1 python benchmarks/architectures.py [NAME ...] [--rounds 7] [--markdown] [--json FILE]

float       largest difference between torch's module and the model, relative to the largest value: the model in
            torch, and in onnxruntime
op by op    of all quantized values, computed from the same inputs: share equal, largest difference in steps, and the
            share of the operator that agrees least
end to end  share of all quantized values within 0, 1, 2 steps, both graphs run whole
speed       time of the model in torch over that of the original module, the median of rounds in which all take turns:
            float, then with fake-quantize; forward, and forward and backward with the gradients of all weights
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qpipe.methods.comparison.parity import parity
from qpipe.model import Model
from tests.whole.test_zoo import computed, fed, quantized, relative
from tests.zoo import ZOO, Example, built, inputs, samples

BATCH = 16


def agreement(module: torch.nn.Module, example: Example, model: Model, small: Model) -> dict[str, Any]:
    """The figures of the first three groups of columns."""
    batch = fed(model, example, BATCH, seed=3)
    wanted, simulated = computed(module, batch), computed(model.to_torch(quantized=False), batch)
    deployed = model.session(mode="deploy", quantized=False).run(None, batch)
    report = parity(small, batch, threads=1)
    elements = sum(unit.elements for unit in report.units)
    whole = [sum(value.counts[i] for value in report.end_to_end) for i in range(4)]
    return {
        "nodes": len(list(model.graph)),
        "float_torch": max(map(relative, simulated, wanted)),
        "float_onnxruntime": max(map(relative, deployed, wanted)),
        "units": len(report.units),
        "equal": sum(unit.counts[0] for unit in report.units) / elements,
        "largest": max(unit.largest for unit in report.units),
        "worst": min(unit.within(0) for unit in report.units),
        "end_to_end": [sum(whole[: n + 1]) / sum(whole) for n in range(3)],
        "cosine": min(output.cosine for output in report.outputs),
    }


def forward(module: torch.nn.Module, batch: tuple[torch.Tensor, ...]) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            module(*batch)

    return run


def backward(module: torch.nn.Module, batch: tuple[torch.Tensor, ...]) -> Callable[[], None]:
    def run() -> None:
        module.zero_grad(set_to_none=True)
        returned = module(*batch)
        outputs = returned if isinstance(returned, tuple) else (returned,)
        torch.stack([each.square().sum() for each in outputs]).sum().backward()

    return run


def medians(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Seconds of each, all taking turns; the first round is not counted."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            found[name].append(time.perf_counter() - started)
    return {name: statistics.median(times[1:]) for name, times in found.items()}


def speed(
    module: torch.nn.Module, example: Example, model: Model, small: Model, rounds: int
) -> dict[str, float]:
    """Ratios to the original module."""
    batch = tuple(samples(each, BATCH, seed=4) for each in inputs(example))
    modules = {
        "module": module,
        "float": model.to_torch(False, trainable=[layer.weight for layer in model.layers()]),
        "quantized": small.to_torch(True, trainable=[layer.weight for layer in small.layers()]),
    }
    ratios = {}
    for way, make in (("forward", forward), ("backward", backward)):
        times = medians({name: make(each, batch) for name, each in modules.items()}, rounds)
        ratios |= {f"{name}_{way}": times[name] / times["module"] for name in ("float", "quantized")}
    return ratios


def measure(name: str, rounds: int) -> dict[str, Any]:
    module, example = built(name)
    model = Model.from_torch(module, inputs(example))
    small = quantized(model, fed(model, example, 32, seed=2))
    return {
        "net": name,
        **agreement(module, example, model, small),
        **(speed(module, example, model, small, rounds) if rounds else {}),
    }


HEADER = (
    "net", "nodes", "float: torch", "onnxruntime", "ops", "equal", "largest", "least", "end to end: 0", "≤ 1", "≤ 2",
    "speed: float", "quantized", "both ways: float", "quantized",
)  # fmt: skip


def line(found: dict[str, Any]) -> tuple[str, ...]:
    ratios = [
        f"{found[key]:.2f}" if key in found else "–"
        for key in ("float_forward", "quantized_forward", "float_backward", "quantized_backward")
    ]
    return (
        found["net"], str(found["nodes"]), f"{found['float_torch']:.0e}", f"{found['float_onnxruntime']:.0e}",
        str(found["units"]), f"{found['equal']:.6f}", str(found["largest"]), f"{found['worst']:.5f}",
        *(f"{share:.5f}" for share in found["end_to_end"]), *ratios,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("nets", nargs="*", default=list(ZOO), metavar="NAME", help=", ".join(ZOO))
    parser.add_argument("--rounds", type=int, default=7, help="0: leave the speed out")
    parser.add_argument("--markdown", action="store_true", help="the table as Markdown")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = []
    edge, between = ("| ", " | ") if arguments.markdown else ("", "  ")
    print(edge + between.join(HEADER) + edge[::-1])
    if arguments.markdown:
        print("|" + "---|" * len(HEADER))
    for name in arguments.nets:
        found.append(measure(name, arguments.rounds))
        print(edge + between.join(line(found[-1])) + edge[::-1], flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
