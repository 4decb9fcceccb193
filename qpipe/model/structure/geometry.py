"""A layer's geometry for `qpipe.numerics.rounding.unfold`: pads that depend on the input's size become numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qpipe.model.operators.window import window
from qpipe.numerics.rounding.unfold import Unfold

if TYPE_CHECKING:
    from qpipe.model.structure.layers import Layer


def unfold_of(layer: Layer, spatial: tuple[int, ...] = ()) -> Unfold:
    """How the inputs and the weight of `layer` become matrices, for inputs of the size `spatial`.

    `spatial` is read only where the layer has `auto_pad` or `output_shape`, and for convolutions only.
    """
    if layer.op_type in ("Gemm", "MatMul"):
        return Unfold("linear", weight_axis=layer.channel_axis)
    return Unfold(
        "conv" if layer.op_type == "Conv" else "conv_transpose",
        kernel_shape=layer.kernel_shape,
        strides=layer.strides,
        pads=_pads(layer, spatial),
        dilations=layer.dilations,
        output_padding=layer.output_padding if layer.op_type == "ConvTranspose" else (),
        groups=layer.groups,
    )


def _pads(layer: Layer, spatial: tuple[int, ...]) -> tuple[int, ...]:
    if layer.auto_pad == "NOTSET" and not layer.output_shape:
        return layer.pads
    if layer.op_type == "Conv":
        place = window(
            spatial, layer.kernel_shape, layer.strides, layer.dilations, layer.pads, layer.auto_pad
        )
        return (*place.begins, *place.ends)
    if layer.auto_pad == "VALID" and not layer.output_shape:
        return (0,) * 2 * len(spatial)
    return _transposed_pads(layer, spatial)


def _transposed_pads(layer: Layer, spatial: tuple[int, ...]) -> tuple[int, ...]:
    """What is cut off so that the output has `output_shape`, or else the input's size times the stride."""
    rank = len(spatial)
    wanted = layer.output_shape[-rank:] or tuple(
        size * step for size, step in zip(spatial, layer.strides, strict=True)
    )
    begins, ends = [], []
    for i in range(rank):
        reach = layer.dilations[i] * (layer.kernel_shape[i] - 1) + 1
        total = layer.strides[i] * (spatial[i] - 1) + layer.output_padding[i] + reach - wanted[i]
        begins.append(total // 2 if layer.auto_pad == "SAME_UPPER" else total - total // 2)
        ends.append(total - begins[-1])
    return (*begins, *ends)
