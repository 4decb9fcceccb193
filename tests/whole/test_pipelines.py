"""Every shipped config composes and plans, and the documented command lines mean something."""

from __future__ import annotations

import functools
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.nursery import Nursery

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


Qpipe = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def qpipe(tmp_path: Path, bare_cache: Path, nursery: Nursery) -> Iterator[Qpipe]:
    """The command line in an empty folder. Whatever it is given, it leaves no result."""
    environment = os.environ | {"QPIPE_CACHE_DIR": str(bare_cache)}
    yield lambda *words: nursery.run(tmp_path, words, environment)
    assert not (bare_cache / "actions").exists()


@pytest.fixture
def plan(qpipe: Qpipe) -> Qpipe:
    return functools.partial(qpipe, "plan")


def test_every_pipeline_plans(plan: Qpipe, tmp_path: Path) -> None:
    """All of them as one sweep."""
    pipelines = options("pipeline")
    found = plan("-m", f"pipeline={','.join(pipelines)}", f"scheme={options('scheme')[0]}")
    assert found.returncode == 0, found.stderr
    nodes = re.search(r"(\d+) nodes: ", found.stdout)
    assert nodes is not None
    assert int(nodes[1]) > 10 * len(pipelines)
    assert not (tmp_path / "outputs").exists()


def test_every_scheme_plans(plan: Qpipe) -> None:
    schemes = options("scheme")
    for chosen, more in (
        ([scheme for scheme in schemes if "block" not in scheme], ["scheme.weight.granularity=per_channel"]),
        ([scheme for scheme in schemes if "block" in scheme], []),
    ):
        found = plan(*(["-m"] if len(chosen) > 1 else []), "pipeline=ptq", f"scheme={','.join(chosen)}", *more)
        assert found.returncode == 0, found.stderr


def test_every_experiment_plans(plan: Qpipe) -> None:
    """All of them as one sweep, each once."""
    found = plan("-m", f"experiment={','.join(options('experiment'))}")
    assert found.returncode == 0, found.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "trials"),
    [
        (["experiment=techniques", "stages.bnf.enabled=true", "scheme=w8a8"], 12),
        (["experiment=bitwidths", "scheme.activation.bitwidth=8"], 10),
    ],
)
def test_an_experiment_is_a_sweep_whose_values_can_be_replaced(plan: Qpipe, words: list[str], trials: int) -> None:
    found = plan("-m", *words)
    assert found.returncode == 0, found.stderr
    nodes = re.search(r"^(\d+) nodes: ", found.stdout, re.MULTILINE)
    assert nodes is not None
    assert trials * 10 <= int(nodes[1]) <= trials * 11


@pytest.mark.slow
@pytest.mark.parametrize("search", options("search"))
def test_every_search_plans(plan: Qpipe, search: str) -> None:
    """Every value that it may choose is looked at; the first trials are planned."""
    found = plan("-m", f"search={search}")
    assert found.returncode == 0, found.stderr


SCHEMES = {
    "onnxruntime_int16": "w8a16",
    "amd_xint8": "xint8",
    "tensorrt": "s8s8",
    "weight_only_int4": "w4_block32",
}


@pytest.mark.parametrize("target", options("target"))
def test_every_target_plans(plan: Qpipe, target: str) -> None:
    found = plan("pipeline=ptq", f"target={target}", f"scheme={SCHEMES.get(target, 'w8a8')}")
    assert found.returncode == 0, found.stderr


def test_a_forbidden_scheme_is_refused_before_anything_runs(plan: Qpipe) -> None:
    found = plan("pipeline=ptq", "target=tensorrt")
    assert found.returncode == 2
    assert "signed codes" in found.stderr
    assert "Use scheme=s8s8." in found.stderr


