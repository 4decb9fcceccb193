"""Re-estimate what batch normalizations know of their inputs, in the model as it is now: quantized, tuned, trained.

    mean' = E[x]        var' = E[x^2] - E[x]^2          pooled over all samples, x as the quantized model gives it

A normalization that was folded into its layer is re-estimated there: its outputs y have to have the mean beta and the
spread gamma that the fold kept, so that

    y' = g (y - E[y]) + beta,    g = |gamma| / sqrt(E[y^2] - E[y]^2)

where g goes into the scale of each row, whose codes stay, and the rest into the bias. In order, each on what those
before it make of the samples. With the float model wired, samples held out judge: what does not bring the outputs
nearer to float's is left.

Assumes: some hundred samples as the training saw them; of few, the mean of each channel is all noise. Scales per
tensor, or that are powers of two, stay, and then the mean alone is set right.
Source: Sun et al., "Hybrid 8-bit Floating Point Training and Inference", NeurIPS 2019, section 3.1; AIMET's
reestimate_bn_stats, which averages the variances of batches instead and so loses what lies between them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, NamedTuple

from qpipe.errors import InputError
from qpipe.stage import NULL, Context, Range, Samples, stage

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray
    from torch import Tensor

    from qpipe.model.network.network import Editor, Network
    from qpipe.model.simulation.stream import Stream
    from qpipe.model.structure.layers import Layer
    from qpipe.numerics.grid import Encoding

    Vector = NDArray[np.float64]
    Arrays = Mapping[str, NDArray[np.generic]]

JUDGE = 7
"""One sample in so many is held out to judge by."""


class Moments(NamedTuple):
    """Mean and variance (C,) of so many values a channel."""

    samples: int
    mean: Vector
    var: Vector


def pooled(batches: Iterable[Tensor], axis: int) -> Moments:
    """The moments of the concatenated batches, of any sizes, channels along `axis`: deviations add up around the common
    mean (Chan, Golub, LeVeque), so that no digit is lost to E[x^2] - E[x]^2. Errors: ValueError for no batch."""
    import torch

    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for batch in batches:
        x = batch.detach().double().movedim(axis, 0).flatten(1)
        own, more = x.mean(1), x.shape[1]
        apart = own - mean
        mean = mean + apart * more / (count + more)
        squares = squares + (x - own[:, None]).square().sum(1) + apart.square() * count * more / (count + more)
        count += more
    if not count:
        raise ValueError("moments of no batch.")
    return Moments(count, mean.cpu().numpy(), (squares / count).cpu().numpy())


def gain_axis(layer: Layer, encoding: Encoding | None, readers: int) -> int | None:
    """The axis of the weight whose rows may be scaled one by one, codes staying; None where the grid does not let them,
    or where the weight has several `readers`."""
    import numpy as np

    shape, axis = layer.weight_shape, layer.channel_axis
    if layer.op_type == "ConvTranspose" and layer.groups > 1:
        axis = 0 if shape[0] == layer.channels and shape[1] == 1 else -1
    if readers > 1 or axis < 0 or encoding is None or encoding.axis is None:
        return None
    if bool(np.all(np.frexp(encoding.scale)[0] == 0.5)) or (encoding.axis == axis) == bool(encoding.block_size):
        return None
    return axis


def scaled(
    weight: NDArray[np.float32], encoding: Encoding, gain: Vector, axis: int
) -> tuple[NDArray[np.float32], Encoding]:
    """The weight with row o times gain_o along `axis`, and its grid with the scales times it: the codes stay."""
    from dataclasses import replace

    from qpipe.numerics.grid import dequantize, quantize

    def along(ndim: int) -> tuple[int, ...]:
        return tuple(-1 if place == axis else 1 for place in range(ndim))

    blocked = encoding.block_size is not None
    wider = replace(encoding, scale=encoding.scale * (gain.reshape(along(weight.ndim)) if blocked else gain))
    if encoding.frozen:
        return dequantize(quantize(weight, encoding), wider), wider
    return (weight * gain.reshape(along(weight.ndim))).astype("float32"), wider


def layer_outputs(model: Network, layer: Layer, inputs: Iterable[Tensor], device: str) -> Iterable[Tensor]:
    """What the layer makes of its `inputs`, before any quantizer of its output."""
    import torch

    from qpipe.model.network.parts import block
    from qpipe.model.simulation.module import to_torch

    part = block(model, [layer.input], [layer.output])
    kept = {name: encoding for name, encoding in part.encodings.items() if name != layer.output}
    module = to_torch(part.with_encodings(kept), device=device)
    for x in inputs:
        with torch.no_grad():
            yield module(x)


def refit_norm(editor: Editor, norm: ir.Node, stream: Stream) -> str | None:
    """Set mean and variance of a BatchNormalization; why they are left, or None."""
    names = [value.name if value is not None and value.is_initializer() else None for value in norm.inputs[3:5]]
    if None in names or any(len(editor.value(str(name)).uses()) > 1 for name in names):
        return "its statistics are computed in the graph, or another one reads them too"
    stream.advance(str(norm.name))
    assert norm.inputs[0] is not None
    found = pooled(stream.value(str(norm.inputs[0].name)), 1)
    for name, vector in zip(names, (found.mean, found.var), strict=True):
        editor.set_param(str(name), vector)
        stream.set_parameter(str(name), editor.param(str(name)).copy())
    return None


def refit_layer(editor: Editor, source: Network, layer: Layer, stream: Stream, device: str) -> str | None:
    """Give a layer's outputs the mean and spread of the normalization folded into it; what stays as it was, or None."""
    import numpy as np

    if layer.bias is None:
        return "it has no bias to move"
    spread, encoding = editor.facts.statistics[layer.output], editor.encodings.get(layer.weight)
    stream.advance(layer.name)
    outputs = layer_outputs(source, layer, stream.value(layer.input), device)
    found = pooled(outputs, -1 if layer.op_type == "MatMul" else 1)
    axis = gain_axis(layer, encoding, len(editor.value(layer.weight).uses()))
    alive = (found.var > 1e-12 * (1.0 + found.mean**2)) & (spread.gamma != 0.0)
    gain = np.where(alive, np.abs(spread.gamma) / np.sqrt(np.where(alive, found.var, 1.0)), 1.0)
    gain = gain if axis is not None else np.ones_like(gain)
    bias = editor.param(layer.bias)
    editor.set_param(layer.bias, (gain * (bias.reshape(-1) - found.mean) + spread.beta).reshape(bias.shape))
    stream.set_parameter(layer.bias, editor.param(layer.bias).copy())
    if axis is None or encoding is None:
        return "its scales are not one for each channel alone, so the spread stays"
    weight, wider = scaled(editor.param(layer.weight), encoding, gain, axis)
    editor.set_param(layer.weight, weight)
    editor.encodings[layer.weight] = wider
    stream.set_parameter(layer.weight, editor.param(layer.weight).copy())
    stream.module.get_submodule(stream.module.meta["quantizers"][layer.weight]).set_encoding(wider)  # type: ignore[operator]  # a FakeQuantize
    return None


