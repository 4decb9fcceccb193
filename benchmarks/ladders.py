"""What each pipeline makes of small trained networks, scheme by scheme: nothing may end below what is plainer.

    python -m benchmarks.ladders [NAME ...] [--schemes w8a8 w4a8 w4a4 w3 w2] [--seed 0] [--json FILE] [--folder FOLDER]

nearest     the model as the plainest step of pipeline=ptq leaves it: bnf, calibrate
ptq         what pipeline=ptq exports, scored on all of the evaluation; adaround the same
dropped     the steps of both that held-out samples did not gain by
autoquant   what pipeline=autoquant exports with goal.max_drop=0.003, and its cost as a share of float

All scores are of the evaluation, which no choice of ptq and adaround looks at. Networks are trained once, and kept in
the folder. w8a8 has one scale per tensor, the others one per channel. The decoder is scored by perplexity, the encoder
by the cosine of its vectors with float's, in per cent. The last lines name what scores less than what is plainer.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.trained import trained, windows
from qpipe.demo.data import load
from qpipe.model import Model
from qpipe.model.files.onnx_writer import write_onnx
from tests.architectures import UNet
from tests.trained import ResNet, train, vit, waves, with_outliers

Arrays = dict[str, Any]
FOLDER = Path(os.environ.get("QPIPE_BENCHMARKS", Path.home() / ".cache" / "qpipe-benchmarks")) / "ladders"
FEW = ("scheme=w4a8", "scheme.weight.granularity=per_channel")
SCHEMES = {
    "w8a8": ["scheme=w8a8", "scheme.weight.granularity=per_tensor"],
    "w4a8": [*FEW],
    "w4a4": [*FEW, "scheme.activation.bitwidth=4"],
    "w3": [*FEW, "scheme.weight.bitwidth=3"],
    "w2": [*FEW, "scheme.weight.bitwidth=2"],
}


def classifier(build: Callable[[], nn.Module], epochs: int, seed: int) -> nn.Module:
    data = load("training")
    torch.manual_seed(seed)
    return train(build(), data["image"], data["labels"], epochs, seed=seed)


def denoiser(seed: int) -> nn.Module:
    """A U-Net that finds the picture under the noise; its four outputs are the colours and their mean."""
    clean = load("training")["image"][:4000]
    torch.manual_seed(seed)
    return train(UNet(), noisy(clean, 1), np.concatenate([clean, clean.mean(1, keepdims=True)], 1), 4)


def noisy(images: Any, seed: int) -> Any:
    return (images + 0.2 * np.random.default_rng(seed).standard_normal(images.shape)).astype(np.float32)


def likelihood(logits: Any, labels: Any) -> float:
    """The mean log-likelihood of the bytes that follow: minus the logarithm of perplexity."""
    shifted = logits - logits.max(-1, keepdims=True)
    found = np.take_along_axis(shifted, labels[..., None], -1)[..., 0] - np.log(np.exp(shifted).sum(-1))
    return float(found.mean())


NETS: dict[str, Callable[[int], nn.Module]] = {
    "ResNet": lambda seed: classifier(ResNet, 6, seed),
    "ViT": vit,
    "ViT, outliers": lambda seed: with_outliers(vit(seed)),
    "U-Net": denoiser,
}
TEXT = {"decoder": "benchmarks.ladders:likelihood", "encoder": "cosine"}
"""Those of benchmarks/trained.py, which have one seed, with their metrics."""


def samples(name: str, split: str) -> Arrays:
    """Pictures and, but for the U-Net, their labels; windows of text and, for the decoder, the bytes that follow."""
    if name in TEXT:
        ids, following = windows(split, *{"calibration": (500, 2), "evaluation": (500, 3)}[split])
        return {"image": ids} | ({"labels": following} if name == "decoder" else {})
    if name.startswith("ViT"):
        images, labels = waves(*{"calibration": (1000, 2), "evaluation": (2000, 3)}[split])
        return {"image": images, "labels": labels}
    data = load(split)
    return data if name != "U-Net" else {"image": noisy(data["image"][:500], 2)}


def prepared(name: str, folder: Path, seed: int = 0) -> list[str]:
    """The overrides that name the network and its data, which are made where they are not there."""
    if name == "built-in":
        return []
    path = folder / f"{name.replace(', ', '-')}{seed or ''}.onnx"
    if not path.exists():
        found = {split: samples(name, split) for split in ("calibration", "evaluation")}
        example = torch.from_numpy(found["calibration"]["image"][:2])
        model = trained(name, folder) if name in TEXT else Model.from_torch(NETS[name](seed), (example,))
        for split, arrays in found.items():
            images = {model.inputs[0].name: arrays.pop("image")}
            np.savez(path.with_suffix(f".{split}.npz"), **images, **arrays)
        write_onnx(model.ir, path)
    files = {split: path.with_suffix(f".{split}.npz") for split in ("calibration", "evaluation")}
    metric = ["goal.metric=sqnr_db", "goal.min_score=35"] if name == "U-Net" else []
    metric = [f"goal.metric={TEXT[name]}"] if name in TEXT else metric
    data = ["data=npz", *(f"data.{split}={file}" for split, file in files.items())]
    return ["model=onnx_file", f"model.path={path}", *data, *metric]


def records(pipelines: Sequence[str], overrides: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """The record of each pipeline, run as one sweep, whatever its status says of the goal."""
    run = folder / "run"
    places = [f"hydra.sweep.dir={run}", "hydra.sweep.subdir=${hydra.job.num}", "run.measure=false", "run.workers=0"]
    words = [sys.executable, "-m", "qpipe", "-m", f"pipeline={','.join(pipelines)}", *overrides, *places]
    done = subprocess.run(words, env=os.environ | {"QPIPE_CACHE_DIR": str(folder / "cache")}, capture_output=True)
    if done.returncode not in (0, 3):
        raise RuntimeError(done.stderr.decode() or done.stdout.decode()[-2000:])
    return {name: json.loads((run / str(i) / "record.json").read_text()) for i, name in enumerate(pipelines)}


def figures(found: dict[str, Any]) -> dict[str, Any]:
    rows = {row["node"]: row for row in found["ladder"]}
    return {
        "float": rows["score_float"]["score"],
        "nearest": rows["score_naive"]["score"],
        "best": found["best"]["score"],
        "deployed": found["goal"]["deployed"],
        "rows": {row["label"]: [row["score"], row.get("choice", {})] for row in found["ladder"]},
        "dropped": [row["label"] for row in found["ladder"] if row.get("choice", {}).get("fate") == "dropped"],
        "cost": next((row.get("cost") for row in found["ladder"] if row["best"]), None),
        "taken": next((row["label"] for row in found["ladder"] if row["best"]), None),
        "met": found["goal"]["met"],
        "cpu_s": found["totals"]["cpu_s"],
    }


def shown(value: float | None, name: str) -> str:
    if value is None:
        return "-"
    if name == "decoder":
        return f"{math.exp(-value):.3f}"
    return f"{value:.2f} dB" if name == "U-Net" else f"{100 * value:.2f}"


def behind(found: dict[str, Any]) -> Iterator[str]:
    """A sentence for each that scores less than what is plainer: there is noise in scores, too."""
    for name, runs in found.items():
        plainer = {"ptq": ("nearest", runs["ptq"]["nearest"]), "adaround": ("ptq", runs["ptq"]["best"])}
        for each, (than, score) in plainer.items():
            if runs[each]["best"] < score:
                net = name.rpartition(" ")[0]
                yield f"{name}: {each} has {shown(runs[each]['best'], net)}, {than} {shown(score, net)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["built-in", *NETS, *TEXT])
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--seed", type=int, default=0, help="of the networks' weights")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    print("| network | scheme | float | nearest | ptq | adaround | dropped | autoquant, 0.3 points | cost |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for name in options.names:
        given = prepared(name, options.folder, options.seed)
        for scheme in options.schemes:
            pipelines = ("ptq", "adaround", *(("autoquant",) if scheme == "w8a8" else ()))
            goal = [] if name == "U-Net" else ["goal.max_drop=0.003"]
            made = records(pipelines, [*given, *SCHEMES[scheme], *goal], options.folder)
            runs = {each: figures(record) for each, record in made.items()}
            found[f"{name} {scheme}"] = runs
            ptq, adaround, auto = runs["ptq"], runs["adaround"], runs.get("autoquant")
            cells = [shown(each, name) for each in (ptq["float"], ptq["nearest"], ptq["best"], adaround["best"])]
            dropped = "; ".join(dict.fromkeys([*ptq["dropped"], *adaround["dropped"]]))
            last = [f"{shown(auto['best'], name)} ({auto['taken']})", f"{auto['cost']:.2f}"] if auto else ["", ""]
            print("|", " | ".join([name, scheme, *cells, dropped, *last]), "|", flush=True)
            if options.json:
                options.json.write_text(json.dumps(found, indent=1))
    print("\n".join(behind(found)) or "None ends below what is plainer.")


if __name__ == "__main__":
    main()
