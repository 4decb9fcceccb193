"""Files mapped into memory: which mapping a buffer or an array is a view of, and how to let go of its pages.

A page of a mapped file that was looked at counts as resident until it is let go of, though the system could take it
back at any time. Who passes once over a large file therefore lets go as it goes: the next look fetches the page anew,
from the system's cache of files.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_PASSING_S = 0.01  # between two times of letting go: a library looks at 50 MB or so meanwhile


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


@contextlib.contextmanager
def passing_over(folder: Path) -> Iterator[None]:
    """While inside, let go again and again of the pages of the files in `folder`, whoever in this process mapped them.

    For libraries that map a file themselves and look at each part once. Linux alone tells what is mapped; elsewhere
    this does nothing.
    """
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_PASSING_S):
            _let_go_of_files(str(folder.resolve()) + os.sep)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _let_go_of_files(prefix: str) -> None:
    """Let go of the mappings of files below `prefix` that were not written to: their pages are those of the file."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError, ValueError):
        system = ctypes.CDLL(None)
        for start, end in _clean_mappings(prefix):
            system.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _clean_mappings(prefix: str) -> Iterator[tuple[int, int]]:
    """Where this process has mapped files below `prefix`, and has no page of its own in the place of one of theirs."""
    place: tuple[int, int] | None = None
    for line in Path("/proc/self/smaps").read_text(errors="surrogateescape").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith(prefix):
            start, end = fields[0].split("-")
            place = int(start, 16), int(end, 16)
        elif place and fields[0] == "Anonymous:":
            if fields[1] == "0":
                yield place
            place = None
