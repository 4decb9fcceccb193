"""What opening a file in onnxruntime and running it once takes of memory, in a process that does nothing else:

    python -m qpipe.deployed.memory '{"model": …, "feed": …, "threads": …, "libraries": […]}'

prints bytes: the largest resident set while it opens and runs, less what Python and the libraries had before.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from qpipe.run.machine import measured


def peak_bytes(model: Path, feed: Path, threads: int | None, libraries: Sequence[str]) -> int:
    """Bytes that a process of its own takes for the file `model` on the arrays of the npz file `feed`. OSError where
    it does not end well."""
    asked = {"model": str(model), "feed": str(feed), "threads": threads, "libraries": list(libraries)}
    command = [sys.executable, "-m", "qpipe.deployed.memory", json.dumps(asked)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    if done.returncode != 0:
        raise OSError(f"a process that opens {model.name} ended with status {done.returncode}")
    return int(done.stdout)


def main(asked: str) -> None:
    """The other side of `peak_bytes`."""
    import ml_dtypes
    import numpy as np

    from qpipe.deployed.session import fed, open_file

    request = json.loads(asked)
    with np.load(request["feed"]) as arrays:
        # numpy writes bfloat16 as two bytes of whatever
        feed = {name: a.view(ml_dtypes.bfloat16) if a.dtype.kind == "V" else a for name, a in arrays.items()}
    with measured() as before:
        pass
    with measured() as during:
        fed(open_file(Path(request["model"]), request["threads"], request["libraries"]), feed)
    print(max(0, int(during["peak_rss_bytes"] - before["peak_rss_bytes"])))


if __name__ == "__main__":
    main(sys.argv[1])
