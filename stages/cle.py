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
layers that read it, so that activations and weights share one range per channel. With `layers: false` that is all:
it adds nothing to the graph, where a bound between layers becomes a Min.

Assumes: BatchNormalization folded (bnf); every value between the layers is read once, every weight by one layer.
Source: Nagel, van Baalen, Blankevoort, Welling, Data-Free Quantization Through Weight Equalization and Bias
Correction, arXiv 1906.04721, sections 4.1 and 5.1.1.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from qpipe.errors import InputError, StageError
from qpipe.stage import NULL, Context, Range, Samples, stage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qpipe.methods.equalization.links import Link
    from qpipe.model.network.network import Network

    Vector = NDArray[np.float64]
    Peaks = Mapping[str, NDArray[np.float32]]

LARGEST_ERROR = 1e-3
"""Relative; what float32 rounding leaves lies three orders below."""

SMALLEST = 1e-30
"""What a range of zero counts as, in a logarithm."""


@dataclass(frozen=True)
class Limits:
    """How long scales are looked for, and how far they may go: the options of `cle` that bear these names."""

    iterations: int
    tolerance: float
    headroom: float
    max_scale: float


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of the model: `links` and their scales (C,), both by the first layer, and `passes` over them; the
    scales of `norms`; the bounds that were `replaced`; the largest `error`; each layer that was left, with the reason.
    """

    links: Mapping[str, Link]
    scales: Mapping[str, Vector]
    passes: int
    norms: Mapping[str, Vector]
    replaced: Collection[str]
    error: float
    refused: Mapping[str, str]


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


def ranges_of(
    row: Sequence[Link], peaks: Peaks, into: Mapping[str, Link], totals: Mapping[str, Vector]
) -> list[Vector]:
    """The ranges of all channels, (C,) for each layer of a row, with the layers rescaled by `totals`.

    Of the first layer the rows count, of the others the columns. `into` is the link that leads to a layer.
    """

    def scaled(name: str) -> Vector:
        array: NDArray[Any] = peaks[name]
        groups, per_group, columns = array.shape
        if name in totals:
            array = array / totals[name].reshape(groups, per_group, 1)
        if name in into:
            link = into[name]
            array = array * link.way.channels.spread(totals[link.first]).reshape(groups, 1, columns)
        return array

    first = scaled(row[0].first).max(axis=2).reshape(-1)
    columns = (link.way.channels.gathered(scaled(link.second).max(axis=1).reshape(-1)) for link in row)
    return [first, *columns]


def moved(
    row: Sequence[Link],
    found: list[Vector],
    totals: Mapping[str, Vector],
    reach: Mapping[str, Vector],
    limits: Limits,
) -> dict[str, Vector]:
    """The scale (C,) of each link in a row, by its first layer, from which its layers get one range; `found` are the
    ranges that they have under `totals`."""
    import numpy as np

    mean = np.exp(np.log(np.maximum(np.stack(found), SMALLEST)).mean(axis=0))
    return {
        link.first: bounded(
            totals[link.first] * scale, mean, reach.get(link.first), limits.headroom, limits.max_scale
        )
        for link, scale in zip(row, scales(found), strict=True)
    }


def equalize(
    peaks: Peaks, rows: Sequence[Sequence[Link]], reach: Mapping[str, Vector], limits: Limits
) -> tuple[dict[str, Vector], int]:
    """The scale (C,) of each link, by its first layer, and the number of passes it took.

    `peaks` are the layers', `reach` the activations' by first layer. The first pass takes layers in a row together,
    the others two by two: a scale that is held back moves its neighbours too.
    """
    import numpy as np

    pairs = [[link] for row in rows for link in row]
    into = {link.second: link for (link,) in pairs}
    totals = {link.first: np.ones(peaks[link.first][..., 0].size) for (link,) in pairs}
    for done in range(1, limits.iterations + 1):
        largest = 0.0
        for row in rows if done == 1 else pairs:
            after = moved(row, ranges_of(row, peaks, into, totals), totals, reach, limits)
            apart = (float(np.abs(np.log(after[name] / totals[name])).max()) for name in after)
            largest = max(largest, *apart)
            totals |= after
        if largest <= limits.tolerance:
            return totals, done
    return totals, limits.iterations


def checked(before: Network, after: Network, arrays: Mapping[str, NDArray[Any]] | None) -> float:
    """How far the outputs moved, relative, on samples or on random inputs.

    Errors: StageError where that is more than float32 rounding can be.
    """
    from qpipe.methods.comparison.compare import OWN, outputs_error, own_error

    error = outputs_error(before, after, arrays)
    if error > LARGEST_ERROR and error > OWN * own_error(before, arrays):
        raise StageError(
            f"cle changed the model's outputs by {error:.1e} (relative); that is not float rounding."
        )
    return error


def sentences(found: Outcome) -> list[str]:
    """What to note: how much was equalized, and what was left."""
    also = f" and {len(found.norms)} normalizations" if found.norms else ""
    pairs = f"{len(found.links)} pairs of layers{also}"
    told = [f"equalized {pairs} in {found.passes} passes; the outputs moved by {found.error:.1e}."]
    if not found.links and not found.norms:
        told = ["nothing is equalized."]
    if found.refused:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in found.refused.items())
        told.append(f"left {len(found.refused)} layers as they were: {reasons}.")
    return told


def report(found: Outcome) -> dict[str, Any]:
    """The same in numbers, as `metadata["cle"]` keeps it."""

    def extent(scale: Vector) -> dict[str, Any]:
        return {"smallest": float(scale.min()), "largest": float(scale.max())}

    return {
        "pairs": {
            name: {"second": link.second, **extent(found.scales[name])} for name, link in found.links.items()
        },
        "norms": {name: extent(scale) for name, scale in found.norms.items()},
        "passes": found.passes,
        "largest_relative_error": float(f"{found.error:.1e}"),
        "replaced": sorted(found.replaced),
        "refused": dict(found.refused),
    }


@stage(
    version=1,
    config={"data": "${tuning}"},
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
    layers: bool = True,
    ctx: Context = NULL,
) -> Network:
    """The model with its channels' ranges equalized across layers; it computes the same, which is measured.

    At most `iterations` passes over all rows of layers, fewer once no scale moves by more than `tolerance` (of its
    logarithm); 1 is one pass. `headroom` is how much further than those that count a channel may reach, `max_scale`
    how far its scale may lie from the average. `relu6`, replace_if_unused, puts Relu in the place of a bound that
    no sample reaches; exact keeps what is computed. `data` say how far activations reach, and serve
    `replace_if_unused` and the measurement (random inputs without); `norms` lets normalizations take part,
    `layers: false` leaves the others out. The scales' extent, the largest error and each layer left as it was, with
    the reason, are in `metadata["cle"]`; a model in which nothing is equalized comes back as it was.
    Errors: InputError for a quantized model or missing data; StageError where the outputs moved by more than 1e-3.
    """
    from qpipe.methods.preconditions import float_weights

    if not float_weights(model, "cle", ctx.note):
        return model
    if relu6 == "replace_if_unused" and data is None:
        raise InputError(
            "relu6: replace_if_unused needs samples on the port `data`. Wire it, or take relu6: exact."
        )
    from qpipe.methods.equalization.links import chains, find_links
    from qpipe.methods.equalization.norm_links import equalize_norms, find_norm_links, measured
    from qpipe.methods.equalization.reach import activation_reach, unreached
    from qpipe.methods.equalization.rescaling import peaks, rescale
    from qpipe.model.structure.layers import find_layers

    editor, arrays = model.edit(), None if data is None else data.arrays
    all_layers = {layer.name: layer for layer in find_layers(model)}
    links, refused = find_links(editor, all_layers) if layers else ({}, {})
    behind, stay = find_norm_links(editor, all_layers) if norms else ([], {})
    if not links and not behind:
        for sentence in sentences(Outcome({}, {}, 0, {}, (), 0.0, {**refused, **stay})):
            ctx.note(sentence)
        return model
    reach, reached = activation_reach(model, all_layers, links, arrays), measured(model, behind, arrays)
    replaced = unreached(model, arrays, links.values()) if arrays and relu6 == "replace_if_unused" else ()
    rescaled = equalize_norms(editor, behind, all_layers, reached, max_scale)
    limits = Limits(iterations, tolerance, headroom, max_scale)
    totals, passes = equalize(peaks(editor, all_layers, links), chains(links, all_layers), reach, limits)
    rescale(editor, all_layers, links, totals, replaced)
    result = editor.model()
    error = checked(model, result, arrays) if links or rescaled else 0.0
    found = Outcome(links, totals, passes, rescaled, replaced, error, {**refused, **stay})
    for sentence in sentences(found):
        ctx.note(sentence)
    return result.with_metadata({"cle": report(found)})
