"""A module of `to_torch` that runs while somebody looks at its values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qpipe.model.simulation.constants import tensor_of
from qpipe.model.simulation.samples import Array

See = Callable[[str, Tensor], object]
"""Is given the name of an ONNX value, and the tensor."""


def watched(
    module: fx.GraphModule, arrays: Sequence[Array], see: See, device: str = "cpu"
) -> tuple[Tensor, ...]:
    """The outputs of `module`, which lives on `device`, for one batch, without gradients.

    `see` is called as soon as a value of the graph is there: an input, a parameter before its first reader, what a node
    gives. A value with a quantizer is seen twice, before and after. No value is held longer than its readers need it,
    unless `see` holds it."""
    with torch.inference_mode():
        outputs = _Watcher(module, see).run(*(tensor_of(array).to(device) for array in arrays))
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)


class _Watcher(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, see: See) -> None:
        super().__init__(module)
        self._see = see

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            for name in n.meta.get("outputs", ()):
                self._see(name, result)
        return result
