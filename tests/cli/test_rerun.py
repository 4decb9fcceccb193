"""`qpipe rerun RUN`: the recorded config, whatever the files say by now."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.nursery import Nursery
from tests.toy import Toy


@pytest.fixture
def rerun(toy: Toy, nursery: Nursery):
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return nursery.run(toy.folder, ["rerun", *words], toy.environment)

    return run


NODES = {
    "a": {"uses": "toy_number", "value": "${seed}"},
    "b": {"uses": "toy_add", "scores": "a", "amount": 2},
}


def test_a_rerun_is_the_recorded_config_when_the_files_are_others_or_gone(toy: Toy, rerun) -> None:
    toy.pipeline(NODES)
    assert toy.run("run", "run.workers=0", "seed=3", "stages.b.amount=5").returncode == 0
    first = toy.record()
    toy.pipeline({"a": {"uses": "toy_number", "value": 100}})
    assert rerun("last", "run.expect=cached").returncode == 0
    second = toy.record()
    (toy.folder / "conf" / "pipeline" / "toy.yaml").unlink()
    assert rerun(first["run_dir"], "run.expect=cached").returncode == 0
    third = toy.record()
    for record in (second, third):
        assert record["run_dir"] != first["run_dir"]
        assert {name: node["key"] for name, node in record["nodes"].items()} == {
            name: node["key"] for name, node in first["nodes"].items()
        }
    assert second["command"] == ["qpipe", "rerun", "last", "run.expect=cached"]
    assert rerun("last~1", "run.expect=cached").returncode == 0  # of a rerun, too


def test_an_override_reaches_what_takes_its_value_by_interpolation(toy: Toy, rerun) -> None:
    toy.pipeline(NODES)
    assert toy.run("run", "run.workers=0").returncode == 0
    done = rerun("last", "seed=7", "stages.b.amount=1")
    assert done.returncode == 0, done.stderr
    record = toy.record()
    assert record["nodes"]["a"]["params"] == {"value": 7}
    assert record["nodes"]["b"]["scores"]["score"] == 8


def test_another_option_of_a_group_takes_the_place_of_the_recorded_one(toy: Toy, rerun) -> None:
    """The table of a target is a mapping: merged over the recorded one it would keep operators that the other lacks."""
    toy.pipeline({"a": {"uses": "toy_number", "value": 1}})
    assert toy.run("run", "run.workers=0").returncode == 0
    assert rerun("last", "target=tensorrt", "scheme=s8s8").returncode == 0
    import yaml

    config = yaml.safe_load((Path(toy.record()["run_dir"]) / "config.yaml").read_text())
    shipped = yaml.safe_load((Path(__file__).parents[2] / "conf" / "target" / "tensorrt.yaml").read_text())
    assert config["target"] == shipped
    assert config["scheme"]["name"] == "s8s8"


def test_a_sweep_of_reruns_and_a_rerun_of_a_trial(toy: Toy, rerun) -> None:
    toy.pipeline(NODES)
    assert toy.run("run", "run.workers=0", "seed=1").returncode == 0
    assert rerun("last", "-m", "seed=1,2").returncode == 0
    toy.calls()
    trial = next((toy.folder / "outputs").glob("*/*-sweep/1"))
    done = rerun(str(trial), "run.expect=cached")
    assert done.returncode == 0, done.stderr
    assert toy.record()["nodes"]["a"]["params"] == {"value": 2}
    assert rerun(str(trial), "seed=5").returncode == 0
    assert toy.record()["nodes"]["b"]["scores"]["score"] == 7
    (trial / ".hydra" / "config.yaml").unlink()
    refused = rerun(str(trial), "seed=5")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    assert "so seed=5 reaches no node. Override what the nodes hold" in refused.stderr
    assert rerun(str(trial), "stages.a.value=5").returncode == 0
    assert toy.record()["nodes"]["b"]["scores"]["score"] == 7


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "rerun: names no run. Say `qpipe rerun RUN`"),
        (["seed=1"], "rerun: names no run. Say `qpipe rerun RUN`"),
        (["nothing"], "rerun: no run 'nothing'."),
        (["last", "pipeline=ptq"], "rerun: pipeline=ptq chooses other nodes"),
        (["last", "stage@stages.a=cle"], "rerun: stage@stages.a=cle chooses other nodes"),
        (["last", "stages.a.valu=1"], "stages.a: 'toy_number' has no param 'valu'. Did you mean 'value'?"),
    ],
)
def test_a_rerun_that_cannot_be_is_one_line(toy: Toy, rerun, words: list[str], said: str) -> None:
    toy.pipeline(NODES)
    assert toy.run("run", "run.workers=0").returncode == 0
    done = rerun(*words)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr.startswith(f"qpipe: {said}")


@pytest.mark.parametrize("content", [b"\xff", b"- a\n", b"a: {", b"", b"a: 1\n"])
def test_a_recorded_config_that_is_none_is_one_line(toy: Toy, rerun, content: bytes) -> None:
    toy.pipeline(NODES)
    assert toy.run("run", "run.workers=0").returncode == 0
    folder = Path(toy.record()["run_dir"])
    (folder / ".hydra" / "config.yaml").write_bytes(content)
    done = rerun("last")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr.startswith("qpipe: rerun: 'outputs")
    for path in (folder / ".hydra" / "config.yaml", folder / "config.yaml"):
        path.unlink()
    done = rerun("last")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "Give another run." in done.stderr


def test_relative_paths_mean_what_they_meant_when_hydra_changes_folder(toy: Toy) -> None:
    (toy.folder / "three.txt").write_text("3")
    toy.pipeline({"a": {"uses": "toy_read", "path": "three.txt"}})
    for workers in ("run.workers=0", "run.workers=1"):
        done = toy.run("run", workers, "hydra.job.chdir=true")
        assert done.returncode == 0, done.stderr
        assert toy.record()["nodes"]["a"]["scores"]["score"] == 3
