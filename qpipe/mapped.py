"""Files mapped into memory: which mapping a buffer or an array is a view of, and how to let go of its pages.

A page of a mapped file that was looked at counts as resident until it is let go of, though the system could take it
back at any time. Who passes once over a large file therefore lets go as it goes: the next look fetches the page anew,
from the system's cache of files.
"""

from __future__ import annotations

import contextlib
import mmap
from typing import Any


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
