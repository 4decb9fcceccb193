"""A model over samples: batches that fit its inputs go in, its outputs come out by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np

from qpipe.errors import InputError
from qpipe.model.runtime.session import make_session
from qpipe.model.simulation.module import to_torch
from qpipe.model.simulation.samples import Array, batch_axes, batches, by_sample, sample_count

if TYPE_CHECKING:
    from qpipe.model.network.network import Network

Backend = Literal["simulation", "onnxruntime"]


def run(
    model: Network,
    arrays: Mapping[str, Array],
    *,
    batch_size: int = 32,
    quantized: bool = True,
    backend: Backend = "simulation",
    device: str = "cpu",
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Array]:
    """The model's outputs over the samples, by name, each (n, ...).

    `simulation` is the torch module, `onnxruntime` the QDQ graph with all optimizations, as it is deployed;
    `quantized=False` runs the float model. Raises InputError for data that do not fit.
    """
    infer = (
        _simulation(model, quantized, device)
        if backend == "simulation"
        else _onnxruntime(model, quantized, threads)
    )
    total = sample_count(model, arrays)
    axes = batch_axes(model)
    size = 1 if None in axes.outputs else batch_size
    names = [spec.name for spec in model.outputs]
    parts: dict[str, list[Array]] = {name: [] for name in names}
    done = 0
    for batch in batches(model, arrays, size):
        fed = axes.size or batch.count
        for name, axis, output in zip(names, axes.outputs, infer(batch.arrays), strict=True):
            found = by_sample(output, axis, fed)
            if found is None and axes.size is None:  # nothing says which dimension is theirs: one by one
                return run(
                    model, arrays, batch_size=1, quantized=quantized, backend=backend,
                    device=device, threads=threads, progress=progress,
                )  # fmt: skip
            if found is None:  # one value for a batch whose size the file fixes: it is that of each of its samples
                found = np.broadcast_to(output, (fed, *output.shape))
            parts[name].append(found[: batch.count])
        done += batch.count
        if progress:
            progress(done, total)
    return {name: _joined(name, outputs) for name, outputs in parts.items()}


def _joined(name: str, outputs: list[Array]) -> Array:
    """The output of all samples. Raises InputError where they give different shapes."""
    shapes = {output.shape[1:] for output in outputs}
    if len(shapes) > 1:
        found = " and ".join(str(list(shape)) for shape in sorted(shapes)[:2])
        raise InputError(
            f"The model's output '{name}' has another shape for other samples ({found}), so that nothing compares it. "
            "Leave it out of the model, or what makes it so, such as a non-maximum suppression at the end."
        )
    return np.concatenate(outputs)


def _simulation(model: Network, quantized: bool, device: str) -> Callable[[tuple[Array, ...]], list[Array]]:
    import torch

    from qpipe.model.simulation.constants import output_of, taken_in

    module = to_torch(model, quantized=quantized, device=device, shared=True)

    def infer(arrays: tuple[Array, ...]) -> list[Array]:
        with torch.inference_mode():
            outputs = module(*(taken_in(array, device) for array in arrays))
        found = outputs if isinstance(outputs, tuple | list) else (outputs,)
        return [output_of(output.cpu()) for output in found]

    return infer


def _onnxruntime(
    model: Network, quantized: bool, threads: int | None
) -> Callable[[tuple[Array, ...]], list[Array]]:
    session = make_session(model, mode="deploy", quantized=quantized, threads=threads)
    names = [spec.name for spec in model.inputs]

    def infer(arrays: tuple[Array, ...]) -> list[Array]:
        outputs: list[Array] = session.run(None, dict(zip(names, arrays, strict=True)))
        return outputs

    return infer
