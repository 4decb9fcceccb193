"""Real runs of the toy pipeline through the real command line: what runs, what hits, what a failure costs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from qpipe.run.machine import memory_gb
from tests.toy import FORMULA, SOURCE, Toy

CHAIN = {
    "a": {"uses": "toy_number", "value": 3},
    "b": {"uses": "toy_add", "scores": "a"},
    "c": {"uses": "toy_sign", "scores": "b"},
    "d": {"uses": "toy_add", "scores": "c"},
}


def verdicts(toy: Toy) -> dict[str, str]:
    return {name: node["verdict"] for name, node in toy.record()["nodes"].items()}


def test_the_second_run_is_all_hits_and_calls_nothing(toy: Toy) -> None:
    toy.pipeline(CHAIN)
    assert toy.run().returncode == 0
    assert toy.calls() == ["number", "add", "sign", "add"]
    first = toy.record()
    assert toy.run().returncode == 0
    assert toy.calls() == []
    assert set(verdicts(toy).values()) == {"hit"}
    again = toy.record()
    assert again["totals"]["hit"] == 4
    for name, node in first["nodes"].items():
        assert again["nodes"][name]["outputs"] == node["outputs"]
        assert again["nodes"][name]["original_duration_s"] == node["duration_s"]


def test_a_changed_param_reruns_its_descendants_up_to_the_early_cut_off(toy: Toy) -> None:
    toy.pipeline(CHAIN)
    toy.run()
    toy.calls()
    plan = toy.run("plan", "stages.b.amount=7")
    assert "param amount: 1 -> 7" in plan.stdout
    assert toy.calls() == []
    assert toy.run("run", "stages.b.amount=7").returncode == 0
    assert toy.calls() == ["add", "sign"]  # sign makes the same bytes, so d hits
    assert verdicts(toy) == {"a": "hit", "b": "ran", "c": "ran", "d": "hit"}
    assert toy.run().returncode == 0  # A -> B -> A
    assert toy.calls() == []


def test_a_renamed_node_and_shuffled_keys_hit(toy: Toy) -> None:
    toy.pipeline(CHAIN)
    toy.run()
    toy.calls()
    toy.pipeline(
        {
            "z": {"scores": "y", "uses": "toy_sign"},
            "y": {"scores": "x", "uses": "toy_add"},
            "x": {"value": 3, "uses": "toy_number"},
            "w": {"scores": "z", "uses": "toy_add"},
        }
    )
    assert toy.run().returncode == 0
    assert toy.calls() == []


def test_an_int_where_the_type_says_float_is_the_same_key(toy: Toy) -> None:
    toy.pipeline(CHAIN)
    toy.run()
    toy.calls()
    toy.run("run", "stages.a.value=3.0")
    assert toy.calls() == []


def test_a_comment_or_a_reformatted_file_hits_and_a_changed_formula_in_another_module_runs(toy: Toy) -> None:
    toy.pipeline(CHAIN)
    toy.run()
    toy.calls()
    stages = toy.folder / "plugin" / "toy_stages.py"
    stages.write_text(
        "# a comment\n"
        + SOURCE.replace('"""Adds."""', '"""Adds one to\n    the other."""').replace(
            'Scores({"score": value, "metric": "toy"})',
            "Scores(\n        {'score': value, 'metric': 'toy'},\n    )",
        )
    )
    toy.run()
    assert toy.calls() == []
    toy.formula.write_text(FORMULA.replace("a + b", "b + a + 0"))
    plan = toy.run("plan")
    assert "code changed" in plan.stdout
    toy.run()
    assert sorted(toy.calls()) == ["add", "add", "number", "sign"]
    toy.formula.write_text(FORMULA)
    toy.run()
    assert toy.calls() == []


def test_a_path_counts_by_its_content(toy: Toy) -> None:
    number = toy.folder / "number.txt"
    number.write_text("5")
    toy.pipeline({"r": {"uses": "toy_read", "path": "number.txt"}})
    toy.run()
    assert toy.calls() == ["read"]
    moved = toy.folder / "elsewhere.txt"
    number.rename(moved)
    toy.run("run", "stages.r.path=elsewhere.txt")
    assert toy.calls() == []
    moved.write_text("6")
    toy.run("run", "stages.r.path=elsewhere.txt")
    assert toy.calls() == ["read"]


def test_a_failure_stops_only_what_depends_on_it_and_is_not_cached(toy: Toy) -> None:
    toy.pipeline(
        {
            "a": {"uses": "toy_number"},
            "bad": {"uses": "toy_boom", "scores": "a"},
            "after": {"uses": "toy_add", "scores": "bad"},
            "good": {"uses": "toy_add", "scores": "a"},
        }
    )
    run = toy.run()
    assert run.returncode == 1
    assert verdicts(toy) == {"a": "ran", "bad": "failed", "after": "skipped", "good": "ran"}
    assert "RuntimeError: it went wrong" in run.stdout
    assert "Traceback" not in run.stdout + run.stderr
    assert "it went wrong" in toy.record()["nodes"]["bad"]["error"]["traceback"]
    toy.calls()
    assert toy.run().returncode == 1
    assert toy.calls() == ["boom"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stage_that_raises_is_told_with_the_line_of_the_persons_code_and_where_the_traceback_is(
    toy: Toy, workers: int
) -> None:
    source = (toy.folder / "plugin" / "toy_stages.py").read_text()
    line = source.splitlines().index('    raise RuntimeError("it went wrong")') + 1
    toy.pipeline({"a": {"uses": "toy_number"}, "bad": {"uses": "toy_boom", "scores": "a"}})
    run = toy.run("run", f"run.workers={workers}")
    place = f'at plugin/toy_stages.py:{line}, in boom: raise RuntimeError("it went wrong")'
    assert f"failed  bad: RuntimeError: it went wrong\n        {place}\n" in run.stderr
    record = toy.record()
    assert record["nodes"]["bad"]["error"]["message"] == f"RuntimeError: it went wrong\n{place}"
    shown = " ".join(run.stdout.split())
    assert f"bad: RuntimeError: it went wrong ({place})" in shown
    page = Path(record["run_dir"]) / "report.html"
    assert f"the whole traceback: {page}\n" in run.stdout
    assert "Traceback (most recent call last)" in page.read_text()


def test_an_error_inside_a_library_is_told_where_the_persons_code_called_it(toy: Toy) -> None:
    toy.formula.write_text("import json\n\ndef add(a, b):\n    return json.loads('{')\n")
    toy.pipeline({"a": {"uses": "toy_number"}, "bad": {"uses": "toy_add", "scores": "a"}})
    run = toy.run("run", "run.workers=0")
    assert "failed  bad: JSONDecodeError: " in run.stderr
    assert "at plugin/toy_formula.py:4, in add: return json.loads('{')" in run.stderr


def test_an_input_that_is_refused_has_no_line_of_code(toy: Toy) -> None:
    toy.pipeline({"a": {"uses": "toy_number", "value": 5}, "bad": {"uses": "toy_refuse", "scores": "a"}})
    run = toy.run("run", "run.workers=0")
    assert "failed  bad: the score is above 1.0.\n" in run.stderr
    assert " at plugin" not in run.stderr
    assert "traceback" not in run.stdout


def test_a_worker_that_dies_is_its_nodes_failure(toy: Toy) -> None:
    toy.pipeline(
        {
            "a": {"uses": "toy_number"},
            "bad": {"uses": "toy_boom", "scores": "a", "how": "kill"},
            "good": {"uses": "toy_add", "scores": "a", "amount": 4},
        }
    )
    assert toy.run("run", "run.workers=1").returncode == 1
    assert verdicts(toy) == {"a": "ran", "bad": "failed", "good": "ran"}
    assert "signal 9" in toy.record()["nodes"]["bad"]["error"]["message"]


def test_in_this_process_the_outputs_are_the_same(toy: Toy) -> None:
    toy.pipeline(CHAIN)
    toy.run("run", "run.workers=0", f"cache.dir={toy.folder}/one")
    first = toy.record()
    toy.run("run", f"cache.dir={toy.folder}/two")
    second = toy.record()
    assert first["totals"]["ran"] == second["totals"]["ran"] == 4
    for name in CHAIN:
        assert first["nodes"][name]["outputs"] == second["nodes"][name]["outputs"]


def test_a_killed_run_resumes_inside_the_stage_and_ends_with_the_same_digests(toy: Toy) -> None:
    toy.pipeline({"a": {"uses": "toy_number"}, "b": {"uses": "toy_add", "scores": "a", "seconds": 4}})
    aside, log = toy.folder / "aside", toy.folder / "aside.log"  # it takes its four seconds meanwhile
    undisturbed = subprocess.Popen(
        toy.command("run", f"cache.dir={aside}/cache", f"hydra.run.dir={aside}/run"),
        env=toy.environment | {"TOY_LOG": str(log)},
        cwd=toy.folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    process = subprocess.Popen(toy.command(), env=toy.environment, cwd=toy.folder, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while (
        len(list((toy.folder / "cache").glob("actions/*/*.json"))) < 10
    ):  # a number, and nine ticks of forty
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.5)  # its workers end by themselves
    assert toy.run().returncode == 0
    assert undisturbed.wait(60) == 0
    assert log.read_text().split().count("tick") == 40
    right = json.loads((aside / "run" / "record.json").read_text())["nodes"]["b"]["outputs"]
    assert toy.record()["nodes"]["b"]["outputs"] == right
    assert toy.calls().count("tick") in (40, 41)  # the one that was under way may run twice


def test_two_runs_at_once_execute_each_action_once(toy: Toy) -> None:
    toy.pipeline({"a": {"uses": "toy_number"}, "b": {"uses": "toy_add", "scores": "a", "seconds": 2}})
    both = [subprocess.Popen(toy.command(), env=toy.environment, cwd=toy.folder) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    calls = toy.calls()
    assert (calls.count("number"), calls.count("add"), calls.count("tick")) == (1, 1, 20)


def test_a_damaged_blob_is_noticed_and_healed(toy: Toy) -> None:
    toy.pipeline(CHAIN)
    toy.run()
    toy.calls()
    digest = toy.record()["nodes"]["b"]["outputs"]["scores"]["digest"]
    blob = toy.folder / "cache" / "blobs" / digest[:2] / digest
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 1
    os.chmod(blob, 0o644)
    blob.write_bytes(content)
    run = toy.run("run", "stages.c.uses=toy_add")  # reads b's output
    assert run.returncode == 0
    assert "damaged" in run.stderr
    assert toy.calls()[0] == "add"
    assert toy.run().returncode == 0


def test_a_deleted_blob_is_a_miss(toy: Toy) -> None:
    toy.pipeline(CHAIN)
    toy.run()
    toy.calls()
    digest = toy.record()["nodes"]["b"]["outputs"]["scores"]["digest"]
    (toy.folder / "cache" / "blobs" / digest[:2] / digest).unlink()
    assert "lost 1 of its blobs" in toy.run("plan").stdout
    toy.run()
    assert toy.calls() == ["add"]


def test_first_within_runs_nothing_behind_its_stop(toy: Toy) -> None:
    def pipeline(max_drop: float) -> None:
        steps = {
            f"m{i}": {"uses": "toy_number", "value": value} for i, value in enumerate((5.0, 9.0, 9.8, 9.9))
        }
        toy.pipeline(
            {
                "float": {"uses": "toy_number", "value": 10},
                **steps,
                "f": {"uses": "toy_files", "scores": "best.scores"},
                "best": {
                    "uses": "first_within",
                    "reference": "float",
                    "max_drop": max_drop,
                    "candidates": [{"model": "source", "scores": f"m{i}"} for i in range(4)],
                },
            }
        )

    pipeline(0.5)
    run = toy.run("plan")
    assert run.returncode == 2, "no node makes a model here"
    assert "no node 'source'" in run.stderr


def test_expect_cached_ends_with_4_and_runs_nothing(toy: Toy) -> None:
    toy.pipeline(CHAIN)
    run = toy.run("run", "run.expect=cached")
    assert run.returncode == 4
    assert toy.calls() == []
    toy.run()
    toy.calls()
    assert toy.run("run", "run.expect=cached").returncode == 0


@pytest.mark.slow
def test_actions_take_turns_where_memory_is_short_and_have_the_threads_they_ask_for(toy: Toy) -> None:
    most = {"memory_gb": memory_gb() * 0.6}
    stages: dict[str, Any] = {"a": {"uses": "toy_number"}}
    for name, more in (("b", most), ("c", most), ("d", {"cpus": 2})):
        stages[name] = {"uses": "toy_add", "scores": "a", "amount": ord(name), "seconds": 0.3, "resources": more}
    toy.pipeline(stages)
    run = toy.run("run", "run.workers=3", "run.threads=1")
    assert run.returncode == 0, run.stderr
    results = [json.loads(path.read_text())["result"] for path in (toy.folder / "cache").glob("actions/*/*.json")]
    by_node = {result["provenance"].get("node"): result["provenance"] for result in results}
    assert {name: by_node[name]["threads"] for name in "abcd"} == {"a": 1, "b": 1, "c": 1, "d": 2}
    first, second = sorted((by_node["b"], by_node["c"]), key=lambda one: one["started"])
    assert first["started"] + first["duration_s"] <= second["started"]
    keys = {node["key"] for node in toy.record()["nodes"].values()}
    toy.pipeline({name: {**body, "resources": {"cpus": 1}} for name, body in stages.items()})
    assert toy.run("run", "run.expect=cached").returncode == 0
    assert {node["key"] for node in toy.record()["nodes"].values()} == keys, "no key holds what an action takes"
    refused = toy.run("run", "run.workers=1", "stages.b.resources.cpus=4096", "stages.b.amount=1")
    assert refused.returncode == 2
    assert "stages.b.resources.cpus: asks for 4096, and this machine has " in refused.stderr.splitlines()[-1]


def test_a_sweep_runs_every_distinct_action_once(toy: Toy) -> None:
    toy.pipeline(CHAIN)
    run = toy.run("-m", "stages.b.amount=1,2,3", "stages.d.amount=1,2")
    assert run.returncode == 0, run.stderr
    calls = toy.calls()
    assert calls.count("number") == 1
    assert calls.count("sign") == 3
    assert calls.count("add") == 3 + 2  # d hits wherever sign made the same bytes
    sweep = json.loads(next(toy.folder.glob("outputs/*/*-sweep/sweep.json")).read_text())
    assert len(sweep["trials"]) == 6
    assert sweep["trials"][0]["overrides"][-2:] == ["stages.b.amount=1", "stages.d.amount=1"]


def test_files_of_a_target_lie_in_the_run_folder(toy: Toy) -> None:
    toy.pipeline({"a": {"uses": "toy_number", "value": 2}, "out": {"uses": "toy_files", "scores": "a"}})
    for _ in range(2):
        toy.run()
        paths = toy.record()["files"]["out"]
        assert [Path(path).read_text() for path in paths] == ["2.0"]


@pytest.mark.parametrize(
    "words",
    [("run", "stages.b.amuont=3"), ("run", "stages.a.value=x"), ("run", "pipeline=nope"), ("run", "nope=1")],
)
def test_a_mistake_ends_with_2_one_line_and_nothing_left_behind(toy: Toy, words: tuple[str, ...]) -> None:
    toy.pipeline(CHAIN)
    run = toy.run(*words)
    assert run.returncode == 2
    assert len(run.stderr.strip().splitlines()) == 1, run.stderr
    assert not list((toy.folder).glob("outputs/**/*"))
    assert toy.calls() == []


@pytest.mark.parametrize(
    ("number", "workers"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGTERM, 0)], ids=str
)
def test_ctrl_c_or_a_sigterm_ends_with_130_and_the_next_run_goes_on(
    toy: Toy, number: signal.Signals, workers: int
) -> None:
    toy.pipeline({"a": {"uses": "toy_number"}, "b": {"uses": "toy_add", "scores": "a", "seconds": 30}})
    command = toy.command("run", f"run.workers={workers}")
    process = subprocess.Popen(command, env=toy.environment, cwd=toy.folder, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list((toy.folder / "cache").glob("actions/*/*.json"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Interrupted. What was finished is in the cache; the same command goes on from there." in stderr
    assert "Traceback" not in stderr
    assert toy.record()["status"] == "interrupted"


def test_a_folder_that_the_person_named_keeps_what_was_in_it(toy: Toy) -> None:
    toy.pipeline(CHAIN)
    folder = toy.folder / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("do not lose")
    assert toy.run("run", f"hydra.run.dir={folder}", "stages.a.value=x").returncode == 2
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_a_sweep_keeps_the_trials_beside_one_whose_input_is_refused(toy: Toy) -> None:
    (toy.folder / "good.txt").write_text("5")
    toy.pipeline({"r": {"uses": "toy_read", "path": "good.txt"}, "c": {"uses": "toy_refuse", "scores": "r"}})
    run = toy.run("-m", "stages.c.limit=1,9")
    assert run.returncode == 2
    records = [
        json.loads(path.read_text()) for path in sorted(toy.folder.glob("outputs/*/*-sweep/*/record.json"))
    ]
    assert [record["nodes"]["c"]["verdict"] for record in records] == ["failed", "ran"]


def test_params_that_do_not_go_together_are_refused_before_anything_runs(toy: Toy) -> None:
    toy.pipeline({"a": {"uses": "toy_number"}, "c": {"uses": "toy_refuse", "scores": "a", "limit": 0}})
    run = toy.run()
    assert run.returncode == 2
    assert run.stderr == "qpipe: stages.c: a limit of 0 refuses everything.\n"
    assert toy.calls() == []


def test_a_damaged_file_of_the_result_is_made_again(toy: Toy) -> None:
    toy.pipeline({"a": {"uses": "toy_number", "value": 2}, "out": {"uses": "toy_files", "scores": "a"}})
    toy.run()
    toy.calls()
    blobs = [path for path in (toy.folder / "cache" / "blobs").glob("*/*") if path.read_bytes() == b"2.0"]
    assert len(blobs) == 1
    os.chmod(blobs[0], 0o644)
    blobs[0].write_bytes(b"3.0")
    run = toy.run()
    assert run.returncode == 0
    assert "damaged" in run.stderr
    assert toy.calls() == ["files"]
    assert Path(toy.record()["files"]["out"][0]).read_text() == "2.0"
