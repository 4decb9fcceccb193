from __future__ import annotations

import contextlib
import json
import random
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from qpipe.artifacts.artifact import Artifact, load, save
from qpipe.artifacts.kinds import Files, Scores, canonical_json
from qpipe.cache.archive import Exported, Imported, export, import_archive
from qpipe.cache.audit import verify
from qpipe.cache.store import Store, sealed
from qpipe.cli.cache_commands import cache_command
from qpipe.errors import CacheError, InputError
from qpipe.keys.hashing import digest, digest_bytes
from tests.inprocess import carry_out, job
from tests.toy import Toy

CONTENT = random.Random(0).randbytes(9_000_000)  # more than two chunks


def publish(store: Store, name: str, value: Files | Scores, **more: object) -> Artifact:
    artifact = save(value, store)
    output = {"kind": artifact.kind, "digest": artifact.digest, "size_bytes": artifact.size_bytes}
    store.publish(digest(name), {"outputs": {"output": output}, **more})
    return artifact


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store of four results: `whole` names `part` as its sub-result; `shared` has a blob in common with it."""
    store = Store(tmp_path / "cache")
    publish(store, "part", Scores({"score": 1.0}))
    publish(store, "whole", Files({"a": CONTENT, "b": b"small"}), parts=[digest("part"), digest("gone")])
    publish(store, "shared", Files({"b": b"small"}))
    publish(store, "other", Files({"c": b"other"}))
    return store


@pytest.fixture
def other(tmp_path: Path) -> Store:
    return Store(tmp_path / "elsewhere" / "cache")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_what_is_exported_comes_in_elsewhere_and_nothing_else(store: Store, other: Store, tmp_path: Path) -> None:
    file = tmp_path / "cache.zip"
    made = export(store, [digest("whole")], file)
    assert made == Exported(2, 4, file.stat().st_size)
    assert import_archive(other, file) == Imported(2, 0, 0)
    assert sorted(other.keys()) == sorted([digest("whole"), digest("part")])
    assert other.peek(digest("whole")) == store.peek(digest("whole"))
    result = other.peek(digest("whole"))
    assert result is not None
    assert load(Artifact(**result["outputs"]["output"]), other).read("a") == CONTENT
    assert verify(other).problems == ()
    assert import_archive(other, file) == Imported(0, 2, 0)


def test_the_same_results_make_the_same_bytes(store: Store, other: Store, tmp_path: Path) -> None:
    keys = [digest(name) for name in ("whole", "shared", "other")]
    export(store, keys, tmp_path / "a.zip")
    import_archive(other, tmp_path / "a.zip")
    time.sleep(0.01)
    export(other, keys[::-1], tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_an_export_that_fails_leaves_the_old_file_and_nothing_beside_it(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "cache.zip").write_bytes(b"old")
    (store.root / "blobs" / digest_bytes(b"other")[:2] / digest_bytes(b"other")).chmod(0o644)
    (store.root / "blobs" / digest_bytes(b"other")[:2] / digest_bytes(b"other")).write_bytes(b"OTHER")
    with pytest.raises(CacheError, match="does not match"):
        export(store, [digest("other")], folder / "cache.zip")
    assert files(folder) == {"cache.zip"}
    assert (folder / "cache.zip").read_bytes() == b"old"
    (folder / "file").write_text("no folder")
    with pytest.raises(CacheError, match="cannot be written"):
        export(store, [digest("part")], folder / "file" / "cache.zip")


def rewritten(source: Path, target: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    """The archive again, its contents changed; everything in it has the check sums of zip right."""
    with zipfile.ZipFile(source) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    change(contents)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)


def _result(change: Callable[[dict[str, object]], None]) -> Callable[[dict[str, bytes]], None]:
    """Change the result `shared`, and seal it again: whoever tampers can do that, too."""

    def apply(contents: dict[str, bytes]) -> None:
        name = f"actions/{digest('shared')}.json"
        result = json.loads(contents[name])["result"]
        change(result)
        contents[name] = sealed(digest("shared"), result)

    return apply


SMALL = f"blobs/{digest_bytes(b'small')}"


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        (lambda contents: contents.update({SMALL: b"SMALL"}), 1),
        (lambda contents: contents.update({SMALL: b"smaller"}), 1),
        (lambda contents: contents.pop(SMALL), 1),
        (lambda contents: contents.update({"../../climb": b"x", "/etc/x": b"x", "blobs/../x": b"x"}), 3),
        (lambda contents: contents.update({"blobs/" + "A" * 64: b"x", "blobs/" + "a" * 64 + "/": b""}), 2),
        (lambda contents: contents.update({f"actions/{digest('shared')}.json": b"\x80\x04\x95"}), 1),
        (lambda contents: contents.update({f"actions/{digest('shared')}.json": b"[" * 100_000}), 1),
        (lambda contents: contents.update({f"actions/{digest('x')}.json": b"{}"}), 1),
        (_result(lambda result: result.update(blobs={**result["blobs"], "a" * 64: 10**18})), 1),  # type: ignore[dict-item]
        (_result(lambda result: result.update(blobs={**result["blobs"], digest_bytes(b"other"): 5})), 1),  # type: ignore[dict-item]
        (_result(lambda result: result["outputs"]["output"].update(size_bytes=1)), 1),  # type: ignore[index]
        (_result(lambda result: result["outputs"]["output"].update(kind="Model")), 1),  # type: ignore[index]
        (_result(lambda result: result.update(outputs={"../x": result["outputs"]["output"]})), 1),  # type: ignore[index]
    ],
)
def test_what_does_not_fit_is_passed_over_and_the_rest_comes_in(
    store: Store, other: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    change: Callable[[dict[str, bytes]], None], refused: int,
) -> None:  # fmt: skip
    export(store, [digest("shared"), digest("other")], tmp_path / "good.zip")
    rewritten(tmp_path / "good.zip", tmp_path / "bad.zip", change)
    before = files(tmp_path)
    found = import_archive(other, tmp_path / "bad.zip")
    assert found.refused == refused == caplog.text.count("passed over")
    assert other.peek(digest("other")) is not None
    assert verify(other).problems == ()
    assert all(name.startswith("elsewhere/cache/") for name in files(tmp_path) - before)
    assert not [path for path in other.root.rglob("*") if path.is_file() and path.stat().st_mode & 0o111]


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_compressed_entries_are_refused_so_that_none_unfolds(
    store: Store, other: Store, tmp_path: Path, method: int
) -> None:
    export(store, [digest("shared")], tmp_path / "good.zip")
    with zipfile.ZipFile(tmp_path / "good.zip", "a", method) as archive:
        archive.writestr(f"blobs/{digest_bytes(bytes(50_000_000))}", bytes(50_000_000))
    assert (tmp_path / "good.zip").stat().st_size < 200_000
    assert import_archive(other, tmp_path / "good.zip") == Imported(1, 0, 1)
    assert sum(size for _, size in other.blobs()) < 10_000


def test_a_size_that_is_made_up_is_not_believed(store: Store, other: Store, tmp_path: Path) -> None:
    export(store, [digest("shared")], tmp_path / "good.zip")
    content = (tmp_path / "good.zip").read_bytes()
    start = content.rindex(SMALL.encode()) - 46  # its entry in the directory at the end
    assert content[start : start + 4] == b"PK\x01\x02"
    for offset in (20, 24):  # both sizes
        content = content[: start + offset] + b"\xf0\xff\xff\x7f" + content[start + offset + 4 :]
    (tmp_path / "bad.zip").write_bytes(content)
    assert import_archive(other, tmp_path / "bad.zip") == Imported(0, 0, 2)


@pytest.mark.parametrize("damage", ["text", "cut", "empty", "foreign", "format"])
def test_what_is_no_archive_of_ours_is_one_sentence(store: Store, other: Store, tmp_path: Path, damage: str) -> None:
    file = tmp_path / "file.zip"
    export(store, [digest("shared")], file)
    content = file.read_bytes()
    broken = {"text": b"hello", "cut": content[:-30], "empty": b""}
    if damage in broken:
        file.write_bytes(broken[damage])
    else:
        with zipfile.ZipFile(file, "w") as archive:
            if damage == "format":
                archive.writestr("qpipe-cache.json", '{"format": 2}')
            archive.writestr("x.pkl", b"\x80\x04\x95")
    with pytest.raises(InputError, match="is not an archive that `qpipe cache export` wrote"):
        import_archive(other, file)
    assert not other.root.exists()


def test_a_missing_file_is_one_sentence(other: Store, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file"):
        import_archive(other, tmp_path / "nothing.zip")


def test_random_damage_never_breaks_in(store: Store, other: Store, tmp_path: Path) -> None:
    """100 archives with a few flipped bytes: each a sentence or an import, and what came in is right."""
    file, chance, came = tmp_path / "file.zip", random.Random(1), 0
    export(store, [digest("shared"), digest("other"), digest("part")], file)
    good = file.read_bytes()
    for _ in range(100):
        damaged = bytearray(good)
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        file.write_bytes(damaged)
        with contextlib.suppress(InputError):
            came += import_archive(other, file).results
        for key in list(other.keys()):
            assert other.peek(key) == store.peek(key)
        assert verify(other).problems == ()
        shutil.rmtree(other.root, ignore_errors=True)
        other.close()
        other._prepared = False
    assert 30 < came < 300


def test_a_pipeline_moves_with_its_cache(toy_stages: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = {
        "one": {"uses": "toy_number", "value": 2.0},
        "slow": {"uses": "toy_add", "scores": "one", "seconds": 0.2},
        "out": {"uses": "toy_files", "scores": "slow"},
    }
    here, there = job(tmp_path / "here", stages), job(tmp_path / "there", stages)
    assert carry_out(here)[0] == 0
    assert carry_out(job(tmp_path / "here", {"unrelated": {"uses": "toy_number", "value": 7.0}}))[0] == 0
    file = str(tmp_path / "ci.zip")
    assert cache_command(["export", file])[0]([here]) == 0
    assert cache_command(["import", file])[0]([there]) == 0
    assert "5 results came in, 0 were there already, 0 entries were passed over" in capsys.readouterr().out
    toy_stages.calls()
    assert carry_out(there)[1].records[0]["totals"]["hit"] == 3
    assert cache_command(["rm", "slow"])[0]([there]) == 0
    assert carry_out(there)[0] == 0
    assert toy_stages.calls() == ["add"]  # its sub-results came along; `out` is cut off early
    capsys.readouterr()
    changed = job(tmp_path / "there", {**stages, "one": {"uses": "toy_number", "value": 3.0}})
    assert cache_command(["export", file])[0]([changed]) == 0
    assert "not in the cache, and so not in the archive: one, out, slow" in capsys.readouterr().out


def test_canonical_results_are_what_an_archive_holds(store: Store, tmp_path: Path) -> None:
    export(store, [digest("part")], tmp_path / "file.zip")
    with zipfile.ZipFile(tmp_path / "file.zip") as archive:
        assert archive.namelist()[0] == "qpipe-cache.json"
        content = archive.read(f"actions/{digest('part')}.json")
        assert canonical_json(json.loads(content)) == content
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
