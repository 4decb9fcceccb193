"""A cache that somebody else can write to: whatever lies in it, a run ends with the right results.

Each attack changes a cache that is warm. Then the same pipeline must end well, what it makes must be right, nothing may
block, nothing may be run, and nothing outside of the cache may change. After one `verify`, the cache is clean.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qpipe.artifacts.artifact import Artifact, load, save
from qpipe.artifacts.kinds import Samples, canonical_json
from qpipe.cache.audit import verify
from qpipe.cache.cleanup import collect
from qpipe.cache.store import Store, sealed
from qpipe.cli.cache_commands import COMMANDS, cache_command
from qpipe.errors import DamagedError
from qpipe.keys.hashing import digest_bytes
from qpipe.run.sweep import Job
from tests.inprocess import carry_out, job, keys
from tests.toy import Toy, in_this_process

pytestmark = pytest.mark.timeout(60)  # what blocks fails

STAGES: dict[str, Any] = {
    "one": {"uses": "toy_number", "value": 2.0},
    "slow": {"uses": "toy_add", "scores": "one", "seconds": 0.1},
    "out": {"uses": "toy_files", "scores": "slow"},
}


@dataclass(frozen=True)
class Warm:
    """The toy plug-in in this process, and a cache in its folder where all of `STAGES` hits."""

    toy: Toy
    keys: dict[str, str]


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    toy = Toy(tmp_path_factory.mktemp("warm"))
    with in_this_process(toy), pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOY_TICK_S", "0")
        one = job(toy.folder, STAGES)
        assert carry_out(one)[0] == 0
        yield Warm(toy, keys(one))


class Scene:
    """A copy of the warm cache, and a folder beside it that must stay as it is."""

    def __init__(self, folder: Path, warm: Warm) -> None:
        self.outside = folder / "outside"
        self.outside.mkdir()
        (self.outside / "secret").write_text("secret")
        (self.outside / "folder").mkdir()
        self.job: Job = job(folder, STAGES)
        self.folder = folder
        self.root = folder / "cache"
        self.marker = folder / "executed"
        shutil.copytree(warm.toy.folder / "cache", self.root)
        self.keys = warm.keys
        self.toy = warm.toy
        self.toy.calls()
        self.before: dict[str, tuple[int, bytes]] = {}

    def action(self, node: str) -> Path:
        return self.root / "actions" / self.keys[node][:2] / f"{self.keys[node]}.json"

    def result(self, node: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.action(node).read_bytes())["result"]
        return found

    def blob(self, node: str) -> Path:
        name = next(iter(self.result(node)["outputs"].values()))["digest"]
        return self.root / "blobs" / name[:2] / name

    def publish(self, node: str, result: dict[str, Any]) -> None:
        """Put a made-up result into the place of a node's, sealed as it has to be."""
        replace(self.action(node), sealed(self.keys[node], result))

    def add_blob(self, content: bytes) -> str:
        name = digest_bytes(content)
        path = self.root / "blobs" / name[:2] / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return name

    def look_outside(self) -> dict[str, tuple[int, bytes]]:
        return {
            str(path.relative_to(self.outside)): (
                path.lstat().st_mode,
                path.read_bytes() if path.is_file() else b"",
            )
            for path in sorted(self.outside.rglob("*"))
        }


@pytest.fixture
def scene(tmp_path: Path, warm: Warm) -> Scene:
    return Scene(tmp_path, warm)


