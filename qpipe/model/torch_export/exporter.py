"""torch modules as models: torch's own exporter, unoptimized, then the canonical form.

`optimize=False` because the exporter's optimizer folds BatchNormalization away, renames weights and merges
equal parameters. `torch_names` names what it leaves after the torch modules.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from qpipe.errors import InputError
from qpipe.model.canon.form import canonicalize
from qpipe.model.network.invariants import OPSET
from qpipe.model.network.naming import MODULE_CLASS, SCOPE
from qpipe.model.network.network import Network
from qpipe.model.torch_export.decomposition import decomposing_in_place
from qpipe.model.torch_export.errors import explain, lacking_operator, refuse_unfit_module, unwrapped
from qpipe.model.torch_export.names import rename
from qpipe.model.torch_export.shortcuts import shortcuts
from qpipe.model.torch_export.translations import TRANSLATIONS
from qpipe.param import uncollected

BATCH = "batch"
_KIND = "pkg.torch.export.graph_signature.InputSpec.kind"


@uncollected()
def from_torch(
    module: torch.nn.Module,
    example_inputs: Any,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    only_input: str | None = None,
) -> Network:
    """The module as it computes in eval mode; dimension 0 of every input is dynamic and called `batch`.

    `example_inputs` is a tensor, a tuple of them or a dict by argument name; `dynamic_shapes`, if given,
    goes to torch.export as it is. `only_input` is the name of the input where there is but one. Raises InputError where
    torch cannot export the module."""
    module = unwrapped(module)
    refuse_unfit_module(module)
    program, notes = exported(module, *arguments(module, example_inputs), dynamic_shapes)
    source: ir.Model = program.model
    if not source.graph.outputs:
        raise InputError(f"{type(module).__name__} returns no tensor. Let its forward return what it computes.")
    parameters = [name for name, value in source.graph.initializers.items() if _is_parameter(value)]
    _own_tensors(source)
    _keep_scopes(source)
    model, changes, grids = canonicalize(source, parameters, keep_types=False)
    values = ir.convenience.create_value_mapping(model.graph)
    grid_of = {values[name]: encoding for name, encoding in grids.encodings.items()}
    if only_input is not None and len(model.graph.inputs) == 1:
        input_names = [only_input]
    rename(model.graph, parameters, input_names)
    metadata: dict[str, Any] = {"notes": notes + changes} if notes + changes else {}
    facts = replace(grids.facts(), tied=_tied(module, set(model.graph.initializers)))
    encodings = {str(value.name): encoding for value, encoding in grid_of.items()}
    return Network(model, encodings, metadata, facts).edit().model()


def _tied(module: torch.nn.Module, kept: set[str]) -> dict[str, str]:
    """The names of parameters that torch knows under another name as well: that name -> the one kept."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied = {}
    for group in names.values():
        holder = next((name for name in group if name in kept), None)
        if holder is not None:
            tied.update({name: holder for name in group if name != holder})
    return dict(sorted(tied.items()))


def arguments(module: torch.nn.Module, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example as positional and named arguments, on the module's device."""
    device = next((p.device for p in [*module.parameters(), *module.buffers()]), torch.device("cpu"))

    def moved(value: Any) -> Any:
        tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        return tensor.to(device) if isinstance(tensor, torch.Tensor) else tensor

    if isinstance(example, Mapping):
        return (), {str(name): moved(value) for name, value in example.items()}
    if isinstance(example, (tuple, list)):
        return tuple(moved(value) for value in example), {}
    return (moved(example),), {}


@contextlib.contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Every submodule in eval mode for the while, and back in its own mode after."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def exported(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any = None
) -> tuple[torch.onnx.ONNXProgram, list[str]]:
    """torch's raw export of the module in eval mode, and notes on what it fixed. Raises InputError with the part at
    fault and the way out."""
    with evaluating(module):
        try:
            if dynamic_shapes is not None:
                return _export(module, args, kwargs, dynamic_shapes), []
            return _export_with_batch(module, args, kwargs)
        except Exception as error:  # the exporter raises its own errors around torch's and python's
            raise InputError(explain(module, args, kwargs, error)) from error


