"""What many variants of one large model cost: 24 copies of a generated model, each with one layer changed.

    python benchmarks/variants.py [--megabytes 500] [--variants 24] [--json FILE]

A real pipeline through the command line, in one worker process: `load_model` takes in an ONNX file with external data
(and checks the import in onnxruntime and in torch), then a stage of a plug-in edits one layer per variant.

disk     bytes of the cache's blobs, against those of one model
memory   largest resident set of any process of the run (VmHWM: clean pages of mapped files count), and the largest sum
         over all processes at a time, sampled (Pss: a page that several have mapped counts once); less what the same
         run takes on a model of 1 MB, which is Python and the libraries. Against the bytes of one model; import and
         variants apart.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx

STAGE = '''
from __future__ import annotations
from typing import TYPE_CHECKING
import numpy as np
from qpipe.stage import stage
if TYPE_CHECKING:
    from qpipe.model import Model

@stage(version=1)
def vary(model: Model, *, layer: int, factor: float) -> Model:
    """One layer's weight times a factor."""
    name = f"layer{layer}.weight"
    return model.with_params({name: model.param(name) * np.float32(factor)})
'''


def write_model(path: Path, size_bytes: int, layers: int = 128) -> int:
    """A chain of square Gemm and Relu, its weights in one file beside it; the bytes of its weights."""
    width = max(64, round((size_bytes / layers / 4) ** 0.5))
    rng = np.random.default_rng(0)
    tensor, value = onnx.TensorProto, onnx.helper.make_tensor_value_info
    nodes, weights, offset = [], [], 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".data"), "wb") as data:
        for i in range(layers):
            nodes.append(onnx.helper.make_node("Gemm", [f"x{i}", f"layer{i}.weight"], [f"y{i}"], f"gemm{i}", transB=1))
            nodes.append(onnx.helper.make_node("Relu", [f"y{i}"], [f"x{i + 1}"], f"relu{i}"))
            array = rng.standard_normal((width, width), np.float32) * np.float32(width**-0.5)
            weight = tensor(name=f"layer{i}.weight", data_type=tensor.FLOAT, dims=array.shape)
            weight.data_location = tensor.EXTERNAL
            entries = {"location": path.with_suffix(".data").name, "offset": offset, "length": array.nbytes}
            for key, entry in entries.items():
                weight.external_data.add(key=key, value=str(entry))
            weights.append(weight)
            offset += data.write(array.tobytes())
    ends = [[value("x0", 1, ["batch", width])], [value(f"x{layers}", 1, ["batch", width])]]
    graph = onnx.helper.make_graph(nodes, "chain", *ends, weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return offset


def write_project(folder: Path, variants: int, layers: int = 128) -> dict[str, str]:
    """A plug-in with the stage and a pipeline of `variants` uses of it; the environment to run it in."""
    (folder / "plugin").mkdir(parents=True)
    (folder / "plugin" / "vary_stage.py").write_text(STAGE)
    info = folder / "registered" / "vary-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vary\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[qpipe.stages]\nvary = vary_stage:vary\n")
    stages: dict[str, Any] = {"source": {"uses": "load_model", "path": str(folder / "model.onnx"), "data": None}}
    for i in range(variants):
        stages[f"v{i}"] = {"uses": "vary", "model": "source", "layer": i % layers, "factor": 1.5 + i}
    body = {"stages": stages, "goal": {"metric": "none", "max_drop": 1.0}}
    pipeline = folder / "conf" / "pipeline" / "vary.yaml"
    pipeline.parent.mkdir(parents=True)
    pipeline.write_text("# @package _global_\n" + json.dumps(body))
    paths = [str(folder / "plugin"), str(folder / "registered"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "QPIPE_CACHE_DIR": str(folder / "cache")}


def run(folder: Path, environment: Mapping[str, str], *overrides: str) -> dict[str, float]:
    """Run the pipeline: `process_bytes`, the largest resident set of a process; `sum_bytes`, what all hold at once."""
    command = [sys.executable, "-m", "qpipe", "run", "--config-dir", str(folder / "conf"), "pipeline=vary"]
    command += ["~model", "~data", "run.workers=1", "run.threads=1"]
    log = folder / "log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [*command, *overrides], cwd=folder, env=dict(environment), stdout=output, stderr=output
        )
        peaks: dict[int, int] = {}
        total = 0
        while process.poll() is None:
            found = {pid: held(pid) for pid in descendants(process.pid)}
            total = max(total, sum(now for now, _ in found.values()))
            for pid, (_, peak) in found.items():
                peaks[pid] = max(peaks.get(pid, 0), peak)
            time.sleep(0.01)
    if process.returncode:
        raise SystemExit(log.read_text())
    return {"process_bytes": max(peaks.values()), "sum_bytes": total}


def descendants(pid: int) -> list[int]:
    """The process, its children and theirs."""
    found, pending = [], [pid]
    while pending:
        pid = pending.pop()
        found.append(pid)
        with suppress(OSError):  # it, or a thread of it, ended meanwhile
            for task in Path(f"/proc/{pid}/task").iterdir():
                pending += [int(word) for word in (task / "children").read_text().split()]
    return found


def held(pid: int) -> tuple[int, int]:
    """What a process holds in bytes, its share of pages that others have mapped too, and the largest resident set it
    ever had; zeros where it is gone. Where the system does not tell shares, the resident set stands in."""
    sizes: dict[str, int] = {}
    for name in ("status", "smaps_rollup"):
        with suppress(OSError):
            lines = Path(f"/proc/{pid}/{name}").read_text().splitlines()
            found = (line.split(":", 1) for line in lines if line.startswith(("VmRSS:", "VmHWM:", "Pss:")))
            sizes |= {field: int(size.split()[0]) << 10 for field, size in found}
    return sizes.get("Pss", sizes.get("VmRSS", 0)), sizes.get("VmHWM", 0)


def blobs_bytes(folder: Path) -> int:
    """What the blobs of the cache take on the disk."""
    return sum(path.stat().st_blocks * 512 for path in (folder / "cache" / "blobs").rglob("*") if path.is_file())


def measure(folder: Path, size_bytes: int, variants: int) -> dict[str, float]:
    """The import alone, then the variants: disk and memory of each."""
    environment = write_project(folder, variants)
    size = write_model(folder / "model.onnx", size_bytes)
    loaded = run(folder, environment, "targets=[source]")
    disk = blobs_bytes(folder)
    varied = run(folder, environment)
    return {
        "model_bytes": size,
        "one_disk_bytes": disk,
        "disk_bytes": blobs_bytes(folder),
        **{f"import_{name}": value for name, value in loaded.items()},
        **{f"variants_{name}": value for name, value in varied.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--variants", type=int, default=24)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        bare = measure(Path(name) / "bare", 1_000_000, 2)
        found = measure(Path(name) / "full", arguments.megabytes * 1_000_000, arguments.variants)
    one = found["model_bytes"]
    disk = found["disk_bytes"] / one
    print(f"one model {one / 1e6:.0f} MB; it and {arguments.variants} variants on disk: {disk:.3f} models")
    for part in ("import", "variants"):
        for what in ("process", "sum"):
            peak, base = found[f"{part}_{what}_bytes"], bare[f"{part}_{what}_bytes"]
            print(
                f"{part:8} {what:7} {peak / 1e6:7.0f} MB = {peak / one:.2f} models"
                f" ({base / 1e6:.0f} MB without a model: {(peak - base) / one:.2f} models above it)"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps({"bare": bare, "found": found}, indent=1))


if __name__ == "__main__":
    main()
