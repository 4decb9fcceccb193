"""Networks as `torch.onnx.export` writes them go through the whole pipeline; onnxruntime computes what was simulated.

Op by op, from equal inputs, none is off by more than one grid step, and at 8 bits at least 99.9 % are equal, or what
differs lies in the middle between two codes to four digits. At 16 bits a step is near the rounding of a float32 sum:
there values next to the middle may differ.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests.architectures import NETS, export, images

Record = Mapping[str, Any]
Exported = Callable[[str, bool, bool], Path]

GRANULARITIES = "scheme.weight.granularity=per_tensor,per_channel"
OPERATORS = {
    "resnet18": {"Conv", "Add", "MaxPool"},
    "mobilenet_v2": {"Conv", "Add"},
    "unet": {"Conv", "ConvTranspose", "Concat", "MaxPool"},
    "vit": {"Conv", "MatMul", "Softmax", "LayerNormalization", "Gelu", "Add"},
}


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """`exported(net, dynamo, dynamic)`: the file, made once, with the samples beside it."""
    folder = tmp_path_factory.mktemp("exported")

    def file(net: str, dynamo: bool, dynamic: bool) -> Path:
        how = f"{'dynamo' if dynamo else 'script'}_{'dynamic' if dynamic else 'one'}"
        path = folder / f"{net}_{how}.onnx"
        if not path.exists():
            size = NETS[net][1]
            np.savez(folder / f"{net}_calibration.npz", pixels=images(16, size, seed=1))
            np.savez(folder / f"{net}_evaluation.npz", pixels=images(11, size, seed=2))
            export(net, path, dynamo=dynamo, dynamic=dynamic)
        return path

    return file


def quantize(folder: Path, net: str, paths: list[Path], *overrides: str) -> dict[tuple[str, ...], Record]:
    """The command line over `paths`, with its own cache: the record of each trial by what it was given."""
    command = [
        sys.executable, "-m", "qpipe", "-m", "pipeline=ptq", "model=onnx_file",
        f"model.path={','.join(map(str, paths))}", "data=npz",
        f"data.calibration={paths[0].parent / f'{net}_calibration.npz'}",
        f"data.evaluation={paths[0].parent / f'{net}_evaluation.npz'}",
        "goal.metric=sqnr_db", "goal.max_drop=null", "targets=[parity,export]", "run.workers=0", "run.threads=1",
        "run.measure=false", *overrides,
    ]  # fmt: skip
    environment = os.environ | {"QPIPE_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (sweep,) = folder.glob("outputs/*/*/sweep.json")
    trials = json.loads(sweep.read_text(), parse_constant=refuse)["trials"]
    return {tuple(trial["overrides"]): read_record(Path(trial["run_dir"])) for trial in trials}


def read_record(folder: Path) -> Record:
    found: Record = json.loads((folder / "record.json").read_text(), parse_constant=refuse)
    return found


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def assert_runs_as_simulated(record: Record, net: str, bits: int, batch: int | str) -> None:
    assert record["status"] == "done"
    assert {node["verdict"] for node in record["nodes"].values()} <= {"ran", "hit", "not_needed"}
    scores = record["nodes"]["parity"]["scores"]
    assert scores["agree"] is True
    assert scores["samples"] == 11
    assert_units_agree(scores["units"], bits)
    assert {op for unit in scores["units"] for op in unit["op_types"]} >= OPERATORS[net]
    counts = np.sum([value["counts"] for value in scores["end_to_end"]], axis=0)
    assert counts[:2].sum() / counts.sum() > (0.9 if bits == 8 else 0.8)
    assert scores["outputs"][0]["cosine"] > 0.98
    assert_loads(Path(record["run_dir"]) / "export" / "model.onnx", net, batch)


def assert_units_agree(units: list[dict[str, Any]], bits: int) -> None:
    share = 0.9999 if bits == 8 else 0.998
    for unit in units:
        assert unit["largest"] <= 1, unit
        assert unit["within_0"] >= 0.999 or unit["tie_distance"] < (1e-4 if bits == 8 else 0.1), unit
    counts = np.sum([unit["counts"] for unit in units], axis=0)
    assert counts[0] / counts.sum() >= share


def assert_loads(path: Path, net: str, batch: int | str) -> None:
    """A plain session takes the file; names and shapes are those of the source."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    size = NETS[net][1]
    assert [(entry.name, entry.shape) for entry in session.get_inputs()] == [
        ("pixels", [batch, 3, size, size])
    ]
    assert [entry.name for entry in session.get_outputs()] == ["out"]
    (out,) = session.run(None, {"pixels": images(1, size, seed=4)})
    assert np.isfinite(out).all()


WAYS = {
    "resnet18": ((True, True), (False, True), (False, False)),
    "mobilenet_v2": ((True, True), (False, False)),
    "unet": ((True, True), (True, False), (False, True), (False, False)),
    "vit": ((True, True), (True, False), (False, True), (False, False)),
}
"""(dynamo, dynamic): by which exporter, and whether the batch size is open. One that is fixed is 1."""


@pytest.mark.slow
@pytest.mark.parametrize("net", NETS)
def test_exports_with_default_options_at_8_bits(net: str, exported: Exported, tmp_path: Path) -> None:
    batches = {str(exported(net, *way)): "batch" if way[1] else 1 for way in WAYS[net]}
    records = quantize(tmp_path, net, list(map(Path, batches)), GRANULARITIES)
    assert len(records) == 2 * len(batches)
    for overrides, record in records.items():
        (batch,) = (batch for path, batch in batches.items() if f"model.path={path}" in overrides)
        assert_runs_as_simulated(record, net, 8, batch)
        assert record["nodes"]["bnf"]["notes"][0].startswith("There is no BatchNormalization to fold")


@pytest.mark.slow
def test_other_bitwidths_of_a_cnn(exported: Exported, tmp_path: Path) -> None:
    path = exported("resnet18", False, True)
    records = quantize(tmp_path, "resnet18", [path], "scheme=w4a8,w8a16,w4a16", GRANULARITIES)
    assert len(records) == 6
    for overrides, record in records.items():
        bits = 16 if any("a16" in word for word in overrides) else 8
        assert_runs_as_simulated(record, "resnet18", bits, "batch")
