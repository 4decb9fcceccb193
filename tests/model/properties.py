"""What has to hold for every model that `graphs` draws, as functions of a case that raise where it does not.

Errors of floats are max |a - b| / max |a| over an output, against what onnxruntime computes, unoptimized, from the
bytes as they came; 1e-4 is allowed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from qpipe.artifacts.kinds import Samples
from qpipe.errors import InputError
from qpipe.methods.comparison.parity import parity
from qpipe.methods.placement.target import Target
from qpipe.model import Model
from qpipe.model.network.facts import Spread
from qpipe.numerics.scheme import BITWIDTHS, Scheme, TensorScheme
from tests.model.graph_pieces import FOLDABLE, RECENT
from tests.model.graphs import Array, Case, cases, distance, reference
from tests.model.quantized import shipped

TOLERANCE = 1e-4
"""What the rounding of weights, computed in float64 and stored in float32 again, may move; `steady` saw to it that such
a change is not made larger than twentyfold on the way."""


def content(model: Model) -> tuple[Any, dict[str, bytes]]:
    """All that the digest of a model is made of."""
    meta, blobs = model.pack()
    return meta, {name: bytes(blob) for name, blob in blobs.items()}


def assert_same(wanted: dict[str, Array], found: dict[str, Array], tolerance: float = TOLERANCE) -> None:
    """The same outputs in the same order, each within `tolerance`."""
    assert list(found) == list(wanted)
    errors = {name: distance(wanted[name], found[name]) for name in wanted}
    assert all(error <= tolerance for error in errors.values()), errors


def in_onnxruntime(model: Model, case: Case) -> dict[str, Array]:
    """The float outputs of `model`, nothing optimized."""
    import onnx_ir as ir

    return reference(ir.to_proto(model.ir), case.feeds)


def in_torch(model: Model, case: Case, quantized: bool = False) -> dict[str, Array]:
    """The outputs of its torch module, the simulation where it is `quantized`."""
    import torch

    with torch.no_grad():
        found = model.to_torch(quantized=quantized)(
            *(torch.from_numpy(case.feeds[spec.name].copy()) for spec in model.inputs)
        )
    tensors = [found] if isinstance(found, torch.Tensor) else list(found)
    return {spec.name: tensor.numpy() for spec, tensor in zip(model.outputs, tensors, strict=True)}


def import_keeps_the_function(case: Case) -> None:
    """Import and prepare: the outputs, the names of inputs and outputs, every node named once, the same bytes twice."""
    from qpipe.stages.prepare import prepare

    wanted = reference(case.proto, case.feeds)
    model = Model.from_proto(case.proto)
    assert content(Model.from_proto(case.proto)) == content(model)
    prepared = prepare(model, verify=False)
    assert content(prepare(model, verify=False)) == content(prepared)
    given = [value.name for value in case.proto.graph.input if value.name in case.feeds]
    for each in (model, prepared, copied := prepare(model, tied_weights="copy", verify=False)):
        assert [spec.name for spec in each.inputs] == given
        names = [node.name for node in each.graph]
        assert all(names)
        assert len(set(names)) == len(names)
        assert_same(wanted, in_onnxruntime(each, case))
    assert content(prepare(prepared, verify=False))[1] == content(prepared)[1]
    assert not any(len(value.uses()) > 1 for value in weights(copied))
    assert_same(wanted, in_torch(prepared, case))


def weights(model: Model) -> list[Any]:
    """The values of the layers' weights."""
    return [model.graph.initializers[layer.weight] for layer in model.layers()]



def gradients_are_slopes(case: Case) -> None:
    """In double precision the directional derivative by autograd is the slope of the outputs along that direction.

    The direction is random, in the inputs and all layers' weights and biases, and so is the point, near the case's: a
    weight of zero puts Relu on its kink. One may still lie between x - h and x + h: the shorter step misses it then."""
    import torch

    model = Model.from_proto(case.proto)
    names = sorted({n for layer in model.layers() for n in (layer.weight, layer.bias) if n is not None})
    module = model.to_torch(quantized=False, trainable=names).double()
    inputs = [torch.from_numpy(case.feeds[spec.name]).double().requires_grad_() for spec in model.inputs]
    leaves = [*inputs, *(p for p in module.parameters() if p.requires_grad)]
    generator = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for leaf in leaves:
            leaf += 1e-2 * torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
    found = _outputs(module(*inputs))
    mixed = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in found]
    total = sum((a * b).sum() for a, b in zip(found, mixed, strict=True))
    assume(isinstance(total, torch.Tensor) and total.requires_grad)
    slopes = torch.autograd.grad(total, leaves, allow_unused=True)
    ways = [torch.randn(leaf.shape, generator=generator, dtype=torch.float64) for leaf in leaves]
    wanted = sum(float((g * d).sum()) for g, d in zip(slopes, ways, strict=True) if g is not None)

    def at(step: float) -> float:
        with torch.no_grad():
            for leaf, way in zip(leaves, ways, strict=True):
                leaf += step * way
            value = sum(float((a * b).sum()) for a, b in zip(_outputs(module(*inputs)), mixed, strict=True))
            for leaf, way in zip(leaves, ways, strict=True):
                leaf -= step * way
        return value

    size = sum(float(g.norm() * d.norm()) for g, d in zip(slopes, ways, strict=True) if g is not None)
    errors = [abs((at(h) - at(-h)) / (2 * h) - wanted) for h in (1e-5, 1e-7)]
    assert min(errors) <= 1e-4 * max(size, abs(float(total.detach())) * 1e-4, 1e-9), (errors, wanted, size)


