"""Cross-layer equalization: rescale channels between layers until their weights share one range; the function
stays.

For layers that only positively homogeneous operators separate, f(a x) = a f(x), channel i may be divided by
any s_i > 0 in the first and multiplied by it in the next. With r1_i = max abs W1 of output channel i, r2_i =
max abs W2 of input channel i

    s_i = r1_i / sqrt(r1_i r2_i)        W1 /= s, b1 /= s (rows)        W2 *= s (columns)

makes both ranges sqrt(r1_i r2_i). Depthwise layers between them are equalized along: with n layers in a row
all ranges of channel i become the n-th root of their product (conv, depthwise, conv: the cube root). Repeated
until no scale moves.

A bound scales too: min(x, 6) / s = min(x / s, 6 / s). So Clip(0, 6) becomes Relu and Min with one bound per
channel, and the model computes what it did. `relu6: replace_if_unused` puts Relu in its place where no sample
reaches the bound.

A channel whose weights are nearly zero has no range to equalize: its scale would explode, and with it what
its bias adds. Scales stay within `max_scale` of their median over the channels of that layer.

Assumes: BatchNormalization folded (bnf); every value between the layers is read once, every weight by one
layer.
Source: Nagel, van Baalen, Blankevoort, Welling, Data-Free Quantization Through Weight Equalization and Bias
Correction, arXiv 1906.04721, sections 4.1 and 5.1.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from qpipe.errors import InputError, StageError
from qpipe.stage import NULL, Context, Range, Samples, stage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qpipe.model import Editor, Layer, Model
    from qpipe.model.links import Link

    Vector = NDArray[np.float64]

LARGEST_ERROR = 1e-3
"""Relative; what float32 rounding leaves lies three orders below."""


def scales(ranges: Sequence[Vector]) -> list[Vector]:
    """s_1 … s_(n-1), each (C,), that give n layers in a row the geometric mean of their `ranges`, each (C,).

    Layer k is divided by s_(k+1) in its rows and multiplied by s_k in its columns. A range of zero counts as
    1e-30.
    """
    import numpy as np

    logs = np.log(np.maximum(np.stack(ranges), 1e-30))
    return list(np.exp(np.cumsum(logs - logs.mean(axis=0), axis=0)[:-1]))


def clamped(total: Vector, largest: float) -> Vector:
    """`total` (C,), each within a factor of `largest` of the median."""
    import numpy as np

    median = np.median(total)
    return np.clip(total, median / largest, median * largest)


def equalize(
    peaks: Mapping[str, Vector],
    rows: Sequence[Sequence[Link]],
    *,
    iterations: int,
    tolerance: float,
    max_scale: float,
) -> tuple[dict[str, Vector], int]:
    """The scale (C,) of each link, by its first layer, and the number of passes it took.

    `peaks` are max abs over the kernel, (g, O/g, I/g) by layer.
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

    for done in range(1, iterations + 1):
        moved = 0.0
        for row in rows:
            ranges = [scaled(row[0].first).max(axis=2).reshape(-1)]
            ranges += [
                link.way.channels.gathered(scaled(link.second).max(axis=1).reshape(-1)) for link in row
            ]
            for link, scale in zip(row, scales(ranges), strict=True):
                before = totals[link.first]
                totals[link.first] = clamped(before * scale, max_scale)
                moved = max(moved, float(np.abs(np.log(totals[link.first] / before)).max()))
        if moved <= tolerance:
            return totals, done
    return totals, iterations


def unreached(model: Model, data: Samples, links: Iterable[Link]) -> set[str]:
    """The names of the Clips on the way of `links` whose upper bound no sample reaches, in onnxruntime."""
    import numpy as np

    from qpipe.model.channels import constant
    from qpipe.model.run import batches

    uppers: dict[str, tuple[str, float]] = {}
    for node in (step.node for link in links for step in link.way.steps if step.node.op_type == "Clip"):
        upper = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        value = node.inputs[0]
        if value is not None and upper is not None and np.isfinite(upper):
            uppers[str(node.name)] = (str(value.name), float(upper))
    if not uppers:
        return set()
    session = model.session(quantized=False, outputs=[value for value, _ in uppers.values()])
    free = set(uppers)
    for batch in batches(model, data.arrays, 32):
        fed = dict(zip([spec.name for spec in model.inputs], batch.arrays, strict=True))
        for (name, (_, bound)), array in zip(uppers.items(), session.run(None, fed), strict=True):
            if array.max() >= bound:
                free.discard(name)
    return free


