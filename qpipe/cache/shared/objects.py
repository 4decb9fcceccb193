"""Named byte strings somewhere else: in a folder that machines share, or behind a URL that fsspec knows.

Names are relative paths of ours (`blobs/ab/abcd…`). Whatever is read may have been written by anybody: no link is
followed, nothing but a regular file is opened, and nobody trusts what comes back before it is verified. What is written
appears whole or not at all where the place allows it: a folder gets a temporary file that is renamed, an object store
shows an object when its upload is complete.

fsspec and the package for a protocol are imported with the first request, not before.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import re
import secrets
import stat
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from qpipe.cache.disk import StrangeFileError, open_regular
from qpipe.errors import ConfigError

CHUNK = 1 << 20  # bytes that are asked for, or sent, at a time
_PART = 8 << 20  # bytes; larger files go to an object store in parts of this size
_PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), ("s3fs", "s3")),
    **dict.fromkeys(("gs", "gcs"), ("gcsfs", "gcs")),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), ("adlfs", "azure")),
}
"""What a protocol needs: the module, and the extra of qpipe that installs it."""

_WHOLE = {*_PACKAGES, "memory", "oss", "oci", "r2"}
"""Protocols under which an object appears when it is complete; elsewhere we write beside and move."""


class Objects(Protocol):
    """Where objects are kept. Any thread may call. Errors: OSError or whatever the package raises."""

    def open(self) -> None:
        """Get ready for the first request: imports, credentials. No other method is called before."""

    def read(self, name: str) -> Generator[bytes, None, None]:
        """The content, in pieces. FileNotFoundError where there is no such object."""

    def size(self, name: str) -> int:
        """Bytes. FileNotFoundError where there is no such object."""

    def write(self, name: str, content: memoryview | Path, beat: Callable[[], None]) -> None:
        """Let the content, bytes or those of a local file, stand under `name`; `beat` is called as it goes on."""

    def create(self, name: str, content: bytes) -> None:
        """The same, but FileExistsError where something stands there already."""

    def remove(self, name: str) -> None:
        """No such object any more. FileNotFoundError where there was none."""


def check_url(url: str) -> str:
    """The protocol of `url`, "file" for a folder. Errors: ConfigError where no object can ever come from there."""
    if url.startswith(("/", "~")):
        return "file"
    match = re.match(r"([a-z][a-z0-9+.-]*)://(.*)", url, re.IGNORECASE)
    if match is None or not match[2]:
        raise ConfigError(
            f"cache.remote: expected a URL such as s3://bucket/prefix or file:///mnt/cache, got '{url}'."
        )
    if urlsplit(url).password is not None:
        raise ConfigError(
            "cache.remote: the URL holds a password, which would end up in every record. "
            "Give credentials where the protocol's package looks for them (its environment variables or files)."
        )
    protocol = match[1].lower()
    if protocol in ("file", "local"):
        if not match[2].startswith("/"):
            raise ConfigError(
                f"cache.remote: a folder is given by its absolute path, got '{url}'. Write file:///{match[2]}."
            )
        return "file"
    _check_protocol(protocol, url)
    return protocol


def _check_protocol(protocol: str, url: str) -> None:
    module, extra = _PACKAGES.get(protocol, ("fsspec", "s3"))
    for needed in dict.fromkeys(("fsspec", module)):
        if importlib.util.find_spec(needed) is None:
            raise ConfigError(
                f"cache.remote: '{url}' needs the package {needed}. Install it: pip install \"qpipe[{extra}]\"."
            )
    if protocol in _PACKAGES or protocol == "memory":
        return
    import fsspec

    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError as error:
        raise ConfigError(
            f"cache.remote: fsspec knows no protocol '{protocol}', got '{url}'. Common ones: file, s3, gs, az."
        ) from error
    except ImportError as error:
        raise ConfigError(f"cache.remote: '{url}' needs a package that is not there: {error}.") from error


def open_objects(url: str, timeout_s: float) -> Objects:
    """The objects at a URL that `check_url` let pass; nothing is asked of them yet."""
    protocol = check_url(url)
    return Folder(folder_of(url)) if protocol == "file" else FileSystem(url, protocol, timeout_s)


def folder_of(url: str) -> Path:
    """The folder that a URL of the protocol "file" means."""
    return Path(url if url.startswith(("/", "~")) else url.partition("://")[2]).expanduser()


class Folder:
    """A folder, often on a network file system. It is made if its parent is there, no further: where a share is not
    mounted, nothing is put in its place."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def open(self) -> None:
        """Nothing to get ready."""

    def read(self, name: str) -> Generator[bytes, None, None]:
        try:
            descriptor, _ = open_regular(self._root / name)
        except StrangeFileError as error:
            raise FileNotFoundError(f"{name}: {error.strerror}") from error
        with open(descriptor, "rb", buffering=0) as file:
            while piece := file.read(CHUNK):
                yield piece

    def size(self, name: str) -> int:
        status = os.lstat(self._root / name)
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError(f"{name} is not a regular file")
        return status.st_size

    def write(self, name: str, content: memoryview | Path, beat: Callable[[], None]) -> None:
        if isinstance(content, Path):
            with open(content, "rb") as source:
                self._place(name, iter(lambda: source.read(CHUNK), b""), os.replace, beat)
        else:
            pieces = (content[start : start + CHUNK] for start in range(0, content.nbytes, CHUNK))
            self._place(name, pieces, os.replace, beat)

    def create(self, name: str, content: bytes) -> None:
        self._place(name, [content], _link_or_copy, lambda: None)

    def remove(self, name: str) -> None:
        os.unlink(self._root / name)

    def _place(
        self,
        name: str,
        pieces: Iterable[bytes | memoryview],
        move: Callable[[Path, Path], None],
        beat: Callable[[], None],
    ) -> None:
        """Write to a temporary file in the same file system, flush, move."""
        target, folder = self._root / name, self._root / "tmp"
        try:
            self._root.mkdir(exist_ok=True)
            for place in (folder, target.parent):
                place.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:  # which means, of an object, that somebody else was first
            raise NotADirectoryError(errno.ENOTDIR, "is no folder", error.filename) from error
        temporary = folder / secrets.token_hex(16)
        try:
            with open(temporary, "xb") as file:
                for piece in pieces:
                    file.write(piece)
                    beat()
                file.flush()
                os.fsync(file.fileno())
            move(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def _link_or_copy(temporary: Path, target: Path) -> None:
    """Let the file stand at `target` too. FileExistsError where something is there."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links; a reader may see half of it, and verifies
        with open(target, "xb") as file:
            file.write(temporary.read_bytes())


class FileSystem:
    """A place that fsspec reaches."""

    def __init__(self, url: str, protocol: str, timeout_s: float) -> None:
        self._url, self._protocol, self._timeout_s = url, protocol, timeout_s
        self._system: Any = None
        self._root = ""
        self._creates = True  # until it turns out that it cannot create exclusively

    def open(self) -> None:
        from fsspec.core import url_to_fs

        system, root = url_to_fs(self._url, **self._options())
        if self._protocol in ("s3", "s3a"):
            system.retries = 1  # how often, and until when, is decided in one place: qpipe.cache.shared.remote
            system.connect()
        self._system, self._root = system, root.rstrip("/")

    def read(self, name: str) -> Generator[bytes, None, None]:
        system, path = self._at(name)
        if not hasattr(system, "open_async"):
            with system.open(path, "rb") as file:
                while piece := file.read(CHUNK):
                    yield bytes(piece)
            return
        from fsspec.asyn import sync

        # as a stream: `cat_file` would take all that a lying server sends into memory
        try:
            stream = sync(system.loop, system.open_async, path, "rb", timeout=self._timeout_s)
        except NotImplementedError:
            with system.open(path, "rb") as file:
                while piece := file.read(CHUNK):
                    yield bytes(piece)
            return
        try:
            while piece := sync(system.loop, stream.read, CHUNK, timeout=self._timeout_s):
                yield piece
        finally:
            with contextlib.suppress(Exception):  # the connection of a body that was not read to its end
                stream.r.close()

    def size(self, name: str) -> int:
        system, path = self._at(name)
        return int(system.info(path)["size"])

    def write(self, name: str, content: memoryview | Path, beat: Callable[[], None]) -> None:
        system, path = self._at(name)
        beside = self._protocol not in _WHOLE
        target = f"{path}.{secrets.token_hex(8)}.tmp" if beside else path
        if beside:
            system.makedirs(path.rpartition("/")[0], exist_ok=True)
        if isinstance(content, Path):
            _put_file(system, content, target, beat, self._protocol in _PACKAGES)
        else:
            system.pipe_file(target, bytes(content))
        if beside:
            system.mv(target, path)

    def create(self, name: str, content: bytes) -> None:
        system, path = self._at(name)
        if self._creates:
            try:
                if self._protocol not in _WHOLE:
                    system.makedirs(path.rpartition("/")[0], exist_ok=True)
                system.pipe_file(path, content, mode="create")
                return
            except (NotImplementedError, TypeError):
                self._creates = False
            except OSError as error:
                if _is_precondition(error):
                    raise FileExistsError(name) from error
                raise
        if system.exists(path):
            raise FileExistsError(name)
        self.write(name, memoryview(content), lambda: None)

    def remove(self, name: str) -> None:
        system, path = self._at(name)
        system.rm_file(path)

    def _at(self, name: str) -> tuple[Any, str]:
        return self._system, f"{self._root}/{name}"

    def _options(self) -> dict[str, Any]:
        if self._protocol not in ("s3", "s3a"):
            return {}
        patience = {"connect_timeout": self._timeout_s, "read_timeout": self._timeout_s}
        return {
            "config_kwargs": {**patience, "retries": {"total_max_attempts": 1}, "max_pool_connections": 32},
            "use_listings_cache": False,
            "skip_instance_cache": True,
        }


def _put_file(system: Any, source: Path, target: str, beat: Callable[[], None], in_parts: bool) -> None:
    from fsspec.callbacks import Callback

    class Beat(Callback):  # type: ignore[misc]  # fsspec has no types
        def relative_update(self, inc: int = 1) -> None:
            beat()

    sizes = {"chunksize": _PART, "max_concurrency": 2} if in_parts and hasattr(system, "call_s3") else {}
    system.put_file(str(source), target, callback=Beat(), **sizes)


def _is_precondition(error: OSError) -> bool:
    """Whether a server said that the object is there already."""
    if isinstance(error, FileExistsError):
        return True
    response = getattr(error.__cause__, "response", None) or {}
    return response.get("Error", {}).get("Code") in ("PreconditionFailed", "412")