def replace(path: Path, content: bytes) -> None:
    remove(path)
    path.write_bytes(content)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def survive(scene: Scene, files: bool = True) -> None:
    """The run ends well and right, every command ends in its own words, and the cache is clean again.

    Without `files`, those of the run are not held against what they should be."""
    before = scene.look_outside()
    store = Store(scene.root)
    status, watch = carry_out(scene.job)
    assert (status, watch.failures) == (0, []), watch.messages
    record = watch.records[-1]
    assert record["nodes"]["slow"]["scores"]["score"] == 3.0
    if files:
        assert (scene.job.folder / "out" / "score.txt").read_text() == "3.0"
    for name in ("ls", "du", "gc", "pin"):
        assert cache_command([name])[0]([scene.job]) == 0
    verify(store)
    assert verify(store).problems == ()
    collect(store, max_bytes=0)
    assert list(store.blobs()) == []
    status, watch = carry_out(scene.job)
    assert (status, watch.records[-1]["nodes"]["slow"]["scores"]["score"]) == (0, 3.0)
    assert verify(store).problems == ()
    assert scene.look_outside() == before
    assert not scene.marker.exists()
    assert set(COMMANDS) >= {"ls", "du", "gc", "pin"}


class Malicious:
    """Unpickled, it leaves a marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def pipe(path: Path, scene: Scene) -> None:
    os.mkfifo(path)


def device(path: Path, scene: Scene) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # /dev/zero: it never ends
        os.close(os.open(path, os.O_RDONLY))
    except PermissionError as error:
        pytest.skip(f"no device can be made here: {error}")


def listener(path: Path, scene: Scene) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is at most 108 bytes long
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("s")
        os.rename("s", path.name)
    finally:
        os.chdir(here)


def folder(path: Path, scene: Scene) -> None:
    path.mkdir()
    (path / "file").write_text("x")


def link_to_file(path: Path, scene: Scene) -> None:
    path.symlink_to(scene.outside / "secret")


def link_to_folder(path: Path, scene: Scene) -> None:
    path.symlink_to(scene.outside / "folder")


def link_to_nothing(path: Path, scene: Scene) -> None:
    path.symlink_to(scene.outside / "nothing" / "there")


def link_to_itself(path: Path, scene: Scene) -> None:
    path.symlink_to(path)


def link_to_zero(path: Path, scene: Scene) -> None:
    path.symlink_to("/dev/zero")


def pickled(path: Path, scene: Scene) -> None:
    path.write_bytes(pickle.dumps(Malicious(scene.marker)))


def immense(path: Path, scene: Scene) -> None:
    with open(path, "wb") as file:
        for power in (60, 50, 43):  # as large as this file system lets a file without content be
            with contextlib.suppress(OSError):
                file.truncate(1 << power)
                return


def deep(path: Path, scene: Scene) -> None:
    path.write_bytes(b"[" * 100_000)


def empty(path: Path, scene: Scene) -> None:
    path.write_bytes(b"")


SHAPES = [
    pipe, device, listener, folder, link_to_file, link_to_folder, link_to_nothing, link_to_itself, link_to_zero,
    pickled, immense, deep, empty,
]  # fmt: skip
Shape = Callable[[Path, Scene], None]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("node", ["one", "slow", "out"])
def test_anything_in_the_place_of_a_blob_is_a_miss(scene: Scene, shape: Shape, node: str) -> None:
    path = scene.blob(node)
    remove(path)
    shape(path, scene)
    survive(scene)


@pytest.mark.parametrize("shape", SHAPES)
def test_anything_in_the_place_of_a_result_is_a_miss(scene: Scene, shape: Shape) -> None:
    path = scene.action("slow")
    remove(path)
    shape(path, scene)
    survive(scene)


@pytest.mark.parametrize("shape", [pipe, link_to_file, link_to_folder, link_to_itself, empty])
@pytest.mark.parametrize(
    "place", ["blobs", "actions", "tmp", "locks", "running", "index", "pins", "damaged", "shelves", "guard", "cache.db"]
)
def test_anything_in_the_place_of_a_folder_of_the_cache(scene: Scene, shape: Shape, place: str) -> None:
    """What lay there is gone, and in its place a way out."""
    places = {
        "shelves": [*(scene.root / "blobs").iterdir(), *(scene.root / "actions").iterdir()],
        "guard": [scene.root / "running" / "guard"],
        "cache.db": [scene.root / "index" / "cache.db"],
    }
    for path in places.get(place, [scene.root / place]):
        path.parent.mkdir(exist_ok=True)
        remove(path)
        shape(path, scene)
    survive(scene)


@pytest.mark.parametrize("place", ["blobs", "actions", "shelves", "tmp", "locks"])
def test_folders_that_were_moved_out_and_linked_to_are_not_written_to(scene: Scene, place: str) -> None:
    """What lay there still lies there, outside, reached through a link: it may be read, and is left as it is."""
    shelves = [*(scene.root / "blobs").iterdir(), *(scene.root / "actions").iterdir()]
    for path in shelves if place == "shelves" else [scene.root / place]:
        target = scene.outside / f"{path.parent.name}-{path.name}"
        shutil.move(path, target)
        path.symlink_to(target)
    remove(scene.blob("out") if place in ("tmp", "locks") else scene.root / "index")  # something has to run
    survive(scene)


@pytest.mark.parametrize("shape", SHAPES)
def test_anything_in_the_place_of_a_lock(scene: Scene, shape: Shape) -> None:
    lock = scene.root / "locks" / scene.keys["slow"][:2] / f"{scene.keys['slow']}.lock"
    remove(scene.action("slow"))
    remove(lock)
    lock.parent.mkdir(parents=True, exist_ok=True)
    shape(lock, scene)
    survive(scene)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("place", ["running", "tmp", "pins", "damaged"])
def test_anything_among_the_small_files(scene: Scene, shape: Shape, place: str) -> None:
    path = scene.root / place / ("a" * 32)
    path.parent.mkdir(exist_ok=True)
    shape(path, scene)
    os.utime(path, (1, 1), follow_symlinks=False)
    survive(scene)


def _output(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda result: next(iter(result["outputs"].values())).update(changes)


@pytest.mark.parametrize(
    "change",
    [
        _output(size_bytes=10**18),
        _output(size_bytes=-1),
        _output(kind="Model"),
        _output(kind="os.system"),
        _output(digest="../../outside/secret"),
        _output(digest="a" * 64),
        _output(more="than there is"),
        lambda result: result["blobs"].update({"b" * 64: 10**18}),
        lambda result: result["blobs"].update({"../../outside/secret": 6}),
        lambda result: result.update(blobs=dict.fromkeys(result["blobs"], 10**18)),
        lambda result: result.update(outputs={}),
        lambda result: result.update(outputs={"other": next(iter(result["outputs"].values()))}),
        lambda result: result.update(outputs={"../../x": next(iter(result["outputs"].values()))}),
        lambda result: result.pop("provenance"),
        lambda result: result.pop("ingredients"),
        lambda result: result.update(provenance=[]),
        lambda result: result.update(ingredients="toy_add"),
        lambda result: result["ingredients"].update(libraries=[1], params="x", ports=None),
        lambda result: result["provenance"].update(duration_s="long"),
        lambda result: result["provenance"].update(duration_s=float("nan")),
        lambda result: result["provenance"].update(duration_s=10**400),
        lambda result: result["provenance"].update(started={}, cpu_s=None),
        lambda result: result["provenance"].update(written=7, listings=7, makers=7),
        lambda result: result.update(notes=7),
        lambda result: result.update(notes=[{}]),
        lambda result: result.update(parts=["../../outside/secret"]),
        lambda result: result.update(parts=7),
    ],
)
@pytest.mark.parametrize("forgotten", [False, True])
def test_a_result_that_was_made_up_and_sealed_is_a_miss(
    scene: Scene, change: Callable[[dict[str, Any]], None], forgotten: bool
) -> None:
    """`forgotten`: without its index, too, so that everything is told from the results."""
    for node in ("one", "slow"):
        result = scene.result(node)
        change(result)
        scene.publish(node, result)
    if forgotten:
        shutil.rmtree(scene.root / "index")
    survive(scene)


def _root(kind: str, meta: Any, blobs: dict[str, Any] | None = None) -> bytes:
    return canonical_json({"format": 1, "kind": kind, "meta": meta, "blobs": blobs or {}})


DEEP = b'{"blobs":{},"format":1,"kind":"Scores","meta":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001
NO_ROOTS = {
    "pickle": pickle.dumps({"score": 1.0}),
    "nothing": b"",
    "deep": DEEP,
    "digits": b'{"blobs":{},"format":1,"kind":"Scores","meta":{"score":' + b"9" * 10_000 + b"}}",
    "list": b"[1, 2]",
    "no meta": b'{"blobs":{},"format":1,"kind":"Scores"}',
    "number": _root("Scores", 7),
    "format": b'{"blobs":{},"format":99,"kind":"Scores","meta":{}}',
    "kind": _root("Pickle", {}),
    "other kind": _root("Files", {"names": []}),
    "climbing": _root("Files", {"names": ["../../climb"]}, {"../../climb": [digest_bytes(b"x"), 1]}),
    "absolute": _root("Files", {"names": ["/tmp/climb"]}, {"/tmp/climb": [digest_bytes(b"x"), 1]}),
    "immense": _root("Files", {"names": ["a"]}, {"a": [digest_bytes(b"x"), 10**18]}),
    "unnamed": _root("Files", {"names": ["a", "b"]}, {"a": [digest_bytes(b"x"), 1]}),
}
TAKEN = {("out", "other kind"), ("out", "immense")}
"""Where that is an artifact of the kind that the node makes: nothing tells it from one that the stage made."""


@pytest.mark.parametrize("name", NO_ROOTS)
@pytest.mark.parametrize("node", ["one", "slow", "out"])
def test_a_result_whose_blob_is_not_what_it_says_is_a_miss(scene: Scene, name: str, node: str) -> None:
    """The digest is right, the seal is right, the result is complete; its content is not an artifact of that kind."""
    content = NO_ROOTS[name]
    result = scene.result(node)
    result["blobs"] = {scene.add_blob(content): len(content), scene.add_blob(b"x"): 1}
    next(iter(result["outputs"].values())).update(digest=digest_bytes(content), size_bytes=len(content))
    scene.publish(node, result)
    survive(scene, files=(node, name) not in TAKEN)


@pytest.mark.parametrize("name", ["deep", "number", "other kind", "pickle"])
def test_a_sub_result_that_was_made_up_is_a_miss(scene: Scene, name: str) -> None:
    store = Store(scene.root)
    (part,) = scene.result("slow")["parts"]
    result = store.peek(part)
    assert result is not None
    content = NO_ROOTS[name]
    for kind in ("Statistics", "Scores", "Files"):
        result["blobs"] = {scene.add_blob(content): len(content)}
        result["outputs"]["result"].update(kind=kind, digest=digest_bytes(content), size_bytes=len(content))
        replace(scene.root / "actions" / part[:2] / f"{part}.json", sealed(part, result))
        remove(scene.action("slow"))
        scene.toy.calls()
        assert carry_out(scene.job)[0] == 0
        assert "tick" in scene.toy.calls()
        scene.toy.calls()
        remove(scene.action("slow"))
        assert carry_out(scene.job)[0] == 0
        assert "tick" not in scene.toy.calls()  # it is healed
    survive(scene)


# the content of blobs: right digests, made-up bytes


def publish_by_hand(store: Store, kind: str, meta: Any, blobs: dict[str, bytes]) -> Artifact:
    named = {name: [store.put(content), len(content)] for name, content in blobs.items()}
    root = _root(kind, meta, named)
    return Artifact(kind, store.put(root), len(root))


ARRAY = {"dtype": "<f4", "shape": [2]}


@pytest.mark.parametrize(
    ("kind", "arrays", "content"),
    [
        ("Samples", {"x": ARRAY | {"shape": [10**18]}}, bytes(8)),
        ("Samples", {"x": ARRAY | {"shape": [-5, -7]}}, bytes(8)),
        ("Samples", {"x": ARRAY | {"shape": "x"}}, bytes(8)),
        ("Samples", {"x": ARRAY | {"dtype": "O"}}, pickle.dumps(1) * 8),
        ("Samples", {"x": ARRAY | {"dtype": "os.system"}}, bytes(8)),
        ("Samples", {"x": ARRAY | {"dtype": "<f4,(1000000,1000000)f8"}}, bytes(8)),
        ("Samples", {"x": ARRAY}, bytes(7)),
        ("Samples", {"x": ARRAY, "y": ARRAY}, bytes(8)),
        ("Samples", [], bytes(8)),
        ("Statistics", {"x": ARRAY | {"dtype": "O"}}, pickle.dumps(1) * 8),
    ],
)
def test_arrays_that_were_made_up_are_damage(tmp_path: Path, kind: str, arrays: Any, content: bytes) -> None:
    store = Store(tmp_path)
    meta = {"arrays": arrays, "labels": None, "values": {}}
    artifact = publish_by_hand(store, kind, meta, {"array/x": content})
    with pytest.raises(DamagedError, match=r"cannot be read|names no blob"):
        load(artifact, store)


def _graph(change: Callable[[onnx.ModelProto], None]) -> bytes:
    node = onnx.helper.make_node("Add", ["x", "w"], ["y"], name="add")
    value = onnx.helper.make_tensor_value_info
    weight = onnx.numpy_helper.from_array(np.zeros(4, np.float32), "w")
    graph = onnx.helper.make_graph(
        [node], "g", [value("x", 1, ["batch", 4])], [value("y", 1, ["batch", 4])], [weight]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    change(model)
    return bytes(model.SerializeToString())


def _external(tensor: onnx.TensorProto, location: str) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    tensor.external_data.add(key="location", value=location)


def _constant_from_file(model: onnx.ModelProto) -> None:
    tensor = onnx.numpy_helper.from_array(np.zeros(4, np.float32), "c")
    _external(tensor, "/etc/passwd")
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["c"], value=tensor, name="constant"))


GRIDS = {"y": {"bitwidth": 8, "signed": False, "symmetric": False, "axis": None, "block_size": None, "frozen": False}}


@pytest.mark.parametrize(
    ("graph", "encodings"),
    [
        (b"\x80\x04\x95", None),
        (b"\xff" * 1000, None),
        (b"", None),
        (_graph(lambda model: _external(model.graph.initializer[0], "../../../../etc/passwd")), None),
        (_graph(_constant_from_file), None),
        (_graph(lambda model: None), struct.pack("<Q", 1 << 60) + b"{}"),
        (_graph(lambda model: None), struct.pack("<Q", 100_000) + b"[" * 100_000),
        (_graph(lambda model: None), b""),
        (
            _graph(lambda model: None),
            struct.pack("<Q", 74) + b'{"y.scale":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}}  ',
        ),
    ],
)
def test_models_that_were_made_up_are_damage(tmp_path: Path, graph: bytes, encodings: bytes | None) -> None:
    store = Store(tmp_path)
    meta = {"format": 1, "metadata": {}, "encodings": GRIDS if encodings is not None else {}}
    blobs = {"graph": graph} | ({} if encodings is None else {"encodings": encodings})
    artifact = publish_by_hand(store, "Model", meta, blobs)
    with pytest.raises(DamagedError, match=r"cannot be read|names no blob"):
        load(artifact, store)


def test_a_good_model_made_by_hand_is_read(tmp_path: Path) -> None:
    """What the test above changes is the only thing wrong with its models."""
    store = Store(tmp_path)
    blobs = {"graph": _graph(lambda model: None)}
    artifact = publish_by_hand(store, "Model", {"format": 1, "metadata": {}, "encodings": {}}, blobs)
    assert load(artifact, store).param("w").shape == (4,)


def test_a_root_of_absurd_size_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    artifact = save(Samples({"x": np.zeros((3, 1))}), store)
    monkeypatch.setattr("qpipe.artifacts.artifact.ROOT_LIMIT", 10)
    with pytest.raises(DamagedError, match="too large"):
        load(artifact, store)
    with pytest.raises(ValueError, match="keep large values as arrays"):
        save(Samples({"x": np.ones((3, 1))}), store)
