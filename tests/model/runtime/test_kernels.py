"""What runs on integers is read off graphs that onnxruntime made of files of known form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import pytest

from qpipe.deployed.session import open_file
from qpipe.model.runtime.kernels import kernels

HEAD = '<ir_version: 10, opset_import: ["": 21]>\nmain (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y)\n'
CONSTANTS = {
    "u8": "float s = {0.02}, uint8 z = {128}",
    "u16": "float s = {0.0001}, uint16 z = {32768}",
}
CODES = ", ".join("1234567890123456")
WEIGHT = f"float c = {{0.5}}, int8[4, 4, 1, 1] w = {{{CODES}}}, float ws = {{0.01}}, int8 wz = {{0}}"


def optimized(body: str, folder: Path, codes: str = "u8") -> dict[str, Any]:
    """What onnxruntime makes of `body`, between a rounding of x and one of y."""
    lines = f"xq = QuantizeLinear(x, s, z)\nxd = DequantizeLinear(xq, s, z)\n{body}\n"
    lines += "q = QuantizeLinear(v, s, z)\ny = DequantizeLinear(q, s, z)"
    path, made = folder / "net.onnx", folder / "optimized.onnx"
    onnx.save(onnx.parser.parse_model(f"{HEAD}<{CONSTANTS[codes]}, {WEIGHT}>\n{{\n{lines}\n}}"), path)
    open_file(path, 1, optimized=made)
    return kernels(onnx.load(path), onnx.load(made, load_external_data=False))


CONV = "wd = DequantizeLinear(w, ws, wz)\n%s = Conv(xd, wd)"
ROUND = "q{0} = QuantizeLinear({0}, s, z)\n{1} = DequantizeLinear(q{0}, s, z)"


def test_a_convolution_between_roundings_runs_on_integers(tmp_path: Path) -> None:
    found = optimized(CONV % "v", tmp_path)
    assert (found["layers"], found["others"]) == ({"integer": 1, "all": 1}, {"integer": 0, "all": 0})
    assert found["in_float"] == []


def test_a_maximum_of_codes_and_a_sum_run_on_integers_too(tmp_path: Path) -> None:
    pool = "MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (a)"
    lines = [CONV % "t", ROUND.format("t", "a"), f"b = {pool}", ROUND.format("b", "d"), "v = Add(d, a)"]
    found = optimized("\n".join(lines), tmp_path)
    assert (found["layers"], found["others"]) == ({"integer": 1, "all": 1}, {"integer": 2, "all": 2})


@pytest.mark.parametrize(
    ("body", "codes", "op_type", "why"),
    [
        ("v = Tanh(xd)", "u8", "Tanh", "onnxruntime has no integer kernel for it"),
        ("v = Add(xd, c)", "u8", "Add", "one operand is a constant in float"),
        ("v = Add(xd, x)", "u8", "Add", "one operand is in float"),
        (CONV % "v", "u16", "Conv", "onnxruntime has no kernel of 16 bits for it"),
    ],
)
def test_what_fell_out_between_roundings_is_told_with_its_reason(
    tmp_path: Path, body: str, codes: str, op_type: str, why: str
) -> None:
    (row,) = optimized(body, tmp_path, codes)["in_float"]
    form = f"DequantizeLinear -> {op_type} -> QuantizeLinear"
    assert (row["op_type"], row["count"], row["form"], row["why"]) == (op_type, 1, form, why)


def test_operators_of_one_form_are_counted_together_and_layers_come_first(tmp_path: Path) -> None:
    body = f"a = Tanh(xd)\n{ROUND.format('a', 'b')}\nd = Tanh(b)\n{ROUND.format('d', 'e')}\nf = Relu(e)\n"
    body += "wf = DequantizeLinear(w, ws, wz)\ng = Conv(f, wf)\nv = Tanh(g)"
    found = optimized(body, tmp_path)
    rows = [(row["op_type"], row["count"]) for row in found["in_float"]]
    assert rows[0][0] in ("Conv", "FusedConv")
    assert ("Tanh", 2) in rows
    assert found["layers"] == {"integer": 0, "all": 1}


def test_shapes_and_indices_are_no_operators_on_data(tmp_path: Path) -> None:
    text = '<ir_version: 10, opset_import: ["": 21]>\nmain (float[n, 4] x) => (int64[k] i)\n'
    path = tmp_path / "net.onnx"
    onnx.save(onnx.parser.parse_model(text + "{ a = Shape(x) i = Mul(a, a) }"), path)
    open_file(path, 1, optimized=tmp_path / "optimized.onnx")
    found = kernels(onnx.load(path), onnx.load(tmp_path / "optimized.onnx"))
    assert (found["layers"]["all"], found["others"]["all"], found["in_float"]) == (0, 0, [])