def test_what_is_trained_on_comes_with_the_data(plan: Qpipe, tmp_path: Path) -> None:
    """Of a factory the split `train`, of files the calibration where nobody says another; both may be thinned."""
    import numpy as np

    arrays = {"image": np.zeros((2, 3, 32, 32), np.float32), "labels": np.zeros(2, np.int64)}
    for name in ("some", "more"):
        np.savez(tmp_path / f"{name}.npz", **arrays)  # type: ignore[arg-type]  # numpy's stubs know no names
    files = ["data=npz", "data.calibration=some.npz", "data.evaluation=some.npz"]
    for words in (
        ["stages.training.limit=500", "stages.qat.loss=cross_entropy"],
        ["data=python", "data.factory=qpipe.demo.data:load", "data.trained_on=training"],
        files,
        [*files, "data.trained_on=more.npz"],
    ):
        found = plan("pipeline=qat", *words)
        assert found.returncode == 0, found.stderr
        assert re.search(r"run +training +load_data", found.stdout)
    bad = plan("pipeline=qat", *files, "data.trained_on=none.npz")
    assert bad.returncode == 2
    assert "stages.training.path: no file or folder at 'none.npz'" in bad.stderr


def test_node_filters_are_swept_from_the_command_line(plan: Qpipe) -> None:
    found = plan("-m", "pipeline=ptq", "target.nodes.exclude=[],[type:Add],[between:..a,'scope:b']")
    assert found.returncode == 0, found.stderr
    assert len(re.findall(r"#\d calibrate ", found.stdout)) == 3
    bad = plan("pipeline=ptq", "target.nodes.only=[between:a]")
    assert bad.returncode == 2
    assert "must be between:first..last" in bad.stderr


def test_node_filters_count_in_the_key() -> None:
    from qpipe.keys.hashing import digest
    from qpipe.methods.placement.target import Nodes, Target

    targets = [Target("t", nodes=nodes) for nodes in (Nodes(), Nodes(("a",)), Nodes((), ("a",)))]
    assert len({digest("test", target) for target in targets}) == 3


def test_a_rounding_can_be_swapped_from_the_command_line(plan: Qpipe) -> None:
    found = plan("pipeline=adaround", "stage@stages.adaround=nearest")
    assert found.returncode == 0, found.stderr
    assert re.search(r"adaround\s+nearest", found.stdout)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["stages.adaround.iteration=5"], "'adaround' has no param 'iteration'. Did you mean 'iterations'?"),
        (["stages.adaround.iterations=0"], "stages.adaround.iterations: must be >= 1"),
        (["stages.cle.model=adaround"], "'cle' after 'adaround' is discouraged"),
        (["scheme.weight.bitwidth=9"], ".scheme.weight: bitwidth must be one of"),
        (["model=onnx_file"], "model.path: missing. Set model.path="),
        (["model=onnx_file", "model.path=none.onnx"], "stages.source.path: no file or folder at 'none.onnx'"),
        (["data=python", "data.factory=nowhere:load"], "stages.calibration.factory: no module 'nowhere'"),
        (["stage@stages.cle=clee"], "stage: there is no 'clee'. Did you mean 'cle'? There are: adaquant, adaround, "),
        (["pipelin=ptq"], "config: there is no 'pipelin'. Did you mean 'pipeline'? There are: "),
        (["goal.max_dorp=1"], "goal: there is no 'max_dorp'. Did you mean 'max_drop'? There are: deployed, max_drop, "),
        (["target.nodes.exlude=[x]"], "target.nodes: there is no 'exlude'. Did you mean 'exclude'?"),
        (["stages.bnf.model=equalized"], "feed one another in a circle"),
        (["+stages.late={uses: cle, model: adaround}"], "'cle' after 'adaround' is discouraged"),
        (["goal.metric=top7"], "expected one of"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    qpipe: Qpipe, tmp_path: Path, overrides: list[str], words: str
) -> None:
    found = qpipe(*overrides)
    assert found.returncode == 2, found.stderr
    assert words in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1, found.stderr
    assert not (tmp_path / "outputs").exists()
