"""x and x^ carried from part to part: what the whole model gives at its end, from files too, however samples lie."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from qpipe.methods.learning.carry import Carry, Layout, layout_of
from qpipe.methods.learning.parts import find_parts
from qpipe.methods.learning.stretch import Problem, Randomness, Stretch, groups
from qpipe.model import Model
from qpipe.model.network.network import Network
from qpipe.model.simulation.run import run
from qpipe.numerics.grid import quantize_dequantize
from tests.model.nets import normal, parsed
from tests.model.quantized import quantized
from tests.zoo import built, inputs, samples

Imported = Callable[[str], Model]
QUICK = ("bert", "conformer")
"""Ids with a mask from shapes, samples that lie on other axes inside."""
SLOW = ("resnet", "llama", "swin", "t5", "mamba", "detr", "yolo", "bidirectional_gru", "gpt2")


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
@pytest.mark.parametrize("blocks", ["auto", "per_layer"])
def test_both_tracks_end_where_the_whole_models_do(imported: Imported, name: str, blocks: str) -> None:
    model = imported(name)
    drawn = [samples(example, 5, 3).numpy() for example in inputs(built(name)[1])]
    arrays = {spec.name: array for spec, array in zip(model.inputs, drawn, strict=True)}
    calibrated = quantized(model, arrays)
    outputs = [spec.name for spec in model.outputs]
    parts, _ = find_parts(calibrated, blocks)  # type: ignore[arg-type]
    carry = Carry(calibrated, model, arrays, parts, also=outputs)
    for part in parts:
        x_hat, x, y = carry.before(part)
        assert len(x_hat) == len(x) == len(part.inputs)
        stretch = Stretch(calibrated, part, Problem(x_hat, x, y))
        index = torch.arange(3)
        found = stretch(on_grid(calibrated, part.weights), index)
        assert found.shape == stretch.batch(index, None)[1].shape
        carry.after(part, None)
    carry.float.bring(outputs)
    carry.quantized.bring(outputs, lambda each: carry.float.held[each].layout)
    for track, is_quantized in ((carry.float, False), (carry.quantized, True)):
        wanted = run(calibrated, arrays, quantized=is_quantized)
        for output in outputs:
            rows = track.held[output].rows
            if is_quantized and output in calibrated.encodings:
                rows = quantize_dequantize(rows, calibrated.encodings[output])
            step = calibrated.encodings[output].scale if output in calibrated.encodings else 0.0
            target = wanted[output].reshape(rows.shape)
            assert np.abs(rows - target).max() <= 1e-4 * np.abs(target).max() + is_quantized * step


def on_grid(model: Network, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(quantize_dequantize(model.param(name), model.encodings[name])) for name in names}


NET = "m (float[N,4] x) => (float[N,3] y) { a = Gemm(x, w, b)  r = Relu(a)  c = Gemm(r, v)  y = Gemm(c, u) }"
TENSORS = {"w": normal(4, 4), "b": normal(4, seed=1), "v": normal(4, 4, seed=2), "u": normal(4, 3, seed=3)}
X = {"x": normal(70, 4)}


def net() -> Model:
    return quantized(Model.from_proto(parsed(NET, **TENSORS)), X)


def test_from_files_it_is_the_same_and_what_nobody_needs_is_let_go() -> None:
    model = net()
    parts, _ = find_parts(model, "per_layer")
    tracks = [Carry(model, model, X, parts, memory=memory) for memory in ("ram", "disk")]  # type: ignore[arg-type]
    for part in parts:
        ram, disk = (carry.before(part) for carry in tracks)
        for a, b in zip([*ram[0], *ram[1], ram[2]], [*disk[0], *disk[1], disk[2]], strict=True):
            np.testing.assert_array_equal(a.rows, b.rows)
        for carry in tracks:
            carry.after(part, None)
            assert set(carry.float.held) <= {part.output}


def test_later_parts_see_what_the_changed_ones_give() -> None:
    model = net()
    first, second, _ = find_parts(model, "per_layer")[0]
    changed = model.with_params({"w": 2 * model.param("w")})
    seen = []
    for tuned in (changed, None):  # None: inputs of all are those of the untuned model
        carry = Carry(model, model, X, [first, second])
        carry.before(first)
        carry.after(first, tuned)
        seen.append(carry.before(second)[0][0].rows)
    wanted = [each.session(outputs=["r"]).run(None, X)[0] for each in (changed, model)]
    step = model.encodings["r"].scale
    for rows, target in zip(seen, wanted, strict=True):
        target = target.reshape(rows.shape)
        assert np.abs(quantize_dequantize(rows, model.encodings["r"]) - target).max() <= 1.01 * step
    assert not np.array_equal(*seen)


def test_units_are_found_on_any_axis_and_come_back() -> None:
    one, two = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    for axis in range(3):
        for interleaved in (False, True):
            layout = Layout(axis, interleaved)
            both = layout.joined(torch.stack([one, two]))
            found = layout_of(one, two, both)
            assert found is not None
            assert (found.axis, found.interleaved) == (axis, interleaved)
            torch.testing.assert_close(found.parted(both, 2), torch.stack([one, two]), rtol=0, atol=0)
    assert layout_of(one, one, one) == Layout(None)
    assert layout_of(one, two, one) is None
    assert layout_of(one, two, torch.randn(6, 4, 5)) is None


def test_sensitivity_is_the_root_of_the_diagonal_of_jacobians() -> None:
    model = net()
    first, second, last = find_parts(model, "per_layer")[0]
    carry = Carry(model, model, X, [first, second, last])
    assert carry.watch_outputs() == ["y"]
    carry.before(first)
    carry.float.bring(["r"])
    g = np.mean([carry.sensitivity("r", ["y"], seed).rows ** 2 for seed in range(30)], axis=(0, 1, 2))
    wanted = np.square(model.param("v") @ model.param("u")).sum(1)  # what a unit error in r does to y
    np.testing.assert_allclose(g / g.mean(), wanted / wanted.mean(), rtol=0.1)
    assert (carry.sensitivity("y", ["y"], 0).rows == 1).all()


def test_what_is_random_is_drawn_while_learning_alone() -> None:
    model = net()
    parts, _ = find_parts(model, "per_layer")
    carry = Carry(model, model, X, parts)
    problem = Problem(*carry.before(parts[0]))
    index, weights = torch.arange(20), on_grid(model, parts[0].weights)
    plain = Stretch(model, parts[0], problem)(weights, index)
    for random in (Randomness(drop=0.5), Randomness(share=0.5)):
        stretch = Stretch(model, parts[0], problem, random=random)
        torch.testing.assert_close(stretch(weights, index), plain, rtol=0, atol=0)
        drawn = [stretch(weights, index, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
        torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=0)
        if random.drop:  # of x^ = x there is nothing to mix
            assert not torch.equal(drawn[0], plain)
            assert not torch.equal(drawn[0], drawn[2])


def test_what_shares_a_grid_is_one_group() -> None:
    text = """m (float[N,4] x) => (float[N,2,2] y) { a = MatMul(x, w)  t = Reshape(a, s)  y = MatMul(t, q) }"""
    tensors = {"w": normal(4, 4), "q": normal(2, 2, seed=2), "s": np.array([-1, 2, 2], np.int64)}
    model = quantized(Model.from_proto(parsed(text, **tensors)), X)
    found = groups(model)
    assert found["a"] == ["a", "t"]
    assert all(len(members) == 1 for leader, members in found.items() if leader != "a")
    assert sum(map(len, found.values())) == sum(name not in model.params for name in model.encodings)
