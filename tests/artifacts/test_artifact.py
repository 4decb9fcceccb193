from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qpipe.artifacts.artifact import KINDS, Artifact, kind_of, load, references, save
from qpipe.artifacts.kinds import Encodings, Files, Samples, Scores, Statistics, canonical_json
from qpipe.cache.store import Store
from qpipe.errors import DamagedError, InputError
from qpipe.keys.hashing import digest_bytes
from qpipe.numerics.grid import Encoding, same_grid


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def _encoding(*shape: int, axis: int | None = None, block_size: int | None = None) -> Encoding:
    scale = (np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape) + 1) / 8
    return Encoding(
        8, True, True, scale, np.zeros(shape, np.int32), axis, block_size, frozen=axis is not None
    )


VALUES: dict[str, Any] = {
    "Samples": Samples(
        {"x": np.ones((3, 2), np.float32), "ids": np.array([[1], [2], [3]])}, np.array([0, 1, 0])
    ),
    "Statistics": Statistics(
        {"gram": np.eye(3), "none": np.zeros((0, 4))}, {"count": 3, "list": [1, {"a": None}]}
    ),
    "Encodings": Encodings(
        {"y": _encoding(), "w": _encoding(4, axis=0), "v": _encoding(2, 3, axis=1, block_size=16)}
    ),
    "Scores": Scores({"score": 0.5, "metric": "top1", "per_class": [1.0, float("inf")]}),
    "Files": Files({"model.onnx": b"onnx", "sub/empty.bin": b""}),
}


@pytest.mark.parametrize("kind", VALUES)
def test_a_value_comes_back_as_it_was_and_saves_as_the_same_artifact(kind: str, store: Store) -> None:
    artifact = save(VALUES[kind], store)
    back = load(artifact, store)
    assert artifact.kind == kind == kind_of(back)
    assert save(back, store) == artifact
    assert canonical_json(back.pack()[0]) == canonical_json(VALUES[kind].pack()[0])
    for name, buffer in VALUES[kind].pack()[1].items():
        assert bytes(back.pack()[1][name]) == bytes(buffer)


GOLDEN = {
    "Samples": "6a64222c866377b11f48c685f989de9c50ff4c052d2298e91f0b4d92d46ed8a4",
    "Statistics": "a1c010ab46336f0fc80d2240a08e3aba835f7f2a08bf386c0558a494a271e56f",
    "Encodings": "27302d59662205373ba4d6b75283c74487f1931208fae4d417bb571e1b191e89",
    "Scores": "b0aa07d3782919a299a90052e106387c96d0faff12d66ad86f98190c8a0a1cc3",
    "Files": "ef0e50d548a6ba35ce20c80c6fe4d520dd50f40c00292165c6e4d6f3c239026c",
}


@pytest.mark.parametrize("kind", VALUES)
def test_the_wire_form_is_frozen(kind: str, store: Store) -> None:
    assert save(VALUES[kind], store).digest == GOLDEN[kind]


def test_a_model_is_an_artifact(store: Store) -> None:
    onnx_ir = pytest.importorskip("onnx_ir")
    from qpipe.model import Model

    text = """<ir_version: 10, opset_import: ["" : 21]>
    agraph (float[n, 4] x) => (float[n, 4] y) <float[4] b = {1, 2, 3, 4}> { y = Add(x, b) }"""
    model = Model.from_proto(onnx_ir.from_onnx_text(text))
    artifact = save(model, store)
    back = load(artifact, store)
    assert artifact.kind == "Model"
    assert save(back, store) == artifact
    assert np.array_equal(back.param("b"), [1, 2, 3, 4])


def test_arrays_come_back_as_read_only_views_of_the_store(store: Store) -> None:
    array = np.arange(1 << 18, dtype=np.float32).reshape(64, -1)
    back = load(save(Samples({"x": array}), store), store).arrays["x"]
    assert np.array_equal(back, array)
    assert back.dtype == array.dtype
    assert not back.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        back[0, 0] = 1
    with pytest.raises(ValueError, match="read-only"):
        Samples({"x": array}).arrays["x"][0, 0] = 1


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "uint16", "int64", "float16", "float64", "<U5", ">f4", "complex64"]
)
def test_dtypes_survive(dtype: str, store: Store) -> None:
    array = np.zeros((2, 3), dtype)
    back = load(save(Statistics({"x": array, "scalar": array[0, 0]}, {}), store), store).arrays
    assert back["x"].dtype == array.dtype.newbyteorder("<")
    assert back["x"].shape == (2, 3)
    assert back["scalar"].shape == ()


