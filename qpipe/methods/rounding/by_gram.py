"""One layer's weight rounded in closed form: the layer as a problem of `qpipe.numerics.rounding`, solved.

It takes x^, the layer's inputs in the quantized model, and x, those in the float model, a tensor per batch each, and
asks `memo(name, function, *inputs)` for what may have been solved before; `by_gradient` does the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qpipe.methods.rounding.walk import Rounded
from qpipe.model.structure.geometry import unfold_of
from qpipe.numerics.rounding.gram import GramOptions, solve
from qpipe.numerics.rounding.moments import LayerMoments, to_arrays
from qpipe.numerics.rounding.rows import row_encoding, row_grid
from qpipe.numerics.rounding.unfold import Unfold, sample_positions

if TYPE_CHECKING:
    from qpipe.model.network.network import Network
    from qpipe.model.structure.layers import Layer
    from qpipe.numerics.grid import Encoding

Array = npt.NDArray[Any]
Memo = Callable[..., Any]


@torch.inference_mode()  # thousands of small operators, a sixth of whose time is what gradients would need
def round_by_gram(
    model: Network,
    layer: Layer,
    x_hat: Sequence[Tensor],
    x: Sequence[Tensor],
    *,
    options: GramOptions,
    positions: int,
    seed: int,
    memo: Memo,
) -> Rounded:
    """The closed form on moments at `positions` places per sample, drawn with `seed`.

    Where x^ and x are the same tensors, the target is the float layer on these.
    """
    encoding, device = model.encodings[layer.weight], x[0].device
    shape = tuple(layer.weight_shape)
    unfold = unfold_of(layer, tuple(x[0].shape[2:]))
    rows = unfold.weight_rows(torch.tensor(model.param(layer.weight), device=device))
    fit, held_out = _moments(unfold, rows, x_hat, x, positions, seed)
    bias = None if layer.bias is None else model.param(layer.bias).reshape(-1)
    used = _options_for(options, bias, encoding)

    def run(*_: Any) -> dict[str, Any]:
        old = None if bias is None else torch.tensor(bias, device=device)
        result = solve(rows, row_grid(encoding, unfold, shape, device), fit, held_out, old, used)
        tuned = row_encoding(encoding, result.grid, unfold, shape)
        return {
            "weight": unfold.weight_from_rows(result.values, shape).cpu().numpy(),
            "bias": result.bias.cpu().numpy(),
            "scale": tuned.scale,
            "zero_point": tuned.zero_point,
            "report": result.report,
        }

    moments = [None if m is None else to_arrays(m) for m in (fit, held_out)]
    problem = [model.param(layer.weight), bias, encoding.to_json(), asdict(unfold), asdict(used)]
    found = memo("gram", run, *problem, moments)
    frozen = replace(encoding, scale=found["scale"], zero_point=found["zero_point"], frozen=True)
    return Rounded(found["weight"], found["bias"] if used.update_bias else None, frozen, found["report"])


def _options_for(options: GramOptions, bias: Array | None, encoding: Encoding) -> GramOptions:
    """`options` as they suit a layer: one without a bias gets none, and then means count in the error; scales that are
    all powers of two stay so when searched."""
    return replace(
        options,
        update_bias=options.update_bias and bias is not None,
        power_of_two=bool(np.all(np.frexp(encoding.scale)[0] == 0.5)),
    )


def _moments(
    unfold: Unfold, rows: Tensor, x_hat: Sequence[Tensor], x: Sequence[Tensor], positions: int, seed: int
) -> Any:
    """The moments to solve on and those to judge on (None for few samples)."""
    sums = LayerMoments(rows.shape[0], rows.shape[2], rows, rows.device)
    taken = 0
    for quantized, given in zip(x_hat, x, strict=True):
        count = math.prod(unfold.output_shape(tuple(given.shape)))
        where = sample_positions(count, positions, taken, len(given), seed)
        beside = None if quantized is given else unfold.rows(given, where)
        sums.update(unfold.rows(quantized, where), beside, len(given))
        taken += len(given)
    return sums.fit, sums.held_out
