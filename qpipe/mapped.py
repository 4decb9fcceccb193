"""Files mapped into memory: which mapping a buffer or an array is a view of, and how to let go of its pages.

A page of a mapped file that was looked at counts as resident until it is let go of, though the system could take it
back at any time. Who passes once over a large file therefore lets go as it goes: the next look fetches the page anew,
from the system's cache of files.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

_PASSING_S = 0.01  # between two times of letting go: a library looks at 50 MB or so meanwhile


class FileMapping(mmap.mmap):
    """A read-only mapping of a whole file that knows the file's `path`."""

    path: str = ""


def beside(path: Path, location: str) -> Path:
    """The file that a file at `path` refers to as `location`. Package caches keep files as links, into a folder where
    they may have other names: it lies beside the file as it was named, or beside what that name is a link to. Errors:
    ValueError for one outside both folders, OSError for a name that no file can have."""
    folders = [path.absolute().parent, path.resolve().parent]
    found = next((folder / location for folder in folders if (folder / location).exists()), folders[1] / location)
    if not any(found.resolve().is_relative_to(folder.resolve()) for folder in folders):
        raise ValueError(str(found))
    return found


def map_file(descriptor: int, size: int, path: str | Path) -> memoryview:
    """The `size` bytes of an open file, not empty, mapped."""
    mapping = FileMapping(descriptor, size, access=mmap.ACCESS_READ)
    mapping.path = os.path.realpath(path)
    return memoryview(mapping)


def place_of(array: np.ndarray[Any, Any]) -> tuple[str, int] | None:
    """The file that a contiguous array is a view of, and where in it the array begins; None where there is none."""
    import numpy as np

    mapping = mapping_behind(array)
    if not isinstance(mapping, FileMapping) or not array.flags.c_contiguous:
        return None
    return mapping.path, array.ctypes.data - np.frombuffer(mapping, np.uint8).ctypes.data


def mapping_behind(buffer: Any) -> mmap.mmap | None:
    """The read-only mapping that `buffer` (a memoryview, an array, …) is a view of; None where there is none."""
    seen = 0
    while buffer is not None and seen < 100:
        if isinstance(buffer, mmap.mmap):
            with memoryview(buffer) as view:
                return buffer if view.readonly else None
        buffer = buffer.obj if isinstance(buffer, memoryview) else getattr(buffer, "base", None)
        seen += 1
    return None


def let_go(buffer: Any) -> None:
    """Let go of the pages of the file that `buffer` is a view of; nothing where it is none. What it holds stays the
    same: only mappings that cannot be written to are let go of."""
    mapping = mapping_behind(buffer)
    if mapping is not None and hasattr(mapping, "madvise"):
        with contextlib.suppress(OSError, ValueError):
            mapping.madvise(mmap.MADV_DONTNEED)


def spooled(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """`array` as a read-only view of a mapped file without a name, of which the system may take back what nobody looks
    at. The array itself where it is empty, or no file can be written."""
    import numpy as np

    if not array.nbytes:
        return array
    try:
        with tempfile.TemporaryFile() as file:
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            file.flush()
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError:
        return array
    return np.frombuffer(mapping, array.dtype).reshape(array.shape)


@contextlib.contextmanager
def passing_over(folder: Path) -> Iterator[None]:
    """While inside, let go again and again of the pages of files in `folder` that a library mapped before.

    For onnxruntime, which maps a model's weights itself, private and writable, and looks at each once in a run. The
    mappings are looked up once, here: they must stay until the end, which those of a session do while it lives. Others
    may come and go meanwhile; an address that was theirs is never touched. Linux alone tells what is mapped; elsewhere
    this does nothing.
    """
    places = _untouched_mappings(str(folder.resolve()) + os.sep)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_PASSING_S):
            _let_go_of(places)

    thread = threading.Thread(target=watch, daemon=True)
    if places:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if places:
            thread.join()


def _let_go_of(places: list[tuple[int, int]]) -> None:
    import ctypes

    system = ctypes.CDLL(None)
    for start, end in places:
        system.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _untouched_mappings(prefix: str) -> list[tuple[int, int]]:
    """Where files below `prefix` are mapped private and writable, and nothing was written: the pages are the file's."""
    found: list[tuple[int, int]] = []
    place: tuple[int, int] | None = None
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/smaps").read_text(errors="surrogateescape").splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith(prefix) and fields[1] == "rw-p":
                start, end = fields[0].split("-")
                place = int(start, 16), int(end, 16)
            elif place and fields[0] == "Anonymous:":
                if fields[1] == "0":
                    found.append(place)
                place = None
    return found
