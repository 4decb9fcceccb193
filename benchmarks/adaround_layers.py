"""Both rounding solvers on single layers, side by side in one run: held-out relative output error and CPU seconds.

Synthetic layers with inputs that are correlated between channels and neighbours and never negative, as after
a Relu; weights of 4 bits per output channel, minmax scales. Errors are measured on samples that no solver
has seen, and are those of the layer's output without the activation after it, as the closed form optimizes
them; `after` counts them behind a Relu, as the gradient optimizes them. CPU seconds of the closed form
include collecting its moments.

    python benchmarks/adaround_layers.py                        about twenty minutes on one core
    python benchmarks/adaround_layers.py --iterations 1000      one minute; the gradient is then not at its best
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qpipe.numerics.grid import Encoding, quantize_dequantize
from qpipe.numerics.learning.optimize import learn
from qpipe.numerics.learning.options import LearningOptions
from qpipe.numerics.learning.roundings import start
from qpipe.numerics.observers import weight_encoding
from qpipe.numerics.rounding.gram import GramOptions, solve
from qpipe.numerics.rounding.moments import LayerMoments
from qpipe.numerics.rounding.rows import row_grid
from qpipe.numerics.rounding.unfold import Unfold, sample_positions
from qpipe.numerics.scheme import TensorScheme

LAYERS = ("conv 3x3 64->64", "depthwise 3x3", "linear 512x512")
POSITIONS = 25
TEST_SAMPLES = {"linear 512x512": 4096}


@dataclass(frozen=True)
class Layer:
    """One layer with its data: inputs to solve on, inputs to measure on."""

    unfold: Unfold
    weight: Tensor
    encoding: Encoding
    inputs: Tensor
    test: Tensor

    def forward(self, weight: Tensor, x: Tensor) -> Tensor:
        if self.unfold.kind == "linear":
            return x @ weight.T
        return F.conv2d(x, weight, padding=1, groups=self.unfold.groups)


def make_layer(name: str, seed: int, samples: int, bits: int) -> Layer:
    """The layer called `name`, drawn with `seed`."""
    draw = torch.Generator().manual_seed(seed)
    if name.startswith("linear"):
        unfold = Unfold("linear")
        weight = torch.randn(512, 512, generator=draw) * math.sqrt(2 / 512)
        mix = torch.randn(512, 64, generator=draw) / 8
    else:
        groups = 64 if name.startswith("depthwise") else 1
        unfold = Unfold("conv", kernel_shape=(3, 3), pads=(1, 1, 1, 1), groups=groups)
        weight = torch.randn(64, 64 // groups, 3, 3, generator=draw) * math.sqrt(2 * groups / 576)
        mix = torch.randn(64, 16, generator=draw) / 4
    scheme = TensorScheme(bits, True, True, "per_channel", observer="minmax", grid="max")
    e = weight_encoding(weight.numpy(), scheme)
    n = TEST_SAMPLES.get(name, 256)
    return Layer(unfold, weight, e, _inputs(mix, samples, draw), _inputs(mix, n, draw))


def _inputs(mix: Tensor, samples: int, draw: torch.Generator) -> Tensor:
    channels, sources = mix.shape
    if channels == 512:
        x = torch.randn(samples, sources, generator=draw) @ mix.T
    else:
        z = 3 * F.avg_pool2d(torch.randn(samples, sources, 18, 18, generator=draw), 3, 1)
        x = torch.einsum("cs,nshw->nchw", mix, z)
    return torch.relu(x + 0.3 * torch.randn(x.shape, generator=draw))


def measure(layer: Layer, weight: Tensor, bias: Tensor | None) -> dict[str, float]:
    """Squared output error over the output's variance, in percent, before and after a Relu."""
    with torch.no_grad():
        y, y_hat = layer.forward(layer.weight, layer.test), layer.forward(weight, layer.test)
        if bias is not None:
            y_hat = y_hat + (bias if y.ndim == 2 else bias[:, None, None])
    dims = [d for d in range(y.ndim) if d != 1]

    def percent(a: Tensor, b: Tensor) -> float:
        return 100.0 * float((a - b).square().sum() / (b - b.mean(dims, keepdim=True)).square().sum())

    return {"error": percent(y_hat, y), "after": percent(F.relu(y_hat), F.relu(y))}


