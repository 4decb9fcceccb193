"""What every technique makes of four trained networks, by bitwidths: one table.

    OMP_NUM_THREADS=1 python -m benchmarks.accuracy --folder FOLDER [--nets …] [--schemes …] [--techniques …]
            [--seeds 0 1 2] [--json FILE] [--markdown FILE]

The networks (the built-in one, a ResNet, a ViT, a byte-level decoder) are trained by benchmarks.trained where FOLDER
does not hold them. Each is judged as it ships: the exported file in onnxruntime, on samples that nothing was tuned on.
A cell is the median over the seeds, which draw the samples to tune on and all that is random: hits in percent (of the
decoder: perplexity), and the outputs' sqnr against float in dB. --json keeps every row; what it holds already is not
measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.grids import TARGET, Net, score
from benchmarks.trained import trained, windows
from qpipe.demo import MODEL_PATH
from qpipe.demo.data import load
from qpipe.methods.placement.target import Target
from qpipe.model import Model
from qpipe.model.simulation.run import run
from qpipe.numerics.metrics import sqnr_db
from qpipe.numerics.scheme import Scheme, TensorScheme
from qpipe.param import coerce
from qpipe.stage import Samples
from qpipe.stages.adaquant import adaquant
from qpipe.stages.adaround import adaround
from qpipe.stages.adascale import adascale
from qpipe.stages.autoround import autoround
from qpipe.stages.bnf import bnf
from qpipe.stages.brecq import brecq
from qpipe.stages.calibrate import calibrate
from qpipe.stages.cle import cle
from qpipe.stages.nearest import nearest
from qpipe.stages.polish import polish

Row = dict[str, Any]
NETS = ("builtin", "resnet", "vit", "decoder")


def weights(bits: int, granularity: Any = "per_channel", observer: Any = "mse") -> TensorScheme:
    return TensorScheme(bits, True, True, granularity, observer=observer, grid="max" if bits == 8 else "signed_max")


def activations(bits: int, observer: Any = "mse") -> TensorScheme:
    return TensorScheme(bits, False, False, observer=observer)


SCHEMES = {
    "w8a8": Scheme(weights(8, "per_tensor", "minmax"), activations(8, "minmax")),
    "w4a8": Scheme(weights(4), activations(8, "minmax")),
    "w4a4": Scheme(weights(4), activations(4)),
    "w3a8": Scheme(weights(3), activations(8, "minmax")),
    "w2a8": Scheme(weights(2), activations(8, "minmax")),
}
"""w8a8 has one scale per tensor, the hard case; the others have one per channel. Below 8 bits by the least squares."""


class Case:
    """One network, scheme and seed; what several techniques start from is made once."""

    def __init__(self, of: Net, scheme: Scheme, target: Target, seed: int) -> None:
        self.of, self.scheme, self.target, self.seed = of, scheme, target, seed
        self._made: dict[str, Model] = {}

    def get(self, name: str, make: Callable[[], Any]) -> Model:
        """`make()`, the first time."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    @property
    def calibrated(self) -> Model:
        return self.get("calibrated", lambda: self._calibrate(self.of.model))

    @property
    def equalized(self) -> Model:
        return self.get("equalized", lambda: self._calibrate(cle(self.of.model, norms=True)))

    @property
    def start(self) -> Model:
        """The one of both that is nearer to float on the samples to tune on: where everything that tunes starts."""
        return self.get("start", lambda: max((self.calibrated, self.equalized), key=self._near))

    @property
    def tuned(self) -> Model:
        """By the closed form: what methods that learn go on from."""
        return self.get("tuned", lambda: adaround(self.start, self.of.calibration, seed=self.seed))

    def learned(self, stage: Callable[..., Any], model: Any = None, **options: Any) -> Any:
        """What a stage that learns makes of `model`, or of what the closed form has tuned."""
        return stage(model or self.tuned, self.of.calibration, self.start, seed=self.seed, **options)

    @property
    def batch(self) -> int:
        """Samples of the decoder are windows of 128 rows."""
        return 8 if self.of.name == "decoder" else 32

    def _near(self, model: Model) -> float:
        rows = {name: array[:128] for name, array in self.of.calibration.arrays.items()}
        found, wanted = (run(nearest(model), rows), run(model, rows, quantized=False))
        return round(min(sqnr_db(found[name], y) for name, y in wanted.items()), 1)

    def _calibrate(self, model: Any) -> Any:
        return calibrate(model, self.of.calibration, scheme=self.scheme, target=self.target)


TECHNIQUES: Mapping[str, Callable[[Case], Any]] = {
    "nearest": lambda case: nearest(case.calibrated),
    "cle": lambda case: nearest(case.equalized),
    "adaround": lambda case: case.tuned,
    "adaquant": lambda case: case.learned(adaquant, case.start, batch_size=case.batch),
    "brecq": lambda case: case.learned(brecq, case.start, batch_size=case.batch),
    "autoround": lambda case: case.learned(autoround, case.start, batch_size=case.batch),
    "adascale": lambda case: case.learned(adascale, case.start, batch_size=case.batch),
    "polish": lambda case: case.learned(polish, batch_size=case.batch),
    "adaquant + polish": lambda case: case.learned(
        polish, case.learned(adaquant, case.start, batch_size=case.batch), batch_size=case.batch
    ),
}
"""By name, what makes the quantized model of a case. nearest and cle begin at the folded network, adaround and what
learns part by part at the better of both, polish at adaround's result."""


