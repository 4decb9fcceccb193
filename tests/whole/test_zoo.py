"""Every family of networks in the zoo: exported from torch with an open batch, quantized, deployed.

Float, the module, the model in torch and onnxruntime agree to 1e-4; quantized, every single operator does in at least
99.9 % of its values, and none is off by more than one step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from qpipe.methods.comparison.parity import ParityReport, parity
from qpipe.model import Model
from qpipe.stage import Samples
from qpipe.stages.amp import amp
from qpipe.stages.bnf import bnf
from qpipe.stages.calibrate import calibrate
from qpipe.stages.cle import cle
from qpipe.stages.prepare import prepare
from tests.model.quantized import ONNXRUNTIME, scheme
from tests.zoo import ZOO, Example, built, inputs, samples

Array = np.ndarray[Any, Any]
Imported = Callable[[str], Model]


def relative(found: Array, wanted: Array) -> float:
    """The largest difference, of the largest wanted value."""
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def fed(model: Model, example: Example, count: int, seed: int) -> dict[str, Array]:
    """`count` samples for every input of the model."""
    given = zip(model.inputs, inputs(example), strict=True)
    return {spec.name: samples(each, count, seed + 100 * i).numpy() for i, (spec, each) in enumerate(given)}


def computed(module: torch.nn.Module, arrays: dict[str, Array]) -> list[Array]:
    with torch.no_grad():
        returned = module(*(torch.from_numpy(array) for array in arrays.values()))
    return [each.numpy() for each in (returned if isinstance(returned, tuple) else (returned,))]


def quantized(model: Model, calibration: dict[str, Array]) -> Model:
    """W8A8 per channel, after prepare, bnf and cle."""
    data = Samples(calibration)
    return calibrate(cle(bnf(prepare(model)), data), data, scheme=scheme(), target=ONNXRUNTIME)


def assert_agrees(report: ParityReport) -> None:
    for unit in report.units:
        assert unit.largest <= 1, unit
        assert unit.within(0) >= 0.999, unit
    assert all(output.cosine > 0.999 for output in report.outputs)


@pytest.mark.slow
@pytest.mark.parametrize("net", ZOO)
def test_from_torch_to_onnxruntime(imported: Imported, net: str) -> None:
    module, example = built(net)
    model = imported(net)
    assert {entry.shape[0] for entry in model.inputs} == {"batch"}
    three = fed(model, example, 3, seed=1)  # another batch size than the example's
    wanted = computed(module, three)
    simulated = computed(model.to_torch(quantized=False), three)
    deployed = model.session(mode="deploy", quantized=False).run(None, three)
    assert max(map(relative, simulated, wanted)) < 1e-4
    assert max(map(relative, deployed, wanted)) < 1e-4

    small = quantized(model, fed(model, example, 24, seed=2))
    assert {layer.weight for layer in small.layers()} <= set(small.encodings)
    assert_agrees(parity(small, fed(model, example, 12, seed=3)))
    # As on an accelerator, no value of the meta device is read on the way, and none of the host's mixes with them.
    returned = small.to_torch().to("meta")(*(torch.from_numpy(array).to("meta") for array in three.values()))
    found = returned if isinstance(returned, tuple) else (returned,)
    assert [each.shape for each in found] == [each.shape for each in wanted]


@pytest.mark.slow
@pytest.mark.parametrize("net", ["convnext", "vit", "gemma2"])
def test_a_mix_of_bitwidths_is_deployed_as_it_is_simulated(imported: Imported, net: str) -> None:
    _, example = built(net)
    model = bnf(imported(net))
    data = [Samples(fed(model, example, 8, seed=seed)) for seed in (2, 3)]
    found = amp(
        model, *data, scheme=scheme(), target=ONNXRUNTIME, metric="sqnr_db", method="gram", max_drop=None, budget=0.6,
        conversion_slack=0.0,
    )  # fmt: skip
    assert {encoding.bitwidth for encoding in found.model.encodings.values()} >= {8, 16}
    assert found.scores.values["score"] >= max(
        row["score"] for row in found.scores.values["uniform"] if row["share"] <= 0.6
    )
    for unit in parity(found.model, data[1].arrays).units:
        # A sum in another order differs by 2^-24 of its terms, which is some hundredth of a step of 16 bits.
        assert unit.largest <= 1, unit
        assert unit.within(0) >= 0.99, unit
