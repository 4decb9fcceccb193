"""The options that every session starts from, and how long it keeps what it was given."""

from __future__ import annotations

import gc

import numpy as np
import onnxruntime
import pytest

from qpipe.model.network.packing import graph_proto
from qpipe.model.runtime.options import open_session, session_options, set_lean
from tests.model.nets import normal, parsed


@pytest.mark.parametrize("mode", ["reference", "deploy"])
def test_a_session_computes_the_same_each_time_and_never_rounds_by_itself(mode: str) -> None:
    options = session_options(mode)  # type: ignore[arg-type]
    level = onnxruntime.GraphOptimizationLevel
    wanted = {"reference": level.ORT_ENABLE_BASIC, "deploy": level.ORT_ENABLE_ALL}[mode]
    assert options.graph_optimization_level == wanted
    assert options.use_deterministic_compute
    assert options.get_session_config_entry("session.qdq_matmulnbits_accuracy_level") == "1"


def test_threads_are_those_that_are_asked_for() -> None:
    options = session_options(threads=3)
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 1)
    assert session_options().intra_op_num_threads == 0


def test_a_lean_session_packs_no_weight() -> None:
    options = session_options()
    assert options.enable_cpu_mem_arena
    set_lean(options)
    assert options.get_session_config_entry("session.disable_prepacking") == "1"
    assert not options.enable_cpu_mem_arena


def test_tensors_that_lie_outside_the_graph_live_as_long_as_the_session() -> None:
    import onnx_ir as ir

    weight = normal(40, 40)
    text = "m (float[N,40] x) => (float[N,40] y) { y = MatMul(x, w) }"
    proto, outside = graph_proto(ir.from_proto(parsed(text, w=weight.T.copy())))
    assert list(outside) == ["w"]
    session = open_session(proto, {"w": np.asarray(outside["w"].numpy())[:, ::1]}, session_options())
    del outside
    gc.collect()
    x = normal(3, 40, seed=1)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ weight.T, rtol=1e-4, atol=1e-4)
