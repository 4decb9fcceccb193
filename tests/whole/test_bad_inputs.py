"""What a user gets wrong outside the config: one clear line, the right exit status, and nothing left behind."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.nursery import Nursery
from tests.once import once

METRICS = """
def fails(outputs, labels):
    raise ValueError("the labels are upside down")

def text(outputs, labels):
    return "good"

def share(outputs, labels):
    return float((outputs.argmax(1) == labels).mean())
"""


def net(path: Path, *, extra: str | None = None, domain: str = "") -> Path:
    """A small classifier of 3x8x8 images, with one more node of type `extra` where asked."""
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.normal(size=(4, 3, 3, 3)).astype(np.float32), "conv.weight")
    head = numpy_helper.from_array(rng.normal(size=(5, 4)).astype(np.float32), "head.weight")
    nodes = [
        helper.make_node("Conv", ["image", "conv.weight"], ["features"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["features"], ["active"], name="relu"),
        helper.make_node("GlobalAveragePool", ["active"], ["pooled"], name="pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], name="flatten"),
        helper.make_node("Gemm", ["flat", "head.weight"], ["last"], name="head", transB=1),
    ]
    last = "last"
    if extra:
        nodes.append(helper.make_node(extra, ["last"], ["odd"], name="odd_one", domain=domain))
        last = "odd"
    nodes.append(helper.make_node("Identity", [last], ["logits"], name="out"))
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 5])],
        [weight, head],
    )
    opsets = [helper.make_opsetid("", 21)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def samples(path: Path, count: int = 16, **arrays: np.ndarray) -> Path:
    rng = np.random.default_rng(1)
    image = rng.normal(size=(count, 3, 8, 8)).astype(np.float32)
    np.savez(path, **({"image": image, "labels": np.arange(count) % 5} | arrays))  # type: ignore[arg-type]
    return path


FINE = ("goal.metric=metrics:share", "goal.max_drop=1")


class Bench:
    """A folder with a model, data and metrics that are fine; a test spoils one of them."""

    def __init__(self, folder: Path, nursery: Nursery | None = None) -> None:
        self.folder = folder
        self._nursery = nursery
        self.model = net(folder / "net.onnx")
        self.calibration = samples(folder / "calibration.npz")
        self.evaluation = samples(folder / "evaluation.npz", 20)
        (folder / "metrics.py").write_text(METRICS)

    def run(self, *overrides: str, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
        words = [
            "pipeline=ptq", "model=onnx_file", "model.path=net.onnx", "data=npz",
            "data.calibration=calibration.npz", "data.evaluation=evaluation.npz", "run.workers=1", "run.threads=1",
            "run.measure=false",
            *overrides,
        ]  # fmt: skip
        environment = os.environ | {"QPIPE_CACHE_DIR": str(cache or self.folder / "cache")}
        if self._nursery is not None:
            return self._nursery.run(self.folder, words, environment, 240)
        command = [sys.executable, "-m", "qpipe", *words]
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=240
        )


@pytest.fixture
def cold(tmp_path: Path) -> Bench:
    """A bench whose cache is empty, and whose runs begin in a fresh interpreter."""
    return Bench(tmp_path)


def run_to_its_end(folder: Path) -> None:
    run = Bench(folder).run(*FINE)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture(scope="session")
def warm_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of a bench on which everything is fine, and ran."""
    return once(tmp_path_factory, "bench", run_to_its_end) / "cache"


@pytest.fixture
def bench(tmp_path: Path, warm_cache: Path, nursery: Nursery) -> Bench:
    """A bench that ran while everything was fine: what a test does not spoil is not computed again."""
    shutil.copytree(warm_cache, tmp_path / "cache")
    return Bench(tmp_path, nursery)


def message(run: subprocess.CompletedProcess[str]) -> str:
    """The lines that tell of the failure; no traceback anywhere."""
    told = run.stdout + run.stderr
    assert "Traceback" not in told
    if run.returncode == 2:
        assert len([line for line in told.splitlines() if line.startswith(("failed", "qpipe:"))]) == 1, told
        assert not run.stdout
    return told


def assert_one_line(run: subprocess.CompletedProcess[str], words: str) -> None:
    """The cache's trouble is told once, not by every node that meets it."""
    told = [line for line in message(run).splitlines() if words in line]
    assert len(told) == 1, told
    assert told[0].startswith("qpipe: ")


def assert_nothing_left(bench: Bench) -> None:
    assert not (bench.folder / "outputs").exists()


def test_the_bench_itself_is_fine(bench: Bench) -> None:
    run = bench.run(*FINE, "run.expect=cached")
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_missing_file(bench: Bench) -> None:
    bench.model.unlink()
    run = bench.run()
    assert run.returncode == 2
    assert run.stderr.strip().splitlines() == [
        "qpipe: stages.source.path: no file or folder at 'net.onnx'. Give the path of an existing one."
    ]
    assert_nothing_left(bench)


@pytest.mark.parametrize("content", [b"", b"not a model at all", b"\x08\x0a" * 50])
def test_a_corrupt_onnx_file(bench: Bench, content: bytes) -> None:
    bench.model.write_bytes(content)
    run = bench.run()
    assert run.returncode == 2, message(run)
    assert "net.onnx" in message(run)
    assert_nothing_left(bench)


def test_a_truncated_onnx_file(cold: Bench) -> None:
    cold.model.write_bytes(cold.model.read_bytes()[:-40])
    run = cold.run()
    assert run.returncode == 2, message(run)
    assert_nothing_left(cold)