def prepared(model: Network) -> tuple[Editor, dict[str, Layer]]:
    """The model with a bias of its own in each layer that a normalization was folded into (a MatMul without one stays
    without), and these layers by name."""
    from qpipe.model.structure.channels import bias_vector, own_bias, set_bias
    from qpipe.model.structure.layers import find_layers

    editor, found = model.edit(), {}
    for layer in find_layers(editor):
        if layer.output in model.facts.statistics:
            if layer.bias is not None or layer.op_type != "MatMul":
                layer = own_bias(editor, layer)
                layer = set_bias(editor, layer, bias_vector(editor, layer))
            found[layer.name] = layer
    return editor, found


def outputs_error(model: Network, float_model: Network, arrays: Arrays, ctx: Context) -> float:
    """Squared error of the float outputs over their energy, the mean of all."""
    import numpy as np

    from qpipe.model.simulation.run import run
    from qpipe.numerics.metrics import counting

    found = run(model, arrays, device=ctx.device)
    wanted = counting(run(float_model, arrays, quantized=False, device=ctx.device))
    errors = [
        np.square(found[name].astype(np.float64) - y).sum() / max(float(np.square(y.astype(np.float64)).sum()), 1e-30)
        for name, y in wanted.items()
    ]
    return float(np.mean(errors))


def reestimated(model: Network, arrays: Arrays, ctx: Context) -> tuple[Network, dict[str, str]]:
    """The model with all that can be re-estimated, and what was left, by name, with the reason."""
    from qpipe.model.simulation.module import to_torch
    from qpipe.model.simulation.samples import batches
    from qpipe.model.simulation.stream import Stream

    editor, layers = prepared(model)
    norms = [node for node in editor.graph if node.op_type == "BatchNormalization"]
    if not norms and not layers:
        raise InputError(
            "bn_reestimate: the model has no BatchNormalization, and 'bnf' folded none. Leave bn_reestimate out: the "
            "means of its layers are adaround's to correct."
        )
    source = editor.model()
    stream = Stream(to_torch(source, device=ctx.device), (batch.arrays for batch in batches(source, arrays, 32)))
    left: dict[str, str] = {}
    for done, node in enumerate(list(editor.graph)):
        name, reason = str(node.name), None
        if node.op_type == "BatchNormalization":
            reason = refit_norm(editor, node, stream)
        elif name in layers:
            reason = refit_layer(editor, source, layers[name], stream, ctx.device)
        if reason:
            left[name] = reason
        ctx.progress(done + 1, editor.graph.num_nodes(), name)
    return editor.model(), left


@stage(
    version=1,
    config={"data": "${tuning}"},
    not_before={"cle": "equalization looks for scales that the re-estimation changes"},
)
def bn_reestimate(
    model: Network,
    data: Samples,
    float_model: Network | None = None,
    *,
    limit: Annotated[int, Range(ge=1)] | None = 1000,
    ctx: Context = NULL,
) -> Network:
    """The model with the statistics of its batch normalizations, folded or not, as its own activations have them.

    `limit` takes that many samples, evenly spread. `metadata["bn_reestimate"]` says what stayed as it was. With
    `float_model`, a seventh of the samples is held out, and the model stays as it is where its outputs there come no
    nearer to the float model's. Errors: InputError for a model without batch normalizations, and data that do not fit.
    """
    from qpipe.numerics.thinning import thinned

    arrays = thinned(data.arrays, limit)
    judge = {name: array[JUDGE // 2 :: JUDGE] for name, array in arrays.items()} if float_model is not None else {}
    if judge and min(map(len, judge.values())):
        rest = [place for place in range(len(next(iter(arrays.values())))) if place % JUDGE != JUDGE // 2]
        arrays = {name: array[rest] for name, array in arrays.items()}
    found, left = reestimated(model, arrays, ctx)
    for name, reason in left.items():
        ctx.note(f"'{name}': {reason}.")
    report: dict[str, object] = {"left": left, "kept": "reestimated"}
    if float_model is not None:
        before, after = (outputs_error(each, float_model, judge or arrays, ctx) for each in (model, found))
        report |= {"error_before": before, "error_after": after}
        if after >= before:
            ctx.note(f"The statistics stay: the outputs would err by {after:.3g} of float's energy, not {before:.3g}.")
            found, report["kept"] = model, "before"
    return found.with_metadata({"bn_reestimate": report})
