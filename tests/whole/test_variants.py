"""Many variants of a large model: `benchmarks/variants.py` on a smaller one, where the same ratios must hold."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from qpipe.artifacts.artifact import load, save
from qpipe.artifacts.kinds import Files, Samples
from qpipe.cache.store import Store
from qpipe.keys.hashing import digest_bytes
from qpipe.mapped import let_go, mapping_behind

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "variants.py"


@pytest.fixture
def variants() -> ModuleType:
    """The benchmark as a module."""
    spec = importlib.util.spec_from_file_location("variants", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident sets are read from /proc")
def test_24_variants_take_little_more_than_one_model_on_disk_and_in_memory(
    variants: ModuleType, tmp_path: Path
) -> None:
    """Beyond what Python and the libraries take, which a small model cannot be held against."""
    bare = variants.measure(tmp_path / "bare", 1_000_000, 1)
    found = variants.measure(tmp_path / "full", 100_000_000, 24)
    one = found["model_bytes"]
    assert one == pytest.approx(100_000_000, rel=0.05)
    assert found["disk_bytes"] <= 1.3 * one
    assert found["one_disk_bytes"] <= 1.01 * one
    for part, models in (("import", 1.5), ("variants", 0.75)):
        for what in ("process", "sum"):
            name = f"{part}_{what}_bytes"
            assert found[name] - bare[name] <= models * one, name


def resident_bytes() -> int:
    """Of mapped files, those in memory (tmpfs) too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssFile", "RssShmem")))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident sets are read from /proc")
def test_hashing_and_putting_a_mapped_file_leave_no_pages_behind(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(np.random.default_rng(0).bytes(50_000_000))
    store = Store(tmp_path / "cache")
    view = Files({"file": tmp_path / "file"}).read("file")
    before = resident_bytes()
    name = digest_bytes(view)
    assert resident_bytes() - before < 10_000_000
    assert store.put(view) == name
    blob = store.open(name)
    assert resident_bytes() - before < 10_000_000
    assert blob == view
    assert resident_bytes() - before > 90_000_000
    for each in (blob, view):
        let_go(each)
    assert resident_bytes() - before < 10_000_000
    assert blob == view


def test_a_value_that_is_passed_on_is_neither_hashed_nor_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = {"a": np.random.default_rng(0).standard_normal((500, 100)), "b": np.arange(100_000.0)}
    artifact = save(Samples({"a": arrays["a"], "b": arrays["b"].reshape(500, -1)}), Store(tmp_path))
    store = Store(tmp_path)
    loaded = load(artifact, store)
    hashed: list[int] = []

    def count(buffer: memoryview) -> str:
        hashed.append(memoryview(buffer).nbytes)
        return digest_bytes(buffer)

    monkeypatch.setattr("qpipe.cache.store.digest_bytes", count)
    written: list[object] = []
    monkeypatch.setattr(Store, "write", lambda *arguments: written.append(arguments))
    assert save(loaded, store) == artifact
    assert all(size < 1000 for size in hashed)  # the root alone
    assert written == []


def test_a_part_of_a_mapped_blob_or_its_numbers_in_another_order_are_hashed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    numbers = np.arange(100_000, dtype="<i4")
    name = store.put(numbers.data)
    found = np.frombuffer(store.open(name), "<i4")
    assert store.put(found.data) == name
    for other in (found[:50_000], found[1:], found[::-1].copy(), found.reshape(100, 1000).T.copy(), found.copy()):
        assert store.put(np.ascontiguousarray(other).data) == digest_bytes(np.ascontiguousarray(other).tobytes())
    with pytest.raises(TypeError):  # not contiguous: no plain bytes
        store.put(found[::-1].data)


def test_memory_that_can_be_written_to_is_never_let_go_of() -> None:
    import mmap

    with mmap.mmap(-1, 1 << 16) as anonymous:
        anonymous[:5] = b"hello"
        assert mapping_behind(memoryview(anonymous)) is None
        let_go(anonymous)
        assert anonymous[:5] == b"hello"
