"""`python -m qpipe` is `qpipe`."""

from qpipe.cli import main

main()