def net(name: str, folder: Path, samples: int, judged: int, seed: int) -> Net:
    """The network `name`, its BatchNorms folded; `seed` draws the samples to tune on."""
    model = Model.load(MODEL_PATH) if name == "builtin" else trained(name, folder)
    label = str(model.graph.inputs[0].name)
    folded = Model.of(bnf(model))
    if name == "decoder":
        (few, _), (rows, following) = windows("calibration", samples // 2, seed), windows("evaluation", judged // 8)
        return Net(name, folded, Samples({label: few}), Samples({label: rows}), following)
    images, evaluation = load("calibration")["image"], load("evaluation")
    drawn = np.random.default_rng(seed).permutation(len(images))[:samples]
    given = Samples({label: images[drawn]}), Samples({label: evaluation["image"][:judged]})
    return Net(name, folded, *given, evaluation["labels"][:judged])


def judged(of: Net, model: Any, reference: Any) -> tuple[float, float]:
    """The score, and the outputs' sqnr in dB, of the exported file in onnxruntime."""
    (found,) = run(model, of.evaluation.arrays, batch_size=50, backend="onnxruntime", threads=1).values()
    rows = np.asarray(found.reshape(-1, found.shape[-1]), np.float64)
    return score(of, rows), sqnr_db(rows, reference)


def measured(arguments: argparse.Namespace, known: list[Row]) -> Iterator[Row]:
    """A row for each network, scheme, technique and seed that is not `known`."""
    with TARGET.open() as file:
        target: Target = coerce(yaml.safe_load(file), Target, "target")
    done = {(row["net"], row["scheme"], row["technique"], row["seed"]) for row in known}
    for name in arguments.nets:
        for seed in arguments.seeds:
            asked = [(s, t) for s in arguments.schemes for t in arguments.techniques if (name, s, t, seed) not in done]
            if not asked:
                continue
            of = net(name, arguments.folder, arguments.samples, arguments.judged, seed)
            (outputs,) = run(of.model, of.evaluation.arrays, batch_size=50, quantized=False).values()
            reference = np.asarray(outputs.reshape(-1, outputs.shape[-1]), np.float64)
            cases = {scheme: Case(of, SCHEMES[scheme], target, seed) for scheme in arguments.schemes}
            for scheme, technique in asked:
                begun = time.process_time()
                model = TECHNIQUES[technique](cases[scheme])
                spent = time.process_time() - begun
                found, decibels = judged(of, model, reference)
                yield {
                    "net": name, "scheme": scheme, "technique": technique, "seed": seed, "score": found,
                    "sqnr_db": decibels, "float": score(of, reference), "cpu_s": spent, "samples": arguments.samples,
                }  # fmt: skip


def table(rows: list[Row]) -> Iterator[str]:
    """Markdown: a block for each network, a line for each technique, a column for each scheme."""
    for name in dict.fromkeys(row["net"] for row in rows):
        own = [row for row in rows if row["net"] == name]
        schemes = list(dict.fromkeys(row["scheme"] for row in own))
        seeds = len({row["seed"] for row in own})
        what = "perplexity" if name == "decoder" else "%"
        yield f"\n| {name}, float {own[0]['float']:.2f} {what}, {seeds} seeds | {' | '.join(schemes)} |"
        yield f"|---|{'---|' * len(schemes)}"
        for technique in dict.fromkeys(row["technique"] for row in own):
            cells = ([r for r in own if (r["technique"], r["scheme"]) == (technique, scheme)] for scheme in schemes)
            yield f"| {technique} | {' | '.join(map(cell, cells))} |"


def cell(rows: list[Row]) -> str:
    """`score (dB)`, the medians."""
    if not rows:
        return ""
    middle = {key: statistics.median(row[key] for row in rows) for key in ("score", "sqnr_db")}
    return f"{middle['score']:.2f} ({middle['sqnr_db']:.1f})"


def main() -> None:
    """Reads the command line; prints each row as it is known, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where trained networks lie, or come to lie")
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=NETS)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES)
    parser.add_argument("--techniques", nargs="+", default=list(TECHNIQUES), choices=TECHNIQUES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=512, help="to calibrate and tune on (default 512)")
    parser.add_argument("--judged", type=int, default=2000, help="to judge on (default 2000)")
    parser.add_argument("--json", type=Path, help="the rows: read before, written after each new one")
    parser.add_argument("--markdown", type=Path, help="the table, besides being printed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else []
    for row in measured(arguments, list(rows)):
        rows.append(row)
        print(json.dumps(row), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1))
    text = "\n".join(table(rows))
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text + "\n")


if __name__ == "__main__":
    main()
