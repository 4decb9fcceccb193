"""An exported file against the float model that it was made of, in onnxruntime, in a process of its own:

    python -m qpipe.deployed.measurement        a request on standard input, lines of JSON on standard output

`{"progress": [done, total, what]}` on the way, at the end `{"found": …}` as `measure` returns it, or `{"error": why}`.
The float model is the network as it was loaded, written as float ONNX; both run on the same batch.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpipe.artifacts.artifact import Artifact, load
from qpipe.errors import InputError
from qpipe.run.machine import load_late
from qpipe.run.workers import open_at

if TYPE_CHECKING:
    from qpipe.artifacts.kinds import Files, Samples
    from qpipe.cache.store import Store
    from qpipe.model.network.network import Network
    from qpipe.model.runtime.options import Session

Tell = Callable[[int, int, str], None]
"""Hears of (done, total, what)."""
MODEL = "model.onnx"


def measure(request: Mapping[str, Any], store: Store, tell: Tell) -> dict[str, Any]:
    """What the request asks for: `size_bytes` and, where it is `timed`, `latency_s` and `peak_bytes`, each also with
    `float_` in front, `kernels`, and `batch`, the samples in one run. Errors: those of onnxruntime, InputError for
    samples that do not fit."""
    files: Files = load(Artifact(*request["exported"]), store)
    network: Network = load(Artifact(*request["float"]), store)
    with tempfile.TemporaryDirectory(prefix="qpipe-") as name:
        pair = {"float_": Path(name) / "float" / MODEL, "": Path(name) / "exported" / MODEL}
        _write(network, files, pair)
        found = {f"{which}size_bytes": _size(path) for which, path in pair.items()}
        if request["timed"]:
            data: Samples | None = load(Artifact(*request["data"]), store) if request["data"] else None
            found |= _in_onnxruntime(network, data, pair, request["threads"], tell)
    return found


def _write(network: Network, files: Files, pair: Mapping[str, Path]) -> None:
    from qpipe.model.files.onnx_writer import write_onnx

    for path in pair.values():
        path.parent.mkdir()
    write_onnx(network.ir, pair["float_"])
    for name in files.contents:
        if name.startswith(MODEL):  # its data beside it, too
            (pair[""].parent / name).write_bytes(files.read(name))


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.parent.iterdir())


def _in_onnxruntime(
    network: Network, data: Samples | None, pair: Mapping[str, Path], threads: int | None, tell: Tell
) -> dict[str, Any]:
    import numpy as np
    import onnx

    from qpipe.deployed.memory import peak_bytes
    from qpipe.deployed.session import fed, open_file
    from qpipe.deployed.timing import alternated
    from qpipe.model.runtime.kernels import kernels
    from qpipe.model.runtime.options import place
    from qpipe.model.simulation.samples import batch_axes

    folder = pair[""].parent.parent
    optimized = folder / "optimized.onnx"
    libraries = [str(place(library)) for library in network.facts.custom_ops]
    sessions = [
        open_file(pair["float_"], threads, libraries),
        open_file(pair[""], threads, libraries, optimized),
    ]
    feed = _feed(network, data, sessions[0])
    runs = [partial(fed, session, feed) for session in sessions]
    taken = alternated(runs, lambda done, total: tell(done, total, "latency"))
    runs.clear()
    sessions.clear()
    np.savez(folder / "feed.npz", **feed)
    tell(0, 1, "memory")
    peaks = [peak_bytes(path, folder / "feed.npz", threads, libraries) for path in pair.values()]
    return {
        **{f"{which}latency_s": seconds for which, seconds in zip(pair, taken, strict=True)},
        **{f"{which}peak_bytes": size for which, size in zip(pair, peaks, strict=True)},
        "batch": batch_axes(network).size or 1,
        "kernels": kernels(*(onnx.load(path, load_external_data=False) for path in (pair[""], optimized))),
    }


def _feed(network: Network, data: Samples | None, session: Session) -> dict[str, Any]:
    """The first batch of `data`, else inputs made up in a size that the model runs on; text as numpy can write it."""
    from qpipe.deployed.session import fed
    from qpipe.methods.comparison.inputs import trial_inputs

    said: Exception | None = None
    for found in trial_inputs(network, None if data is None else data.arrays, batch=1):
        feed = {name: array.astype(str) if array.dtype == object else array for name, array in found.items()}
        try:
            fed(session, feed)
        except Exception as error:  # onnxruntime's errors have no common type
            said = error
        else:
            return feed
    raise said or InputError("no inputs of such a size are made up")


def main() -> None:
    """One request, answered."""

    def say(**line: Any) -> None:
        print(json.dumps(line), flush=True)

    request = json.loads(sys.stdin.readline())
    load_late()
    try:
        with open_at(request["store"]) as store:
            say(found=measure(request, store, lambda done, total, what: say(progress=[done, total, what])))
    except Exception as error:  # whatever it is, it is told in one line
        say(error=(str(error).strip().splitlines() or [type(error).__name__])[0])


if __name__ == "__main__":
    main()
