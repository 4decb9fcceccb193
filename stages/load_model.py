"""Bring a model in, from an ONNX file or from torch, in the one canonical form; and show that it computes the same.

The import is held against its source on random inputs: onnxruntime on the source, onnxruntime on the canonical form,
and the torch module that simulation runs on. A torch module is the source itself, on its example inputs and on the
first samples.

    max |y - y'| / max |y| <= 1e-4        or the model is refused, with the first node that differs

Assumes: an ONNX file whose external data lie beside it; a Python function that returns an nn.Module, or the
module and its example inputs. Without example inputs, the first sample on the port `data` serves.
Source: own.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpipe.errors import InputError
from qpipe.param import load_factory
from qpipe.stage import NULL, Context, Factory, Samples, stage

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from qpipe.model.network.network import Network

    Arrays = dict[str, NDArray[Any]]


def built(factory: str) -> tuple[torch.nn.Module, Any]:
    """The module that `module:function` returns, and its example inputs or None. Errors: InputError."""
    import torch

    returned = load_factory(factory)()
    module, example = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, None)
    if not isinstance(module, torch.nn.Module):
        raise InputError(
            f"{factory} returned {type(module).__name__}; it has to return an nn.Module, or (module, example_inputs)."
        )
    return module, example


def example_from(module: torch.nn.Module, data: Samples | None, factory: str) -> Any:
    """The first sample, by argument name where the names are those of `forward`, else as the only argument."""
    if data is None:
        raise InputError(
            f"{factory} returned no example inputs, and no samples are wired. Return (module, example_inputs)."
        )
    sample = {name: array[:1].copy() for name, array in data.arrays.items()}
    if set(sample) <= set(inspect.signature(module.forward).parameters):
        return sample
    if len(sample) == 1:
        return tuple(sample.values())
    arguments = ", ".join(inspect.signature(module.forward).parameters)
    raise InputError(
        f"The samples hold {', '.join(sample)}, but {type(module).__name__} takes {arguments}. Name them alike."
    )


def from_module(module: torch.nn.Module, example: Any, data: Samples | None) -> Network:
    """The module as a model; a single input takes the name that the samples give it."""
    from qpipe.model.torch_export.exporter import from_torch

    model = from_torch(module, example)
    names = list(data.arrays) if data is not None else []
    if len(names) == len(model.inputs) == 1 and names[0] != model.inputs[0].name:
        model = from_torch(module, example, input_names=names)
    return model


def refuse(name: str, error: float, difference: Mapping[str, Any] | None) -> None:
    """Raise InputError for an import that does not compute what its source does."""
    where = ""
    if difference is not None:
        where = (
            f" The first node that differs is '{difference['node']}' ({difference['op_type']}), by "
            f"{difference['error']:.1e} in '{difference['value']}'."
        )
    raise InputError(
        f"The import of {name} computes something else than its source: outputs off by {error:.1e}.{where}"
    )


def refuse_sources(given: Mapping[str, Any]) -> None:
    """Errors: InputError unless exactly one of path and factory is given; weights go with a factory."""
    path, factory = given["path"], given["factory"]
    if (path is None) == (factory is None):
        raise InputError(
            f"load_model takes either path or factory, got {'both' if path else 'none of them'}."
        )
    if path is not None and given["reads"]:
        raise InputError("`reads` goes with `factory`; an ONNX file counts by its content anyway.")
    if path is not None and given["weights"] is not None:
        raise InputError("`weights` go with `factory`; an ONNX file holds its own.")


def from_file(path: Path) -> tuple[Network, float]:
    """The model in an ONNX file, and how far its outputs are off, relative. Errors: InputError where that is much."""
    from qpipe.methods.comparison.check import verify_import
    from qpipe.model.canon.form import canonical_network
    from qpipe.model.files.onnx_reader import read_onnx

    model = canonical_network(read_onnx(path))
    found = verify_import(model, path)
    error: float = max(found["onnxruntime"], found["torch"])
    if not found["equal"]:
        refuse(path.name, error, found["first_difference"])
    return model, error


def from_factory(factory: str, weights: Path | None, data: Samples | None) -> tuple[Network, float | None]:
    """The model that `module:function` builds, with its parameters or `weights`, and how far its outputs are off,
    relative; None where the module's code does not run in float32. Errors: InputError where that is much."""
    from qpipe.model.files.state_dict import fill, read_weights
    from qpipe.model.torch_export.fidelity import check

    module, example = built(factory)
    if weights is not None:
        fill(module, read_weights(weights), weights.name)
    example = example_from(module, data, factory) if example is None else example
    model = from_module(module, example, data)
    return model, check(module, example, model, None if data is None else data.arrays, deployed=True)


@stage(version=1, check=refuse_sources)
def load_model(
    data: Samples | None = None,
    *,
    path: Path | None = None,
    factory: Factory | None = None,
    reads: tuple[Path, ...] = (),
    weights: Path | None = None,
    encodings: Path | None = None,
    ctx: Context = NULL,
) -> Network:
    """The model in an ONNX file (`path`), or the one that a Python function builds (`factory`), canonical.

    A file in QDQ form gives the float model with its grids: those of weights stay in every later stage, those of
    activations until `calibrate` makes new ones.

    `reads` names the files and folders that the factory opens by itself, so that their content counts.
    `weights` (.safetensors, or a state dict saved by torch) replace a torch module's parameters. `data` give the
    example where the factory returns none, and the name of a single input. `encodings` is a file in AIMET's format
    (0.6.1, 1.0.0 or 2.0.0), whose grids take the place of the model's own. Errors: InputError for a file or a module
    that cannot be taken, for weights that do not fit, and for an import that computes something else.
    """
    refuse_sources(locals())
    from qpipe.model.files.encodings_reader import with_encodings_file

    error: float | None
    if path is not None:
        model, error = from_file(path)
    else:
        assert factory is not None
        model, error = from_factory(factory, weights, data)
    for note in model.metadata.get("notes", []):
        ctx.note(note)
    if encodings is not None:
        model = with_encodings_file(model, encodings)
    if model.encodings:
        kept = sum(encoding.frozen for encoding in model.encodings.values())
        ctx.note(
            f"It came quantized: {kept} weights and {len(model.encodings) - kept} activations have grids. "
            "Those of the weights stay."
        )
    if error is None:
        ctx.note("The module's code does not run in float32, so the import is not held against it.")
    else:
        ctx.note(f"The import computes what its source does, to {error:.1e} (relative).")
    return model
