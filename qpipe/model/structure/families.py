"""Families of operators and of types that several rooms ask about."""

from __future__ import annotations

import onnx_ir as ir

MOVING = frozenset(
    {"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "Expand", "Tile"}
    | {"DepthToSpace", "SpaceToDepth", "Identity", "MaxPool", "GlobalMaxPool"}
)
"""Their outputs hold values of their first input: on the same grid a second quantizer is redundant."""

ON_CODES = (MOVING - {"Identity", "MaxPool", "GlobalMaxPool"}) | {"Pad"}
"""Of what moves values: what onnxruntime's CPU has for codes of 8 bits, unsigned ones."""

RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
"""Their outputs are drawn anew in each run."""

WIDE_UNSIGNED = frozenset({ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64})
