from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qpipe.cache.cleanup import collect
from qpipe.cache.store import Store
from qpipe.cli.cache_commands import COMMANDS, cache_command
from qpipe.cli.completion import complete
from qpipe.errors import CacheError, ConfigError
from qpipe.run.sweep import Job
from tests.inprocess import carry_out, job, keys
from tests.toy import Toy

STAGES: dict[str, Any] = {
    "one": {"uses": "toy_number", "value": 1.0},
    "two": {"uses": "toy_add", "scores": "one", "amount": 1},
    "three": {"uses": "toy_add", "scores": "two", "amount": 1},
}


@pytest.fixture
def done(toy_stages: Toy) -> Job:
    """A pipeline of three nodes, run."""
    one = job(toy_stages.folder, STAGES)
    assert carry_out(one)[0] == 0
    return one


def cache(one: Job, *words: str) -> int:
    function, rest = cache_command(words)
    assert rest == []
    return function([one])


def store_of(one: Job) -> Store:
    return Store(Path(str(one.spec.cache_dir)))


def last_used(one: Job, seconds_ago: dict[str, float]) -> None:
    """Make the results of nodes look as if they had been used that long ago."""
    for name, ago in seconds_ago.items():
        key = keys(one)[name]
        path = store_of(one).root / "actions" / key[:2] / f"{key}.json"
        os.utime(path, (time.time() - ago, time.time() - ago))