def test_bfloat16_survives_in_a_process_that_has_not_heard_of_it(store: Store) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    artifact = save(Statistics({"x": np.arange(3).astype(ml_dtypes.bfloat16)}, {}), store)
    program = (
        "import sys, pathlib\n"
        "from qpipe.cache.store import Store; from qpipe.artifacts.artifact import Artifact, load\n"
        "x = load(Artifact('Statistics', sys.argv[2], 0), Store(pathlib.Path(sys.argv[1]))).arrays['x']\n"
        "assert x.dtype.name == 'bfloat16' and x.astype(float).tolist() == [0, 1, 2]"
    )
    subprocess.run([sys.executable, "-c", program, store.root, artifact.digest], check=True)


def test_variants_that_share_a_tensor_share_its_blob(store: Store) -> None:
    weight = np.random.default_rng(0).random(100)
    one = save(Statistics({"w": weight, "b": np.zeros(1)}, {}), store)
    two = save(Statistics({"renamed": weight, "b": np.ones(1)}, {}), store)
    shared = set(references(store.open(one.digest))) & set(references(store.open(two.digest)))
    assert shared == {digest_bytes(weight.data)}


def test_size_counts_every_blob_once(store: Store) -> None:
    same = np.zeros(100)
    artifact = save(Statistics({"a": same, "b": same}, {}), store)
    assert (
        artifact.size_bytes
        == 800 + store.open(artifact.digest).nbytes
        == sum(size for _, size in store.blobs())
    )


def test_equal_content_has_one_name_whatever_the_order_and_the_process(store: Store) -> None:
    x, y = np.ones((2, 1)), np.zeros((2, 3))
    artifact = save(Samples({"x": x, "y": y}), store)
    assert save(Samples({"y": np.asfortranarray(y), "x": x.astype(">f8")}), store) == artifact
    assert save(Scores({"b": 1, "a": {"d": 1, "c": 2}}), store) == save(
        Scores({"a": {"c": 2, "d": 1}, "b": 1}), store
    )


@pytest.mark.parametrize(
    ("arrays", "labels", "said"),
    [
        ({}, None, "hold no input"),
        ({}, [1], "hold no input"),
        (
            {"x": np.ones((2, 3)), "y": np.ones((3, 3))},
            None,
            r"differ in their first dimension.*'x' \(2, 3\)",
        ),
        ({"x": np.ones((2, 3))}, [1, 2, 3], "differ in their first dimension"),
        ({"x": np.float32(1)}, None, "differ in their first dimension"),
        ({"x": np.ones((0, 3))}, None, "empty"),
        ({"x": [[1.0], [float("nan")]]}, None, "'x' holds a number that is not finite, first in sample 1"),
        ({"x": [[1.0], [1.0]]}, [0.0, float("-inf")], "'labels' holds a number that is not finite"),
        ({"x": np.array([{}, {}])}, None, "dtype object"),
    ],
)
def test_samples_that_cannot_be_used_are_refused_in_one_sentence(arrays: Any, labels: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        Samples(arrays, labels)
    assert "\n" not in str(caught.value)


def test_a_number_that_is_not_finite_is_found_in_any_place() -> None:
    array = np.ones((5000, 1000), np.float32)
    array[4321, 17] = np.inf
    with pytest.raises(InputError, match="sample 4321"):
        Samples({"x": array})


def test_samples_are_walked_in_batches() -> None:
    samples = Samples({"x": np.arange(10).reshape(5, 2), "y": np.arange(5)}, np.arange(5))
    assert len(samples) == 5
    assert [len(batch["y"]) for batch in samples.batches(2)] == [2, 2, 1]
    assert np.array_equal(np.concatenate([batch["x"] for batch in samples.batches(3)]), samples.arrays["x"])
    head = samples.head(2)
    assert len(head) == 2
    assert head.labels is not None
    assert head.labels.tolist() == [0, 1]
    assert len(samples.head(99)) == 5
    with pytest.raises(ValueError, match="at least one"):
        next(samples.batches(0))


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/", ".", "a\\b", "a\0b"]
)
def test_a_file_may_not_climb_out(name: str, store: Store) -> None:
    with pytest.raises(InputError, match="cannot name a file"):
        Files({name: b""})


def test_a_hostile_root_cannot_name_a_file_that_climbs_out(store: Store) -> None:
    blob = store.put(b"x")
    root = {"format": 1, "kind": "Files", "meta": {"names": ["../x"]}, "blobs": {"../x": [blob, 1]}}
    digest = store.put(canonical_json(root))
    with pytest.raises(DamagedError, match="cannot name a file"):
        load(Artifact("Files", digest, 0), store)


