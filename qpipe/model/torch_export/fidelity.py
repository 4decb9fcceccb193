"""A torch module held against its import: what both compute from the same inputs, and what was lost where they part.

    max |y - y'| / max |y| <= 1e-4        or as much as the source's own rounding, if that is more; else refused

torch's exporter may lose what an operator was told (a divisor, a mode) and says nothing. So the module itself, as it is
in eval mode, runs once on its example, and once on the first samples where there are any. Only where the import
differs is the module exported again, and the exported program is run node by node beside its ONNX graph: the first
value that differs names the operator.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from qpipe.errors import InputError
from qpipe.model.network.network import Network
from qpipe.model.runtime.session import make_session
from qpipe.model.simulation.constants import array_of, tensor_of
from qpipe.model.simulation.module import to_torch
from qpipe.model.simulation.samples import batches
from qpipe.model.torch_export.errors import node_place, operator_name, reason, unwrapped
from qpipe.model.torch_export.exporter import evaluating, exported

Arrays = Mapping[str, npt.NDArray[Any]]
TOLERANCE = 1e-4
"""The largest relative error of float32 arithmetic in another order."""
QUANTIZED_TOLERANCE = 0.05
"""The same of a module that rounds to grids: what rounds the other way moves what follows by some steps."""
_SAMPLES = 4
_ROUNDINGS = 8
"""How many times its own rounding a module's import may be off: as many sums in another order."""
_NARROW = {"FLOAT16": 2.0**-11, "BFLOAT16": 2.0**-8}
"""Half a step of the types that a module may compute in within, where its import computes in float32."""


def check(
    module: torch.nn.Module,
    example: Any,
    model: Network,
    samples: Arrays | None = None,
    deployed: bool = False,
    tolerance: float | None = None,
) -> float | None:
    """How far the outputs of `model`, the import of `module`, are off, relative, on the example and on the first of
    `samples`; in onnxruntime as well if `deployed`. None where the module's code does not run in float32.

    Raises InputError, which names the operator that the export lost, where that is more than `tolerance`, by default
    more than rounding."""
    twin = _twin(unwrapped(module))
    errors = []
    for tensors in (_tensors(example, model), *_sampled(model, samples)):
        try:
            wanted = _computed(twin, example, tensors)
        except Exception:  # samples that the code does not take, or code that insists on half precision
            continue
        found = _found(model, tensors, deployed)
        error = max((difference(wanted, each) for each in found), default=0.0)
        usual = QUANTIZED_TOLERANCE if model.encodings else TOLERANCE
        if error > (usual if tolerance is None else tolerance):
            _refuse_loss(twin, example, tensors, _tensors(example, model), error)
        errors.append(error)
    return max(errors, default=None)


def difference(wanted: list[Tensor], found: list[Tensor]) -> float:
    """max |a - b| / max |a| over pairs of tensors; infinite where their number, shapes or finite places differ."""
    if len(wanted) != len(found):
        return float("inf")
    return max(map(_difference, wanted, found), default=0.0)


def _difference(wanted: Tensor, found: Tensor) -> float:
    wanted = torch.view_as_real(wanted.resolve_conj()) if wanted.is_complex() else wanted
    if wanted.shape != found.shape:
        return float("inf")
    a, b = wanted.detach().cpu().double(), found.detach().cpu().double()
    finite = a.isfinite()
    if not torch.equal(a[~finite].nan_to_num(0.5), b[~finite].nan_to_num(0.5)) or not b[finite].isfinite().all():
        return float("inf")
    if not finite.any():
        return 0.0
    return float((a[finite] - b[finite]).abs().max()) / max(float(a[finite].abs().max()), 1e-12)


def _twin(module: torch.nn.Module) -> torch.nn.Module:
    """A copy in float32 on the CPU, whose buffers may be written to; it shares the parameters that are so already."""
    tensors = [*module.parameters(), *module.buffers()]
    plain = all(t.device.type == "cpu" and (t.dtype == torch.float32 or not t.is_floating_point()) for t in tensors)
    try:
        twin = copy.deepcopy(module, {id(p): p for p in module.parameters()} if plain else {})
    except Exception:  # whatever a module of the user's holds that cannot be copied
        return module
    return twin if plain else twin.cpu().float()