def _outputs(found: Any) -> list[Any]:
    import torch

    return [found] if isinstance(found, torch.Tensor) else list(found)


def folding_and_equalizing_keep_the_function(case: Case) -> None:
    """bnf, then cle with drawn options, then hbf with statistics that hold on the inputs; what stays is told why."""
    from qpipe.stages.bnf import bnf
    from qpipe.stages.cle import cle
    from qpipe.stages.prepare import prepare

    wanted = reference(case.proto, case.feeds)
    prepared = prepare(Model.from_proto(case.proto), verify=False)
    folded = bnf(prepared)
    assert_same(wanted, in_onnxruntime(folded, case))
    assert_same(wanted, in_torch(folded, case))
    norms = [node.name for node in prepared.graph if node.op_type == "BatchNormalization"]
    assert sorted(name for went in folded.metadata["bnf"].values() for name in went) == sorted(norms)
    assert not any(node.op_type == "BatchNormalization" for node in folded.graph)
    assert content(bnf(folded))[1] == content(folded)[1]
    rng = np.random.default_rng(case.seed)
    samples = Samples(dict(case.feeds))
    options: dict[str, Any] = {
        "norms": bool(rng.integers(2)), "iterations": int(rng.choice([1, 100])),
        "relu6": str(rng.choice(["exact", "replace_if_unused"])), "headroom": float(rng.choice([1.0, 8.0])),
    }  # fmt: skip
    with_data = options["relu6"] != "exact" or bool(rng.integers(2))
    equal = cle(folded, samples if with_data else None, **options)
    assert_same(wanted, in_onnxruntime(equal, case))
    assert_same(wanted, in_torch(equal, case))
    told = equal.metadata.get("cle")
    if told is None:  # there was nothing to equalize, and it says so
        assert content(equal)[1] == content(folded)[1]
    else:
        assert {layer.name for layer in folded.layers()} <= set(told["pairs"]) | set(told["refused"])
        assert all(" " in reason for reason in told["refused"].values())
    assert_same(wanted, in_onnxruntime(cle(equal, samples, **options), case))
    high_biases_move_on(equal, wanted, case)


def high_biases_move_on(model: Model, wanted: Mapping[str, Array], case: Case) -> None:
    """hbf changes nothing where no activation is below what it takes for sure: here, by statistics that say the
    smallest one that each channel has on the inputs."""
    from qpipe.stages.hbf import hbf

    layers = model.layers()
    if not layers:
        return
    session = model.session(quantized=False, outputs=[layer.output for layer in layers])
    smallest = {}
    for layer, array in zip(layers, session.run(None, dict(case.feeds)), strict=True):
        axis = array.ndim - 1 if layer.op_type == "MatMul" else 1
        least = array.min(axis=tuple(a for a in range(array.ndim) if a != axis)).astype(float)
        smallest[layer.output] = Spread(np.zeros(least.size), least - 1e-6 * abs(least))
    moved = hbf(model.with_facts(statistics=smallest))
    assert_same(dict(wanted), in_onnxruntime(moved, case))
    told = moved.metadata["hbf"]
    assert all(" " in reason for reason in told["left"].values())


TARGETS = ("onnxruntime", "onnxruntime_int16", "qualcomm_htp", "amd_xint8", "tensorrt", "weight_only_int4")


