"""Cross-layer equalization: channels are rescaled between layers until their weights share one range.

For layers that only positively homogeneous operators separate, f(a x) = a f(x), channel i may be divided by any
s_i > 0 in the first and multiplied by it in the next. With

    r1_i = max abs W1 of output channel i       r2_i = max abs W2 of input channel i
    s_i = r1_i / sqrt(r1_i r2_i)                W1 /= s, b1 /= s (rows)        W2 *= s (columns)

both ranges become sqrt(r1_i r2_i). Depthwise layers between them are equalized along: with n layers in a row
all ranges of channel i become the n-th root of their product (conv, depthwise, conv: the cube root). Repeated
until no scale moves.

A bound scales too: min(x, 6) / s = min(x / s, 6 / s). So Clip(0, 6) becomes Relu and Min with one bound per
channel, and the model computes what it did. `relu6: replace_if_unused` puts Relu in its place where no sample
reaches the bound.

A channel whose weights are nearly zero but whose bias is not, a dead one, would be stretched by its scale until it
alone sets the range of all activations: a network trained with a penalty on its normalizations fell from 96.3 % to
12.6 % at 8 bits. `headroom` limits how much further than the channels that count a channel may reach: 96.1 % again,
and 90 % instead of 10 % with 4-bit weights. The reach comes from samples, else from folded statistics.

`norms: true` also rescales channels between a LayerNormalization (or the Mul that ends an RMS norm) and the linear
layers that read it, so that activations and weights share one range per channel.

Assumes: BatchNormalization folded (bnf); every value between the layers is read once, every weight by one layer.
Source: Nagel, van Baalen, Blankevoort, Welling, Data-Free Quantization Through Weight Equalization and Bias
Correction, arXiv 1906.04721, sections 4.1 and 5.1.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from qpipe.errors import InputError, StageError
from qpipe.stage import NULL, Context, Range, Samples, stage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qpipe.methods.equalization.links import Link
    from qpipe.model.network.network import Editor, Network
    from qpipe.model.structure.layers import Layer

    Vector = NDArray[np.float64]

LARGEST_ERROR = 1e-3
"""Relative; what float32 rounding leaves lies three orders below."""

SMALLEST = 1e-30
"""What a range of zero counts as, in a logarithm."""


def scales(ranges: Sequence[Vector]) -> list[Vector]:
    """s_1 … s_(n-1), each (C,), that give n layers in a row the geometric mean of their `ranges`, each (C,).

    Layer k is divided by s_k in its rows and multiplied by s_(k-1) in its columns. A zero range counts as `SMALLEST`.
    """
    import numpy as np

    logs = np.log(np.maximum(np.stack(ranges), SMALLEST))
    return list(np.exp(np.cumsum(logs - logs.mean(axis=0), axis=0)[:-1]))


def bounded(scale: Vector, ranges: Vector, reach: Vector | None, headroom: float, max_scale: float) -> Vector:
    """`scale` (C,), held back where a channel's weights say little and its activations much.

    `ranges` (C,) are what the channels' weights would end with; squared, they say how much each counts. A
    channel that would reach (`reach` / scale, C) more than `headroom` times as far as the channels do on that
    average gets a larger scale, at most the average one. All stay within `max_scale` of the average.
    """
    import numpy as np

    weights = ranges**2 / max(float((ranges**2).sum()), 1e-300)
    average = float(np.exp((weights * np.log(scale)).sum()))
    if reach is not None:
        allowed = headroom * float((weights * reach / scale).sum())
        if allowed > 0:
            scale = np.maximum(scale, np.minimum(reach / allowed, average))
    return np.clip(scale, average / max_scale, average * max_scale)


def equalize(
    peaks: Mapping[str, Vector],
    rows: Sequence[Sequence[Link]],
    reach: Mapping[str, Vector],
    *,
    iterations: int,
    tolerance: float,
    headroom: float,
    max_scale: float,
) -> tuple[dict[str, Vector], int]:
    """The scale (C,) of each link, by its first layer, and the number of passes it took.

    `peaks` are max abs over the kernel, (g, O/g, I/g) by layer; `reach` the activations' by first layer. The first
    pass takes layers in a row together, the others two by two: a scale that is held back moves its neighbours too.
    """
    import numpy as np

    links = {link.first: link for row in rows for link in row}
    totals = {name: np.ones(peaks[name].shape[0] * peaks[name].shape[1]) for name in links}
    into = {link.second: link for link in links.values()}

    def scaled(name: str) -> Vector:
        array = peaks[name]
        groups, per_group, columns = array.shape
        if name in totals:
            array = array / totals[name].reshape(groups, per_group, 1)
        if name in into:
            link = into[name]
            array = array * link.way.channels.spread(totals[link.first]).reshape(groups, 1, columns)
        return array

    def move(row: Sequence[Link]) -> float:
        ranges = [scaled(row[0].first).max(axis=2).reshape(-1)]
        ranges += [link.way.channels.gathered(scaled(link.second).max(axis=1).reshape(-1)) for link in row]
        mean = np.exp(np.log(np.maximum(np.stack(ranges), SMALLEST)).mean(axis=0))
        moved = 0.0
        for link, scale in zip(row, scales(ranges), strict=True):
            before = totals[link.first]
            after = bounded(before * scale, mean, reach.get(link.first), headroom, max_scale)
            totals[link.first] = after
            moved = max(moved, float(np.abs(np.log(after / before)).max()))
        return moved

    pairs = [[link] for row in rows for link in row]
    for done in range(1, iterations + 1):
        if max((move(row) for row in (rows if done == 1 else pairs)), default=0.0) <= tolerance:
            return totals, done
    return totals, iterations


def apply(
    editor: Editor, layers: Mapping[str, Layer], links: Mapping[str, Link], totals: Mapping[str, Vector]
) -> None:
    """Divide each layer's rows, bias and folded statistics by its own scale, multiply its columns by the one before."""
    from dataclasses import replace

    from qpipe.model.network.facts import Spread
    from qpipe.model.structure.channels import bias_vector, grouped, own, set_bias, ungrouped

    into = {link.second: link for link in links.values()}
    statistics = dict(editor.facts.statistics)
    for name in sorted(set(links) | set(into)):
        layer = own(editor, layers[name])
        weight = grouped(editor.param(layer.weight), layer.groups, layer.channel_axis)
        groups, per_group, columns, _ = weight.shape
        if name in into:
            scale = into[name].way.channels.spread(totals[into[name].first])
            weight = weight * scale.reshape(groups, 1, columns, 1)
        if name in totals:
            weight = weight / totals[name].reshape(groups, per_group, 1, 1)
            if layer.bias is not None:
                set_bias(editor, layer, bias_vector(editor, layer) / totals[name])
            if layer.output in statistics:
                spread = statistics[layer.output]
                statistics[layer.output] = Spread(spread.gamma / totals[name], spread.beta / totals[name])
        editor.set_param(layer.weight, ungrouped(weight, layer.weight_shape, layer.channel_axis))
    editor.facts = replace(editor.facts, statistics=statistics)


