"""Matrix products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qpipe.model.operators.registry import operator

operator("MatMul")(torch.matmul)


@operator("Gemm")
def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """alpha a' b' + beta c, a' and b' transposed where asked."""
    a = a.t() if transA else a
    if alpha == 1.0 and beta == 1.0 and (c is None or c.ndim == 1):
        return F.linear(a, b if transB else b.t(), c)
    product = a @ (b.t() if transB else b)
    product = product if alpha == 1.0 else alpha * product
    if c is None:
        return product
    return product + (c if beta == 1.0 else beta * c)


@operator("Einsum")
def einsum(*tensors: Tensor, equation: str) -> Tensor:
    """The sum of products that `equation` describes."""
    return torch.einsum(equation, *tensors)


operator("Det")(torch.linalg.det)
