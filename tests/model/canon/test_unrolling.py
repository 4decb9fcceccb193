"""Control flow that is decided is written out, and computes what the loop and the branch computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qpipe.methods.comparison.check import verify_import
from qpipe.model import Model
from tests.model.nets import error_of_import, normal, op_types, parsed

LOOP = """net (float[N,4] x{inputs}) => (float[N,4] y, float[T,N,4] all) {{
    {before}
    [again] y, all = Loop (trips, going, x) <body = step (int64 i, bool c, float[N,4] a)
        => (bool d, float[N,4] b, float[N,4] s) {{
        f = Cast<to=1>(i)  w = Mul(a, half)  b = Add(w, f)  s = Relu(b)  d = Identity(c) }}> }}"""


@pytest.mark.parametrize("trips", [1, 5])
def test_a_loop_with_a_constant_count_is_its_body_so_many_times(trips: int) -> None:
    proto = parsed(
        LOOP.format(inputs="", before=f"n = Constant<value_int={trips - 1}>()  trips = Add(n, one)"),
        one=np.int64(1),
        going=np.array(True),
        half=np.float32(0.5),
    )
    model = Model.from_proto(proto)
    assert "Loop" not in op_types(model)
    assert error_of_import(proto, model) < 1e-6
    x = normal(2, 4)
    last, stacked = model.to_torch()(torch.tensor(x))
    wanted = []
    for i in range(trips):
        x = x * np.float32(0.5) + i
        wanted.append(np.maximum(x, 0))
    assert np.allclose(last.detach(), x, atol=1e-6)
    assert np.allclose(stacked.detach(), np.stack(wanted), atol=1e-6)


def test_a_loop_that_the_data_count_stays_and_runs() -> None:
    proto = parsed(LOOP.format(inputs=", int64 trips", before=""), going=np.array(True), half=np.float32(0.5))
    model = Model.from_proto(proto)
    assert model.metadata["notes"] == [
        "torch cannot compute 'again' (Loop). It stays as it is, and runs through onnxruntime."
    ]
    assert verify_import(model, proto.SerializeToString()).equal


@pytest.mark.parametrize("directions", [(0, 0), (1, 0), (1, 1)])
def test_a_scan_over_a_known_length_is_its_body_so_many_times(directions: tuple[int, int]) -> None:
    taken, given = directions
    proto = parsed(
        f"""net (float[N,4] h, float[N,5,4] x) => (float[N,4] last, float[5,N,4] all) {{
        last, all = Scan (h, x) <num_scan_inputs = 1, scan_input_axes = [1],
            scan_input_directions = [{taken}], scan_output_directions = [{given}],
            body = step (float[N,4] a, float[N,4] b) => (float[N,4] c, float[N,4] d) {{
            e = Add(a, b)  c = Tanh(e)  d = Exp(c) }}> }}"""
    )
    model = Model.from_proto(proto)
    assert op_types(model).count("Tanh") == 5
    h, x = normal(3, 4), normal(3, 5, 4, seed=1)
    last, stacked = model.to_torch()(torch.tensor(h), torch.tensor(x))
    outputs = []
    for step in reversed(range(5)) if taken else range(5):
        h = np.tanh(h + x[:, step])
        outputs.append(np.exp(h))
    assert np.allclose(last, h, atol=1e-6)
    assert np.allclose(stacked, np.stack(outputs[::-1] if given else outputs), atol=1e-6)


IF = """net (float[3,4] x, bool c) => (float[3,4] y) {{
    [choice] y = If (c) <then_branch = yes () => (float[3,4] t) {{ t = {yes} }},
                         else_branch = no () => (float[3,4] e) {{ e = {no} }}> }}"""


def test_an_if_on_data_whose_branches_cannot_fail_is_both_of_them() -> None:
    model = Model.from_proto(parsed(IF.format(yes="Relu(x)", no="Exp(x)")))
    assert sorted(op_types(model)) == ["Exp", "Relu", "Where"]
    assert model.outputs[0].name == "y"
    x = normal(3, 4)
    for flag, wanted in ((True, np.maximum(x, 0)), (False, np.exp(x))):
        found = model.session().run(None, {"x": x, "c": np.array(flag)})[0]
        assert np.allclose(found, wanted, atol=1e-6)


def test_a_branch_that_might_fail_is_not_run_unasked() -> None:
    proto = parsed(IF.format(yes="Relu(x)", no="Gather(x, i)"), i=np.array([0, 1, 7]))
    assert "If" in op_types(Model.from_proto(proto))
