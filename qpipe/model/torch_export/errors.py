"""Why torch could not export a module, in one line: what failed, in which part, and the way out."""

from __future__ import annotations

import copy
import os
import re
import sysconfig
import traceback
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from qpipe.errors import InputError

_OTHERWISE = "or export the model to ONNX yourself and load that file"
_TORCH = os.path.join(Path(torch.__file__).parent, "")
_INSTALLED = tuple({os.path.join(sysconfig.get_path(name), "") for name in ("stdlib", "purelib", "platlib")})
_OURS = os.path.join(Path(__file__).parents[2], "")
_CALL = re.compile(r'File "([^"]+)", line \d+, in \S+\n\s+(.+)')
_NO_OPERATOR = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.]+)'")


def refuse_unfit_module(module: nn.Module) -> None:
    """Raise InputError for a module of which torch's exporter is known to make nothing."""
    name = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        raise InputError(f"{name} is a ScriptModule. Give the nn.Module that it was scripted or traced from.")
    parts = ((path, type(part).__module__) for path, part in module.named_modules())
    quantized = [path for path, where in parts if ".quantized" in where and ".quantized.reference" not in where]
    if quantized:
        raise InputError(f"{name} is quantized by torch already, in its part {quantized[0]!r}. Give the float module.")
    state = module.state_dict(keep_vars=True)  # of quantized modules, also settings
    empty = [path for path, value in state.items() if isinstance(value, torch.Tensor) and value.is_meta]
    if empty:
        raise InputError(
            f"{name} has {len(empty)} tensors without data (device meta), such as {empty[0]!r}. Fill them before: "
            "build the module on the CPU, or call to_empty(device='cpu') and load the weights."
        )


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module


def explain(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], error: BaseException
) -> str:
    """What went wrong in the export, where in the module, and what to do.

    The module is run once on its example, a copy of it where it can be copied: what fails there is no matter of ONNX.
    """
    name = type(module).__name__
    twin, own = _run(module, args, kwargs)
    if isinstance(own, BaseException):
        return (
            f"{name} does not run on its example inputs: {reason(own)}{_place(twin, [own])}. Give inputs that it "
            f"takes ({_signature(module)}); the example has {_described(args, kwargs)}."
        )
    if strange := _strange_output(own):
        return (
            f"{name} returns {strange}. Let forward return a tensor, or a tuple, list or dict of tensors, or wrap the "
            f"module in one that does; {_OTHERWISE}."
        )
    chain = _chain(error)
    if foreign := _missing_part(chain):
        return (
            f"torch {torch.__version__} exports by way of onnxscript, and the installed onnxscript "
            f"{version('onnxscript')} lacks {foreign}. Install another one: pip install --upgrade onnxscript."
        )
    place = _place(module, chain)
    if operator := lacking_operator(error):
        return (
            f"ONNX has no operator for {operator}, which {name} calls{place or ' in its forward'}. "
            f"Replace it by others; {_OTHERWISE}."
        )
    told = f" (torch says {reason(_cause(error)).split('. ')[0]}.)"
    if _decides_by_values(chain):
        return (
            f"{name} decides by the values of a tensor{place}, which an ONNX graph cannot follow. Use torch.where or "
            f"torch.cond, and sizes that do not depend on values; {_OTHERWISE}.{told}"
        )
    node = next((found for each in reversed(chain) if (found := _node(each))), None)
    stops = f"it stops{f' at {operator_name(node)}' if node else ''}{place}" if node or place else "it says not where"
    return (
        f"torch cannot export {name} to ONNX: {stops}. Rewrite what depends on the "
        f"values of tensors or calls operators that ONNX lacks; {_OTHERWISE}.{told}"
    )


def _missing_part(chain: list[BaseException]) -> str | None:
    """The module of onnxscript that torch asks for in vain: each goes with some versions of the other."""
    names = (error.name or "" for error in chain if isinstance(error, ImportError))
    return next((name for name in names if name.partition(".")[0] == "onnxscript"), None)


def lacking_operator(error: BaseException) -> str | None:
    """The operator of torch that has no form in ONNX, for which the export failed; None where it failed otherwise."""
    found = _NO_OPERATOR.search(_said(_chain(error)))
    return found[1].removeprefix("aten.").strip("_") if found else None


def _decides_by_values(chain: list[BaseException]) -> bool:
    said = _said(chain)
    return "DataDependent" in said or "data-dependent" in said


def _said(chain: list[BaseException]) -> str:
    return "\n".join(f"{type(error).__name__} {error}" for error in chain)


