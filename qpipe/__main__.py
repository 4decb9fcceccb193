"""The `qpipe` command, and `python -m qpipe`: thin, so that Ctrl-C while all else is imported leaves one line, too."""

from __future__ import annotations

import gc
import sys


def main() -> None:
    """Entry point; ends with the exit status."""
    # What is imported and composed lives on: a config of 10,000 nodes is a million objects, and a third of the time
    # went into looking for cycles among them. `sweep` enables it again before an action runs.
    gc.disable()
    try:
        from qpipe.cli.requirements import refusal

        if line := refusal():
            print(f"qpipe: {line}", file=sys.stderr)
            sys.exit(2)
        from qpipe.cli.main import main as command

        command()
    except KeyboardInterrupt:
        print("qpipe: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