def apply(
    editor: Editor, layers: Mapping[str, Layer], links: Mapping[str, Link], totals: Mapping[str, Vector]
) -> None:
    """Divide each layer's rows, bias and folded statistics by its own scale, multiply its columns by the one
    before.
    """
    import numpy as np

    from qpipe.model.channels import bias_vector, grouped, own, set_bias, ungrouped

    into = {link.second: link for link in links.values()}
    statistics = editor.metadata.get("folded_statistics", {})
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
                found = statistics[layer.output]
                statistics[layer.output] = {
                    key: (np.array(found[key]) / totals[name]).tolist() for key in found
                }
        editor.set_param(layer.weight, ungrouped(weight, layer.weight_shape, layer.channel_axis))


@stage(version=1)
def cle(
    model: Model,
    data: Samples | None = None,
    *,
    iterations: Annotated[int, Range(ge=1)] = 100,
    tolerance: Annotated[float, Range(ge=0)] = 1e-4,
    max_scale: Annotated[float, Range(gt=1)] = 100.0,
    relu6: Literal["exact", "replace_if_unused"] = "exact",
    ctx: Context = NULL,
) -> Model:
    """The model with the ranges of its channels equalized across layers; it computes the same, which is
    measured.

    At most `iterations` passes over all rows of layers, fewer once no scale moves by more than `tolerance`
    (of its logarithm); 1 is one pass. `data` serve `replace_if_unused` and the measurement (random inputs
    without). The scales' extent, the largest error and each layer left as it was, with the reason, are in
    `metadata["cle"]`. Errors: InputError for a quantized model or missing data; StageError where the outputs
    moved by more than 1e-3.
    """
    if model.encodings:
        raise InputError(
            "cle changes weights, and this model's are quantized already. Put cle before quantization."
        )
    if relu6 == "replace_if_unused" and data is None:
        raise InputError(
            "relu6: replace_if_unused needs samples on the port `data`. Wire it, or take relu6: exact."
        )
    import numpy as np

    from qpipe.model.channels import grouped
    from qpipe.model.compare import outputs_error
    from qpipe.model.links import chains, find_links, rescale_bounds

    editor = model.edit()
    layers = {layer.name: layer for layer in model.layers()}
    links, refused = find_links(editor, layers)
    peaks = {
        name: np.abs(grouped(editor.param(layer.weight), layer.groups, layer.channel_axis)).max(axis=3)
        for name, layer in layers.items()
    }
    rows = chains(links, layers)
    totals, passes = equalize(peaks, rows, iterations=iterations, tolerance=tolerance, max_scale=max_scale)
    free = (
        unreached(model, data, links.values()) if data is not None and relu6 == "replace_if_unused" else set()
    )
    apply(editor, layers, links, totals)
    for link in links.values():
        for step in link.way.steps:
            if step.node.op_type in ("Clip", "Min", "Max"):
                rescale_bounds(editor, step, totals[link.first], str(step.node.name) in free)
    result = editor.model()
    error = outputs_error(model, result, data.arrays if data is not None else None)
    if error > LARGEST_ERROR:
        raise StageError(
            f"cle changed the model's outputs by {error:.1e} (relative); that is not float rounding."
        )
    ctx.note(f"equalized {len(links)} pairs of layers in {passes} passes; the outputs moved by {error:.1e}.")
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
        "passes": passes,
        "largest_relative_error": float(f"{error:.1e}"),
        "replaced": sorted(free),
        "refused": refused,
    }
    return result.with_metadata({"cle": report})
