"""Other quantizers for `benchmarks/deployed.py --peers`, each in an environment of its own with what is pinned here.

    peer     pins                                     how it is called
    nncf     nncf==3.2.0                              nncf.quantize, mixed preset; transformers with its model type
    quark    amd-quark==0.13, torch==2.13.0           U8S8_AAWS, as documented for CPUs

The environments lie beside the published models and are made when they are first asked for. Run as a script by an
environment's own Python, this file makes one file: `peers.py PEER SOURCE SAMPLES OUT [transformer]`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

PINS = {
    "nncf": ("nncf==3.2.0", "onnx==1.23.2", "onnxruntime==1.32.0"),
    "quark": ("torch==2.13.0", "amd-quark==0.13", "onnx==1.22.0", "onnxruntime==1.32.0"),
}


def python_of(peer: str, cache: Path) -> Path:
    """The Python of the peer's environment, which is made where there is none."""
    place = cache / f"peer-{peer}"
    if not (place / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True)
        for pin in PINS[peer]:  # one after another, so that torch is the one that is asked for
            subprocess.run([place / "bin" / "pip", "install", "-q", pin], check=True, capture_output=True)
        (place / "ready").touch()
    return place / "bin" / "python"


def peer_file(peer: str, cache: Path, source: Path, samples: Path, path: Path, transformer: bool) -> None:
    """Have `peer` quantize the file `source` by the samples of an npz file, one after another, into the file `path`.

    RuntimeError, with the last line that it printed, where it does not."""
    files = (Path(__file__), source, samples, path)
    script, *places = (str(each.resolve()) for each in files)
    command = [str(python_of(peer, cache)), script, peer, *places, *(["transformer"] * transformer)]
    # A peer may write reports of its own where it runs.
    done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True)
    if done.returncode or not path.exists():
        raise RuntimeError((done.stderr.strip().splitlines() or ["no file"])[-1])


def _nncf(source: str, samples: list[dict[str, Any]], path: str, transformer: bool) -> None:
    import nncf
    import onnx

    made = nncf.quantize(
        onnx.load(source), nncf.Dataset(samples), subset_size=len(samples), preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER if transformer else None,
    )  # fmt: skip
    onnx.save(made, path)


def _quark(source: str, samples: list[dict[str, Any]], path: str, transformer: bool) -> None:
    from onnxruntime.quantization import CalibrationDataReader
    from quark.onnx import ModelQuantizer
    from quark.onnx.quantization.config import Config, get_default_config

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(samples)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.left, None)

        def reset_iter(self) -> None:
            self.left = iter(samples)

    config = Config(global_quant_config=get_default_config("U8S8_AAWS"))
    ModelQuantizer(config).quantize_model(source, path, Reader())


def main(peer: str, source: str, data: str, path: str, *how: str) -> None:
    import numpy as np

    arrays = dict(np.load(data))
    count = len(next(iter(arrays.values())))
    samples = [{name: array[i] for name, array in arrays.items()} for i in range(count)]
    {"nncf": _nncf, "quark": _quark}[peer](source, samples, path, "transformer" in how)


if __name__ == "__main__":
    main(*sys.argv[1:])
