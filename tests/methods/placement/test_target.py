"""Targets: built from YAML, refused with a sentence."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qpipe.methods.placement.target import OpRule, Target
from tests.model.quantized import ONNXRUNTIME


def test_the_table_of_onnxruntime_is_a_target() -> None:
    assert ONNXRUNTIME.name == "onnxruntime"
    assert ONNXRUNTIME.quantize["Conv"] == OpRule(None, True)
    assert ONNXRUNTIME.quantize["Softmax"] == OpRule((), True)
    assert "Relu" in ONNXRUNTIME.fused["Conv"]


def test_an_operator_cannot_have_a_rule_and_share() -> None:
    with pytest.raises(ValueError, match="Add cannot stand in both"):
        Target("t", {"Add": OpRule()}, share=("Add",))


def test_a_target_loads_nothing_heavy() -> None:
    code = (
        "import sys, qpipe.methods.placement.target\n"
        "print({'numpy', 'torch', 'onnx', 'onnxruntime'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
