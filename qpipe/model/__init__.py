"""The model layer: ONNX graphs read, matched, rewritten, run and turned into torch modules; no engine.

Importing this package loads nothing heavy; each name is imported from its module when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qpipe.model.model import Editor, Model, ValueSpec
    from qpipe.model.structure.layers import Layer

__all__ = ["Editor", "Layer", "Model", "ValueSpec"]


def __getattr__(name: str) -> Any:
    if name == "Model":
        from qpipe.model.model import Model

        return Model
    if name == "Editor":
        from qpipe.model.model import Editor

        return Editor
    if name == "ValueSpec":
        from qpipe.model.model import ValueSpec

        return ValueSpec
    if name == "Layer":
        from qpipe.model.structure.layers import Layer

        return Layer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
