"""The table with every operator in it: the families are imported here, and nowhere else."""

from __future__ import annotations

from qpipe.model.operators import (
    conv,
    detection,
    elementwise,
    index,
    integer,
    matmul,
    norm,
    pool,
    recurrent,
    reduce,
    resize,
    shape,
    signal,
    unsigned,
)
from qpipe.model.operators.registry import OPERATORS, Operator

__all__ = [
    "OPERATORS",
    "Operator",
    "conv",
    "detection",
    "elementwise",
    "index",
    "integer",
    "matmul",
    "norm",
    "pool",
    "recurrent",
    "reduce",
    "resize",
    "shape",
    "signal",
    "supported_ops",
    "unsigned",
]


def supported_ops() -> frozenset[tuple[str, str]]:
    """The operators, as (domain, name), that a graph may hold."""
    return frozenset(("", name) for name in OPERATORS) | {("", "Constant")}
