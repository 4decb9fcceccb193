"""load_data: npz, images and factories give the arrays they hold; whatever cannot serve is one sentence."""

from __future__ import annotations

import itertools
import zipfile

import numpy as np
import pytest
from PIL import Image

from qpipe.errors import InputError
from qpipe.stages.load_data import load_data

RNG = np.random.default_rng(0)
_COUNT = itertools.count()


def test_an_npz_gives_its_arrays_and_labels(tmp_path):
    image, labels = RNG.normal(size=(6, 3, 4, 4)).astype(np.float32), np.arange(6)
    np.savez(tmp_path / "d.npz", image=image, mask=image > 0, labels=labels)
    data = load_data(path=tmp_path / "d.npz")
    assert np.array_equal(data.arrays["image"], image)
    assert np.array_equal(data.arrays["mask"], image > 0)
    assert np.array_equal(data.labels, labels)


def test_a_limit_keeps_every_class_of_sorted_data(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.arange(100, dtype=np.float32), labels=np.repeat(np.arange(10), 10))
    data = load_data(path=tmp_path / "d.npz", limit=20)
    assert np.array_equal(np.bincount(data.labels), [2] * 10)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"x": np.array([[0.0, 1], [np.nan, 1]])}, "array 'x' holds NaN, first in sample 1"),
        ({"x": np.array([[0.0, 1], [2, np.inf]])}, "array 'x' holds inf, first in sample 1"),
        ({"x": np.zeros((0, 3))}, "array 'x' is empty, shape (0, 3)"),
        ({"x": np.float32(3)}, "array 'x' is a single number"),
        ({"x": np.zeros((4, 3)), "labels": np.zeros(5)}, "array 'labels' has 5 samples, 'x' has 4"),
        ({"labels": np.zeros(5)}, "holds no array for a model input, only ['labels']"),
        ({"x": np.array([b"a", b"b"])}, "array 'x' has dtype |S1; it has to hold numbers, or text as numpy's str"),
        ({"x": np.zeros(2), "labels": np.array(["a", "b"])}, "array 'labels' has dtype <U1; it has to hold numbers"),
        ({}, "holds no array for a model input"),
    ],
)
def test_arrays_that_cannot_serve_are_refused_by_name(tmp_path, arrays, reason):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(InputError) as refused:
        load_data(path=tmp_path / "d.npz")
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_files_that_are_no_npz_are_refused(tmp_path):
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 cut")
    np.savez(tmp_path / "objects.npz", x=np.array([{}, []], dtype=object))
    for name in ("one.npy", "text.npz", "cut.npz", "objects.npz", "missing.npz"):
        with pytest.raises(InputError, match=r"one\.npy|text\.npz|cut\.npz|objects\.npz|missing\.npz"):
            load_data(path=tmp_path / name)


