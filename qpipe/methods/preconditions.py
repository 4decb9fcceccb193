"""What a technique asks of the model that it gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from qpipe.errors import InputError

if TYPE_CHECKING:
    from qpipe.model.network.network import Network


def float_weights(model: Network, technique: str, note: Callable[[str], None]) -> bool:
    """Whether the weights are there to be changed: they are not, and that is noted, where the model came quantized.

    Raises InputError where a stage before has given it grids.
    """
    if model.facts.came_quantized:
        note(
            f"The model came quantized, and its weights stay on their grids: {technique} leaves it as it is."
        )
        return False
    if model.encodings:
        raise InputError(
            f"{technique} takes a float model, and this one is quantized already. Put {technique} before quantization."
        )
    return True
