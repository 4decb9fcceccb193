"""Files of a cache folder on the disk, where anybody may have put anything.

What is opened is a regular file or refused: no link is followed, no pipe or device is waited for. What is written is
there whole or not at all: written beside, flushed, moved into place, and the move itself flushed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from qpipe.mapped import let_go, map_file

_LOG = logging.getLogger(__name__)
_STALE_S = 60.0  # a temporary file younger than this may not have been locked yet
_ABANDONED_S = 86_400.0  # where files cannot be locked, only age says that a writer is gone
_MAPPED_SIZE = 1 << 16  # bytes; smaller files are read: a page table costs more than a copy
_CHUNK = 1 << 23  # bytes that are written at a time
_PLAUSIBLE_SIZE = 1 << 40  # bytes; a larger file is held against the size of its file system


class StrangeFileError(OSError):
    """Something else than a file of ours stands under the name: a link, a folder, a pipe, a device."""


def open_regular(path: str | Path) -> tuple[int, os.stat_result]:
    """The descriptor of a regular file, to be read, and its status.

    FileNotFoundError where there is none; StrangeFileError for anything else than a regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.ENODEV, errno.ENOTDIR):
            raise StrangeFileError(error.errno, "it is not a regular file") from error
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise StrangeFileError(errno.EINVAL, "it is not a regular file")
    return descriptor, status


def read_small(path: str | Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes; ValueError for a larger one, errors as above."""
    descriptor, status = open_regular(path)
    try:
        if status.st_size > limit:
            raise ValueError("it is too large")
        parts = []
        while part := os.read(descriptor, 1 << 20):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(descriptor)


def view(path: str | Path) -> tuple[memoryview, os.stat_result]:
    """The content of a regular file, mapped where it is large, and its status. Errors as in `open_regular`;
    StrangeFileError too for a file that claims to be larger than its disk."""
    descriptor, status = open_regular(path)
    try:
        if status.st_size < _MAPPED_SIZE:
            return memoryview(os.read(descriptor, _MAPPED_SIZE)), status
        if status.st_size > _PLAUSIBLE_SIZE and status.st_size > _capacity(descriptor):
            raise StrangeFileError(errno.EFBIG, "it claims to be larger than the disk it is on")
        return map_file(descriptor, status.st_size, path), status
    finally:
        os.close(descriptor)


def _capacity(descriptor: int) -> int:
    system = os.fstatvfs(descriptor)
    return system.f_blocks * system.f_frsize


@contextlib.contextmanager
def temporary_file(folder: str) -> Iterator[tuple[int, str]]:
    """A new file to write, and its path; its lock, held meanwhile, says that its writer lives. It is removed at the end
    if it was not moved."""
    path = f"{folder}/{secrets.token_hex(16)}"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor, path
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        os.close(descriptor)


def write_all(descriptor: int, content: memoryview) -> None:
    """Write every byte, however often the system stops halfway."""
    while content:
        content = content[os.write(descriptor, content[:_CHUNK]) :]
        let_go(content)


def seal_file(descriptor: int) -> None:
    """Make a written file read-only and flush it to the disk."""
    os.fchmod(descriptor, 0o444)
    os.fsync(descriptor)


def move(temporary: str, target: str) -> bool:
    """Move into place, over whatever file is there; True."""
    os.replace(temporary, target)
    return True


def move_first(temporary: str, target: str) -> bool:
    """Move unless something stands at `target`; whether it did not."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if os.path.lexists(target):
            return False
        os.replace(temporary, target)
    return True


def make_folder(folder: str | Path, root: Path, flush: bool = True) -> None:
    """Make `folder` below `root`, and let its name outlast a loss of power (`flush`). What stands in the way, a link or
    a file, is moved aside: nothing is ever written through a link."""
    path, end = os.fspath(folder), len(os.fspath(root))
    while end < len(path):
        end = path.find(os.sep, end + 1) % (len(path) + 1)  # the next one further down, or all of it
        if is_folder(path[:end]):  # as text: Paths would cost more than the looks
            continue
        place = Path(path[:end])
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            place.mkdir()
        except FileExistsError:
            if is_folder(place):  # another process was first: its folder is not moved away under its feet
                continue
            set_aside(place, root)
            with contextlib.suppress(FileExistsError):  # as above
                place.mkdir()
        if not is_folder(place):
            raise StrangeFileError(errno.ENOTDIR, f"{place} is no folder")
        if flush:
            flush_folder(place.parent)


def is_ours(path: Path, root: Path) -> bool:
    """Whether `path` lies in `root` itself: no folder between them is a link."""
    return all(is_folder(above) for above in path.parents if root in above.parents)


def is_folder(path: str | Path) -> bool:
    """Whether a folder stands there itself, not a link to one."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


def is_file(path: str | Path) -> bool:
    """Whether a regular file stands there itself, not a link to one."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def set_aside(path: str | Path, root: Path) -> bool:
    """Move whatever stands at `path` into `root`/damaged; whether it went. The file of that name that lay there before
    is lost; a folder never is."""
    path, damaged = Path(path), root / "damaged"
    with contextlib.suppress(OSError):  # another process was first, or the disk refuses
        if os.path.lexists(damaged) and not is_folder(damaged):
            os.rename(damaged, root / f"damaged.{secrets.token_hex(4)}")
        damaged.mkdir(exist_ok=True)
        if not is_ours(path, root):
            return False
        target = damaged / path.name
        if is_folder(path) or is_folder(target):
            target = damaged / f"{path.name}.{secrets.token_hex(4)}"
        os.rename(path, target)
        _LOG.warning("%s is not what the cache put there; it was moved to %s", path, target)
        return True
    return False


def flush_folder(folder: str | Path) -> None:
    """Make what was moved into `folder` outlast a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (
            errno.EINVAL,
            errno.ENOTSUP,
            errno.EBADF,
        ):  # some file systems flush no folders
            raise
    finally:
        os.close(descriptor)


def remove_stale(folder: Path) -> None:
    """Remove the temporary files in `folder` whose writers are gone."""
    for entry in os.scandir(folder):
        with contextlib.suppress(OSError):
            _remove_stale(entry)


def _remove_stale(entry: os.DirEntry[str]) -> None:
    """Remove a temporary file whose writer is gone: nobody holds its lock, or it is a day old."""
    age_s = time.time() - entry.stat(follow_symlinks=False).st_mtime
    if age_s < _STALE_S:
        return
    if not entry.is_file(follow_symlinks=False):
        if not entry.is_dir(follow_symlinks=False):
            os.unlink(entry.path)
        return
    descriptor, _ = open_regular(entry.path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    except OSError:  # a file system without locks
        if age_s < _ABANDONED_S:
            return
    finally:
        os.close(descriptor)
    os.unlink(entry.path)
