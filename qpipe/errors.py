"""The errors of qpipe, one tree; each message is a complete sentence for the person who reads it.

QpipeError                 exit status 1
├── ConfigError            2   the composed config says something that cannot be run
├── InputError             2   a model, a data set or a path given by the user cannot be taken
├── StageError             1   a node failed while it ran
│   └── ChangedError       1   what it read or ran is no longer what its key says
├── ClusterError           1   the cluster that a run is on cannot be reached any more
└── CacheError             1   the cache cannot be written, or what it holds is damaged
    └── DamagedError       1   a stored blob is missing or does not match its digest
"""

from __future__ import annotations


class QpipeError(Exception):
    """The root: `exit_code` is the status the command line ends with."""

    exit_code = 1


class ConfigError(QpipeError):
    """`<config address>: <fact>, got <value>. <way out>`."""

    exit_code = 2


class InputError(QpipeError):
    """Bad input from outside the config: a corrupt file, an unsupported operator, data of the wrong shape."""

    exit_code = 2


class StageError(QpipeError):
    """A node failed; the cause is chained or named in the message."""


class ChangedError(StageError):
    """Code or an input was edited while the run went on: the result is not that of the key, and is not kept."""


class ClusterError(QpipeError):
    """The cluster that a run is on cannot be reached any more; what was finished there is in the cache."""


class CacheError(QpipeError):
    """The cache cannot serve: not writable, full, or damaged beyond what a rerun heals."""


class DamagedError(CacheError):
    """A blob is missing or its content does not match its digest; `digest` names it."""

    def __init__(self, message: str, digest: str) -> None:
        super().__init__(message)
        self.digest = digest
