"""What ships: qpipe's int8 file beside those of onnxruntime's quantize_static, over float, on one thread, batch 1.

    OMP_NUM_THREADS=1 python -m benchmarks.deployed [NAME ...] [--seconds 2] [--draws 3] [--json FILE] [--nodes]
                                                    [--peers PEER ...]

All make the file from the same float model and calibration samples: qpipe by prepare, bnf, calibrate and export, W8A8,
minmax; quantize_static in QDQ form with uint8 activations and int8 weights, per tensor and per channel, minmax, after
quant_pre_process.

latency    processor time of a run on one thread, the median of rounds in which all take turns, over the float file's
size       bytes of the file over those of the float one; in the last column over those of quantize_static's file, per
           channel
integer    Conv, ConvTranspose, MatMul and Gemm on integer kernels in onnxruntime's optimized graph, of all
dB         signal to noise of the outputs against the float file's, on other samples; the output with the least
agree      how far the file decides as the float one does on those: classes, pixels, text, boxes (benchmarks/agreement)

Both are means over files from `--draws` sets of calibration samples: with one they differ by as much as 5 dB from
another. Of the first set are the other figures.

`--peers` adds other quantizers, from environments that are made for them: benchmarks/peers.py.

`--nodes` prints, for each file, the operators that are left in float beside a rounding.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from benchmarks.peers import PINS, peer_file
from benchmarks.published import CACHE, CALIBRATION, CASES, EVALUATION, Array, Arrays, Case
from qpipe.deployed.session import open_file
from qpipe.methods.placement.target import Target
from qpipe.model import Model
from qpipe.model.files.given import fix_shapes
from qpipe.model.files.onnx_reader import read_onnx
from qpipe.model.files.onnx_writer import write_onnx
from qpipe.model.qdq.writer import qdq_model
from qpipe.model.runtime.kernels import kernels
from qpipe.numerics.metrics import sqnr_db
from qpipe.numerics.scheme import Scheme, TensorScheme
from qpipe.stage import Samples
from qpipe.stages.bnf import bnf
from qpipe.stages.calibrate import calibrate
from qpipe.stages.load_model import load_model
from qpipe.stages.prepare import prepare
from tests.model.quantized import shipped

W8A8 = Scheme(TensorScheme(8, True, True, "auto"), TensorScheme(8, False, False))


def feeds(case: Case, arrays: Arrays, names: list[str]) -> list[Arrays]:
    """One dictionary a sample, as a session takes it."""
    count = len(next(iter(arrays.values())))
    moved = {name: np.moveaxis(arrays[name], 0, case.batch_axis.get(name, 0)) for name in names}
    return [
        {name: np.ascontiguousarray(moved[name].take([i], case.batch_axis.get(name, 0))) for name in names}
        for i in range(count)
    ]


def outputs(path: Path, samples: list[Arrays]) -> list[Array]:
    runs = open_file(path, 1)
    found = [runs.run(None, sample) for sample in samples]
    return [np.stack([each[i] for each in found]) for i in range(len(found[0]))]


def qpipe_file(model: Model, data: Samples, target: Target, path: Path) -> None:
    write_onnx(qdq_model(calibrate(bnf(prepare(model, data)), data, scheme=W8A8, target=target)), path)


class _Reader(CalibrationDataReader):
    def __init__(self, samples: list[Arrays]) -> None:
        self.samples = iter(samples)

    def get_next(self) -> Arrays | None:
        return next(self.samples, None)


def static_file(source: Path, samples: list[Arrays], per_channel: bool, path: Path) -> None:
    """What quantize_static makes of `source`, which is first brought to an opset that has scales per channel."""
    proto = onnx.load(source)
    opset = next(each.version for each in proto.opset_import if each.domain in ("", "ai.onnx"))
    if opset < 13:
        proto = onnx.version_converter.convert_version(proto, 17)
    prepared = path.with_suffix(".prepared.onnx")
    onnx.save(proto, prepared)
    try:
        quant_pre_process(str(prepared), str(prepared), auto_merge=True)
    except Exception:  # its symbolic shapes do not take every model
        quant_pre_process(str(prepared), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared), str(path), _Reader(samples), quant_format=QuantFormat.QDQ, per_channel=per_channel,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip


def layers(path: Path) -> tuple[float, dict[str, int]]:
    """The share of layers on integer kernels, and the operators in float beside a rounding, counted."""
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        open_file(path, 1, optimized=optimized)
        found = kernels(onnx.load(path), onnx.load(optimized, load_external_data=False))
    left: Counter[str] = Counter()
    for row in found["in_float"]:
        left[row["op_type"]] += row["count"] * ("->" in row["form"])
    return found["layers"]["integer"] / max(1, found["layers"]["all"]), dict((+left).most_common())


def latencies(paths: dict[str, Path], samples: list[Arrays], seconds: float) -> dict[str, float]:
    """Processor seconds of a run of each, all taking turns for about `seconds` each, in another order each time: after
    a large file the caches are cold."""
    runs = {name: open_file(path, 1) for name, path in paths.items()}
    order, draw = list(runs.items()), random.Random(0)
    found: dict[str, list[float]] = {name: [] for name in runs}
    started, turn = time.process_time(), 0
    while turn < 8 or time.process_time() - started < seconds * len(runs):
        sample = samples[turn % len(samples)]
        draw.shuffle(order)
        for name, each in order:
            before = time.process_time()
            each.run(None, sample)
            found[name].append(time.process_time() - before)
        turn += 1
    return {name: statistics.median(times[3:]) for name, times in found.items()}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        yield
        logging.disable(logging.NOTSET)


def fixed(case: Case, source: Path, path: Path) -> Path:
    """`source` with the shapes of `case` for a batch of one, as quantize_static wants them."""
    if case.inputs or not case.shapes:
        return source
    model = read_onnx(source)
    fix_shapes(model, {name: [1 if dim == "n" else dim for dim in shape] for name, shape in case.shapes.items()})
    for value in model.graph.outputs:
        value.shape = None
    write_onnx(model, path)
    return path


def measure(
    name: str, target: Target, seconds: float, draws: int, folder: Path, peers: list[str]
) -> dict[str, Any]:
    """All figures of one model; a file that could not be made has its error instead."""
    row, *others = (drawn(name, target, folder / str(i), i, seconds * (i == 0), peers) for i in range(draws))
    for maker in ("qpipe", "static", "static_per_channel", *peers):
        every = [each[maker] for each in (row, *others)]
        if not any("error" in each for each in every):
            row[maker] |= {f"{what}_drawn": [each[what] for each in every] for what in ("sqnr_db", "agree")}
            row[maker] |= {what: statistics.fmean(row[maker][f"{what}_drawn"]) for what in ("sqnr_db", "agree")}
    return row


def drawn(
    name: str, target: Target, folder: Path, draw: int, seconds: float, peers: list[str]
) -> dict[str, Any]:
    """The figures of the files from one set of calibration samples, which lie in `folder`; without `seconds` of
    latencies."""
    folder.mkdir(parents=True, exist_ok=True)
    case = CASES[name]
    source = case.path(CACHE)
    calibration, evaluation = case.data(CALIBRATION, 1 if draw == 0 else 10 + draw), case.data(EVALUATION, 2)
    names = list(calibration)
    data = Samples(calibration)
    model = Model.of(load_model(data, path=source, inputs=case.inputs, shapes=case.shapes))
    plain = source
    if case.inputs:  # what the file takes beside the data
        plain = model.save(folder / "float")
    samples = feeds(case, calibration, names)
    makers: dict[str, Callable[[Path], None]] = {
        "qpipe": lambda path: qpipe_file(model, data, target, path),
        "static": lambda path: static_file(fixed(case, plain, folder / "fixed.onnx"), samples, False, path),
        "static_per_channel": lambda path: static_file(
            fixed(case, plain, folder / "fixed.onnx"), samples, True, path
        ),
    }
    given = folder / "samples.npz"
    np.savez(given, **{name: np.stack([sample[name] for sample in samples]) for name in samples[0]})  # type: ignore[arg-type]
    for peer in peers:
        makers[peer] = lambda path, peer=peer: peer_file(  # type: ignore[misc]
            peer, CACHE, fixed(case, plain, folder / "fixed.onnx"), given, path, case.transformer
        )
    row: dict[str, Any] = {"model": name, "float_bytes": plain.stat().st_size}
    paths, told = {"float": plain}, feeds(case, evaluation, names)
    wanted = outputs(plain, told)
    for maker, make in makers.items():
        path = folder / f"{maker}.onnx"
        try:
            with quiet():
                make(path)
                found = outputs(path, told)
        except Exception as error:  # whatever a peer, or qpipe, makes of the model is a result
            row[maker] = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"}
            continue
        share, left = layers(path)
        row[maker] = {
            "size": path.stat().st_size / row["float_bytes"],
            "integer": share,
            "sqnr_db": min(map(sqnr_db, found, wanted)),
            "agree": case.agree(*([each[:, 0] for each in outputs] for outputs in (wanted, found))),
            "left": left,
        }
        paths[maker] = path
    if not seconds:
        return row
    times = latencies(paths, told, seconds)
    row["float_ms"] = 1e3 * times["float"]
    sizes = [row[maker].get("size") for maker in ("qpipe", "static_per_channel")]
    row["size_over_static"] = None if None in sizes else sizes[0] / sizes[1]
    for maker in paths.keys() - {"float"}:
        row[maker]["latency"] = times[maker] / times["float"]
    return row


WHO = {"qpipe": "qpipe", "static": "static", "static_per_channel": "per channel"}
WHAT = {"latency": ".2f", "size": ".2f", "integer": ".2f", "sqnr_db": ".1f", "agree": ".3f"}


OVER = "qpipe's size over per channel's"


def header(peers: list[str]) -> list[str]:
    who = (*WHO.values(), *peers)
    return ["model", "float ms", *(f"{each}: {what.replace('sqnr_db', 'dB')}" for each in who for what in WHAT), OVER]


def cells(row: dict[str, Any], peers: list[str]) -> list[str]:
    found = [row["model"], f"{row['float_ms']:.2f}"]
    for maker in (*WHO, *peers):
        each = row[maker]
        if "error" in each:
            found += [f"{each['error'][:60]}", *["–"] * (len(WHAT) - 1)]
        else:
            found += [format(each[what], form) for what, form in WHAT.items()]
    over = row["size_over_static"]
    return [*found, "–" if over is None else f"{over:.3f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(CASES), metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring, for each file")
    parser.add_argument("--draws", type=int, default=3, help="sets of calibration samples")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peers", nargs="+", default=[], choices=list(PINS))
    parser.add_argument("--nodes", action="store_true")
    parser.add_argument("--keep", type=Path, help="a folder for the files")
    arguments = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    target: Target = shipped(Target, "target", "onnxruntime")
    titles = header(arguments.peers)
    print("| " + " | ".join(titles) + " |")
    print("|" + "---|" * len(titles))
    rows = []
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) if arguments.keep is None else arguments.keep / name.replace(" ", "_")
            folder.mkdir(parents=True, exist_ok=True)
            rows.append(measure(name, target, arguments.seconds, arguments.draws, folder, arguments.peers))
        print("| " + " | ".join(cells(rows[-1], arguments.peers)) + " |", flush=True)
        for maker in (*WHO, *arguments.peers) if arguments.nodes else ():
            print(f"    {maker}: {rows[-1][maker].get('left') or rows[-1][maker]}", file=sys.stderr)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
