"""What a fully cached run costs: `qpipe`, all hits, against a bare Hydra app that composes the same config and does
nothing. Both as processes, taking turns, in one run.

    python benchmarks/cached_run.py [--rounds 15] [--json FILE] [overrides …]

The bare app gets the same config as plain YAML: the shipped groups, with every stage's schema written out as a file, so
that it neither imports qpipe nor pays for making schemas.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from qpipe.language.catalog import catalog, schema

CONF = Path(__file__).parent.parent / "conf"
OURS = ("  - override hydra/launcher: qpipe\n", "  - override hydra/sweeper: qpipe\n")
APP = """
import os, secrets, sys
import hydra
from omegaconf import OmegaConf
OmegaConf.register_new_resolver("qpipe.file", lambda name: name)
OmegaConf.register_new_resolver("qpipe.run_id", lambda: secrets.token_hex(2), use_cache=True)

@hydra.main(version_base="1.3", config_path=sys.argv.pop(1), config_name="config")
def main(config):
    pass

main()
"""


def write_bare_app(folder: Path) -> list[str]:
    """The bare app and its config below `folder`; its command."""
    for source in CONF.rglob("*.yaml"):
        target = folder / "conf" / source.relative_to(CONF)
        target.parent.mkdir(parents=True, exist_ok=True)
        lines = source.read_text().splitlines(keepends=True)
        target.write_text("".join(line for line in lines if line not in OURS))
    (folder / "conf" / "qpipe_base.yaml").write_text("stages: {}\n")
    (folder / "conf" / "stage").mkdir()
    for name, stage in catalog().items():
        (folder / "conf" / "stage" / f"{name}.yaml").write_text(
            yaml.safe_dump(schema(stage), sort_keys=False)
        )
    (folder / "app.py").write_text(APP)
    return [sys.executable, str(folder / "app.py"), str(folder / "conf")]


def seconds(command: list[str], folder: Path) -> tuple[float, float]:
    """(wall, CPU) seconds of one run of `command`."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if run.returncode not in (0, 3):
        raise SystemExit(f"{' '.join(command)} ended with {run.returncode}:\n{run.stderr}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bare = [*write_bare_app(folder), *arguments.overrides]
        cached = [str(Path(sys.executable).with_name("qpipe")), *arguments.overrides]
        seconds(cached, folder)  # fills the cache where it is cold
        seconds(bare, folder)
        rounds = [(seconds(bare, folder), seconds(cached, folder)) for _ in range(arguments.rounds)]
    result = {
        name: {
            "bare_s": statistics.median(round_[0][i] for round_ in rounds),
            "qpipe_s": statistics.median(round_[1][i] for round_ in rounds),
            "ratio": statistics.median(round_[1][i] / round_[0][i] for round_ in rounds),
        }
        for i, name in enumerate(("wall", "cpu"))
    }
    for kind, row in result.items():
        print(
            f"{kind:5} bare {row['bare_s']:.3f} s   qpipe {row['qpipe_s']:.3f} s   ratio {row['ratio']:.2f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