def _export_with_batch(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.onnx.ONNXProgram, list[str]]:
    """The export with dimension 0 dynamic; with the example's own shapes, and a note, if that is refused."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    sizes = {tensor.shape[0] if tensor.dim() else 0 for tensor in tensors}
    if len(sizes) != 1 or 0 in sizes:
        note = "Shapes are fixed to the example's: its inputs do not share their first dimension."
        return _export(module, args, kwargs, None), [note]
    # torch.export takes a dimension of 1 for a constant, so a batch of one becomes a batch of two.
    two_args, two_kwargs = pytree.tree_map_only(torch.Tensor, _doubled, (args, kwargs))
    program: torch.onnx.ONNXProgram | None
    try:
        program = _export(module, two_args, two_kwargs, _open_batch(module, two_args, two_kwargs))
    except Exception as error:
        if lacking_operator(error):  # which fixed shapes do not bring
            raise
        program = None
    if program is None:  # not above: the error of the first try says nothing about the second
        program = _export(module, args, kwargs, None)
    if _has_open_batch(program.model):
        _name_batch(program.model)
        return program, []
    size = next(value.shape[0] for value in program.model.graph.inputs if value.shape)
    return program, [f"The batch size is fixed to {size}: the module does not export with an open one."]


def _open_batch(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Dimension 0 of every tensor, by the name of the argument that holds it, however deep; `*args` hold a tuple."""
    dim = torch.export.Dim(BATCH, min=1)
    arguments = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    return {
        name: pytree.tree_map(lambda leaf: {0: dim} if isinstance(leaf, torch.Tensor) else None, value)
        for name, value in arguments.items()
    }


def _has_open_batch(model: ir.Model) -> bool:
    """torch closes a dimension without a word where the module's code compares it with a number."""
    shapes = [value.shape for value in model.graph.inputs]
    return all(shape is not None and len(shape) > 0 and not isinstance(shape[0], int) for shape in shapes)


def _name_batch(model: ir.Model) -> None:
    """torch calls the dimension `s97` where constants stand among the inputs; in a size made from it as well."""
    shape = model.graph.inputs[0].shape
    name = shape[0].value if shape is not None and isinstance(shape[0], ir.SymbolicDim) else None
    if name is None or name == BATCH:
        return
    for value in [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]:
        if value.shape is not None:
            dims = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
            named = [re.sub(rf"\b{name}\b", BATCH, dim) if isinstance(dim, str) else dim for dim in dims]
            value.shape = ir.Shape(named)


def _doubled(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor]) if tensor.shape[0] == 1 else tensor


def _export(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> torch.onnx.ONNXProgram:
    # The fused kernels lay their result out otherwise than the form that the exporter takes attention
    # apart into, and a view that was traced over the one does not fit the other.
    with _quiet(), uncollected(), sdpa_kernel(SDPBackend.MATH), decomposing_in_place(), shortcuts():
        program = torch.onnx.export(
            module,
            args if kwargs else (*args, {}),  # it takes a dict at the end for named arguments
            kwargs=kwargs or None,
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            custom_translation_table=TRANSLATIONS,
            dynamic_shapes=dynamic_shapes,
        )
    assert program is not None
    return program


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter logs, prints and warns of things that are none of the user's; errors are raised."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        logging.disable(disabled)


def _is_parameter(value: ir.Value) -> bool:
    """Parameters, and buffers of floats that the checkpoint holds: both have names that users know."""
    kind = value.metadata_props.get(_KIND)
    persistent = value.metadata_props.get(_KIND.replace("kind", "persistent")) == "True"
    return kind == "PARAMETER" or (kind == "BUFFER" and persistent)


def _own_tensors(model: ir.Model) -> None:
    """Copies, so that the module may go on training. A tensor used under two names becomes one initializer
    with two readers in torch's export already; that stays."""
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                value.const_value = ir.Tensor(
                    np.array(value.const_value.numpy(), order="C"), dtype=value.const_value.dtype, name=name
                )


def _keep_scopes(model: ir.Model) -> None:
    """The innermost torch module of each node, by dotted path and class; the rest of the metadata goes."""
    for node in model.graph:
        scopes = _listed(node.metadata_props.get("pkg.torch.onnx.name_scopes"))
        classes = _listed(node.metadata_props.get("pkg.torch.onnx.class_hierarchy"))
        if len(scopes) > 1 and "metadata_hook" not in scopes[-2]:  # that is torch's own bookkeeping
            node.metadata_props[SCOPE] = scopes[-2]
        if len(classes) > 1:
            node.metadata_props[MODULE_CLASS] = classes[-2].rsplit(".", 1)[-1]


def _listed(text: str | None) -> list[str]:
    """The strings in the repr of a list of strings."""
    return re.findall(r"'([^']*)'", text or "")
