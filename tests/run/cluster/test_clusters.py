"""Runs on real clusters of this machine: the same results, each action once, and what happens when a part dies."""

from __future__ import annotations

import json
import signal
import subprocess
from collections import Counter
from typing import Any

import pytest

from tests.run.cluster.clusters import dask_cluster, until
from tests.toy import Toy

GRID = {
    "a": {"uses": "toy_number", "value": 1},
    "b": {"uses": "toy_add", "scores": "a", "amount": 1},
    "c": {"uses": "toy_add", "scores": "b", "amount": 10},
    "d": {"uses": "toy_add", "scores": "c", "amount": 100},
    "e": {"uses": "toy_add", "scores": "b", "amount": "${stages.d.amount}"},
    "f": {"uses": "toy_number", "value": 1},
}
WORDS = ("-m", "stages.b.amount=1,2", "stages.c.amount=10,20,30", "stages.d.amount=100,200,300,400")
LONG = {"a": {"uses": "toy_number"}, "b": {"uses": "toy_add", "scores": "a", "seconds": 3}}


def trials(toy: Toy) -> list[dict[str, Any]]:
    """Of every trial of the last sweep the keys and outputs of its nodes."""
    folder = max(toy.folder.glob("outputs/*/*-sweep"), key=lambda path: path.stat().st_mtime_ns)
    records = [json.loads((folder / str(number) / "record.json").read_text()) for number in range(24)]
    return [
        {name: (node["key"], node["outputs"]) for name, node in record["nodes"].items()} for record in records
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("run", "library"), [("dask", "distributed"), ("ray", "ray")])
def test_a_sweep_runs_each_action_once_and_gives_what_this_machine_gives(toy: Toy, run: str, library: str) -> None:
    pytest.importorskip(library)
    toy.pipeline(GRID)
    here = toy.run(*WORDS, "run.workers=0", f"cache.dir={toy.folder}/other")
    assert here.returncode == 0, here.stderr
    expected = trials(toy)
    assert sum(Counter(toy.calls()).values()) == 41
    there = toy.run(*WORDS, f"run={run}")
    assert there.returncode == 0, there.stderr
    assert sum(Counter(toy.calls()).values()) == 41
    assert trials(toy) == expected


def start(toy: Toy, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        toy.command("run", *words),
        env=toy.environment,
        cwd=toy.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ticks(toy: Toy) -> int:
    return toy.log.read_text().split().count("tick") if toy.log.exists() else 0


@pytest.mark.slow
def test_what_a_lost_worker_did_is_gone_on_with_and_a_lost_scheduler_is_one_line(toy: Toy) -> None:
    toy.pipeline(LONG)
    with dask_cluster(toy.folder / "dask", toy.environment, workers=2) as cluster:
        run = start(toy, "run=dask", f"run.address={cluster.address}")
        until(lambda: ticks(toy) > 3)
        cluster.at_work().send_signal(signal.SIGKILL)
        seen = ticks(toy)
        until(lambda: ticks(toy) > seen + 3)
        cluster.scheduler.send_signal(signal.SIGKILL)
        said, _ = run.communicate(timeout=60)
    assert run.returncode == 1, said
    assert said.count("run.address: the Dask scheduler at") == 1
    assert "Traceback" not in said
    assert toy.record()["status"] == "cluster_lost"
    run = start(toy, "run.workers=1")
    said, _ = run.communicate(timeout=120)
    assert run.returncode == 0, said
    assert 30 <= ticks(toy) <= 32, "a tick that was under way is made again"


@pytest.mark.slow
def test_workers_that_do_not_see_the_cache_go_through_the_remote_and_none_without_it(toy: Toy) -> None:
    """One on a machine of its own, as far as files go: another folder lies where the cache is."""
    toy.pipeline(LONG)
    assert toy.run("run", "targets=[a]", "run.workers=0").returncode == 0
    toy.calls()
    far = toy.folder / "far"
    with dask_cluster(toy.folder / "dask", toy.environment, workers=0) as cluster:
        if not cluster.start_far_worker(toy.folder / "cache", far):
            pytest.skip("no mount namespaces here")
        cluster.wait(1)
        words = ("run=dask", f"run.address={cluster.address}", "stages.b.seconds=0.2")
        refused = toy.run("run", *words)
        assert refused.returncode == 2
        assert "does not see the cache" in refused.stderr.splitlines()[-1]
        words = (*words, f"cache.remote={toy.folder}/share")
        for calls in (["add", "tick", "tick"], []):
            done = toy.run("run", *words)
            assert done.returncode == 0, done.stderr
            assert toy.calls() == calls, "what this machine had made was lent"
    assert len(list(far.glob("blobs/*/*"))) >= 2
    assert len(list((toy.folder / "share").glob("actions/*/*.json"))) == 4