def test_ls_names_every_result_and_marks_the_pinned(done: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert cache(done, "pin", "two") == 0
    assert cache(done, "ls") == 0
    out = capsys.readouterr().out
    for name, key in keys(done).items():
        (line,) = [line for line in out.splitlines() if line.startswith(key[:16])]
        assert line.endswith("pinned") == (name == "two")
    assert "3 results and 0 sub-results" in out


def test_du_counts_own_and_shared_bytes(toy_stages: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    same = {"a": {"uses": "toy_number", "value": 5.0}, "b": {"uses": "toy_add", "scores": "a", "amount": 0}}
    one = job(toy_stages.folder, same)
    assert carry_out(one)[0] == 0
    store_of(one).put(bytes(3_000_000))
    assert cache(one, "du") == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
    (size,) = (size for _, size in store_of(one).blobs() if size < 3_000_000)
    assert rows["toy_number"] == ["1", "0", "B", str(size), "B"]  # both made the same
    assert rows["Scores"] == ["2", str(size), "B", "0", "B"]
    assert rows["3.0"][:2] == ["MB", "in"]  # the total: a blob that no result needs counts


def test_gc_keeps_to_max_size_and_takes_what_was_not_used_for_longest(done: Job, toy_stages: Toy) -> None:
    last_used(done, {"one": 300, "two": 100, "three": 200})
    before = keys(done)
    with store_of(done) as store:
        everything = collect(store).left_bytes
        removed = collect(store, max_bytes=everything - 1)
        assert removed.results == 1
        assert store.peek(before["one"]) is None
        assert store.peek(before["two"]) is not None
        removed = collect(store, max_bytes=removed.left_bytes - 1)
        assert store.peek(before["three"]) is None
        assert list(store.keys()) == [before["two"]]
        assert collect(store, max_bytes=0).left_bytes == 0
        assert list(store.blobs()) == []


def test_a_hit_counts_as_use(done: Job) -> None:
    last_used(done, {"one": 300, "two": 200, "three": 100})
    assert carry_out(done)[1].records[0]["totals"]["hit"] == 3
    store = store_of(done)
    assert all(store.age_s(key) < 60 for key in list(store.keys()))


def test_a_sub_result_that_is_read_counts_as_used(toy_stages: Toy) -> None:
    stages = {"one": STAGES["one"], "slow": {"uses": "toy_add", "scores": "one", "seconds": 0.2}}
    one = job(toy_stages.folder, stages)
    assert carry_out(one)[0] == 0
    store = store_of(one)
    for path in (store.root / "actions").glob("*/*"):
        os.utime(path, (1, 1))
    assert cache(one, "rm", "slow") == 0
    toy_stages.calls()
    assert carry_out(one)[0] == 0
    assert toy_stages.calls() == ["add"]  # its two ticks came from the cache
    assert all(store.age_s(key) < 60 for key in list(store.keys()))


def test_a_run_ends_within_max_size(done: Job, toy_stages: Toy) -> None:
    last_used(done, {"one": 300, "two": 300, "three": 300})
    other = job(toy_stages.folder, {"other": {"uses": "toy_number", "value": 9.0}}, cache={"max_size": "1kB"})
    status, watch = carry_out(other)
    assert status == 0
    assert keys(done) == {}
    assert len(list(store_of(other).keys())) <= 1
    assert any("cache.max_size: 3 results" in text or "4 results" in text for text in watch.messages)


def test_gc_says_when_pins_keep_it_above_the_limit(done: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert cache(done, "pin", str(done.folder)) == 0
    limited = job(done.folder.parent, STAGES, cache={"max_size": 0})
    assert cache(limited, "gc") == 0
    assert "above cache.max_size" in capsys.readouterr().out
    assert len(keys(done)) == 3
    with pytest.raises(CacheError, match="pinned"):
        cache(done, "rm", "one")
    assert cache(done, "unpin", str(done.folder)) == 0
    assert cache(limited, "gc") == 0
    assert keys(done) == {}
    with pytest.raises(CacheError, match="is not in the cache any more"):
        cache(done, "pin", str(done.folder))


def test_rm_takes_nodes_beginnings_of_keys_and_stages(done: Job) -> None:
    assert cache(done, "rm", "three", keys(done)["one"][:10]) == 0
    assert len(list(store_of(done).keys())) == 1
    assert carry_out(done)[0] == 0
    assert cache(done, "rm", "--stage", "toy_add") == 0
    assert set(keys(done)) == {"one"}
    assert len(list(store_of(done).blobs())) == 1  # what only they needed went along
    assert cache(done, "rm", "--stage=toy_number") == 0
    assert list(store_of(done).keys()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"names no command. Say `qpipe cache ls\|du"),
        (["pipeline=ptq"], "names no command"),
        (["veryfy"], "no command 'veryfy'. Did you mean 'verify'"),
        (["ls", "one"], "cache ls: takes nothing, got one"),
        (["rm"], r"cache rm: takes NODE\|KEY…\|--stage STAGE, got nothing"),
        (["rm", "tow"], "'tow': no node and no key. Did you mean 'two'"),
        (["rm", "abcdef"], "no node and no key"),
        (["rm", "--stage", "toy_ad"], "no result of a stage 'toy_ad'. Did you mean 'toy_add'"),
        (["rm", "--stage"], "no result of a stage ''"),
        (["pin", "nowhere"], "'nowhere': no node and no key"),
    ],
)
def test_mistakes_are_told(done: Job, words: Sequence[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cache(done, *words)


def test_overrides_go_on_to_hydra() -> None:
    _, rest = cache_command(["rm", "two", "--stage", "toy_add", "--config-dir", "x", "pipeline=toy", "~model"])
    assert rest == ["--config-dir", "x", "pipeline=toy", "~model"]


def test_commands_complete(done: Job) -> None:
    assert complete({"COMP_LINE": "qpipe cache "}) == (list(COMMANDS), False)
    assert complete({"COMP_LINE": "qpipe cache ve"}) == (["verify"], False)
    line = {"COMP_LINE": "qpipe cache gc sche", "COMP_POINT": "19"}
    assert complete(line) == ([], True)
    assert line == {"COMP_LINE": "qpipe sche", "COMP_POINT": "10"}


def test_verify_moves_damage_aside_and_the_next_run_heals(done: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert cache(done, "verify") == 0
    store = store_of(done)
    damaged, deleted = (store.peek(keys(done)[name]) for name in ("one", "two"))
    assert damaged is not None
    assert deleted is not None
    (first,), (second,) = damaged["blobs"], deleted["blobs"]
    path = store.root / "blobs" / first[:2] / first
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    (store.root / "blobs" / second[:2] / second).unlink()
    (store.root / "blobs" / "stray").mkdir()
    (store.root / "blobs" / "stray" / "file").write_text("x")
    assert cache(done, "verify") == 1
    out = capsys.readouterr().out
    assert "does not match its digest" in out
    assert out.count("of its blobs are missing") == 2
    assert "is no file of the cache" in out
    assert cache(done, "verify") == 0
    status, watch = carry_out(done)
    assert (status, watch.records[0]["totals"]["ran"]) == (0, 2)
    assert cache(done, "verify") == 0


def test_the_command_line_ends_with_the_status_of_verify(toy: Toy) -> None:
    toy.pipeline(STAGES)
    assert toy.run().returncode == 0
    (blob, *_) = (toy.folder / "cache" / "blobs").glob("*/*")
    blob.chmod(0o644)
    blob.write_bytes(b"other")
    run = toy.run("cache", "verify")
    assert run.returncode == 1
    assert "does not match" in run.stdout
    assert "Traceback" not in run.stderr


_RUNNER = """
import sys
from pathlib import Path
from tests.inprocess import carry_out, job
folder, name, first = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for i in range(first, first + 12):
    stages = {f"n{k}": {"uses": "toy_number", "value": float(i % 5 + k)} for k in range(3)}
    for k in range(3):
        stages[f"a{k}"] = {"uses": "toy_add", "scores": f"n{k}", "amount": i % 3, "seconds": 0.1}
    stages["total"] = {"uses": "toy_total", "scores": ["a0", "a1", "a2"]}
    stages["out"] = {"uses": "toy_files", "scores": "total"}
    status, watch = carry_out(job(folder, stages, f"{name}/{i}", run={"workers": int(sys.argv[4])}))
    wanted = sum(float(i % 5 + k) + i % 3 for k in range(3))
    score = watch.records[0]["nodes"]["total"]["scores"]["score"]
    said = [text for text in watch.messages if "waiting" not in text]
    text = (folder / name / str(i) / "out" / "score.txt").read_text()
    assert (status, score, float(text), said, watch.failures) == (0, wanted, wanted, [], []), watch.__dict__
"""


@pytest.mark.slow
def test_gc_in_a_loop_that_takes_all_it_may_breaks_no_running_job(toy: Toy) -> None:
    path = os.pathsep.join([toy.environment["PYTHONPATH"], str(Path(__file__).parents[2])])
    environment = toy.environment | {"PYTHONPATH": path}
    runners = [
        subprocess.Popen(
            [sys.executable, "-c", _RUNNER, toy.folder, f"runs{i}", str(i), str(workers)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, workers in enumerate((0, 1))
    ]
    store, rounds, results = Store(toy.folder / "cache"), 0, 0
    while any(runner.poll() is None for runner in runners):
        removed = collect(store, max_bytes=0)
        rounds, results = rounds + 1, results + removed.results
        time.sleep(0.002)
    for runner in runners:
        assert runner.communicate()[1] == ""
        assert runner.returncode == 0
    print(f"{rounds} cleanups took {results} results beside 24 runs")
    assert rounds > 50
    assert results > 50
    assert collect(store, max_bytes=0).left_bytes == 0
    assert [path.name for path in (store.root / "running").iterdir()] == ["guard"]
