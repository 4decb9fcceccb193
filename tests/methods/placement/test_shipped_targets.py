"""The targets in conf/target: what they forbid, and that what is made for them loads, agrees and runs on integers."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from qpipe.errors import InputError
from qpipe.methods.comparison.parity import parity
from qpipe.methods.placement.placement import place
from qpipe.methods.placement.target import Target
from qpipe.model import Model
from qpipe.numerics.scheme import Scheme
from tests.model.nets import Mobile, UNet, normal, randomized
from tests.model.qdq.test_writer import optimized
from tests.model.quantized import quantized, shipped

CONF = Path(__file__).parents[3] / "conf"
TARGETS = sorted(path.stem for path in (CONF / "target").glob("*.yaml"))
SCHEMES = sorted(path.stem for path in (CONF / "scheme").glob("*.yaml"))


class Transformer(torch.nn.Module):
    """One layer, of widths that are whole blocks of 32, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, activation="gelu")
        self.head = torch.nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.layer(x)).mean(1)
        return y


SHAPES: dict[type[torch.nn.Module], tuple[int, ...]] = {
    Mobile: (3, 16, 16),
    UNet: (3, 16, 16),
    Transformer: (6, 32),
}


@cache
def imported(net: type[torch.nn.Module]) -> Model:
    torch.manual_seed(0)
    return Model.from_torch(randomized(net()), torch.zeros(2, *SHAPES[net]))


def made(net: type[torch.nn.Module], name: str) -> tuple[Model, dict[str, Any]]:
    """The network with the grids that the target wants, by the first scheme that it names."""
    target = shipped(Target, "target", name)
    scheme = shipped(Scheme, "scheme", (target.schemes or ("w8a8",))[0])
    target.check(scheme)
    model = imported(net)
    x = {model.inputs[0].name: normal(8, *SHAPES[net])}
    return quantized(model, x, scheme, target), x


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "weight_only_int4"])
@pytest.mark.parametrize("net", SHAPES)
def test_what_is_made_for_a_target_loads_anywhere_and_agrees(net: type[torch.nn.Module], name: str) -> None:
    model, x = made(net, name)
    proto = model.to_qdq()
    onnx.checker.check_model(proto, full_check=True)
    onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    report = parity(model, x)
    assert report.units
    for unit in report.units:
        assert unit.largest <= 1, unit
        assert unit.agree, unit


def test_four_bit_weights_alone_become_one_operator_of_onnxruntime(tmp_path: Path) -> None:
    model, x = made(Transformer, "weight_only_int4")
    assert {e.block_size for e in model.encodings.values()} == {32}
    found = optimized(model.to_qdq(), tmp_path / "o.onnx")
    assert found["MatMulNBits"] == 4
    simulated = model.to_torch()(torch.tensor(next(iter(x.values())))).numpy()
    np.testing.assert_allclose(model.session("deploy").run(None, x)[0], simulated, atol=2e-5)
    # A network of convolutions has nothing for this target.
    target = shipped(Target, "target", "weight_only_int4")
    assert not place(imported(UNet), target, shipped(Scheme, "scheme", "w4_block32")).weights


def test_onnxruntime_leaves_no_convolution_in_float(tmp_path: Path) -> None:
    found = optimized(made(Mobile, "onnxruntime")[0].to_qdq(), tmp_path / "o.onnx")
    assert found["QLinearConv"] == 7
    assert found["QGemm"] == found["QLinearAdd"] == 1
    assert not {"Conv", "FusedConv", "Clip", "Gemm", "Add"} & set(found)
    found = optimized(made(UNet, "onnxruntime")[0].to_qdq(), tmp_path / "o.onnx")
    assert found["QLinearConv"] == 4
    assert found["QLinearConcat"] == 1
    assert not {"Conv", "FusedConv", "Relu", "Concat"} & set(found)


def test_onnxruntime_multiplies_a_transformers_matrices_as_integers(tmp_path: Path) -> None:
    found = optimized(made(Transformer, "onnxruntime")[0].to_qdq(), tmp_path / "o.onnx")
    integers = found["QLinearMatMul"] + found["MatMulIntegerToFloat"] + found["QGemm"]
    assert integers == 7
    assert not {"MatMul", "Gemm", "QLinearSoftmax", "QLinearAdd"} & set(found), "scores and sums are in float"


def test_shared_grids_of_htp() -> None:
    model, _ = made(UNet, "qualcomm_htp")
    concat = next(node for node in model.graph if node.op_type == "Concat")
    grids = [model.encodings[str(value.name)] for value in (*concat.inputs, *concat.outputs) if value]
    assert len({float(grid.scale) for grid in grids}) == 1
    plain, _ = made(UNet, "onnxruntime")
    grids = [plain.encodings[str(value.name)] for value in (*concat.inputs, *concat.outputs) if value]
    assert len({float(grid.scale) for grid in grids}) > 1


def test_power_of_two_scales_of_xint8() -> None:
    model, _ = made(Mobile, "amd_xint8")
    for encoding in model.encodings.values():
        assert np.frexp(encoding.scale)[0] == 0.5
        assert not encoding.zero_point.any()


def test_tensorrt_gets_pairs_in_front_and_float_biases() -> None:
    model, _ = made(Mobile, "tensorrt")
    proto = model.to_qdq()
    assert not any(t.data_type == onnx.TensorProto.INT32 for t in proto.graph.initializer)
    assert not any(model.outputs[0].name == name for name in model.encodings)
    assert all(not e.zero_point.any() for e in model.encodings.values())


FORBIDDEN = {
    ("amd_xint8", "w8a8"): "powers of two, not free ones, .* Use scheme=xint8",
    ("amd_xint8", "s8s8"): "powers of two",
    (
        "tensorrt",
        "w8a8",
    ): "activations with signed codes, not unsigned ones, as the scheme 'w8a8' has. Use scheme=s8s8",
    ("tensorrt", "w8a16"): "activations with 8 bits, not 16",
    ("tensorrt", "w4a8"): "weights with 8 bits, not 4",
    ("qualcomm_htp", "s8s8"): "unsigned codes",
    ("qualcomm_htp", "w4_block32"): "takes quantized activations, and the scheme 'w4_block32' has none",
    ("onnxruntime_int16", "w8a8"): "16 bits, not 8, .* Use scheme=w8a16 or scheme=w4a16",
    ("weight_only_int4", "w8a8"): "leaves activations in float, and the scheme 'w8a8' quantizes them",
}


@pytest.mark.parametrize(("name", "scheme"), FORBIDDEN)
def test_a_scheme_that_a_target_forbids_is_one_sentence_with_the_way_out(name: str, scheme: str) -> None:
    with pytest.raises(InputError, match=FORBIDDEN[name, scheme]) as refused:
        shipped(Target, "target", name).check(shipped(Scheme, "scheme", scheme))
    assert str(refused.value).count("\n") == 0


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_takes_the_schemes_that_it_names_and_says_its_source(name: str) -> None:
    target = shipped(Target, "target", name)
    assert target.name == name
    for scheme in target.schemes:
        assert scheme in SCHEMES
        target.check(shipped(Scheme, "scheme", scheme))
    text = (CONF / "target" / f"{name}.yaml").read_text()
    assert "# Forbids" in text
    assert "# Source: " in text
