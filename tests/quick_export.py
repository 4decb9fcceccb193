"""torch's exporter with a memory: it reads the sources of its 500 functions, and looks through them, for every export,
half of the time that a small network takes. Here it remembers what it found."""

from __future__ import annotations

import contextlib
import functools
import importlib


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

        materialize, counts = utils._materialize_cpp_cia_ops, list[int]()

        def only_new_ones() -> None:
            known = len(torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd"))
            if known not in counts:
                materialize()
                counts[:] = [known]

        utils._materialize_cpp_cia_ops = only_new_ones
    with contextlib.suppress(ImportError, AttributeError):
        from torch import _ops

        assert isinstance(len, _ops.Callable)  # it is used so, too

        # Each of 10,000 registrations that an export makes defines a function and works out its annotations.
        _ops.Callable = _Callable


class _Annotation(type):
    """What stands for Callable in annotations, at no cost; else it is what can be called."""

    def __getitem__(cls, _: object) -> type:
        return cls

    def __instancecheck__(cls, value: object) -> bool:
        return callable(value)


class _Callable(metaclass=_Annotation):
    pass