def test_files_are_taken_from_paths_and_written_to_a_folder(tmp_path: Path, store: Store) -> None:
    big = tmp_path / "big.bin"
    big.write_bytes(b"\x01" * 100_000)
    back = load(save(Files({"a/big.bin": big, "b.txt": b"text"}), store), store)
    back.write(tmp_path / "out")
    assert (tmp_path / "out/a/big.bin").read_bytes() == big.read_bytes()
    assert (tmp_path / "out/b.txt").read_bytes() == b"text"


@pytest.mark.parametrize(
    "root",
    [
        b"",
        b"not json",
        b"[]",
        b"null",
        b"[" * 100_000,
        b'{"format": 2, "kind": "Scores", "meta": {}, "blobs": {}}',
        b'{"format": 1, "kind": "Pickle", "meta": {}, "blobs": {}}',
        b'{"format": 1, "kind": ["Scores"], "meta": {}, "blobs": {}}',
        b'{"format": 1, "kind": "Scores", "blobs": {}}',
        b'{"format": 1, "kind": "Scores", "meta": {}, "blobs": {"x": "y"}}',
        b'{"format": 1, "kind": "Scores", "meta": {}, "blobs": {"x": ["../../etc/passwd", 1]}}',
        b'{"format": 1, "kind": "Scores", "meta": {}, "blobs": {"x": ["%s", -1]}}' % (b"a" * 64),
        b'{"format": 1, "kind": "Scores", "meta": {}, "blobs": {"x": ["%s", true]}}' % (b"a" * 64),
        b'{"format": 1, "kind": "Scores", "meta": {}, "blobs": {"x": ["%s", 1e300]}}' % (b"a" * 64),
    ],
)
def test_what_is_no_root_is_damage_and_not_a_crash(root: bytes, store: Store) -> None:
    digest = store.put(root)
    with pytest.raises(DamagedError, match="not the root of an artifact"):
        load(Artifact("Scores", digest, 0), store)
    with pytest.raises(DamagedError):
        references(root)


def test_an_artifact_of_another_kind_is_damage(store: Store) -> None:
    artifact = save(Scores({"score": 1.0}), store)
    with pytest.raises(DamagedError, match="is a Scores, not a Statistics"):
        load(Artifact("Statistics", artifact.digest, artifact.size_bytes), store)


def test_a_missing_blob_of_an_artifact_is_damage_that_names_it(store: Store) -> None:
    artifact = save(Samples({"x": np.ones((2, 2))}), store)
    blob = next(iter(references(store.open(artifact.digest))))
    (store.root / "blobs" / blob[:2] / blob).unlink()
    with pytest.raises(DamagedError) as caught:
        load(artifact, store)
    assert caught.value.digest == blob


def test_what_is_of_no_kind_or_no_json_is_a_type_error(store: Store) -> None:
    with pytest.raises(TypeError, match="ndarray is of no artifact kind"):
        save(np.zeros(3), store)
    with pytest.raises(TypeError, match="not JSON"):
        Scores({"score": object()})
    with pytest.raises(TypeError, match="not JSON"):
        Scores({"score": np.zeros(3)})
    with pytest.raises(TypeError, match="values by name"):
        Scores([1, 2])  # type: ignore[arg-type]  # what a stage might return by mistake


def test_scores_are_plain_json_from_the_start() -> None:
    scores = Scores({"score": np.float32(0.5), "flag": np.bool_(True), "pair": (1, 2)})
    assert json.dumps(scores.values) == '{"flag": true, "pair": [1, 2], "score": 0.5}'
    assert scores == Scores({"score": 0.5, "flag": True, "pair": [1, 2]})


def test_encodings_come_back_bit_for_bit(store: Store) -> None:
    back = load(save(VALUES["Encodings"], store), store).encodings
    for name, encoding in VALUES["Encodings"].encodings.items():
        assert same_grid(back[name], encoding)
        assert back[name].frozen == encoding.frozen


def test_scores_are_saved_and_loaded_without_numpy(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; import qpipe.artifacts.artifact as a\n"
        "from qpipe.artifacts.kinds import Scores; from qpipe.cache.store import Store\n"
        "store = Store(pathlib.Path(sys.argv[1])); a.load(a.save(Scores({'score': 1.0}), store), store)\n"
        "assert not {'numpy', 'torch', 'onnx', 'onnxruntime', 'diskcache'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path], check=True)
    assert set(KINDS) == {"Model", "Samples", "Statistics", "Encodings", "Scores", "Files"}
