"""Bring a model in, from an ONNX file or from torch, in the one canonical form; and show that it computes the same.

The import is held against its source on samples, or on inputs made up in sizes that it runs on: onnxruntime on the
source, onnxruntime on the canonical form, and the torch module that simulation runs on. A torch module is the source
itself, on its example inputs and on the first samples.

    max |y - y'| / max |y|        above 1e-4 a note, with the first node that differs; above 1e-2, or four times what
                                  the source differs from itself with optimizations off and on, a refusal

Assumes: an ONNX file whose external data lie beside it; a Python function that returns an nn.Module, or the
module and its example inputs. Without example inputs, the first sample on the port `data` serves.
Source: own.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from qpipe.errors import InputError
from qpipe.param import listed, load_factory
from qpipe.stage import NULL, Context, Factory, Library, Range, Samples, stage

Shapes = dict[str, tuple[int | str | None, ...]]

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch
    from numpy.typing import NDArray

    from qpipe.methods.comparison.check import ImportCheck
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

    names = list(data.arrays) if data is not None else []
    return from_torch(module, example, only_input=names[0] if len(names) == 1 else None)


def judged(name: str, check: ImportCheck, tolerance: float | None) -> str:
    """What the check of an import says, in a sentence. Errors: InputError for one that computes something else than its
    source: off by more than `tolerance`, by default what no rounding explains."""
    if check.inputs is None:
        return (
            f"The import could not be held against its source, which onnxruntime runs on no made-up input "
            f"({check.reason}). With samples on the port `data` of load_model it can."
        )
    where = own = ""
    if check.first_difference is not None:
        node, kind, value, error = (check.first_difference[key] for key in ("node", "op_type", "value", "error"))
        where = f" The first node that differs is '{node}' ({kind}), by {error:.1e} in '{value}'."
    if check.own:
        own = f" Without optimizations and with all of them, the source differs from itself by {check.own:.1e}."
    if check.error > (check.bar if tolerance is None else tolerance):
        raise InputError(
            f"The import of {name} computes something else than its source: outputs off by {check.error:.1e}."
            f"{where}{own} `tolerance` of load_model says how much is allowed."
        )
    if check.equal:
        return f"The import computes what its source does, to {check.error:.1e} (relative)."
    return f"The import's outputs are off by {check.error:.1e} (relative) from its source's.{where}{own}"


def refuse_sources(given: Mapping[str, Any]) -> None:
    """Errors: InputError unless exactly one of path and factory is given; weights go with a factory."""
    path, factory = given["path"], given["factory"]
    if (path is None) == (factory is None):
        raise InputError(
            f"load_model takes either path or factory, got {'both' if path else 'none of them'}."
        )
    if path is None and (given["inputs"] or given["shapes"]):
        raise InputError("`inputs` and `shapes` go with `path`; a factory builds its module as it is to be.")
    if path is None and given["custom_ops"]:
        raise InputError("`custom_ops` go with `path`; what a factory's module computes, torch computes.")
    if path is not None and given["reads"]:
        raise InputError("`reads` goes with `factory`; an ONNX file counts by its content anyway.")
    if path is not None and given["weights"] is not None:
        raise InputError("`weights` go with `factory`; an ONNX file holds its own.")


def fitting_arrays(model: Network, data: Samples | None) -> Arrays | None:
    """The first samples, where they are the model's; a stage that needs them says what does not fit."""
    from qpipe.model.simulation.samples import fitting

    if data is None:
        return None
    few = {name: array[:2] for name, array in data.arrays.items()}  # as many as the check runs
    try:
        fitting(model, few)
    except InputError:
        return None
    return few


NOT_IN_BFLOAT16 = (
    "onnxruntime has next to no operators of bfloat16 on the CPU, so the import is not held against its source."
)


def in_bfloat16(source: ir.Model) -> bool:
    """Whether a model takes, gives or holds numbers in bfloat16, in which onnxruntime computes next to nothing."""
    import onnx_ir as ir

    graph = source.graph
    values = [*graph.inputs, *graph.outputs, *graph.initializers.values()]
    return any(value.dtype == ir.DataType.BFLOAT16 for value in values)


