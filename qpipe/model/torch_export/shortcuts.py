"""What torch's exporter does for every export and needs for few: left out, and what is exported is the same.

    signatures      of all 500 functions that write operators, out of their sources: one is worked out when it is
                    needed, as the exporter does by itself where it finds none
    type promotion  runs the whole program once more to know what each node gives, which the program says already

A sixth of the time that an export takes. All that is replaced is private: where a name is missing, takes other
parameters, or is used in another way than is known here, it stays as it is.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx

_EXPORTER = "torch.onnx._internal.exporter"
_KNOWN = "_pt_onnx_signature"


@contextlib.contextmanager
def shortcuts() -> Iterator[None]:
    """Exports meanwhile go the shorter way."""
    replaced = [found for find in (_signatures, _promotion) if (found := find()) is not None]
    before = [(owner, name, owner.__dict__.get(name)) for owner, names in replaced for name in names]
    try:
        for owner, names in replaced:
            for name, value in names.items():
                setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            if value is None:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


Replaced = tuple[Any, dict[str, Callable[..., Any]]]
"""A class, and what takes the place of its methods."""


def _signatures() -> Replaced | None:
    """Entries of the table of operators that ask for no signature when they are made."""
    entry = _found(f"{_EXPORTER}._registration", "OnnxDecompMeta")
    made = _found(f"{_EXPORTER}._registration", "OnnxDecompMeta.__post_init__", "self")
    choosing = _found(f"{_EXPORTER}._dispatching", "dispatch", "node", "registry")
    calling = _found(f"{_EXPORTER}._building", "OpRecorder.eval_function", "self", "function", "args", "kwargs")
    if entry is None or made is None or choosing is None or calling is None:
        return None
    works_it_out = "op_signature_from_function" in calling.__code__.co_names and _KNOWN in calling.__code__.co_consts
    if not works_it_out or "signature" in choosing.__code__.co_names:
        return None

    def only_of_users(self: Any) -> None:
        if self.is_custom:
            made(self)

    return entry, {"__post_init__": only_of_users}


def _promotion() -> Replaced | None:
    """The interpreter that promotes types, which takes what a node gives from the node, where that was not changed."""
    where = "torch.onnx._internal.fx.passes.type_promotion"
    interpreter = _found(where, "_TypePromotionInterpreter")
    step = _found(where, "_TypePromotionInterpreter.run_node", "self", "n")
    if interpreter is None or step is None or "call_function" in vars(interpreter):
        return None
    compute = interpreter.call_function

    def run_node(self: Any, n: fx.Node) -> Any:
        self.qpipe_node = n, n.target, n.args, n.kwargs
        return step(self, n)

    def call_function(self: Any, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        node, *before = self.qpipe_node
        same = target is node.target and [node.target, node.args, node.kwargs] == before
        return node.meta["val"] if same and "val" in node.meta else compute(self, target, args, kwargs)

    return interpreter, {"run_node": run_node, "call_function": call_function}


def _found(module: str, name: str, *parameters: str) -> Any:
    """A class or function of a module; None where it is not there, or takes other parameters than these, if any."""
    try:
        place = importlib.import_module(module)
        for part in name.split("."):
            place = getattr(place, part)
        known = not parameters or tuple(inspect.signature(place).parameters) == parameters  # type: ignore[arg-type]
    except (ImportError, AttributeError, TypeError, ValueError):
        return None
    return place if known else None
