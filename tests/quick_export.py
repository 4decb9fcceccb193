"""torch's exporter with a memory: it reads the sources of its 500 functions, and looks through them, for every export,
half of the time that a small network takes. Here it remembers what it found."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any


@functools.cache
def remember() -> None:
    """Let this process export small modules in half the time; where torch does it another way, nothing is changed."""
    with contextlib.suppress(ImportError, AttributeError):
        from onnxscript._internal.values import TracedOnnxFunction

        remembered = functools.cached_property(TracedOnnxFunction.function_ir.fget)
        remembered.__set_name__(TracedOnnxFunction, "function_ir")
        TracedOnnxFunction.function_ir = remembered
    with contextlib.suppress(ImportError, AttributeError):
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        made = functools.cache(ONNXRegistry.from_torchlib)

        def copied(opset_version: int) -> ONNXRegistry:
            # It knows the operators that there are when it is made: these come with torch's quantization.
            importlib.import_module("torch.ao.quantization.fx._decomposed")
            copy = ONNXRegistry()  # an export adds the caller's own functions to it
            copy._opset_version = opset_version
            copy.functions = {name: [*known] for name, known in made(opset_version).functions.items()}
            return copy

        ONNXRegistry.from_torchlib = staticmethod(copied)  # type: ignore[assignment]
    with contextlib.suppress(ImportError, AttributeError):
        import torch
        from torch._export import utils

        collect, found = utils._collect_all_valid_cia_ops, dict[int, set[Any]]()

        def only_new_ones() -> set[Any]:
            count = len(torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd"))
            if count not in found:
                found.clear()
                found[count] = collect()
            return found[count]

        for user in ("torch._export.utils", "torch.export.exported_program", "torch.export.decomp_utils"):
            importlib.import_module(user)._collect_all_valid_cia_ops = only_new_ones  # type: ignore[attr-defined]
    with contextlib.suppress(ImportError, AttributeError):
        from torch import _ops

        assert isinstance(len, _ops.Callable)  # it is used so, too

        # Each of 10,000 registrations that an export makes defines a function and works out its annotations.
        _ops.Callable = _Callable
    with contextlib.suppress(ImportError, AttributeError):
        from torch.export import exported_program
        from torch.onnx._internal.exporter import _decomp

        _decomp.create_onnx_friendly_decomposition_table = _by_operators(
            _decomp.create_onnx_friendly_decomposition_table
        )
        exported_program._split_decomp_table_to_cia_and_python_decomp = _by_operators(
            exported_program._split_decomp_table_to_cia_and_python_decomp
        )
    with contextlib.suppress(ImportError, AttributeError):
        from torch._subclasses import fake_impls
        from torch.export import exported_program

        make = exported_program._override_composite_implicit_decomp
        rules = fake_impls.op_implementations_dict
        exported_program._override_composite_implicit_decomp = _overriding(make, rules)


def _by_operators(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`make`, a function of operators (what they are made into is torch's own), asked once for each collection of them,
    and again where there are more composite operators than there were."""
    known: dict[Any, Any] = {}

    def copied(result: Any) -> Any:
        return tuple(map(copied, result)) if isinstance(result, tuple) else result.copy()

    def remembered(operators: Any) -> Any:
        count = len(torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd"))
        key = (count, *sorted(map(id, operators)))
        if key not in known:
            known[key] = [*operators], copied(make(operators))  # who is kept keeps its id
        return copied(known[key][1])

    import torch

    return remembered


def _overriding(
    make: Callable[[dict[Any, Any]], AbstractContextManager[None]], rules: dict[Any, Any]
) -> Callable[[dict[Any, Any]], AbstractContextManager[None]]:
    """`make`, which gives operators thousands of kernels while it lasts. Those that an operator had the last time it is
    given again, where it began with the same ones."""
    known: dict[Any, tuple[Any, dict[Any, Any], dict[Any, Any], Any]] = {}

    @contextlib.contextmanager
    def override(wanted: dict[Any, Any]) -> Iterator[None]:
        before = {op: (op.py_kernels.copy(), rules.get(op)) for op in wanted}
        told = {op: _told(how) for op, how in wanted.items()}
        new = {op: how for op, how in wanted.items() if known.get(op, ())[:2] != (told[op], before[op])}
        with make(new):
            known.update({op: (told[op], before[op], op.py_kernels.copy(), rules.get(op)) for op in new})
            for op in wanted.keys() - new.keys():
                _give(rules, op, *known[op][2:])
            try:
                yield
            finally:
                for op in wanted.keys() - new.keys():
                    _give(rules, op, before[op][0], None)  # as `make` does

    return override


def _told(how: Any) -> Any:
    """What tells one function from another: torch makes the same partial anew for every export."""
    return (how.func.__code__, how.args, how.keywords) if isinstance(how, functools.partial) else how


def _give(rules: dict[Any, Any], op: Any, kernels: dict[Any, Any], rule: Any) -> None:
    op.py_kernels.clear()
    op.py_kernels.update(kernels)
    op._dispatch_cache.clear()
    rules.pop(op, None)
    if rule is not None:
        rules[op] = rule


class _Annotation(type):
    """What stands for Callable in annotations, at no cost; else it is what can be called."""

    def __getitem__(cls, _: object) -> type:
        return cls

    def __instancecheck__(cls, value: object) -> bool:
        return callable(value)


class _Callable(metaclass=_Annotation):
    pass
