"""load_model: ONNX files and torch modules, weights that fit, and one sentence for all that does not."""

from __future__ import annotations

import gc
import itertools

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

from qpipe.errors import InputError
from qpipe.model import Model
from qpipe.model.structure.layers import find_layers
from qpipe.numerics.scheme import Scheme, TensorScheme
from qpipe.stage import Samples
from qpipe.stages.calibrate import calibrate
from qpipe.stages.evaluate import evaluate
from qpipe.stages.export import export
from qpipe.stages.load_model import load_model
from qpipe.stages.parity import parity
from qpipe.stages.prepare import prepare
from tests.model.nets import normal, parsed

NETS = """
import torch
from torch import nn


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, image):
        return self.second(torch.relu(self.first(image)))


class Two(nn.Module):
    def forward(self, a, b):
        return a + 2 * b


def conv():
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU6())


def conv_with_example():
    return conv(), torch.randn(1, 3, 8, 8)


def tied():
    return Tied(), torch.randn(2, 4)


def two():
    return Two()


def wrong():
    return 3
"""
_COUNT = itertools.count()


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A module of networks in the working directory; its name is new each time, since Python caches imports."""
    name = f"nets_{next(_COUNT)}"
    (tmp_path / f"{name}.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    return name


def onnx_file(path, text="t = Conv(x, w)  y = Relu(t)"):
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> n (float[N,3,8,8] x) => (float[N,4,p,q] y) {{ {text} }}'
    )
    weight = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(model, path)
    return weight


def test_an_onnx_file_comes_in_with_its_names(tmp_path, notes):
    weight = onnx_file(tmp_path / "net.onnx")
    model = load_model(path=tmp_path / "net.onnx", ctx=notes)
    assert np.array_equal(model.param("w"), weight)
    assert model.inputs[0].name == "x"
    assert "computes what its source does" in notes.notes[-1]


def test_a_module_with_example_inputs_comes_in_from_the_working_directory(nets, run):
    model = load_model(factory=f"{nets}:conv_with_example")
    assert [node.op_type for node in model.graph] == ["Conv", "BatchNormalization", "Clip"]
    assert set(model.params) >= {"0.weight", "1.weight", "1.running_var"}
    assert model.inputs[0].shape[0] == "batch"


def test_without_example_inputs_the_first_sample_serves(nets):
    data = Samples({"image": np.zeros((5, 3, 8, 8), np.float32)})
    model = load_model(data, factory=f"{nets}:conv")
    assert model.inputs[0].name == "image", "a single input takes the name that the data give it"
    assert model.inputs[0].shape == ("batch", 3, 8, 8)


def test_a_module_is_exported_once_and_python_collects_garbage_again_after_it(nets, monkeypatch):
    calls, export = [], torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *a, **k: calls.append(gc.isenabled()) or export(*a, **k))
    load_model(Samples({"image": np.zeros((5, 3, 8, 8), np.float32)}), factory=f"{nets}:conv")
    assert calls == [False]
    assert gc.isenabled()


def test_several_inputs_are_matched_by_argument_name(nets, run):
    data = Samples({"b": np.ones((3, 2), np.float32), "a": np.zeros((3, 2), np.float32)})
    model = load_model(data, factory=f"{nets}:two")
    assert run(model, {"a": data.arrays["a"], "b": data.arrays["b"]})[0].tolist() == [[2, 2]] * 3
    with pytest.raises(InputError, match=r"hold c, d, but Two takes a, b"):
        load_model(Samples({n: np.ones((3, 2), np.float32) for n in "cd"}), factory=f"{nets}:two")


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "nested", "parallel"])
def test_weights_replace_the_modules(nets, tmp_path, suffix):
    given = {"0.weight": torch.randn(4, 3, 3, 3)}
    names = ("weight", "bias", "running_mean", "running_var")
    given |= {f"1.{name}": torch.rand(4) + 0.5 for name in names}
    path = tmp_path / f"w.{suffix}"
    if suffix == "safetensors":
        save_file(given, path)
    elif suffix == "pt":
        torch.save(given, path)
    elif suffix == "nested":
        torch.save({"epoch": 3, "state_dict": given}, path)
    else:
        torch.save({f"module.{name}": value for name, value in given.items()}, path)
    model = load_model(factory=f"{nets}:conv_with_example", weights=path)
    for name, value in given.items():
        assert np.array_equal(model.param(name), value.numpy())


def test_a_tied_parameter_is_filled_under_its_other_name(nets, tmp_path):
    weight = torch.randn(4, 4)
    save_file(
        {"first.weight": weight, "first.bias": torch.zeros(4), "second.bias": torch.ones(4)},
        tmp_path / "w.safetensors",
    )
    model = load_model(factory=f"{nets}:tied", weights=tmp_path / "w.safetensors")
    weights = {layer.weight for layer in find_layers(model)}
    assert len(weights) == 1


def test_weights_that_do_not_fit_are_listed_in_one_sentence(nets, tmp_path):
    torch.save(
        {"0.weight": torch.zeros(4, 3, 5, 5), "1.weight": torch.zeros(4), "head.bias": torch.zeros(2)},
        tmp_path / "w.pt",
    )
    with pytest.raises(InputError) as refused:
        load_model(factory=f"{nets}:conv_with_example", weights=tmp_path / "w.pt")
    assert str(refused.value) == (
        "The weights w.pt do not fit Sequential: of another shape: 0.weight (4, 3, 5, 5) instead of (4, 3, 3, 3); "
        "missing: 1.bias, 1.running_mean, 1.running_var; unexpected: head.bias."
    )


def test_a_pickle_that_runs_code_is_refused(nets, tmp_path):
    class Bomb:
        def __reduce__(self):
            return print, ("boom",)

    torch.save({"0.weight": Bomb()}, tmp_path / "w.pt")
    with pytest.raises(InputError, match="cannot be read"):
        load_model(factory=f"{nets}:conv_with_example", weights=tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({}, "either path or factory, got none"),
        ({"path": "net.onnx", "factory": "{}:conv"}, "got both"),
        ({"path": "net.onnx"}, "net.onnx does not exist"),
        ({"path": "text.onnx"}, "text.onnx"),
        ({"path": "good.onnx", "weights": "w.pt"}, "`weights` go with `factory`"),
        ({"factory": "no_such_module:build"}, "cannot import no_such_module"),
        ({"factory": "{}:conf"}, "has no function 'conf'. Did you mean 'conv'?"),
        ({"factory": "{}:wrong"}, "returned int; it has to return an nn.Module"),
        ({"factory": "{}:conv"}, "returned no example inputs, and no samples are wired"),
        ({"factory": "{}:conv", "weights": "w.pt"}, "There is no file of weights"),
    ],
)
def test_a_bad_source_is_one_sentence(nets, tmp_path, params, reason):
    (tmp_path / "text.onnx").write_text("no model")
    onnx_file(tmp_path / "good.onnx")
    given = {
        key: value.format(nets) if key == "factory" else tmp_path / value for key, value in params.items()
    }
    with pytest.raises(InputError) as refused:
        load_model(**given)
    assert reason in str(refused.value)


def test_a_quantized_file_comes_in_with_its_grids_and_stays_as_it_is(tmp_path, network, notes, target):
    from qpipe.numerics.scheme import Scheme, TensorScheme
    from qpipe.stages.adaround import adaround
    from qpipe.stages.bnf import bnf
    from qpipe.stages.calibrate import calibrate
    from qpipe.stages.cle import cle
    from qpipe.stages.prepare import prepare

    text = "n (float[N,3,8,8] x) => (float[N,4,6,6] y) { t = Conv(x, w, b)  y = Relu(t) }"
    samples = Samples({"x": np.random.default_rng(0).normal(size=(8, 3, 8, 8)).astype(np.float32)})
    scheme = Scheme(TensorScheme(4, True, True, "per_channel"), TensorScheme(8, False, False))
    made = calibrate(network(text, {"w": (4, 3, 3, 3), "b": (4,)}), samples, scheme=scheme, target=target)
    made.save(tmp_path)
    model = load_model(path=tmp_path / "model.onnx", ctx=notes)
    assert any("came quantized: 1 weights and 2 activations" in note for note in notes.notes)
    # Whoever changes weights leaves these; new samples give new grids to activations alone.
    assert adaround(model, samples, ctx=notes) is model
    again = cle(bnf(prepare(model, samples, ctx=notes), ctx=notes), samples, ctx=notes)
    assert again is model
    wider = Samples({"x": 2 * samples.arrays["x"]})
    eight = Scheme(TensorScheme(8, True, True), TensorScheme(8, False, False))
    renewed = calibrate(model, wider, scheme=eight, target=target, ctx=notes)
    np.testing.assert_array_equal(renewed.encodings["w"].scale, made.encodings["w"].scale)
    assert renewed.encodings["w"].bitwidth == 4
    assert float(renewed.encodings["x"].scale) == pytest.approx(2 * float(made.encodings["x"].scale))
    assert notes.notes[-1] == "The model came quantized, so their grid stays: w."


def test_an_encodings_file_gives_a_float_model_its_grids(tmp_path, notes):
    from qpipe.model.files.encodings_writer import write_encodings
    from tests.model.quantized import quantized

    onnx_file(tmp_path / "net.onnx")
    model = load_model(path=tmp_path / "net.onnx")
    x = {model.inputs[0].name: np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)}
    made = quantized(Model.of(model), x)
    write_encodings(made, tmp_path / "encodings.json", "2.0.0")
    found = load_model(path=tmp_path / "net.onnx", encodings=tmp_path / "encodings.json", ctx=notes)
    assert set(found.encodings) == set(made.encodings)
    assert any("came quantized" in note for note in notes.notes)
    (tmp_path / "encodings.json").write_text('{"version": "2.0.0", "encodings": [{"name": "z"}]}')
    with pytest.raises(InputError, match="names that the model has not: 'z'"):
        load_model(path=tmp_path / "net.onnx", encodings=tmp_path / "encodings.json")


def test_the_import_of_a_file_is_checked_on_samples_and_to_a_tolerance(tmp_path, notes):
    onnx_file(tmp_path / "net.onnx")
    data = Samples({"x": np.random.default_rng(0).normal(size=(3, 3, 8, 8)).astype(np.float32)})
    load_model(data, path=tmp_path / "net.onnx", ctx=notes)
    assert notes.notes[-1].startswith("The import computes what its source does, to ")
    other = Samples({"image": np.zeros((3, 1, 8, 8), np.float32)})
    load_model(other, path=tmp_path / "net.onnx", ctx=notes)  # of another model: `prepare` will say so
    with pytest.raises(InputError, match=r"computes something else than its source.*`tolerance` of load_model"):
        load_model(data, path=tmp_path / "net.onnx", tolerance=1e-12)


def test_a_file_that_runs_on_nothing_made_up_is_taken_and_the_note_says_so(tmp_path, notes):
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> n (float[N,3] x, int64[M] i) => (float[M,3] y) '
        "{ far = Constant<value_ints=[50000]>()  near = Sub(i, far)  y = Gather(x, near) }"
    )
    onnx.save(model, tmp_path / "net.onnx")
    load_model(path=tmp_path / "net.onnx", ctx=notes)
    assert "could not be held against its source" in notes.notes[-1]
    assert "samples on the port `data`" in notes.notes[-1]


def test_a_file_in_bfloat16_is_taken_and_the_note_says_that_it_is_not_checked(tmp_path, notes):
    w = (normal(4, 3) / 2).astype(ml_dtypes.bfloat16)
    text = "m (bfloat16[N,4] x) => (bfloat16[N,3] y) { h = MatMul(x, w)  y = Relu(h) }"
    onnx.save(parsed(text, w=w), tmp_path / "net.onnx")
    model = load_model(path=tmp_path / "net.onnx", ctx=notes)
    assert notes.notes[-1].startswith("onnxruntime has next to no operators of bfloat16")
    x = normal(5, 4, seed=1).astype(ml_dtypes.bfloat16)
    (found,) = Model.of(model).session().run(None, {"x": x})
    wanted = np.maximum(x.astype(np.float32) @ w.astype(np.float32), 0)
    np.testing.assert_array_equal(found, wanted.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("name", ["bfloat16", "float16", "double"])
def test_a_model_in_another_type_is_quantized_scored_and_exported_with_its_border(tmp_path, notes, target, name):
    w = (normal(16, 8) / 4).astype({"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "double": np.float64}[name])
    text = f"m ({name}[N,16] x) => ({name}[N,8] y) {{ h = MatMul(x, w)  y = Relu(h) }}"
    onnx.save(parsed(text, w=w), tmp_path / "net.onnx")
    data = Samples({"x": normal(64, 16, seed=1)})
    scheme = Scheme(TensorScheme(8, True, True), TensorScheme(8, False, False))
    model = prepare(load_model(data, path=tmp_path / "net.onnx", ctx=notes), data)
    quantized = calibrate(model, data, scheme=scheme, target=target)
    for backend in ("simulation", "onnxruntime"):
        assert 25 < evaluate(quantized, data, model, metric="sqnr_db", backend=backend).values["score"] < 60, backend
    assert parity(quantized, data).values["agree"]
    (tmp_path / "model.onnx").write_bytes(export(quantized).read("model.onnx"))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [item.type for item in (*session.get_inputs(), *session.get_outputs())] == [f"tensor({name})"] * 2
