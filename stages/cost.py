"""What the exported model would cost to run, as a share of float: by its graph, so that it is the same everywhere.

    cost = time(onnxruntime's graph of the QDQ file) / time(its graph of the float model)

with time as qpipe.methods.running_cost counts it: multiplications by what they are carried out on, conversions between
floats and codes, what stays in float, a start for every operator. It knows no machine, so it can be cached, and chooses
nothing; what this machine takes is measured when a run ends (docs/deployed.md).

    bitops = sum over the multiplications of the layers of  bits of the one factor * bits of the other  over float's

say what an engine could save that has a kernel for every bitwidth.

Assumes: onnxruntime on a CPU, for `cost`. For another target it is a guess. Source: own; the fusions are onnxruntime's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qpipe.errors import StageError
from qpipe.stage import NULL, Context, Samples, Scores, stage

if TYPE_CHECKING:
    from pathlib import Path

    from qpipe.methods.running_cost import Running
    from qpipe.model.network.network import Network


def weighed(model: Network, data: Samples, folder: Path) -> tuple[Running, int]:
    """What running the model takes, written to `folder`, for the first of the samples; and the bytes of its files."""
    from qpipe.methods.comparison.inputs import trial_inputs
    from qpipe.methods.running_cost import running
    from qpipe.model.files.onnx_writer import write_deployed
    from qpipe.model.runtime.optimized import optimized, shapes

    folder.mkdir()
    path = folder / "model.onnx"
    write_deployed(model, path)
    size = sum(file.stat().st_size for file in folder.iterdir())
    graph = optimized(path, model.facts.custom_ops)
    feed = next(trial_inputs(model, data.arrays, batch=1))
    return running(graph, shapes(graph, folder, feed, model.facts.custom_ops)), size


MEMORY = ("allocate memory", "bad_alloc", "bad allocation", "out of memory")
"""What onnxruntime says, in whatever class of error, where the memory at hand was too little."""


def of_the_moment(error: Exception) -> bool:
    """Whether another try may go better: it failed for want of memory, or of a place for files."""
    return isinstance(error, MemoryError | OSError) or any(words in str(error).lower() for words in MEMORY)


@stage(version=1, config={"data": "calibration"})
def cost(model: Network, float_model: Network, data: Samples, *, ctx: Context = NULL) -> Scores:
    """`cost`, the time that running the model is counted with, `size`, the bytes of its file, and `bitops`, its bit
    operations, as shares of those in float; `on_integers`, the share of its multiplications there, and `conversions`
    between floats and codes.

    `data` say how large the values are: the first sample is run once, with the memory of a run. Where onnxruntime does
    not load or run what was written, `cost` is null, and a note says why. Errors: StageError for want of memory or of
    a place for files, which is no answer to be kept.
    """
    import tempfile
    from pathlib import Path

    import numpy as np

    from qpipe.methods.mixing.products import bitops_share

    plain = float_model.with_encodings({})
    meta, blobs = plain.pack()
    tensors = {name: np.frombuffer(blob, np.uint8) for name, blob in blobs.items()}
    first = {name: array[:1] for name, array in data.arrays.items()}

    def of_float(*_: Any) -> list[float]:
        with tempfile.TemporaryDirectory() as name:
            found, size = weighed(plain, data, Path(name) / "float")
        return [found.time_us, float(size)]

    def own(folder: Path) -> dict[str, Any]:
        time_us, float_bytes = ctx.memo("float", of_float, meta, tensors, first)
        found, size = weighed(model, data, folder / "own")
        return {
            "cost": found.time_us / time_us,
            "size": size / float_bytes,
            "bitops": bitops_share(model, first),
            "on_integers": found.on_integers / max(1, found.products),
            "conversions": found.conversions,
            "time_us": found.time_us,
        }

    with tempfile.TemporaryDirectory() as name:
        try:
            return Scores(own(Path(name)))
        except Exception as error:  # onnxruntime has no class of its own; what a step costs is no reason to end a run
            said = " ".join(str(error).split())[:300]
            if of_the_moment(error):
                told = f"What the model costs could not be seen: {said}. Run again, or leave 'cost' out."
                raise StageError(told) from error
            ctx.note(f"Cost unknown: {said}")
            return Scores({"cost": None})