@pytest.mark.parametrize(("op", "domain"), [("Mystery", "my.domain"), ("Bernoulli", "")])
def test_an_unsupported_operator_is_named_with_its_node(bench: Bench, op: str, domain: str) -> None:
    net(bench.model, extra=op, domain=domain)
    run = bench.run()
    assert run.returncode == 2, message(run)
    assert "odd_one" in message(run)
    assert op in message(run)
    assert_nothing_left(bench)


MANY_PROBLEMS = """<ir_version: 10, opset_import: ["": 21, "my.domain": 1]>
net (float[batch,3,8,8] image, string[batch] title, float4e2m1[4] code, int64 count) => (float[batch,3] logits) {
    [pool] pooled = GlobalAveragePool(image)
    [flatten] last = Flatten(pooled)
    [mystery] odd = my.domain.Mystery(last)
    [noise] noisy = RandomNormalLike(odd)
    [narrow] small = Cast<to=22>(noisy)
    [words] parts = StringNormalizer(title)
    [noisier] drawn = Bernoulli(odd)
    [new] bits = BitCast(odd)
    [maybe] held = Optional(small)
    [loop] logits = Loop(count, , last) <body = step (int64 i, bool c, float[batch,3] a)
        => (bool d, float[batch,3] b) { d = Identity(c)  b = Relu(a) }>
}"""


MANY_REASONS = """\
- input 'code': it holds float4e2m1, which torch cannot compute with. Give the model in float32.
- node 'noise' (op RandomNormalLike, domain ai.onnx): it draws random numbers. Export the model in eval mode.
- node 'noisier' (op Bernoulli, domain ai.onnx): it draws random numbers. Export the model in eval mode.
- node 'new' (op BitCast, domain ai.onnx): there is no such operator. Export the model again.""".splitlines()


def test_a_model_with_many_problems_is_told_all_of_them_at_once(cold: Bench) -> None:
    onnx.save(onnx.parser.parse_model(MANY_PROBLEMS), cold.model)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = cold.run()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run.returncode == 2
    told = message(run)
    problems = [line.strip() for line in told.splitlines() if line.startswith("          - ")]
    assert problems == MANY_REASONS
    assert "The model has 4 parts that cannot be taken:" in told
    # Processor time, since other tests may be at work: of the run and of the worker that reads the model.
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 10
    assert_nothing_left(cold)


@pytest.mark.parametrize(
    ("spoiled", "words"),
    [
        ({"image": np.zeros((16, 3, 9, 8), np.float32)}, "9"),
        ({"image": np.zeros((16, 3, 8), np.float32)}, "image"),
        ({"image": np.zeros((16, 3, 8, 8), np.int64)}, "int64"),
        ({"image": np.full((16, 3, 8, 8), np.nan, np.float32)}, "holds NaN, first in sample 0"),
        ({"image": np.zeros((0, 3, 8, 8), np.float32), "labels": np.zeros(0, int)}, "empty"),
        ({"labels": np.zeros(3, int)}, "array 'labels' has 3 samples, 'image' has"),
    ],
    ids=["shape", "rank", "dtype", "nan", "empty", "lengths"],
)
@pytest.mark.parametrize("which", ["calibration", "evaluation"])
def test_spoiled_data(bench: Bench, which: str, spoiled: dict[str, np.ndarray], words: str) -> None:
    samples(getattr(bench, which), **spoiled)
    run = bench.run()
    assert run.returncode == 2, message(run)
    assert words in message(run)
    assert_nothing_left(bench)


def test_data_under_another_name(bench: Bench) -> None:
    image = np.zeros((16, 3, 8, 8), np.float32)
    np.savez(bench.calibration, picture=image)
    run = bench.run()
    assert run.returncode == 2
    assert "picture" in message(run)
    assert "image" in message(run)


def test_pickled_data_is_not_read(cold: Bench) -> None:
    np.savez(cold.calibration, image=np.array([{"a": 1}], dtype=object))
    run = cold.run()
    assert run.returncode == 2
    assert_nothing_left(cold)


def test_missing_labels(cold: Bench) -> None:
    np.savez(cold.evaluation, image=np.zeros((4, 3, 8, 8), np.float32))
    run = cold.run()
    assert run.returncode == 2
    assert "labels" in message(run)


@pytest.mark.parametrize(
    ("function", "words"), [("fails", "ValueError: the labels are upside down"), ("text", "metrics:text")]
)
def test_an_evaluation_callable_that_does_not_serve(bench: Bench, function: str, words: str) -> None:
    run = bench.run(f"goal.metric=metrics:{function}")
    assert run.returncode == 1
    assert words in message(run)
    assert "score" in message(run)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 300 KB; skipped where mounting is not permitted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder], capture_output=True
    ).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk(cold: Bench, small_disk: Path) -> None:
    samples(cold.calibration, 2000)
    run = cold.run(cache=small_disk / "cache")
    assert run.returncode == 1
    assert_one_line(run, "has no room left")
    assert_nothing_left(cold)
    assert not list((small_disk / "cache").glob("tmp/*"))


def test_a_disk_that_is_full_before_the_record_is_written(bench: Bench, small_disk: Path) -> None:
    bench.run(f"hydra.run.dir={bench.folder / 'fine'}")
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "full").write_bytes(b"x" * (free - 40_000))  # enough for the files of Hydra and of the export
    run = bench.run(f"hydra.run.dir={small_disk / 'run'}")
    assert run.returncode == 1
    assert_one_line(run, "record.json' cannot be written: No space left on device")
    assert not [path for path in (small_disk / "run").rglob("*") if path.is_file()]


def test_a_read_only_cache(cold: Bench, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    run = cold.run(cache=small_disk / "cache")
    assert run.returncode == 1
    assert_one_line(run, "cannot be written")
    assert_nothing_left(cold)
