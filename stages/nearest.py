"""Round every quantized weight to the nearest value of its grid, and keep it there.

    w^ = s (clip(round_half_even(w / s) + z, qmin, qmax) - z)

This is what a QDQ export does with weights that nothing tuned, done in the model itself: the baseline that
methods which tune weights are held against, in the same place of a pipeline.

Assumes: weights have encodings (`calibrate`). Weights that a method has tuned already, whose encodings are
frozen, stay as they are. Biases stay float here: the export writes them as int32 with scale s_x * s_w.
Source: own; the arithmetic is that of ONNX's QuantizeLinear and DequantizeLinear, opset 21.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qpipe.errors import InputError
from qpipe.stage import NULL, Context, stage

if TYPE_CHECKING:
    from qpipe.model.network.network import Network


def open_weights(model: Network) -> list[str]:
    """The initializers that have an encoding which is not frozen, in the order of their names."""
    params = model.params
    return [name for name in sorted(model.encodings) if name in params and not model.encodings[name].frozen]


@stage(
    version=1,
    not_after={"adaround": "the tuned weights are on the grid already"},
)
def nearest(model: Network, *, ctx: Context = NULL) -> Network:
    """The model with every quantized weight rounded to its grid and frozen.

    Errors: InputError where no weight has an encoding, or one holds a nan.
    """
    from dataclasses import replace

    from qpipe.numerics.grid import quantize_dequantize

    if not any(name in model.params for name in model.encodings):
        raise InputError(
            "No weight of the model has an encoding to round to. Put the stage 'calibrate' before 'nearest'."
        )
    names = open_weights(model)
    editor = model.edit()
    for done, name in enumerate(names):
        editor.set_param(name, quantize_dequantize(model.param(name), model.encodings[name], name))
        editor.encodings[name] = replace(model.encodings[name], frozen=True)
        ctx.progress(done + 1, len(names), name)
    kept = sorted(name for name, encoding in model.encodings.items() if encoding.frozen)
    if kept:
        ctx.note(f"Tuned before, so left as they are: {', '.join(kept)}.")
    return editor.model()