@stage(
    version=1,
    config={"data": "calibration"},
    not_after={
        "adaround": "equalization moves the grid under weights whose rounding is already tuned",
        "nearest": "equalization moves the grid under weights that are already rounded",
        "calibrate": "the ranges were observed on a model that equalization changes",
        "amp": "the mix was chosen for a model that equalization changes",
    },
)
def cle(
    model: Network,
    data: Samples | None = None,
    *,
    iterations: Annotated[int, Range(ge=1)] = 100,
    tolerance: Annotated[float, Range(ge=0)] = 1e-4,
    headroom: Annotated[float, Range(ge=1)] = 8.0,
    max_scale: Annotated[float, Range(gt=1)] = 1000.0,
    relu6: Literal["exact", "replace_if_unused"] = "exact",
    norms: bool = False,
    ctx: Context = NULL,
) -> Network:
    """The model with its channels' ranges equalized across layers; it computes the same, which is measured.

    At most `iterations` passes over all rows of layers, fewer once no scale moves by more than `tolerance`
    (of its logarithm); 1 is one pass. `data` say how far activations reach, and serve `replace_if_unused` and
    the measurement (random inputs without); `norms` lets normalizations take part. The scales' extent, the
    largest error and each layer left as it was, with the reason, are in `metadata["cle"]`. Errors: InputError
    for a quantized model or missing data; StageError where the outputs moved by more than 1e-3.
    """
    from qpipe.methods.preconditions import float_weights

    if not float_weights(model, "cle", ctx.note):
        return model
    if relu6 == "replace_if_unused" and data is None:
        raise InputError(
            "relu6: replace_if_unused needs samples on the port `data`. Wire it, or take relu6: exact."
        )
    import numpy as np

    from qpipe.methods.comparison.compare import outputs_error
    from qpipe.methods.equalization.links import chains, find_links, rescale_bounds
    from qpipe.methods.equalization.norm_links import equalize_norms, find_norm_links, measured
    from qpipe.methods.equalization.reach import expected_reach, measured_reach, unreached
    from qpipe.model.structure.channels import grouped
    from qpipe.model.structure.layers import find_layers

    editor = model.edit()
    layers = {layer.name: layer for layer in find_layers(model)}
    links, refused = find_links(editor, layers)
    behind, stay = find_norm_links(editor, layers) if norms else ([], {})
    reached = measured(model, behind, data.arrays if data is not None else None)
    moved = equalize_norms(editor, behind, layers, reached, max_scale)
    refused |= stay
    linked = [layers[name] for name in sorted(set(links) | {link.second for link in links.values()})]
    peaks = {  # float32 holds them exactly: of linear layers they are the whole weight
        layer.name: np.abs(grouped(editor.param(layer.weight), layer.groups, layer.channel_axis))
        .max(axis=3)
        .astype(np.float32)
        for layer in linked
    }
    rows = chains(links, layers)
    free: set[str] = set()
    if data is None:
        reach = {name: expected_reach(model, layers[name], link) for name, link in links.items()}
    else:
        reach = measured_reach(model, data.arrays, layers, links)
        if relu6 == "replace_if_unused":
            free = unreached(model, data.arrays, links.values())
    totals, passes = equalize(
        peaks, rows, reach, iterations=iterations, tolerance=tolerance, headroom=headroom, max_scale=max_scale
    )
    apply(editor, layers, links, totals)
    for link in links.values():
        for step in link.way.steps:
            if step.node.op_type in ("Clip", "Min", "Max"):
                rescale_bounds(editor, step, totals[link.first], str(step.node.name) in free)
    result = editor.model()
    error = outputs_error(model, result, data.arrays if data is not None else None) if links or moved else 0.0
    if error > LARGEST_ERROR:
        raise StageError(
            f"cle changed the model's outputs by {error:.1e} (relative); that is not float rounding."
        )
    also = f" and {len(moved)} normalizations" if moved else ""
    ctx.note(
        f"equalized {len(links)} pairs of layers{also} in {passes} passes; the outputs moved by {error:.1e}."
    )
    if refused:
        ctx.note(
            f"left {len(refused)} layers as they were: {'; '.join(f'{k}: {v}' for k, v in refused.items())}."
        )
    report: dict[str, Any] = {
        "pairs": {
            name: {
                "second": link.second,
                "smallest": float(totals[name].min()),
                "largest": float(totals[name].max()),
            }
            for name, link in links.items()
        },
        "norms": {
            name: {"smallest": float(scale.min()), "largest": float(scale.max())}
            for name, scale in moved.items()
        },
        "passes": passes,
        "largest_relative_error": float(f"{error:.1e}"),
        "replaced": sorted(free),
        "refused": refused,
    }
    return result.with_metadata({"cle": report})
