"""Bring a model into the shape that the later stages count on, and show that it still computes the same.

    y = alpha (x W) + beta c   ->   y = x (alpha W) + beta c written into the parameters
    a bias that several layers share, or of one number for all channels   ->   one vector for each layer
    f * (x W + b) + s, by constants     ->   x (W f) + (b f + s); before layers too (qpipe.model.structure.factors)
    HardSigmoid(x W + b)                ->   Clip(x (a W) + (a b + c), 0, 1)
    the canonical form again: constants folded, dead and equal nodes out, every node and value named

max |y - y'| / max |y| over the outputs, in onnxruntime on `data` (without, on inputs made up), has to stay within
`tolerance`.

Assumes: a float model. Samples, where they are wired, have one array for each input, of its rank, type and
fixed dimensions; they are checked here, since every later stage would fail on them one by one.
Source: own; the list of what to prepare follows what equalization, folding and rounding each ask for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from qpipe.errors import StageError
from qpipe.stage import NULL, Context, Range, Samples, stage

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from qpipe.model.network.network import Editor, Network


def scale_into_parameters(editor: Editor, node: ir.Node) -> bool:
    """Write alpha and beta of a Gemm with constant parameters into them; whether there was anything to write."""
    import numpy as np
    import onnx_ir

    changed = False
    for index, key in ((1, "alpha"), (2, "beta")):
        factor: float = node.attributes.get_float(key, 1.0)
        value = node.inputs[index] if len(node.inputs) > index else None
        if factor == 1.0 or (value is not None and not value.is_initializer()):
            continue
        if value is not None:
            array = editor.param(str(value.name)) * np.float32(factor)
            node.replace_input_with(index, editor.add_param(str(value.name), array))
        node.attributes[key] = onnx_ir.AttrFloat32(key, 1.0)
        changed = True
    return changed


def widen_bias(editor: Editor, node: ir.Node) -> bool:
    """Write a Gemm's bias of one number as one for each channel; whether it was one number."""
    import numpy as np

    weight, bias = (node.inputs[index] if len(node.inputs) > index else None for index in (1, 2))
    if bias is None or weight is None or not bias.is_initializer() or weight.const_value is None:
        return False
    array = editor.param(str(bias.name))
    transposed: int = node.attributes.get_int("transB", 0)
    channels = weight.const_value.shape.numpy()[0 if transposed else 1]
    if array.size != 1 or array.shape == (channels,):
        return False
    node.replace_input_with(2, editor.add_param(str(bias.name), np.full(channels, array.reshape(())[()])))
    return True


def separate(model: Network, weights: bool) -> tuple[Network, list[str]]:
    """The model whose layers each have a bias (and a weight) of their own, and the names that were shared."""
    from qpipe.model.structure.channels import own_bias
    from qpipe.model.structure.layers import find_layers
    from qpipe.model.structure.sharing import shared_weights, with_own_weights

    if weights:
        return with_own_weights(model), list(shared_weights(model))
    editor = model.edit()
    shared = {str(layer.bias) for layer in find_layers(model) if own_bias(editor, layer) != layer}
    return (editor.model(), sorted(shared)) if shared else (model, [])


def checked(
    before: Network, after: Network, tolerance: float, arrays: Mapping[str, NDArray[Any]] | None
) -> float:
    """How far the outputs moved, relative, on samples or on inputs made up. Errors: StageError where that is more than
    `tolerance`, and more than the model differs from itself."""
    from qpipe.methods.comparison.compare import OWN, outputs_error, own_error

    error = outputs_error(before, after, arrays)
    if not error <= tolerance and not error <= OWN * own_error(before, arrays):
        raise StageError(
            f"prepare moved the model's outputs by {error:.1e} (relative); {tolerance:.0e} is allowed (`tolerance`)."
        )
    return error


@stage(version=1, config={"data": "calibration"})
def prepare(
    model: Network,
    data: Samples | None = None,
    *,
    tied_weights: Literal["keep", "copy"] = "keep",
    verify: bool = True,
    tolerance: Annotated[float, Range(gt=0)] = 1e-4,
    ctx: Context = NULL,
) -> Network:
    """The model as later stages want it; what it computes is the same, which is measured unless `verify` is false.

    A weight that several layers share stays one, unless `tied_weights` is copy: then each layer can be tuned
    by itself, at the cost of size. The error is noted and kept in `metadata["prepare"]`; `tolerance` is how far
    the outputs may move, relative. Errors: InputError
    for a quantized model and for samples that do not fit its inputs; StageError where the outputs moved by
    more than `tolerance`, and more than the model differs from itself with optimizations off and on.
    """
    from qpipe.methods.preconditions import float_weights
    from qpipe.model.canon.form import canonical_network
    from qpipe.model.simulation.samples import fitting
    from qpipe.model.structure.factors import fold_factors
    from qpipe.model.structure.layers import find_layers
    from qpipe.model.structure.sharing import shared_weights

    if not float_weights(model, "prepare", ctx.note):
        return model
    if data is not None:
        fitting(model, data.arrays)
    editor = model.edit()
    gemms = [node for node in editor.graph if node.op_type == "Gemm" and not node.domain]
    scaled = [str(node.name) for node in gemms if scale_into_parameters(editor, node)]
    widened = [str(node.name) for node in gemms if widen_bias(editor, node)]
    folded = fold_factors(editor)
    canonical = canonical_network(editor.ir.clone(), model.facts.custom_ops)
    result, shared = separate(type(model).of(canonical), tied_weights == "copy")
    report: dict[str, object] = {"scaled": scaled, "widened": widened, "folded": folded, "separated": shared}
    if verify:
        error = checked(model, result, tolerance, None if data is None else data.arrays)
        on = "random inputs" if data is None else "samples"
        ctx.note(f"The outputs moved by {error:.1e} (relative) on {on}.")
        report["largest_relative_error"] = float(f"{error:.1e}")
    ctx.note(
        f"{result.graph.num_nodes()} nodes, {len(find_layers(result))} layers, {len(shared)} parameters separated."
    )
    if kept := shared_weights(result):
        ctx.note(
            f"Several nodes share {', '.join(map(repr, kept))}; tied_weights: copy gives each layer a weight of its "
            "own, to be equalized and tuned by itself."
        )
    return result.with_metadata({**model.metadata, "prepare": report}).with_facts(model.facts)
