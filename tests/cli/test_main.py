"""The command line: what is left where it was typed."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qpipe.cli.main import main
from tests.nursery import Nursery
from tests.toy import Toy


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "pipeline=ptq"],
        ["plan", "-m", "pipeline=ptq", "scheme=w8a8,w4a8"],
        ["why", "bnf", "-m", "pipeline=ptq", "scheme=w8a8,w4a8"],
        ["graph", "pipeline=ptq"],
    ],
    ids=" ".join,
)
def test_commands_that_run_nothing_leave_nothing_and_take_nothing(
    tmp_path: Path, arguments: list[str], bare_cache: Path, nursery: Nursery
) -> None:
    here = tmp_path / "here"
    (here / ".hydra").mkdir(parents=True)
    others = [tmp_path / "multirun.yaml", here / "workers.log", here / ".hydra" / "config.yaml"]
    for path in others:
        path.write_text("somebody's")
    done = nursery.run(here, arguments, os.environ | {"QPIPE_CACHE_DIR": str(bare_cache)})
    assert done.returncode == 0, done.stderr
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(others)
    assert not (bare_cache / "actions").exists()


def test_an_interrupt_while_libraries_are_imported_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "omegaconf.py").write_text("raise KeyboardInterrupt\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-m", "qpipe"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (run.returncode, run.stderr) == (130, "qpipe: interrupted\n")


@pytest.mark.parametrize("sweep", [[], ["-m"]], ids=["run", "sweep"])
def test_a_working_directory_that_cannot_be_written_is_one_line(
    tmp_path: Path, sweep: list[str], nursery: Nursery
) -> None:
    (tmp_path / "outputs").write_text("a file, where the folder of the run is to be made")
    environment = os.environ | {"QPIPE_CACHE_DIR": str(tmp_path / "cache")}
    run = nursery.run(tmp_path, [*sweep, "pipeline=ptq"], environment)
    assert run.returncode == 1
    assert run.stderr.startswith("qpipe: the folder of the run cannot be made ('outputs")
    assert len(run.stderr.splitlines()) == 1


def test_a_number_that_python_does_not_read_is_one_line(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "qpipe", "plan", "seed=" + 5000 * "9"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 2
    assert run.stderr.startswith("qpipe: Exceeds the limit (4300 digits)")
    assert len(run.stderr.splitlines()) == 1


def test_a_run_that_was_all_hits_still_tells_those_who_asked_for_the_end(toy: Toy) -> None:
    """Python looks through no objects as it ends; what a plug-in registered runs, and all that was said arrives."""
    with open(toy.folder / "plugin" / "toy_stages.py", "a") as source:
        source.write(
            "\nimport atexit, gc\n"
            "searched = lambda: gc.isenabled() or not gc.get_freeze_count()\n"
            "atexit.register(lambda: called('end,searched' if searched() else 'end'))\n"
        )
    toy.pipeline({"a": {"uses": "toy_number", "value": 2}})
    cold = toy.run("run", "run.workers=0", fresh=True)
    assert (cold.returncode, toy.calls()) == (0, ["number", "end,searched"]), cold.stderr
    warm = toy.run("run", "run.workers=0", "run.expect=cached", fresh=True)
    assert (warm.returncode, toy.calls()) == (0, ["end"]), warm.stderr
    assert "0 ran, 1 from the cache" in warm.stdout
    refused = toy.run("run", "run.workers=0", "run.expect=cached", "stages.a.value=3", fresh=True)
    assert (refused.returncode, toy.calls()) == (4, ["end"])


def test_a_command_ends_as_a_python_program_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["qpipe", "stages", "bnf"])
    try:
        with pytest.raises(SystemExit) as end:
            main()
    finally:
        gc.unfreeze()
        gc.enable()
    assert end.value.code == 0


def test_help_that_nobody_reads_to_its_end_says_nothing_more(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "qpipe", "--help"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141
