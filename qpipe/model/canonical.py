from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from qpipe.model.invariants import remove_dead_nodes, restore
from qpipe.model.shapes import infer_shapes


def canonicalize(model: ir.Model) -> tuple[ir.Model, list[str]]:
    if model.functions:
        common.InlinePass()(model)
    if model.opset_imports.get("", 0) < 21:
        from onnxscript import version_converter

        version_converter.convert_version(model, 21, fallback=True)
    common.IdentityEliminationPass()(model)
    remove_dead_nodes(model)
    restore(model)
    infer_shapes(model)
    return model, []
