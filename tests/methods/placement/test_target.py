"""Targets: built from YAML, refused with a sentence."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from qpipe.errors import InputError
from qpipe.methods.placement.target import OpRule, Target
from qpipe.numerics.scheme import Scheme, TensorScheme
from tests.model.quantized import ONNXRUNTIME, shipped


def test_the_table_of_onnxruntime_is_a_target() -> None:
    assert ONNXRUNTIME.name == "onnxruntime"
    assert ONNXRUNTIME.quantize["Conv"] == OpRule(None, True)
    assert ONNXRUNTIME.quantize["Softmax"] == OpRule((), True)
    assert "Relu" in ONNXRUNTIME.fused["Conv"]


def test_an_operator_cannot_have_a_rule_and_share() -> None:
    with pytest.raises(ValueError, match="Add cannot stand in both"):
        Target("t", {"Add": OpRule()}, share=("Add",))


@pytest.mark.parametrize("name", ["tensorrt", "amd_xint8", "qualcomm_htp"])
def test_targets_that_know_no_negative_scale_refuse_it_and_auto_does_without(name: str) -> None:
    target: Target = shipped(Target, "target", name)
    weight = TensorScheme(
        min(target.weight.bitwidths), True, True, power_of_two=bool(target.weight.power_of_two), grid="signed_max"
    )
    activation = TensorScheme(8, bool(target.activation.signed), bool(target.activation.symmetric))
    activation = replace(activation, power_of_two=bool(target.activation.power_of_two))
    message = f"The target '{name}' takes weights with grid max or full_range, not signed_max, as the scheme has."
    with pytest.raises(InputError, match=f"^{message} Use scheme="):
        target.check(Scheme(weight, activation))
    auto = replace(weight, grid="auto")
    target.check(Scheme(auto, activation))
    assert target.weight.settled(auto).grid == "max"


def test_auto_mirrors_codes_at_few_bits_where_the_target_takes_that() -> None:
    for bits, grid, observer in ((2, "signed_max", "mse"), (4, "signed_max", "mse"), (5, "max", "minmax")):
        settled = ONNXRUNTIME.weight.settled(TensorScheme(bits, True, True, "auto"))
        assert (settled.grid, settled.observer, settled.granularity) == (grid, observer, "per_channel")


def test_a_target_loads_nothing_heavy() -> None:
    code = (
        "import sys, qpipe.methods.placement.target\n"
        "print({'numpy', 'torch', 'onnx', 'onnxruntime'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
