"""encodings.json in AIMET's formats: the numbers give the grids back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qpipe.errors import InputError
from qpipe.model import Model
from qpipe.model.files.encodings_reader import read_encodings
from qpipe.model.files.encodings_writer import write_encodings
from qpipe.numerics.grid import Encoding, broadcast, same_grid
from qpipe.numerics.observers import weight_encoding
from qpipe.numerics.scheme import code_bounds
from tests.model.nets import normal, parsed
from tests.model.qdq.test_writer import X, cnn
from tests.model.quantized import quantized, scheme


def document_of(model: Model, folder: Path, version: Any = "1.0.0") -> dict[str, Any]:
    """What the file says that `write_encodings` writes."""
    write_encodings(model, folder / "document.json", version)
    document: dict[str, Any] = json.loads((folder / "document.json").read_text())
    return document


def by_name(entries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The entries of a list by name."""
    return {entry["name"]: entry for entry in entries}


def test_version_1_0_0_gives_scales_and_offsets(tmp_path: Path) -> None:
    model = quantized(cnn(), X)
    document = document_of(model, tmp_path)
    assert document["version"] == "1.0.0"
    weight = by_name(document["param_encodings"])["w1"]
    assert {k: weight[k] for k in ("enc_type", "dtype", "bw", "is_sym")} == {
        "enc_type": "PER_CHANNEL",
        "dtype": "INT",
        "bw": 8,
        "is_sym": True,
    }
    assert weight["offset"] == [-128] * 8
    assert weight["scale"] == model.encodings["w1"].scale.tolist()
    activation = by_name(document["activation_encodings"])["x"]
    e = model.encodings["x"]
    assert activation["enc_type"] == "PER_TENSOR"
    assert activation["scale"] == [float(e.scale)]
    assert activation["offset"] == [-int(e.zero_point)]
    assert activation["is_sym"] is False


def test_biases_are_listed_with_32_bits(tmp_path: Path) -> None:
    model = quantized(cnn(), X)
    bias = by_name(document_of(model, tmp_path)["param_encodings"])["b1"]
    assert (bias["bw"], bias["enc_type"]) == (32, "PER_CHANNEL")
    assert bias["offset"] == [-(2**31)] * 8
    expected = model.encodings["x"].scale * model.encodings["w1"].scale
    assert bias["scale"] == expected.tolist()


def test_version_0_6_1_gives_the_ranges(tmp_path: Path) -> None:
    model = quantized(cnn(), X)
    document = document_of(model, tmp_path, "0.6.1")
    (entry,) = document["activation_encodings"]["r"]
    e = model.encodings["r"]
    assert entry["min"] == 0.0
    assert entry["max"] == pytest.approx(255 * float(e.scale))
    assert entry["is_symmetric"] == "False"
    channels = document["param_encodings"]["w1"]
    assert len(channels) == 8
    assert channels[3]["is_symmetric"] == "True"
    assert channels[3]["min"] == pytest.approx(-128 * float(model.encodings["w1"].scale[3]))
    assert document["quantizer_args"]["param_bitwidth"] == 8
    assert document["quantizer_args"]["per_channel_quantization"] is True


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_block"])
def test_version_2_0_0_gives_every_grid_back(granularity: Any, tmp_path: Path) -> None:
    block = 4 if granularity == "per_block" else 0
    text = "n (float[N,8] x) => (float[N,6] y) { y = MatMul(x, w) }"
    model = quantized(
        Model.from_proto(parsed(text, w=normal(8, 6))), {"x": normal(9, 8)}, scheme(4, 8, granularity, block)
    )
    entries = by_name(document_of(model, tmp_path, "2.0.0")["encodings"])
    assert set(entries) == set(model.encodings)
    for name, e in model.encodings.items():
        entry = entries[name]
        dtype = entry["output_dtype"]
        scale = np.asarray(entry["y_scale"], np.float32)
        found = Encoding(
            int(dtype.removeprefix("u").removeprefix("int")),
            not dtype.startswith("u"),
            e.symmetric,
            scale,
            np.broadcast_to(np.asarray(entry.get("y_zero_point", 0), np.int32), scale.shape),
            entry.get("axis"),
            entry.get("block_size"),
        )
        np.testing.assert_array_equal(found.scale, e.scale)
        np.testing.assert_array_equal(found.zero_point, e.zero_point)
        assert (found.bitwidth, found.signed, found.axis, found.block_size) == (
            e.bitwidth,
            e.signed,
            e.axis,
            e.block_size,
        )


