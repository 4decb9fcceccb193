"""What the first result costs, in processor seconds: a cold run, by what they go into; a decoder imported from torch.

    python benchmarks/first_result.py [--rounds 2] [--decoder] [--json FILE] [overrides …]

A cold run is `qpipe` with an empty cache. Its actions are what record.json says of them; the rest of the workers is
their start and what they import; what is measured in onnxruntime has processes of its own; the remainder is the command
itself: composing, planning, keys, the record and the report. Linux alone: processes are watched in /proc.

The decoder is a Llama of 0.77 million parameters, in a fresh process: importing torch and transformers, then what
`Model.from_torch` takes. It needs transformers, which `make setup` installs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KINDS = {"qpipe.run.workers": "workers", "qpipe.deployed": "measuring"}
INTERVAL_S = 0.05
TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")
DECODER = """
import json, time
import torch
torch.set_num_threads(1)
found = {"torch": time.process_time()}
from transformers import LlamaConfig, LlamaForCausalLM
found["transformers"] = time.process_time() - sum(found.values())
class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits
config = LlamaConfig(vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=5, num_attention_heads=4,
                     num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True)
module = Logits(LlamaForCausalLM(config).eval())
tokens = torch.randint(0, 256, (2, 32))
before = time.process_time()
from qpipe.model import Model
Model.from_torch(module, (tokens,))
found["from_torch"] = time.process_time() - before
print(json.dumps(found))
"""


def cold_run(folder: Path, overrides: list[str]) -> dict[str, float]:
    """Processor seconds of `qpipe` with an empty cache in `folder`, by what they went into, and all together."""
    before = _waited()
    command = [sys.executable, "-m", "qpipe", *overrides, f"cache.dir={folder / 'cache'}"]
    run = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    spent: dict[int, tuple[str, float]] = {}
    while run.poll() is None:
        for process in below(run.pid):
            spent[process] = seen(process) or spent.get(process, ("", 0.0))
        time.sleep(INTERVAL_S)
    total = _waited() - before
    if run.returncode not in (0, 3):
        raise SystemExit(f"qpipe ended with {run.returncode}")
    (record,) = (json.loads(path.read_text()) for path in folder.glob("outputs/*/*/record.json"))
    actions = sum(node["cpu_s"] or 0.0 for node in record["nodes"].values() if node["verdict"] == "ran")
    of = {kind: sum(seconds for each, seconds in spent.values() if each == kind) for kind in KINDS.values()}
    rest = {"workers": of["workers"] - actions, "measuring": of["measuring"], "command": total - sum(of.values())}
    return {"total": total, "actions": actions, **rest}


def below(root: int) -> list[int]:
    """All processes below the process `root`."""
    parents: dict[int, list[int]] = {}
    for place in Path("/proc").glob("[0-9]*"):
        if (fields := _fields(int(place.name))) is not None:
            parents.setdefault(int(fields[1]), []).append(int(place.name))
    found = [root]
    for process in found:
        found += parents.get(process, ())
    return found[1:]


def seen(process: int) -> tuple[str, float] | None:
    """What a process is for, and the processor seconds that it has taken; None where it is gone."""
    fields = _fields(process)
    try:
        command = Path(f"/proc/{process}/cmdline").read_text().split("\0")
    except OSError:
        return None
    if fields is None or command == [""]:
        return None
    kind = next((kind for part, kind in KINDS.items() if any(word.startswith(part) for word in command)), "")
    return kind, (int(fields[11]) + int(fields[12])) * TICK_S


def _fields(process: int) -> list[str] | None:
    """Those of /proc/PID/stat behind the name: state, parent, …"""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _waited() -> float:
    waited = resource.getrusage(resource.RUSAGE_CHILDREN)
    return waited.ru_utime + waited.ru_stime


def decoder() -> dict[str, float]:
    """Processor seconds of importing the decoder, by part."""
    done = subprocess.run([sys.executable, "-c", DECODER], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--decoder", action="store_true", help="the decoder alone")
    parser.add_argument("--json", type=Path)
    arguments, overrides = parser.parse_known_args()
    rows = []
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as name:
            rows.append(decoder() if arguments.decoder else cold_run(Path(name), overrides))
        print(", ".join(f"{name} {seconds:.2f}" for name, seconds in rows[-1].items()), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
