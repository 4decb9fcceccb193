"""prepare: what later stages count on is there, and the function is the same."""

from __future__ import annotations

import numpy as np
import pytest

from qpipe.errors import InputError, StageError
from qpipe.stage import Samples
from qpipe.stages import prepare as module
from qpipe.stages.prepare import prepare


def feeds(*shape):
    return {"x": np.random.default_rng(1).normal(size=shape).astype(np.float32)}


def check_same(run, before, after, fed, tolerance=2e-6):
    for expected, found in zip(run(before, fed), run(after, fed), strict=True):
        assert np.abs(expected - found).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("bias", [(5,), (1, 5), (1,), ()])
def test_a_scaled_gemm_becomes_a_layer(network, run, bias):
    model = network(
        "n (float[N,4] x) => (float[N,5] y) { y = Gemm<alpha=0.5, beta=-2.0, transB=1>(x, w, c) }",
        {"w": (5, 4), "c": bias},
    )
    assert not model.layers()
    prepared = prepare(model)
    (layer,) = prepared.layers()
    assert layer.bias is not None
    assert prepared.metadata["prepare"]["scaled"] == [layer.name]
    check_same(run, model, prepared, feeds(3, 4))


def test_a_shared_bias_is_separated_and_a_shared_weight_stays(network, run):
    model = network(
        """n (float[N,4,5,5] x) => (float[N,4,5,5] y) {
            s = Conv(x, w, c)  t = Relu(s)  u = Conv(t, w, c)  y = Relu(u) }""",
        {"w": (4, 4, 1, 1), "c": (4,)},
    )
    prepared = prepare(model)
    first, second = prepared.layers()
    assert first.weight == second.weight
    assert first.bias != second.bias
    check_same(run, model, prepared, feeds(2, 4, 5, 5))
    copied = prepare(model, tied_weights="copy")
    first, second = copied.layers()
    assert first.weight != second.weight
    check_same(run, model, copied, feeds(2, 4, 5, 5))


def test_dead_and_equal_nodes_go(network, run):
    model = network(
        """n (float[N,4,5,5] x) => (float[N,4,5,5] y) {
            s = Conv(x, w)  a = Relu(s)  b = Relu(s)  dead = Sigmoid(a)  i = Identity(b)  y = Add(a, i) }""",
        {"w": (4, 4, 1, 1)},
    )
    prepared = prepare(model)
    assert [node.op_type for node in prepared.graph] == ["Conv", "Relu", "Add"]
    check_same(run, model, prepared, feeds(2, 4, 5, 5))


def test_preparing_twice_gives_the_same_bytes(network):
    model = network(
        "n (float[N,4] x) => (float[N,5] y) { t = Gemm<alpha=0.5>(x, w, c)  y = Relu(t) }",
        {"w": (4, 5), "c": (5,)},
    )
    once = prepare(model)
    meta, blobs = prepare(once).with_metadata({"prepare": once.metadata["prepare"]}).pack()
    assert (meta, {key: bytes(blob) for key, blob in blobs.items()}) == (
        once.pack()[0],
        {key: bytes(blob) for key, blob in once.pack()[1].items()},
    )


def test_the_error_is_noted_and_kept(network, notes):
    model = network("n (float[N,4] x) => (float[N,5] y) { y = MatMul(x, w) }", {"w": (4, 5)})
    prepared = prepare(model, ctx=notes)
    assert prepared.metadata["prepare"]["largest_relative_error"] == 0
    assert "The outputs moved by 0.0e+00" in notes.notes[0]
    assert "largest_relative_error" not in prepare(model, verify=False).metadata["prepare"]


def test_weights_that_stay_shared_are_named_with_the_way_out(network, notes):
    model = network(
        "n (float[N,4] x) => (float[N,4] y) { t = MatMul(x, w)  u = Relu(t)  y = MatMul(u, w) }",
        {"w": (4, 4)},
    )
    prepare(model, ctx=notes)
    assert "share 'w'; tied_weights: copy gives each layer a weight of its own" in notes.notes[-1]
    notes.notes.clear()
    prepare(model, tied_weights="copy", ctx=notes)
    assert not any("share" in note for note in notes.notes)


def test_outputs_that_moved_are_a_failure(network, monkeypatch):
    model = network("n (float[N,4] x) => (float[N,5] y) { y = Gemm<alpha=3.0>(x, w) }", {"w": (4, 5)})

    def forget_the_factor(editor, node):
        del node.attributes["alpha"]
        return True

    monkeypatch.setattr(module, "scale_into_parameters", forget_the_factor)
    with pytest.raises(StageError, match=r"moved the model.s outputs by 6\.7e-01"):
        prepare(model)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"image": (3, 4)}, "no array for the model's input 'x'; they hold 'image'"),
        ({"x": (3, 4, 1)}, "has shape (4, 1), the model takes (4)"),
        ({"x": (3, 5)}, "has shape (5), the model takes (4)"),
    ],
)
def test_samples_that_do_not_fit_are_refused_in_one_line(network, arrays, reason):
    model = network("n (float[N,4] x) => (float[N,5] y) { y = MatMul(x, w) }", {"w": (4, 5)})
    data = Samples({name: np.zeros(shape, np.float32) for name, shape in arrays.items()})
    with pytest.raises(InputError) as refused:
        prepare(model, data)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_samples_of_another_type_are_refused(network):
    model = network("n (float[N,4] x) => (float[N,5] y) { y = MatMul(x, w) }", {"w": (4, 5)})
    with pytest.raises(InputError, match="input 'x' is float32, the data give int64"):
        prepare(model, Samples({"x": np.zeros((3, 4), np.int64)}))