@st.composite
def schemes(draw: Any) -> tuple[Target, Scheme]:
    """A shipped target and a scheme that it takes."""
    target: Target = shipped(Target, "target", draw(st.sampled_from(TARGETS)))
    weight_bits = draw(st.sampled_from(target.weight.bitwidths or BITWIDTHS))
    granularity = draw(st.sampled_from(target.weight.granularities or ("per_tensor", "per_channel", "per_block")))
    signed, symmetric = _drawn(draw, target.weight.signed), _drawn(draw, target.weight.symmetric)
    grids = (target.weight.grids or ("max", "full_range", "signed_max")) if signed and symmetric else ("max",)
    weight = TensorScheme(
        weight_bits, signed, symmetric, granularity,
        draw(st.sampled_from([1, 2, 3])) if granularity == "per_block" else 0,
        draw(st.sampled_from(["minmax", "mse", "sqnr"])), power_of_two=_drawn(draw, target.weight.power_of_two),
        grid=draw(st.sampled_from(grids)),
    )  # fmt: skip
    if target.activations == "none" or (target.activations == "optional" and draw(st.integers(0, 5)) == 5):
        return target, Scheme(weight, None)
    limits = target.activation
    activation = TensorScheme(
        draw(st.sampled_from(limits.bitwidths or (8, 16, 4, 6))), _drawn(draw, limits.signed),
        _drawn(draw, limits.symmetric), observer=draw(st.sampled_from(["minmax", "percentile", "mse"])),
        power_of_two=_drawn(draw, limits.power_of_two),
    )  # fmt: skip
    return target, Scheme(weight, activation)


def _drawn(draw: Any, fixed: bool | None) -> bool:
    return draw(st.booleans()) if fixed is None else fixed


def quantized(case: Case, target: Target, scheme: Scheme) -> Model:
    """`case` as calibrate and nearest leave it; passed over where the target quantizes nothing in it."""
    from qpipe.stages.calibrate import calibrate
    from qpipe.stages.nearest import nearest

    model = Model.from_proto(case.proto)
    try:
        model = calibrate(model, Samples(dict(case.feeds)), scheme=scheme, target=target)
    except InputError as error:
        assume("quantizes nothing" not in str(error))
        raise
    return nearest(model) if any(name in model.params for name in model.encodings) else model


def simulation_is_deployment(drawn: tuple[Case, tuple[Target, Scheme]]) -> None:
    """Unit by unit the simulation and the exported file in onnxruntime agree, as `parity` counts it; and where no unit
    differs, the outputs of the whole file do not either."""
    case, (target, scheme) = drawn
    model = quantized(case, target, scheme)
    report = parity(model, case.feeds)
    bad = [unit for unit in report.units if not unit.agree]
    if target.bias == "float":  # onnxruntime rounds these biases to int32, which can flip a value far from a tie
        bad = [unit for unit in bad if unit.largest > 1]
    assert not bad, bad
    simulated = in_torch(model, case, quantized=True)
    deployed = reference(model.to_qdq(), case.feeds)
    if all(unit.largest == 0 for unit in report.units):
        assert_same(simulated, deployed)


def what_is_written_reads_back(drawn: tuple[Case, tuple[Target, Scheme]]) -> None:
    """Packed and unpacked a model is the same, digest and all; its QDQ file gives the same grids and simulation."""
    case, (target, scheme) = drawn
    model = quantized(case, target, scheme)
    meta, blobs = model.pack()
    unpacked = Model.unpack(meta, lambda name: memoryview(blobs[name]))
    assert content(unpacked) == content(model)
    simulated = in_torch(model, case, quantized=True)
    assert_same(simulated, in_torch(unpacked, case, quantized=True), 0.0)
    with tempfile.TemporaryDirectory() as folder:
        read = Model.load(model.save(Path(folder) / "saved"))
        back = in_torch(read, case, quantized=True)
    values = {v.name: v for v in [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]}
    idle = {str(node.outputs[0].name) for node in read.graph if node.op_type == "Identity"}
    for name, encoding in model.encodings.items():  # an input that is an output too leaves the graph unrounded
        if name in values and not values[name].uses() and not values[name].is_graph_output():
            continue  # the other half of a Split, which nobody reads
        if name in values and values[name].is_graph_input() and values[name].is_graph_output():
            continue  # leaves the graph unrounded, and what is read has the name of a node that passes it on
        if name in model.params and model.graph.initializers[name].is_graph_output():
            continue  # a weight that is an output keeps its name there
        again = read.encodings.get(name, read.encodings.get(f"{name}_rounded"))
        if again is None and name in idle:
            continue  # an output that is its input, rounded already: a Slice of everything
        assert again is not None, (name, list(read.encodings))
        assert again.signed == encoding.signed
    assert_same(simulated, back, 1e-5)


PROPERTIES: dict[str, tuple[Callable[[Any], None], st.SearchStrategy[Any]]] = {
    "import": (import_keeps_the_function, cases()),
    "import_recent": (import_keeps_the_function, cases(RECENT, oldest=23)),
    "gradients": (gradients_are_slopes, cases()),
    "stages": (folding_and_equalizing_keep_the_function, cases(FOLDABLE)),
    "parity": (simulation_is_deployment, st.tuples(cases(strange=False), schemes())),
    "round_trip": (what_is_written_reads_back, st.tuples(cases(), schemes())),
}