def test_blocks_are_listed_channel_by_channel(tmp_path: Path) -> None:
    text = "n (float[N,8] x) => (float[N,6] y) { y = MatMul(x, w) }"
    model = quantized(
        Model.from_proto(parsed(text, w=normal(8, 6))), {"x": normal(9, 8)}, scheme(4, 8, "per_block", 4)
    )
    entry = by_name(document_of(model, tmp_path)["param_encodings"])["w"]
    assert (entry["enc_type"], entry["block_size"]) == ("PER_BLOCK", 4)
    assert entry["scale"] == model.encodings["w"].scale.T.reshape(-1).tolist()
    with pytest.raises(InputError, match="block scales of 'w'"):
        document_of(model, tmp_path, "0.6.1")


def test_an_unknown_version_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"0\.6\.1, 1\.0\.0, 2\.0\.0, got '3'"):
        document_of(quantized(cnn(), X), tmp_path, "3")


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_encodings(quantized(cnn(), X), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert json.loads((tmp_path / "a").read_text())["version"] == "1.0.0"


VERSIONS = ("0.6.1", "1.0.0", "2.0.0")
THOROUGH = settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
"""Of the folder, each example writes its own file anew."""


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_every_version_is_read_back(version: Any, granularity: Any, tmp_path: Path) -> None:
    model = quantized(cnn(), X, scheme(4, 8, granularity))
    write_encodings(model, tmp_path / "e.json", version)
    found = cnn().with_encodings_file(tmp_path / "e.json")
    assert set(found.encodings) == set(model.encodings)
    for name, e in model.encodings.items():
        assert same_grid(e, found.encodings[name]), name
        assert found.encodings[name].frozen == (name in model.params)
    np.testing.assert_array_equal(found.session().run(None, X)[0], model.session().run(None, X)[0])


@pytest.mark.parametrize("version", VERSIONS)
def test_signed_asymmetric_grids_hold_the_same_numbers(version: Any, tmp_path: Path) -> None:
    model = quantized(cnn(), X, scheme(signed=True))
    write_encodings(model, tmp_path / "e.json", version)
    found = cnn().with_encodings_file(tmp_path / "e.json")
    np.testing.assert_array_equal(found.session().run(None, X)[0], model.session().run(None, X)[0])


@pytest.mark.parametrize("version", ["1.0.0", "2.0.0"])
@pytest.mark.parametrize("op", ["MatMul(x, w)", "Gemm<transB=1>(x, w)"])
def test_blocks_are_read_back(version: Any, op: str, tmp_path: Path) -> None:
    text = f"n (float[N,8] x) => (float[N,6] y) {{ y = {op} }}"
    net = Model.from_proto(parsed(text, w=normal(*((8, 6) if op.startswith("MatMul") else (6, 8)))))
    model = quantized(net, {"x": normal(9, 8)}, scheme(4, 8, "per_block", 4))
    write_encodings(model, tmp_path / "e.json", version)
    found = read_encodings(net, tmp_path / "e.json")
    assert all(same_grid(e, found[name]) for name, e in model.encodings.items())


@pytest.mark.parametrize("version", ["0.6.1", "1.0.0", "2.0.0"])
def test_mirrored_codes_are_read_back_as_such(version: Any, tmp_path: Path) -> None:
    wanted = scheme(weight=4)
    model = quantized(cnn(), X, replace(wanted, weight=replace(wanted.weight, grid="signed_max")))
    write_encodings(model, tmp_path / "encodings.json", version)
    found = read_encodings(model, tmp_path / "encodings.json")
    mirrored = [name for name, e in model.encodings.items() if name in model.params and np.any(e.zero_point == -1)]
    assert mirrored
    for name in mirrored:
        assert same_grid(found[name], model.encodings[name])


def written(tmp_path: Path, change: Any, version: Any = "1.0.0") -> Path:
    """A file of the small network's grids that `change` has spoilt."""
    document = document_of(quantized(cnn(), X), tmp_path, version)
    change(document)
    path = tmp_path / "e.json"
    path.write_text(json.dumps(document))
    return path


BAD = {
    "has encodings for 1 of 17 names that the model has not: 'w11'; did you mean 'w1'": lambda d: (
        d["param_encodings"].__getitem__(4).update(name="w11")
    ),
    "its version is '0.5.0'; 0.6.1, 1.0.0, 2.0.0 are known": lambda d: d.update(version="0.5.0"),
    "the encoding of 'w1' cannot be read: 7 scales fit no axis": lambda d: d["param_encodings"][4].update(
        scale=[1.0] * 7, offset=[-128] * 7
    ),
    "enc_type LPBQ is not known": lambda d: d["param_encodings"][4].update(enc_type="LPBQ"),
    "the encoding of 'a' cannot be read": lambda d: d["activation_encodings"][0].update(
        name="a", scale=[0.0]
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_a_file_that_does_not_fit_is_one_sentence(message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        cnn().with_encodings_file(written(tmp_path, BAD[message]))
    assert message in str(refused.value)


def test_floats_are_passed_over_and_what_is_no_file_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, lambda d: d["activation_encodings"][0].update(dtype="FLOAT", bw=16))
    assert len(cnn().with_encodings_file(path).encodings) == len(quantized(cnn(), X).encodings) - 1
    with pytest.raises(InputError, match="does not exist"):
        cnn().with_encodings_file(tmp_path / "none.json")
    (tmp_path / "text").write_text("no json")
    with pytest.raises(InputError, match="is no encodings file"):
        cnn().with_encodings_file(tmp_path / "text")


NETS = {
    "MatMul": ("(float[N,6,4] x) => (float[N,6,4] y) { y = MatMul(x, w) }", (4, 4)),
    "Gemm": ("(float[N,4] x) => (float[N,4] y) { y = Gemm<transB=1>(x, w) }", (4, 4)),
    "MatMul of rank 3": ("(float[N,4,6,4] x) => (float[N,4,6,4] y) { y = MatMul(x, w) }", (4, 4, 4)),
    "Conv": ("(float[N,4,6,6] x) => (float[N,4,a,b] y) { y = Conv(x, w) }", (4, 4, 3, 3)),
    "pointwise Conv": ("(float[N,4,6,6] x) => (float[N,4,a,b] y) { y = Conv(x, w) }", (4, 4, 1, 1)),
    "ConvTranspose": ("(float[N,4,6,6] x) => (float[N,2,a,b] y) { y = ConvTranspose(x, w) }", (4, 2, 3, 3)),
    "tied": ("(float[N,4] x) => (float[N,4] y) { a = MatMul(x, w)  y = Gemm<transB=1>(a, w) }", (4, 4)),
    "tied head": (
        "(int64[N,6] x) => (float[N,6,6] y) { e = Gather(w, x)  t = Transpose<perm=[1,0]>(w)  y = MatMul(e, t) }",
        (6, 4),
    ),
    "on the left": ("(float[N,4,6] x) => (float[N,4,6] y) { y = MatMul(w, x) }", (4, 4)),
}  # fmt: skip
MODELS = {name: Model.from_proto(parsed(f"m {text}", w=normal(*shape))) for name, (text, shape) in NETS.items()}


@st.composite
def grids(draw: st.DrawFn, shape: tuple[int, ...] | None) -> Encoding:
    """Any grid that a tensor of `shape` can have; None: an activation."""
    bitwidth, signed = draw(st.sampled_from([2, 4, 7, 8, 16])), draw(st.booleans())
    axis = None if shape is None else draw(st.sampled_from([None, *range(len(shape))]))
    block = None if axis is None else draw(st.sampled_from([None, 1, 2, 3]))
    size: tuple[int, ...] = ()
    if shape is not None and axis is not None:
        size = (shape[axis],) if block is None else tuple(
            -(-n // block) if i == axis else n for i, n in enumerate(shape)
        )  # fmt: skip
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    scale = np.exp(rng.normal(size=size)) if draw(st.booleans()) else np.full(size, 0.5)
    low, high = code_bounds(bitwidth, signed)
    zero_point = rng.integers(low, high + 1, size) if draw(st.booleans()) else np.full(size, (low + high + 1) // 2)
    return Encoding(bitwidth, signed, False, scale, zero_point, axis, block)


def numbers(encoding: Encoding, shape: tuple[int, ...]) -> list[Any]:
    """The lowest number of the grid at each place of a tensor of `shape`, and the step."""
    scale, zero_point = broadcast(encoding, shape)
    found = (encoding.qmin - zero_point.astype(np.int64), scale)
    return [encoding.bitwidth, *(np.broadcast_to(array, shape).tolist() for array in found)]


def refusal(act: Callable[..., Any], *args: Any) -> str:
    """What `act` is refused with; empty where it is not."""
    try:
        act(*args)
    except InputError as refused:
        return str(refused)
    return ""


@settings(THOROUGH, max_examples=300)
@given(data=st.data(), name=st.sampled_from(sorted(NETS)), version=st.sampled_from(VERSIONS))
def test_what_is_read_back_is_what_was_written_or_it_was_refused(
    data: st.DataObject, name: str, version: Any, tmp_path: Path
) -> None:
    model, shape = MODELS[name], NETS[name][1]
    value = str(model.graph[0].outputs[0].name)
    chosen = {"w": data.draw(grids(shape)), value: data.draw(grids(None))}
    path = tmp_path / "e.json"
    path.unlink(missing_ok=True)
    if said := refusal(write_encodings, model.with_encodings(chosen), path, version):
        assert version != "2.0.0"
        assert "2.0.0" in said
        assert not path.exists()
        return
    found = read_encodings(model, path)
    assert set(found) == set(chosen)
    assert numbers(found["w"], shape) == numbers(chosen["w"], shape)
    assert numbers(found[value], ()) == numbers(chosen[value], ())


@pytest.mark.parametrize("version", ["0.6.1", "1.0.0"])
def test_scales_along_an_axis_that_no_word_says_are_refused(version: Any, tmp_path: Path) -> None:
    model = MODELS["MatMul"]
    inputs, outputs = (weight_encoding(model.param("w"), scheme().weight, axis) for axis in (0, 1))
    write_encodings(model.with_encodings({"w": outputs}), tmp_path / "e.json", version)
    assert refusal(write_encodings, model.with_encodings({"w": inputs}), tmp_path / "f.json", version) == (
        f"encodings.json {version} does not say that the scales of 'w' run along axis 0: they would be read as those "
        "of another. Use encodings_format 2.0.0."
    )
    write_encodings(model.with_encodings({"w": inputs}), tmp_path / "f.json", "2.0.0")
    assert same_grid(read_encodings(model, tmp_path / "f.json")["w"], inputs)


HOSTILE = st.one_of(
    st.sampled_from([None, True, False, -1, 0, 3, 10**12, 10**400, -(10**400), 1e308, float("nan"), float("inf")]),
    st.sampled_from(["", "x", "8", "int8", "\ud800", "int99999", "float", [], {}, [[]], [{}], [None], {"name": "w"}]),
    st.sampled_from([["1.0"], [1e400], [[1.0], [2.0, 3.0]]]),
    st.integers(),
    st.floats(),
    st.lists(st.integers(-3, 300), max_size=5),
)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything in a JSON value, but for the value itself."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*at, key)
        yield from places(child, (*at, key))


@settings(THOROUGH, max_examples=400)
@given(data=st.data(), name=st.sampled_from(["MatMul", "pointwise Conv"]), version=st.sampled_from(VERSIONS))
def test_whatever_stands_in_a_file_is_read_or_refused_in_one_line(
    data: st.DataObject, name: str, version: Any, tmp_path: Path
) -> None:
    model = MODELS[name]
    block = data.draw(st.sampled_from([0, 2])) if version != "0.6.1" else 0
    wanted = scheme(4, 8, "per_block" if block else "per_channel", block)
    sizes = [n if isinstance(n, int) else 3 for n in model.inputs[0].shape]
    document = document_of(quantized(model, {"x": normal(*sizes)}, wanted), tmp_path, version)
    for _ in range(data.draw(st.integers(1, 2))):
        *way, last = data.draw(st.sampled_from(list(places(document))))
        parent = document
        for key in way:
            parent = parent[key]
        if data.draw(st.booleans()):
            parent[last] = data.draw(HOSTILE)
        elif isinstance(parent, dict):
            parent.pop(last, None)
    path = tmp_path / "hostile.json"
    path.write_text(json.dumps(document))
    said = refusal(read_encodings, model, path)
    assert "\n" not in said
    assert len(said) < 500


DEEP, DIGITS = "[" * 900 + "]" * 900, "1" + "0" * 4000


@pytest.mark.parametrize(
    "text",
    [
        *("[" * 100_000, f'{{"version": {DEEP}}}', f'{{"version": {DIGITS}}}', '{"version": ["2.0.0"]}'),
        *('{"version": {"2.0.0": 1}}', "3", '"text"', ""),
        *(f'{{"version": "2.0.0", "encodings": [{{"name": "w", {part}}}]}}' for part in (
            f'"output_dtype": {DEEP}', f'"output_dtype": "int8", "y_scale": {DEEP}', f'"output_dtype": "int{DIGITS}"',
            f'"output_dtype": "int8", "y_scale": 1, "y_zero_point": {DIGITS}',
        )),
        *(f'{{"version": "1.0.0", "param_encodings": [{{"name": "w", "dtype": "INT", "bw": {digits}}}]}}'
          for digits in (DIGITS, f"{DIGITS}{DIGITS}")),
    ],
)  # fmt: skip
def test_what_nobody_would_write_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    path.write_text(text)
    said = refusal(read_encodings, MODELS["MatMul"], path)
    assert said
    assert "\n" not in said
    assert len(said) < 500
