"""Machines on one shared cache, each a real command line with a cache folder of its own."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.nursery import Nursery
from tests.s3_server import Server
from tests.toy import Toy

STEPS = {
    "one": {"uses": "toy_number", "value": 3},
    "two": {"uses": "toy_add", "scores": "one", "seconds": 0.5},
    "three": {"uses": "toy_add", "scores": "one", "amount": 5, "seconds": 0.5},
    "four": {"uses": "toy_total", "scores": ["two", "three"]},
    "five": {"uses": "toy_files", "scores": "four"},
}
LIBRARIES = ("torch", "onnx", "onnxruntime", "networkx", "fsspec", "s3fs", "boto3")


Machines = Callable[..., list[Toy]]


@pytest.fixture
def machines(tmp_path: Path, nursery: Nursery) -> Machines:
    """Makes machines of these names, with a cache each and one log of all calls."""

    def make(*names: str) -> list[Toy]:
        toys = [Toy(tmp_path / name, nursery) for name in names]
        for toy in toys:
            toy.log = tmp_path / "calls.log"
            toy.environment = {**os.environ, **toy.environment, "TOY_LOG": str(toy.log)}
            toy.pipeline(STEPS)
        return toys

    return make


def start(toy: Toy, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        toy.command("run", *arguments),
        env=toy.environment,
        cwd=toy.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def verdicts(toy: Toy) -> list[str]:
    return [node["verdict"] for node in toy.record()["nodes"].values()]


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.slow)])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a cache that machines share."""
    found = request.getfixturevalue("moto") if request.param == "s3" else f"file://{tmp_path}/share"
    return str(found)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


def test_two_machines_cold_at_once_run_every_action_once_in_all(
    machines: Machines, tmp_path: Path, shared: str
) -> None:
    toys = machines("a", "b")
    runs = [start(toy, f"cache.remote={shared}", "run.workers=2") for toy in toys]
    outputs = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    calls = Counter(toys[0].calls())
    assert {name: calls[name] for name in ("number", "add", "total", "files")} == {
        "number": 1,
        "add": 2,
        "total": 1,
        "files": 1,
    }
    assert sorted(verdicts(toys[0]) + verdicts(toys[1])) == ["hit"] * 5 + ["ran"] * 5
    outputs_of = [{name: node["outputs"] for name, node in toy.record()["nodes"].items()} for toy in toys]
    assert outputs_of[0] == outputs_of[1]
    third = machines("c")[0]
    assert third.run("run", f"cache.remote={shared}").returncode == 0
    assert verdicts(third) == ["hit"] * 5
    assert not list((tmp_path / "share").rglob("leases/*/*"))


def test_when_the_holder_is_killed_another_machine_goes_on_where_it_was(machines: Machines, shared: str) -> None:
    first, second = machines("a", "b")
    for toy in (first, second):
        toy.pipeline({"slow": {"uses": "toy_add", "scores": "one", "seconds": 4}, "one": STEPS["one"]})
    options = (f"cache.remote={shared}", "cache.remote_lease_s=2", "run.workers=1")
    holder = start(first, *options)
    _wait_for(first.log, "tick", 15)
    waiter = start(second, *options)
    time.sleep(1.0)
    holder.kill()
    holder.communicate()
    output = waiter.communicate(timeout=120)[0]
    assert waiter.returncode == 0, output
    calls = Counter(second.calls())
    assert calls["number"] == 1
    assert calls["add"] == 2  # once in vain
    assert 40 <= calls["tick"] <= 46  # the sub-results that were published before the kill are not done again
    assert "another process computes it; waiting" in output


def _wait_for(log: Path, name: str, count: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if log.exists() and log.read_text().split().count(name) >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"{name} was not called {count} times")


def test_a_machine_that_has_nothing_hits_everything_and_loads_nothing_heavy(
    machines: Machines, shared: str
) -> None:
    first, second = machines("a", "b")
    assert first.run("run", f"cache.remote={shared}").returncode == 0
    first.calls()
    plan = second.run("plan", f"cache.remote={shared}", "run.expect=cached")
    assert plan.returncode == 0, plan.stdout + plan.stderr
    assert not list((second.folder / "cache").rglob("blobs/*/*"))
    second.environment["PYTHONPROFILEIMPORTTIME"] = "1"
    done = second.run("run", f"cache.remote={shared}", "run.expect=cached", fresh=True)
    assert done.returncode == 0, done.stderr
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    unwanted = LIBRARIES if shared.startswith("file:") else LIBRARIES[:4]
    assert "qpipe.cache.shared.tier" in loaded
    assert not loaded & set(unwanted)
    assert second.calls() == []
    assert list((second.folder / "outputs").rglob("five/score.txt"))
    without = second.run("run", fresh=True)
    loaded = {line.rpartition("|")[2].strip() for line in without.stderr.splitlines()}
    assert "qpipe.cache.store" in loaded
    assert not loaded & {*LIBRARIES, "qpipe.cache.shared.tier", "qpipe.cache.shared.remote"}