FACTORIES = """
import numpy as np
import torch


def mapping(split):
    n = {"calibration": 4, "evaluation": 6}[split]
    return {"x": np.ones((n, 2), np.float32), "labels": list(range(n))}


def batches(split):
    for start in range(0, 100, 10):
        yield {"x": torch.full((10, 2), float(start)), "labels": torch.arange(start, start + 10)}


def endless(split):
    while True:
        yield {"x": np.ones((3, 2), np.float32)}


def pairs(split):
    return [(np.ones((3, 2)), np.ones(3))]


def uneven(split):
    return [{"x": np.ones((3, 2))}, {"y": np.ones((3, 2))}]


def nothing(split):
    return []


def ragged(split):
    return [{"x": np.ones((3, 2))}, {"x": np.ones((3, 5))}]


def number(split):
    return 3
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    name = f"factories_{next(_COUNT)}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    return name


def test_a_factory_is_called_with_the_split(factories):
    assert len(load_data(factory=f"{factories}:mapping")) == 4
    data = load_data(factory=f"{factories}:mapping", split="evaluation", limit=3)
    assert data.labels.tolist() == [0, 2, 4]


def test_batches_of_a_factory_are_joined_until_the_limit(factories):
    data = load_data(factory=f"{factories}:batches")
    assert data.labels.tolist() == list(range(100))
    assert data.arrays["x"].dtype == np.float32
    assert load_data(factory=f"{factories}:batches", limit=15).labels.tolist() == list(range(15))
    assert len(load_data(factory=f"{factories}:endless", limit=7)) == 7


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pairs", "yields tuple as batch 0; each batch has to be a mapping"),
        ("uneven", "batch 1 holds ['y'], the first one ['x']"),
        ("nothing", "yields no batch for split 'calibration'"),
        ("ragged", "the batches of 'x' do not fit together"),
        ("number", "returned int; it has to return a mapping of arrays"),
        ("mappin", "has no function 'mappin'. Did you mean 'mapping'?"),
    ],
)
def test_a_factory_that_returns_something_else_is_told(factories, name, reason):
    with pytest.raises(InputError) as refused:
        load_data(factory=f"{factories}:{name}")
    assert reason in str(refused.value)


def picture(path, size=(6, 4), seed=0):
    """A random RGB image of `size` (width, height), lossless; its pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def test_one_folder_for_each_class_gives_images_and_labels(tmp_path):
    for index, name in enumerate(("cat/b.png", "cat/a.png", "ant/z.png")):
        picture(tmp_path / name, seed=index)
    data = load_data(images=tmp_path, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    pixels = np.asarray(Image.open(tmp_path / "cat/a.png")).astype(np.float64)
    wanted = ((pixels / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]).transpose(2, 0, 1)
    np.testing.assert_allclose(data.arrays["image"][1], wanted, rtol=1e-6)
    assert data.labels.tolist() == [0, 1, 1]
    assert data.arrays["image"].shape == (3, 3, 4, 6)


def test_a_csv_gives_the_order_and_the_labels(tmp_path):
    for name in ("a.png", "b.png"):
        picture(tmp_path / "images" / name)
    (tmp_path / "l.csv").write_text("filename,label\nb.png,7\na.png,3\n")
    data = load_data(
        images=tmp_path / "images", labels=tmp_path / "l.csv", input_name="x", layout="NHWC", mode="BGR"
    )
    pixels = np.asarray(Image.open(tmp_path / "images/b.png"))[:, :, ::-1]
    np.testing.assert_allclose(data.arrays["x"][0], pixels / 255, rtol=1e-6)
    assert data.labels.tolist() == [7, 3]
    (tmp_path / "l.csv").write_text("b.png,dog\na.png,cat\n")
    assert load_data(images=tmp_path / "images", labels=tmp_path / "l.csv").labels.tolist() == [1, 0]


def test_images_are_resized_and_cropped_to_one_size(tmp_path):
    picture(tmp_path / "a.png", (40, 20))
    picture(tmp_path / "b.png", (24, 48))
    for params in ({"fit": "crop"}, {"fit": "stretch"}, {"crop": 0.5}, {"mode": "L"}):
        data = load_data(images=tmp_path, size=(8, 10), **params)
        assert data.arrays["image"].shape == (2, 1 if params.get("mode") else 3, 8, 10)
        assert data.labels is None
    flat = Image.new("RGB", (40, 20), (255, 0, 51))
    flat.save(tmp_path / "a.png")
    cropped = load_data(images=tmp_path, size=(8, 10), crop=0.7, limit=1).arrays["image"]
    np.testing.assert_allclose(cropped[0].mean(axis=(1, 2)), [1, 0, 0.2], rtol=1e-6)


@pytest.mark.parametrize(
    ("files", "params", "reason"),
    [
        ((), {}, "holds no image"),
        (("a.png", "cat/b.png"), {}, "holds images beside its class folders"),
        (("a.png",), {"labels": "c.png,1\n"}, "lists 1 images that do not exist"),
        (("a.png",), {"labels": "a.png;1\n"}, "entry 1 is 'a.png;1'; each has to be 'filename,label'"),
        (("a.png",), {"mean": (0.5, 0.5)}, "mean has 2 numbers; RGB images take one, or 3"),
        (("a.png",), {"std": (1.0, 0.0, 1.0)}, "std must not hold a zero"),
        (("a.png",), {"size": (8,)}, "size has to be [height, width], got [8]"),
    ],
)
def test_a_folder_that_cannot_serve_is_one_sentence(tmp_path, files, params, reason):
    (tmp_path / "images").mkdir()
    for name in files:
        picture(tmp_path / "images" / name)
    if "labels" in params:
        (tmp_path / "l.csv").write_text(params["labels"])
        params = {"labels": tmp_path / "l.csv"}
    with pytest.raises(InputError) as refused:
        load_data(images=tmp_path / "images", **params)
    assert reason in str(refused.value)


def test_images_of_different_sizes_and_broken_ones_are_named(tmp_path):
    picture(tmp_path / "a.png", (6, 4))
    picture(tmp_path / "b.png", (5, 4))
    with pytest.raises(InputError, match=r"b\.png has shape \(3, 4, 5\), a\.png \(3, 4, 6\)"):
        load_data(images=tmp_path)
    (tmp_path / "b.png").write_text("no image")
    with pytest.raises(InputError, match=r"b\.png cannot be read as an image"):
        load_data(images=tmp_path)


def test_exactly_one_source_is_taken(tmp_path):
    with pytest.raises(InputError, match="takes one of path, images and factory, got none"):
        load_data()
    with pytest.raises(InputError, match="got path and images"):
        load_data(path=tmp_path, images=tmp_path)
    with pytest.raises(InputError, match="`labels` goes with `images`"):
        load_data(path=tmp_path, labels=tmp_path)


def member(shape, data=b"", descr="<f4"):
    """An array file that claims a shape."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (63 - (len(text) + 10) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + data


@pytest.mark.parametrize(
    "content",
    [
        member((2**40, 4), bytes(100)),
        member((2**70,)),
        member((-4, 4), bytes(64)),
        member((20,), bytes(10)),
        member((2,), bytes(16), "|O"),
        member("(" * 500 + ")" * 500),
        b"hello",
        b"",
    ],
    ids=["2**40 rows", "2**70 rows", "negative", "cut off", "objects", "deep", "no array", "empty"],
)
def test_an_npz_whose_header_lies_is_told_in_a_line(tmp_path, content):
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("x.npy", content)
    with pytest.raises(InputError) as caught:
        load_data(path=tmp_path / "d.npz")
    assert str(caught.value).startswith(str(tmp_path / "d.npz"))
    assert "\n" not in str(caught.value)


def test_samples_may_lie_along_another_axis_and_a_number_is_every_sample_s(tmp_path):
    state = np.arange(24.0).reshape(2, 4, 3)
    np.savez(tmp_path / "d.npz", x=np.ones((4, 5)), state=state, rate=np.int64(16000))
    with pytest.raises(InputError, match=r"'state' has 2 samples.*say data.batch_axis=\{state: AXIS\}"):
        load_data(path=tmp_path / "d.npz")
    found = load_data(path=tmp_path / "d.npz", batch_axis={"state": 1}, limit=2).arrays
    assert {name: array.shape for name, array in found.items()} == {"x": (2, 5), "state": (2, 2, 3), "rate": (2,)}
    np.testing.assert_array_equal(found["state"][0], state[:, 0])
    assert found["rate"].tolist() == [16000, 16000]
    with pytest.raises(InputError, match=r"batch_axis: .*holds no array 'stat', only rate, state, x"):
        load_data(path=tmp_path / "d.npz", batch_axis={"stat": 1})
    with pytest.raises(InputError, match=r"'x' has the shape \(4, 5\), so no axis 2"):
        load_data(path=tmp_path / "d.npz", batch_axis={"state": 1, "x": 2})


def test_text_is_taken_as_numpy_has_it_or_as_objects(tmp_path, monkeypatch):
    np.savez(tmp_path / "d.npz", words=np.array(["one", "three"]))
    assert load_data(path=tmp_path / "d.npz").arrays["words"].tolist() == ["one", "three"]
    (tmp_path / "texts.py").write_text(
        "import numpy as np\ndef load(split):\n    return {'words': np.array(['one', 'three'], object)}\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_data(factory="texts:load").arrays["words"].tolist() == ["one", "three"]
