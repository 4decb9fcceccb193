"""The model layer: ONNX graphs read, matched, rewritten, run and turned into torch modules; no engine.

Importing this package loads nothing heavy; each name is imported from its module when it is first asked for. So a key
that reaches into the package holds no more of it than is imported by name: the face, `Model`, holds all of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qpipe.model.model import Model
    from qpipe.model.network.network import Editor, Network, ValueSpec
    from qpipe.model.structure.layers import Layer

__all__ = ["Editor", "Layer", "Model", "Network", "ValueSpec"]


def __getattr__(name: str) -> Any:
    if name == "Model":
        from qpipe.model.model import Model

        return Model
    if name == "Layer":
        from qpipe.model.structure.layers import Layer

        return Layer
    if name in ("Editor", "Network", "ValueSpec"):
        from qpipe.model.network import network

        return getattr(network, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
