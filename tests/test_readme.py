"""What the README shows works as it is printed there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qpipe.language.catalog import catalog
from tests.nursery import Nursery
from tests.whole.test_bad_inputs import net

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    """Every qpipe command line of the README, continuation lines joined, comments dropped."""
    text = "\n".join(blocks("console")).replace("\\\n", " ")
    lines = [line[2:].partition("  #")[0] for line in text.splitlines() if line.startswith("$ ")]
    return [words[1:] for line in lines if (words := shlex.split(line))[0].endswith("qpipe")]


def qpipe(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qpipe", *words],
        cwd=folder,
        env=os.environ | {"QPIPE_CACHE_DIR": str(folder / "cache")} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def write_example(folder: Path) -> None:
    """The files that the README's own commands speak of."""
    net(folder / "net.onnx")
    samples = np.zeros((4, 3, 8, 8), np.float32)
    for name in ("calib", "test"):
        np.savez(folder / f"{name}.npz", image=samples, labels=np.arange(4))
    package = folder / "my_pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "nets.py").write_text("def build():\n    import torch\n    return torch.nn.Linear(2, 2)\n")
    (package / "data.py").write_text("def load(split):\n    return {}\n")
    (folder / "net.safetensors").write_bytes(b"")


def test_the_readme_has_commands() -> None:
    assert len(commands()) >= 6


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_plans(words: list[str], tmp_path: Path, bare_cache: Path, nursery: Nursery) -> None:
    write_example(tmp_path)
    words = [word for word in words if word != "plan"]
    found = nursery.run(tmp_path, ["plan", *words], os.environ | {"QPIPE_CACHE_DIR": str(bare_cache)})
    assert found.returncode == 0, found.stderr


def test_the_pipeline_of_the_readme_plans(tmp_path: Path) -> None:
    folder = tmp_path / "conf" / "pipeline"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(blocks("yaml")[0])
    found = qpipe(tmp_path, "plan", "--config-dir", "conf", "pipeline=mine", "stages.round.beam=4")
    assert found.returncode == 0, found.stderr
    assert re.search(r"round\s+adaround", found.stdout)


def test_the_stage_of_the_readme_is_one(tmp_path: Path) -> None:
    source = next(block for block in blocks("python") if "def prune" in block)
    (tmp_path / "pruning.py").write_text(source)
    info = tmp_path / "registered" / "pruning-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pruning\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[qpipe.stages]\nprune = pruning:prune\n")
    path = os.pathsep.join([str(tmp_path), str(tmp_path / "registered")])
    found = qpipe(tmp_path, "stages", "prune", PYTHONPATH=path)
    assert found.returncode == 0, found.stderr
    assert "The model with the smallest weights of every layer set to zero." in found.stdout
    assert re.search(r"param\s+ratio\s+float >= 0 and < 1\s+0.5", found.stdout)
    write_example(tmp_path)
    nodes = "+stages.pruned={uses: prune, model: source, ratio: 0.9}"
    arguments = ["targets=[pruned]", "model=onnx_file", "model.path=net.onnx", "run.workers=1", nodes]
    run = qpipe(tmp_path, *arguments, PYTHONPATH=path)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 layers pruned." in run.stderr


def test_the_notebook_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    net(tmp_path / "net.onnx")
    exec(next(block for block in blocks("python") if "Model.load" in block), {})
    assert (tmp_path / "folder" / "model.onnx").exists()


def test_the_stages_named_in_the_changelog_exist() -> None:
    named = re.findall(
        r"`(\w+)`", (ROOT / "CHANGELOG.md").read_text().partition("- Stages:")[2].partition("\n- ")[0]
    )
    assert len(named) > 10
    assert set(named) <= {*catalog(), "solver", "gram", "gradient"}
