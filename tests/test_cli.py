"""The command line: what is left where it was typed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


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
    tmp_path: Path, arguments: list[str]
) -> None:
    here = tmp_path / "here"
    (here / ".hydra").mkdir(parents=True)
    others = [tmp_path / "multirun.yaml", here / "workers.log", here / ".hydra" / "config.yaml"]
    for path in others:
        path.write_text("somebody's")
    environment = os.environ | {"QPIPE_CACHE_DIR": str(tmp_path / "cache")}
    subprocess.run(
        [sys.executable, "-m", "qpipe", *arguments],
        cwd=here,
        env=environment,
        check=True,
        capture_output=True,
    )
    assert sorted(
        path for path in tmp_path.rglob("*") if path.is_file() and "cache" not in path.parts
    ) == sorted(others)


def test_an_interrupt_while_libraries_are_imported_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "omegaconf.py").write_text("raise KeyboardInterrupt\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-m", "qpipe"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (run.returncode, run.stderr) == (130, "qpipe: interrupted\n")