def run_gram(layer: Layer, options: GramOptions) -> tuple[Tensor, Tensor]:
    """The closed form: moments at sampled positions, then the solver."""
    rows = layer.unfold.weight_rows(layer.weight)
    moments = LayerMoments(rows.shape[0], rows.shape[2], rows)
    for first in range(0, len(layer.inputs), 32):
        x = layer.inputs[first : first + 32]
        count = math.prod(layer.unfold.output_shape(tuple(x.shape)))
        where = sample_positions(count, POSITIONS, first, len(x), seed=0)
        moments.update(layer.unfold.rows(x, where), samples=len(x))
    shape = tuple(layer.weight.shape)
    grid = row_grid(layer.encoding, layer.unfold, shape)
    result = solve(rows, grid, moments.fit, moments.held_out, None, options)
    return layer.unfold.weight_from_rows(result.values, shape), result.bias


def run_gradient(layer: Layer, iterations: int) -> tuple[Tensor, None]:
    """AdaRound with its published settings, behind a Relu."""
    with torch.no_grad():
        targets = F.relu(layer.forward(layer.weight, layer.inputs))
    result = learn(
        {"w": start("rectified_sigmoid", layer.weight, layer.weight, layer.encoding)},
        lambda values, x, draw: F.relu(layer.forward(values["w"], x)),
        lambda index, draw: (layer.inputs.index_select(0, index), targets.index_select(0, index)),
        len(layer.inputs),
        options=LearningOptions(iterations=iterations, rates={"weight": 1e-3}, schedule="constant", check_every=250),
    )
    return result.values["w"], None


def nearest(layer: Layer) -> tuple[Tensor, None]:
    """Nearest rounding."""
    return torch.tensor(quantize_dequantize(layer.weight.numpy(), layer.encoding)), None


Solver = Callable[[Layer], tuple[Tensor, Tensor | None]]


def solvers(iterations: int) -> dict[str, Solver]:
    """What is compared, by the name in the table."""
    return {
        "nearest": nearest,
        f"gradient, {iterations} iterations": lambda layer: run_gradient(layer, iterations),
        "gram, greedy": lambda layer: run_gram(layer, GramOptions(beam=1)),
        "gram": lambda layer: run_gram(layer, GramOptions()),
        "gram, scale search": lambda layer: run_gram(layer, GramOptions(scale_search=True)),
    }


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One record per layer and solver: medians over the seeds."""
    records = []
    for name in arguments.layers:
        layers = [
            make_layer(name, seed, arguments.samples, arguments.bits) for seed in range(arguments.seeds)
        ]
        for solver, solve_layer in solvers(arguments.iterations).items():
            outcomes = []
            for layer in layers:
                start = time.process_time()
                weight, bias = solve_layer(layer)
                seconds = time.process_time() - start
                outcomes.append({**measure(layer, weight, bias), "cpu_s": seconds})
            medians = {key: statistics.median(o[key] for o in outcomes) for key in outcomes[0]}
            records.append({"layer": name, "solver": solver, **medians})
            if not arguments.json:
                print(
                    f"{name:17} {solver:28} {medians['error']:8.3f} {medians['after']:8.3f} "
                    f"{medians['cpu_s']:9.2f}",
                    flush=True,
                )
    return records


def main() -> None:
    """Reads the command line, prints the table or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iterations", type=int, default=10000, help="of the gradient (default 10000)")
    parser.add_argument("--samples", type=int, default=1024, help="to solve on (default 1024)")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument(
        "--seeds", type=int, default=3, help="layers of each kind; medians are shown (default 3)"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=LAYERS)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.json:
        print(f"{'layer':17} {'solver':28} {'error %':>8} {'after %':>8} {'CPU s':>9}")
    records = run(arguments)
    if arguments.json:
        print(json.dumps({"arguments": vars(arguments), "records": records}, indent=1))


if __name__ == "__main__":
    main()