def _leaves(example: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """The example's leaves, as torch.export flattens its positional and named arguments."""
    if isinstance(example, Mapping):
        return pytree.tree_flatten(((), {str(name): value for name, value in example.items()}))
    return pytree.tree_flatten((tuple(example) if isinstance(example, (tuple, list)) else (example,), {}))


def _tensors(example: Any, model: Network) -> list[Tensor]:
    """The example's tensors in the order of the model's inputs, as the model takes them."""
    leaves, _ = _leaves(example)
    given = [torch.as_tensor(leaf) for leaf in leaves if _is_input(leaf)]
    return [_fitted(tensor, spec.shape) for tensor, spec in zip(given, model.inputs, strict=True)]


def _fitted(tensor: Tensor, shape: tuple[int | str, ...]) -> Tensor:
    tensor = tensor.detach().cpu()
    if shape and tensor.dim() and shape[0] == 2 and len(tensor) == 1:  # the export made a batch of two of it
        tensor = torch.cat([tensor, tensor])
    return tensor.float() if tensor.is_floating_point() else tensor


def _sampled(model: Network, samples: Arrays | None) -> list[list[Tensor]]:
    """The first samples as one batch, where they are this model's."""
    if samples is None:
        return []
    try:
        batch = next(batches(model, samples, _SAMPLES))
    except InputError:  # whoever runs the model over them says so
        return []
    return [[tensor_of(array) for array in batch.arrays]]


def _computed(twin: torch.nn.Module, example: Any, tensors: list[Tensor]) -> list[Tensor]:
    """What the module computes where the example's tensors are replaced by these."""
    args, kwargs = _arguments(example, tensors)
    with evaluating(twin), torch.no_grad():
        returned = pytree.tree_leaves(twin(*args, **kwargs))
    return [leaf for leaf in returned if isinstance(leaf, Tensor)]


def _arguments(example: Any, tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example with these tensors in place of its own; copies, since a module may write into its inputs."""
    leaves, spec = _leaves(example)
    given = iter(tensors)
    leaves = [next(given).clone() if _is_input(leaf) else leaf for leaf in leaves]
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return args, kwargs


def _found(model: Network, tensors: list[Tensor], deployed: bool) -> list[list[Tensor]]:
    """What the import computes in torch and, if `deployed`, in onnxruntime. Raises InputError where it does not run."""
    runs = (_simulated, _deployed) if deployed else (_simulated,)
    try:
        return [run(model, tensors) for run in runs]
    except Exception as error:  # of both, and of no common type
        raise InputError(
            f"torch exports the module, but the import does not run on its example inputs: {reason(error)}. "
            "Write the module in other operators."
        ) from error


def _simulated(model: Network, tensors: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        returned = to_torch(model, shared=True)(*(tensor.clone() for tensor in tensors))
    return [returned] if isinstance(returned, Tensor) else list(returned)


def _deployed(model: Network, tensors: list[Tensor]) -> list[Tensor]:
    fed = {spec.name: array_of(tensor) for spec, tensor in zip(model.inputs, tensors, strict=True)}
    return [tensor_of(array) for array in make_session(model).run(None, fed)]


def _refuse_loss(
    twin: torch.nn.Module, example: Any, tensors: list[Tensor], exported_on: list[Tensor], error: float
) -> None:
    """Raise InputError unless the source's own rounding explains the error that was found on `tensors`."""
    if error <= _ROUNDINGS * _own_rounding(twin, example, tensors):
        return
    program, _ = exported(twin, *_arguments(example, exported_on))
    if error <= _ROUNDINGS * _narrowest(program):
        return
    name = type(twin).__name__
    raise InputError(
        f"The export of {name} to ONNX does not compute what {name} does: its outputs are {_apart(error)}. "
        f"{_what_was_lost(program, _arguments(example, tensors), _computed(twin, example, tensors))}"
    )


def _what_was_lost(program: torch.onnx.ONNXProgram, arguments: Any, wanted: list[Tensor]) -> str:
    """What of the outputs `wanted` was lost, and the way out: in one operator, in the recording, or in the import."""
    assert program.exported_program is not None
    leaves = pytree.tree_leaves(arguments)
    try:
        recorder = _Recorder(program.exported_program.module())
        with torch.no_grad():
            returned = pytree.tree_leaves(recorder.run(*leaves))
        lost = _first_lost(program, recorder.values, [leaf for leaf in leaves if _is_input(leaf)])
    except Exception as error:  # onnxruntime's have no common type, nor have the guards of what torch recorded
        return f"Which operator it lost is not known, since the export does not run here: {reason(error)}."
    if lost is not None:
        node, off = lost
        return (
            f"It lost something of {operator_name(node)}{node_place(node)}, whose value is {_apart(off)}. "
            "Write that with other operators, which compute the same."
        )
    if difference(wanted, [leaf for leaf in returned if isinstance(leaf, Tensor)]) > TOLERANCE:
        return (
            "What Python takes out of tensors (numpy, tolist, a copy of their data), or changes from call to call, "
            "is a constant in it. Compute it with operators of torch."
        )
    return "torch's own export is right, so the fault lies with the import of it. Write the module in other operators."


def _is_input(leaf: Any) -> bool:
    return isinstance(leaf, Tensor | np.ndarray)


def _apart(error: float) -> str:
    return f"off by {error:.1e} (relative)" if error < float("inf") else "of another shape, or not finite elsewhere"


def _own_rounding(twin: torch.nn.Module, example: Any, tensors: list[Tensor]) -> float:
    """How far the module itself, in float32, is off from what it computes in float64; 0 where it cannot."""
    try:
        exact = copy.deepcopy(twin).double()
        wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors]
        error = difference(_computed(exact, example, wide), _computed(twin, example, tensors))
        return error if error < float("inf") else 0.0
    except Exception:  # code that insists on float32, or that cannot be copied
        return 0.0


def _narrowest(program: torch.onnx.ONNXProgram) -> float:
    """Half a step of the narrowest type that the program computes in, 0 for float32."""
    names = {value.dtype.name for node in program.model.graph for value in node.outputs if value.dtype is not None}
    return max((_NARROW[name] for name in names & set(_NARROW)), default=0.0)


class _Recorder(fx.Interpreter):
    """Runs an exported program and keeps every tensor in it."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.values[n.name] = result
        return result


def _first_lost(
    program: torch.onnx.ONNXProgram, recorded: Mapping[str, Tensor], tensors: list[Tensor]
) -> tuple[fx.Node, float] | None:
    """The first node of the exported program whose value the ONNX graph computes otherwise, and by how much."""
    assert program.exported_program is not None
    nodes = {node.name: node for node in program.exported_program.graph.nodes if node.op == "call_function"}
    known = {str(value.name) for node in program.model.graph for value in node.outputs}
    names = [name for name in nodes if name in known and name in recorded]
    found = program.compute_values(names, tuple(tensor.clone() for tensor in tensors))
    for name, value in zip(names, found, strict=True):
        off = difference([recorded[name]], [value])
        if off > TOLERANCE:
            return nodes[name], off
    return None

