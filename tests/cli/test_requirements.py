"""Another Hydra or OmegaConf than qpipe composes with is told in one line."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from qpipe.cli.requirements import NEEDED, fits, refusal

ROOT = Path(__file__).parents[2]


def installed(folder: Path, name: str, version: str) -> None:
    """Let `folder`, on the path before all others, say that this version is installed."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_what_is_needed_is_what_the_package_says() -> None:
    said = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {f"{name}{bounds}" for name, bounds in NEEDED.items()} <= set(said)
    assert refusal() is None


@pytest.mark.parametrize(
    ("version", "fit"),
    [
        ("1.3.1", False),
        ("1.3.2", True),
        ("1.3.2.post1", True),
        ("1.3.8", True),
        ("1.3.10", True),
        ("1.4.0.dev1", False),
        ("1.4.0rc3", False),
        ("1.4", False),
        ("1.4.0", False),
        ("2", False),
        ("unknown", False),
    ],
)
def test_a_version_lies_between_two(version: str, fit: bool) -> None:
    assert fits(version, ">=1.3.2,<1.4") == fit


@pytest.mark.parametrize(
    "arguments",
    [[], ["plan", "pipeline=ptq"], ["-m", "scheme=w8a8,w4a8"], ["--help"], ["-sc", "query=bash"]],
    ids=" ".join,
)
def test_a_hydra_that_is_not_known_is_refused_in_one_line(tmp_path: Path, arguments: list[str]) -> None:
    installed(tmp_path, "hydra-core", "1.4.0rc3")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "qpipe", *arguments]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == (
        "qpipe: hydra-core 1.4.0rc3 is installed; qpipe needs hydra-core>=1.3.2,<1.4 and omegaconf>=2.3,<2.4: "
        "pip install 'hydra-core>=1.3.2,<1.4' 'omegaconf>=2.3,<2.4'\n"
    )


def test_all_that_does_not_fit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, "hydra-core", "1.4.0rc3")
    installed(tmp_path, "omegaconf", "2.4.1rc1")
    monkeypatch.syspath_prepend(tmp_path)
    assert str(refusal()).startswith("hydra-core 1.4.0rc3 and omegaconf 2.4.1rc1 are installed; qpipe needs ")


def test_what_says_no_version_is_left_to_the_import() -> None:
    assert refusal({"a-package-of-no-such-name": ">=1,<2"}) is None
