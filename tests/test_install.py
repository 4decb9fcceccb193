"""A wheel holds all that is needed, and works from a folder that knows nothing of the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built from a copy so that nothing is left in it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, files.decode().split("\0")):
        if name.split("/")[0] in ("qpipe", "stages", "conf") or "/" not in name:
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", folder, source], check=True, capture_output=True)
    return next(folder.glob("qpipe-*.whl"))


def test_the_wheel_holds_code_configs_and_the_built_in_model(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "qpipe/cli/main.py",
        "qpipe/stages/adaround.py",
        "qpipe/conf/config.yaml",
        "qpipe/conf/pipeline/ptq.yaml",
        "qpipe/demo/mobilenet.onnx",
        "qpipe/py.typed",
        "hydra_plugins/qpipe/launcher.py",
    } <= names
    assert not [name for name in names if name.split("/")[0] in ("stages", "conf", "tests", "benchmarks")]


def test_an_unpacked_wheel_plans_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    environment = os.environ | {"PYTHONPATH": str(site), "QPIPE_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "qpipe", "plan", "pipeline=adaround"]
    run = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    where = [sys.executable, "-c", "import qpipe.stages.bnf, qpipe.conf; print(qpipe.stages.bnf.__file__)"]
    found = subprocess.run(where, cwd=work, env=environment, capture_output=True, text=True, check=True).stdout
    assert str(site) in found, "the wheel's own stages are the ones in use"