def from_file(
    path: Path,
    data: Samples | None,
    tolerance: float | None,
    inputs: Mapping[str, Any],
    shapes: Shapes,
    custom_ops: tuple[Path, ...] = (),
) -> tuple[Network, list[str]]:
    """The model in an ONNX file, and what is to be said of it. Errors: InputError where it computes something else."""
    from qpipe.methods.comparison.check import verify_import
    from qpipe.model.canon.form import canonical_network
    from qpipe.model.files.given import fix_inputs, fix_shapes
    from qpipe.model.files.onnx_reader import read_onnx, told_as_input
    from qpipe.model.runtime.options import libraries

    with told_as_input(path):
        source = read_onnx(path)
        fix_shapes(source, shapes)
        fixed = fix_inputs(source, inputs)
        narrow = in_bfloat16(source)
        model = canonical_network(source, libraries(custom_ops))
    told = [f"The inputs {listed(fixed)} are constants now; the model has {len(model.inputs)} left."] if fixed else []
    if narrow:
        return model, [*told, NOT_IN_BFLOAT16]
    check = verify_import(model, path, arrays=fitting_arrays(model, data), given=fixed)
    return model, [*told, judged(path.name, check, tolerance)]


def from_factory(
    factory: str, weights: Path | None, data: Samples | None, tolerance: float | None
) -> tuple[Network, list[str]]:
    """The model that `module:function` builds, with its parameters or `weights`, and what its check says. Errors:
    InputError where it computes something else."""
    from qpipe.model.files.state_dict import fill, read_weights
    from qpipe.model.torch_export.fidelity import check

    module, example = built(factory)
    if weights is not None:
        fill(module, read_weights(weights), weights.name)
    example = example_from(module, data, factory) if example is None else example
    model = from_module(module, example, data)
    error = check(module, example, model, None if data is None else data.arrays, deployed=True, tolerance=tolerance)
    if error is None:
        return model, ["The module's code does not run in float32, so the import is not held against it."]
    return model, [f"The import computes what its source does, to {error:.1e} (relative)."]


@stage(version=1, check=refuse_sources)
def load_model(
    data: Samples | None = None,
    *,
    path: Path | None = None,
    factory: Factory | None = None,
    reads: tuple[Path, ...] = (),
    weights: Path | None = None,
    encodings: Path | None = None,
    tolerance: Annotated[float, Range(gt=0)] | None = None,
    inputs: dict[str, Any] | None = None,
    shapes: Shapes | None = None,
    custom_ops: tuple[Library, ...] = (),
    ctx: Context = NULL,
) -> Network:
    """The model in an ONNX file (`path`), or the one that a Python function builds (`factory`), canonical.

    A file in QDQ form gives the float model with its grids: those of weights stay in every later stage, those of
    activations until `calibrate` makes new ones.

    `reads` names the files and folders that the factory opens by itself, so that their content counts.
    `weights` (.safetensors, or a state dict saved by torch) replace a torch module's parameters. `data` give the
    example where the factory returns none, and the name of a single input; a file's import is checked on them.
    `encodings` is a file in AIMET's format (0.6.1, 1.0.0 or 2.0.0), whose grids take the place of the model's own.
    `tolerance` is how far the import's outputs may lie from the source's, relative; by default, what rounding explains.
    `inputs` makes inputs of a file constants ({sr: 16000}), `shapes` fixes their dimensions ({x: [n, 3, 480, 480]}; a
    name or null leaves one open); what follows from that is decided, such as the branch that an If takes.
    `custom_ops` are shared libraries of onnxruntime operators that a file needs; every later session has them too.
    Errors: InputError for a file or a module that cannot be taken, for weights that do not fit, and for an import that
    computes something else.
    """
    refuse_sources(locals())
    from qpipe.model.files.encodings_reader import with_encodings_file

    if path is not None:
        model, told = from_file(path, data, tolerance, inputs or {}, shapes or {}, custom_ops)
    else:
        assert factory is not None
        model, told = from_factory(factory, weights, data, tolerance)
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
    for note in told:
        ctx.note(note)
    return model