def _chain(error: BaseException) -> list[BaseException]:
    """The error and its causes, the first cause last."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def _cause(error: BaseException) -> BaseException:
    """The error that was the first cause, without what happened to be handled when it was raised."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def reason(error: BaseException) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return f"{type(error).__name__}: {next(filter(None, lines), 'no reason given').rstrip('.')}"


def node_place(node: fx.Node) -> str:
    """` in its part 'a.b' at `code``, of a node of an exported program, as far as it is known."""
    path = next(reversed([*_stack(node)]), "")
    code = _told_line(str(node.meta.get("stack_trace")))
    return (f" in its part {path!r}" if path else "") + (f" at `{code}`" if code else "")


def _place(module: nn.Module, chain: list[BaseException]) -> str:
    """ in its part 'a.b' at `code`, as far as it is known."""
    places = [place for error in chain if (place := _deepest_module(module, error))]
    where = f" in its part {places[-1]!r}" if places else ""
    lines = (line for error in reversed(chain) for line in (_own_line(error), _line_of_node(error)))
    code = next(filter(None, lines), "")
    return where + (f" at `{code}`" if code else "")


def _own_line(error: BaseException) -> str:
    """The last line of code outside torch that was running, or that torch says was."""
    if told := _told_line(str(error)):
        return told
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_theirs(frame.filename)]
    return str(own[-1].line or "") if own else ""


def _told_line(trace: str) -> str:
    """The last line of code outside torch in a text that holds a stack."""
    told = [code.strip() for file, code in _CALL.findall(trace) if _is_theirs(file)]
    return str(told[-1]) if told else ""


def _line_of_node(error: BaseException) -> str:
    """The line that the operator stands in which was being translated."""
    node = _node(error)
    return "" if node is None else _told_line(str(node.meta.get("stack_trace")))


def _node(error: BaseException) -> fx.Node | None:
    """The node of the exported program that was being translated."""
    found = (frame.f_locals.get("node") for frame, _ in traceback.walk_tb(error.__traceback__))
    nodes = [node for node in found if isinstance(node, fx.Node) and node.op == "call_function"]
    return nodes[-1] if nodes else None


def operator_name(node: fx.Node) -> str:
    """What torch's users call the operator of a node: `avg_pool2d`."""
    return str(node.meta.get("torch_fn", ("", str(node.target)))[1]).rpartition(".")[2]


def _is_theirs(file: str) -> bool:
    """Whether the person who brings the module wrote the file: it follows from where the others lie, not from what
    its path is called."""
    return not file.startswith((_TORCH, *_INSTALLED, _OURS, "<"))


def _deepest_module(module: nn.Module, error: BaseException) -> str | None:
    """The path of the innermost submodule whose code was running, or that the operator came from which was being
    translated; None for the module itself or none."""
    paths = {id(part): path for path, part in module.named_modules()}
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        path = paths.get(id(frame.f_locals.get("self")))
        node = frame.f_locals.get("node")
        if isinstance(node, fx.Node):
            path = next(reversed([*_stack(node)]), path)
        found = path or found
    return found


def _stack(node: fx.Node) -> Iterator[str]:
    """The paths of the modules that a node of an exported program came from, the innermost last."""
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        if isinstance(path, str) and path and "metadata_hook" not in path:  # that is torch's own bookkeeping
            yield path.removeprefix("L['self'].")


def _run(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    """A copy of the module, where it can be copied, and what that returns for the example, or the error it raises."""
    try:
        twin = copy.deepcopy(module)
    except Exception:  # whatever a module of the user's holds that cannot be copied
        twin = module
    own_args, own_kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (args, dict(kwargs)))
    try:
        with torch.no_grad():
            return twin, twin(*own_args, **own_kwargs)
    except Exception as error:  # the module is the user's: whatever it raises is theirs to read
        return twin, error


def _strange_output(returned: Any) -> str | None:
    """What an output holds that is no tensor, in words; None where all are."""
    for leaf in pytree.tree_leaves(returned):
        if leaf is not None and not isinstance(leaf, torch.Tensor):
            return f"an object of {type(leaf).__name__} (in its output)"
    return None


def _signature(module: nn.Module) -> str:
    import inspect

    names = ", ".join(inspect.signature(module.forward).parameters)
    return f"forward takes {names or 'nothing'}"


def _described(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    def one(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        return type(value).__name__

    named = [f"{name}: {one(value)}" for name, value in kwargs.items()]
    return ", ".join([*map(one, args), *named]) or "none"
