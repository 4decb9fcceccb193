"""Files that are there whole or not at all: written beside their place, then moved into it.

Whoever reads meanwhile finds the file as it was before, or all of the new one; a disk that is full leaves no part.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from qpipe.errors import QpipeError

if TYPE_CHECKING:
    from typing_extensions import Buffer


@contextlib.contextmanager
def beside(path: Path) -> Iterator[BinaryIO]:
    """An open file that takes the place of `path` at the end, and is gone if something was raised before.

    Its name is one of its own: who writes the same file at the same time does not write into this one."""
    temporary = path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}.tmp")  # of the 255 bytes that a name may have
    try:
        with temporary.open("xb") as file:
            yield file
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_whole(path: Path, content: str | Buffer, flush: bool = False) -> None:
    """Put `content` at `path`. With `flush` it outlasts a loss of power, which takes a disk some ms: for what cannot be
    made again. QpipeError where the system refuses."""
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    try:
        with beside(path) as file:
            file.write(data)
            if flush:
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise QpipeError(
            f"'{path}' cannot be written: {error.strerror or error}. Make room there, or choose another folder."
        ) from error