def test_read_mode_takes_and_gives_nothing(machines: Machines, tmp_path: Path) -> None:
    first, second = machines("a", "b")
    url = f"file://{tmp_path}/share"
    first.run("run", f"cache.remote={url}")
    before = files_below(tmp_path / "share")
    options = (f"cache.remote={url}", "cache.remote_mode=read", "stages.four.uses=toy_total", "seed=1")
    changed = (*options, "stages.three.amount=6")
    done = second.run("run", *changed)
    assert done.returncode == 0, done.stderr
    assert sorted(verdicts(second)) == ["hit", "hit", "ran", "ran", "ran"]
    assert files_below(tmp_path / "share") == before
    assert first.run("run", *changed[1:], f"cache.remote={url}", "cache.remote_mode=off").returncode == 0
    assert sorted(verdicts(first)) == ["hit", "hit", "ran", "ran", "ran"]
    assert files_below(tmp_path / "share") == before


@pytest.mark.parametrize("word", ["hang", "flip", "denied"])
def test_a_bad_remote_costs_a_run_time_and_one_line(machines: Machines, server: Server, word: str) -> None:
    first, second = machines("a", "b")
    assert first.run("run", "cache.remote=s3://bucket/team").returncode == 0
    assert server.objects
    first.calls()
    if word == "flip":
        server.behaviour = lambda method, path: word if method == "GET" and "/blobs/" in path else ""
    else:
        server.behaviour = lambda method, path: word
    done = second.run("run", "cache.remote=s3://bucket/team", "cache.remote_timeout_s=1", "stages.two.amount=2")
    assert done.returncode == 0, done.stdout + done.stderr
    said = (done.stdout + done.stderr).count("from here on the local cache alone is used")
    assert said <= 1 if word == "flip" else said == 1
    assert "Traceback" not in done.stdout + done.stderr
    score = json.loads((next((second.folder / "outputs").rglob("five/score.txt"))).read_text())
    assert score == (3 + 2) + (3 + 5)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("bucket/prefix", "expected a URL"),
        ("s3://", "expected a URL"),
        ("file://share", "absolute path"),
        ("gopher://host/cache", "fsspec knows no protocol 'gopher'"),
        ("gs://bucket/cache", 'pip install "qpipe[gcs]"'),
        ("ftp://user:password@host/cache", "holds a password"),
        ("memory://cache", "Set run.workers=0"),
    ],
)
def test_what_can_never_be_a_remote_is_refused_before_anything_runs(
    machines: Machines, url: str, said: str
) -> None:
    (toy,) = machines("a")
    done = toy.run("run", f"cache.remote={url}")
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert toy.calls() == []
    assert not (toy.folder / "outputs").exists()


def test_the_local_cache_is_no_remote(machines: Machines) -> None:
    (toy,) = machines("a")
    done = toy.run("run", f"cache.remote={toy.folder}/cache")
    assert done.returncode == 2
    assert "is the local cache itself" in done.stderr


@pytest.mark.parametrize("option", ["remote_mode=sometimes", "remote_timeout_s=0", "remote_lease_s=-1"])
def test_options_of_the_remote_are_checked(machines: Machines, tmp_path: Path, option: str) -> None:
    (toy,) = machines("a")
    done = toy.run("plan", f"cache.remote=file://{tmp_path}/share", f"cache.{option}")
    assert done.returncode == 2
    assert done.stderr.startswith(f"qpipe: cache.{option.partition('=')[0]}")


def test_without_s3fs_the_way_out_is_one_line(machines: Machines, tmp_path: Path) -> None:
    (toy,) = machines("a")
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "import importlib.util\n"
        "found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, package=None: None if name == 's3fs' else found(name, package)\n"
    )
    toy.environment["PYTHONPATH"] = os.pathsep.join([str(hidden), toy.environment["PYTHONPATH"]])
    done = toy.run("run", "cache.remote=s3://bucket/cache", fresh=True)
    assert done.returncode == 2
    assert 'Install it: pip install "qpipe[s3]"' in done.stderr


def test_memory_serves_a_run_in_one_process(machines: Machines) -> None:
    (toy,) = machines("a")
    done = toy.run("run", "cache.remote=memory://cache", "run.workers=0")
    assert done.returncode == 0, done.stderr
    assert verdicts(toy) == ["ran"] * 5


def test_the_secret_is_in_no_record(machines: Machines, tmp_path: Path) -> None:
    (toy,) = machines("a")
    toy.environment["QPIPE_CACHE_SECRET"] = "a secret of sixteen bytes and more"
    assert toy.run("run", f"cache.remote=file://{tmp_path}/share").returncode == 0
    written = files_below(tmp_path)
    assert any(b'"signature"' in content for content in written.values())
    assert not any(b"a secret of sixteen" in content for content in written.values())


def test_what_a_run_asks_of_the_remote(machines: Machines, server: Server) -> None:
    first, second = machines("a", "b")
    stages = {"n0": {"uses": "toy_number", "value": 1}}
    stages |= {f"n{i}": {"uses": "toy_add", "scores": "n0", "amount": i} for i in range(1, 20)}
    for toy in (first, second):
        toy.pipeline(stages)
    options = ("cache.remote=s3://bucket/team", "run.workers=1")
    asked = []
    for toy in (first, first, second, second):
        server.asked.clear()
        assert toy.run("run", *options).returncode == 0
        asked.append(Counter(method for method, _ in server.asked))
    assert asked[0]["PUT"] <= 20 * 3 + 1  # a lease, a blob, a result
    assert asked[0]["GET"] <= 20 * 2 + 1  # is there a result: in the plan, and again under the lease
    assert asked[0]["DELETE"] == 20
    assert asked[1] == Counter()  # nothing to do: nothing is asked
    assert asked[2] == Counter(GET=40)  # a result and the score in it
    assert asked[3] == Counter()
