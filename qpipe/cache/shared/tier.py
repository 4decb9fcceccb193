"""The local cache with a shared one behind it: `cache.remote`, any URL that fsspec knows, or a folder.

A local miss looks at the remote. Results come first; a blob is fetched when somebody reads it. So a plan downloads no
tensor, and a run that the remote knows whole downloads what its report and its exports read. Until then a remote result
is a promise: blobs are uploaded before the result that names them. A promise that turns out broken is a DamagedError of
the blob; `doubt` notes it, and what made the blob is planned anew, as a miss.

    remote: blobs/<2>/<digest>   actions/<2>/<key>.json {"result", "seal", "signature"}   leases/<2>/<key>.json

Blobs are immutable and results written once, unless what stands there is no result. All that arrives is verified before
it counts: a blob against its size as it comes and its digest, a result as qpipe.cache.shared.signing says.

Only the process that decides what counts, the executor's, writes to the remote. Workers read, and say which sub-results
they published; `share` sends these.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qpipe.artifacts.artifact import references
from qpipe.cache import disk
from qpipe.cache.lock import Lock
from qpipe.cache.shared.lease import Leases
from qpipe.cache.shared.promises import Promises
from qpipe.cache.shared.remote import LieError, Remote, RemoteError, RemoteOptions
from qpipe.cache.shared.signing import open_signer, write_envelope
from qpipe.cache.shared.uploads import Upload, Uploads, blob_name
from qpipe.cache.store import Store, sealed
from qpipe.errors import DamagedError
from qpipe.keys.hashing import digest_bytes

Json = Any
_LOG = logging.getLogger(__name__)
_ROOT_LIMIT = 64 << 20  # bytes of a blob whose size nobody has said: the root of an artifact, JSON text
_ROOT_BEGINS = b'{"blobs":{'
_SIDE_BY_SIDE = 8  # requests
_TOLERATED = 2  # blobs that may turn out damaged before the remote is asked for nothing more
_PATIENCE_S = 5.0  # that the end of a run waits for uploads before it says so


class TieredStore(Store):
    """A cache folder with a remote behind it."""

    def __init__(self, root: Path, remote: Remote, reads_only: bool = False) -> None:
        super().__init__(root)
        self.remote = remote
        self._reads_only = reads_only
        self._leases = Leases(remote, self.root)
        self._uploads = Uploads(remote, self.path, super().open)
        self._promises = Promises(remote, self, open_signer(remote.options.secret_file))
        self._sizes: dict[str, int] = {}
        self._family: dict[str, dict[str, int]] = {}
        self._roots: set[str] = set()
        self._broken: set[str] = set()
        self._damaged = 0
        self._told_unsigned = False
        self._told: set[str] = set()

    # blobs

    def open(self, digest: str) -> memoryview:
        try:
            view = super().open(digest)
        except DamagedError:
            if not self._fetch(digest):
                raise
            view = super().open(digest)
        if digest not in self._roots and bytes(view[: len(_ROOT_BEGINS)]) == _ROOT_BEGINS:
            self._roots.add(digest)
            self._learn(view)
        return view

    def complete(self, result: dict[str, Json]) -> list[str]:
        """The digests of the blobs that are neither here nor promised by the remote. Only for a result of the local
        cache that lacks blobs is the remote asked anything."""
        missing = super().complete(result)
        if not missing or not self.remote.readable:
            return missing
        self._sizes.update(result["blobs"])
        asked = [digest for digest in missing if digest not in self._broken | self._uploads.known]
        self._ask_for(asked)
        return [digest for digest in missing if digest not in self._uploads.known]

    def doubt(self, digest: str) -> None:
        """Reading the blob failed somewhere. Where it cannot be had, no remote result that needs it is a hit any more;
        after a few such blobs, none at all."""
        if not self.remote.readable or self.has(digest) or self._fetch(digest):
            return
        if digest not in self._broken:
            self._break(digest)
        if self.remote.readable:  # is it this blob alone?
            self._ask_for(self._lazy(), again=True)

    def _lazy(self) -> list[str]:
        """The promised blobs that are not here."""
        promised = {digest for _, result in self._promises.items() for digest in result["blobs"]}
        return [digest for digest in promised - self._broken if not self.has(digest)]

    def _ask_for(self, digests: Iterable[str], again: bool = False) -> None:
        """Whether the remote has them, side by side; what it has not, it does not promise any more."""

        def ask(digest: str) -> None:
            if self.remote.size(blob_name(digest)) == self._sizes[digest]:
                self._uploads.known.add(digest)
            elif self.remote.readable:
                self._broken.add(digest)
                self._uploads.known.discard(digest)

        wanted = [digest for digest in digests if again or digest not in self._uploads.known]
        if wanted:
            with ThreadPoolExecutor(_SIDE_BY_SIDE) as pool:
                list(pool.map(ask, wanted))

    def _break(self, digest: str) -> None:
        self._broken.add(digest)
        self._uploads.known.discard(digest)
        self._uploads.doubted.add(digest)
        self._damaged += 1
        if self._damaged > _TOLERATED:
            self.remote.give_up(f"serves damaged blobs ({self._damaged} so far)")

    def _learn(self, root: memoryview) -> None:
        """Note the sizes of the blobs a root names, and that they belong together."""
        if root.nbytes <= _ROOT_LIMIT:
            with contextlib.suppress(DamagedError):  # a tensor that looks like a root
                family = references(root)
                self._sizes.update(family)
                self._family.update(dict.fromkeys(family, family))

    def _fetch(self, digest: str) -> bool:
        """Bring a blob here, and the others of its artifact with it: a reader of one reads all. Whether it came."""
        if not self.remote.readable or digest in self._broken:
            return False
        others = self._family.get(digest, {})
        wanted = [other for other, size in others.items() if other != digest and not self.has(other, size)]
        if not wanted:
            return self._download(digest)
        with ThreadPoolExecutor(_SIDE_BY_SIDE) as pool:
            came, *_ = pool.map(self._download, [digest, *wanted])
        return came

    def _download(self, digest: str) -> bool:
        size, name = self._sizes.get(digest), blob_name(digest)
        try:
            if size is None:
                content = self.remote.read(name, _ROOT_LIMIT)
                true = content is not None and digest_bytes(content) == digest
                if content is not None and true:
                    self.put(content)
            else:
                true = self.remote.fetch(name, size, lambda pieces: self.receive(digest, size, pieces))
        except RemoteError:
            return False
        except (FileNotFoundError, LieError) as error:
            _LOG.warning("remote blob %s: %s", digest, error)
            true = False
        if not true:
            _LOG.warning("remote blob %s is missing or does not match its digest", digest)
            self._break(digest)
        return true

    # results

    def result(self, key: str) -> dict[str, Json] | None:
        found = super().result(key)
        if found is not None or not self.remote.readable:
            return found
        known = key in self._promises
        promise = self._promises.get(key, keep_absent=not self.remote.writable and not self._reads_only)
        if promise is not None and not known:
            self._sizes.update(promise["blobs"])
            self._uploads.known.update(promise["blobs"].keys() - self._broken)
        return promise

    @property
    def is_far(self) -> bool:  # type: ignore[override]  # it changes: True after the first question
        return self.remote.readable and self.remote.requests["read"] > 0

    def expect(self, keys: Sequence[str]) -> None:
        """Ask for all of them side by side."""
        self._promises.expect([key for key in keys if self.peek(key) is None])

    def publish(self, key: str, result: dict[str, Json]) -> dict[str, Json]:
        if self.remote.readable:
            for output in result["outputs"].values():
                self._bring(output["digest"])
        whole = super().publish(key, result)
        self._send(key, whole)
        return whole

    def _bring(self, root: str) -> None:
        """What was passed on without being read is here before it is published."""
        for digest, size in references(self.open(root)).items():
            if not self.has(digest, size):
                self._fetch(digest)

    def share(self, key: str) -> None:
        """A worker has published this."""
        if self.remote.writable and (result := self.peek(key)) is not None:
            self._send(key, result)

    def _send(self, key: str, result: dict[str, Json]) -> None:
        if self._reads_only or self.remote.options.mode != "write":
            return
        if not self.remote.writable:
            self._uploads.unsent.add(key)
            return
        content = write_envelope(key, result, self._promises.signer)
        overwrite = (
            self._promises.is_wrong(key) or key in self._promises
        )  # what stands there could not be used
        self._uploads.add(Upload(key, result["blobs"], content, overwrite, lambda: self._leases.release(key)))

    def forget(self, key: str) -> None:
        super().forget(key)
        self._promises.refuse(key)

    # company

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Nothing is held: a remote may answer slowly, and no cleanup is to wait for it."""
        yield

    def lock(self, key: str) -> TieredLock:
        """The lock of an action on this machine and, where the remote is written to, its lease among machines."""
        return TieredLock(self, super().lock(key).path, key)

    def acquire_lease(self, key: str) -> bool:
        """Whether this machine computes the action; yes, too, where the result is here already."""
        if self._reads_only or not self.remote.writable:
            return True
        if self._is_here(key):
            return True
        return self._leases.acquire(key)

    def release_lease(self, key: str) -> None:
        """In the background; after the upload, where the result is on its way."""
        if self._leases.holds(key) and not self._uploads.sends(key):
            self._uploads.later(lambda: self._leases.release(key))

    def _is_here(self, key: str) -> bool:
        result = self.peek(key)
        return result is not None and not super().complete(result)

    def news(self) -> list[str]:
        return self.remote.news()

    def _last_news(self) -> list[str]:
        """As `news`, and what can be counted only at the end."""
        told = self.remote.news()
        if (unsigned := len(self._promises.unsigned)) and not self._told_unsigned:
            self._told_unsigned = True
            told.append(
                f"Not signed with this secret, and so misses: {_results(unsigned)} of the remote cache "
                f"{self.remote.options.url}."
            )
        return told

    def settle(self) -> list[str]:
        """Finish the uploads, try once more what an earlier run could not send, and let results whose blobs all came
        here stand in the local cache; the news of it."""
        told: list[str] = []
        if self.remote.options.mode == "write" and not self._reads_only:
            told = self._send_all()
        self._fetch_scores()
        for key, result in self._promises.items():
            if not super().complete(result):
                self.write(self._action(key), memoryview(sealed(key, result)), disk.move_first)
                self._promises.keep(key)
        new = [line for line in [*self._last_news(), *told] if line not in self._told]
        self._told.update(new)  # a run settles twice
        return new

    def _fetch_scores(self) -> None:
        """The report reads them all: side by side rather than one by one."""
        outputs = [output for _, result in self._promises.items() for output in result["outputs"].values()]
        roots = {output["digest"] for output in outputs if output["kind"] == "Scores"}
        wanted = [root for root in roots - self._broken if not self.has(root)]
        if wanted and self.remote.readable:
            with ThreadPoolExecutor(_SIDE_BY_SIDE) as pool:
                list(pool.map(self._download, wanted))

    def _send_all(self) -> list[str]:
        kind, uploads = f"remote {self.remote.options.name} unsent", self._uploads
        before = self.index.get(kind, "keys") or []
        for key in before:
            uploads.unsent.add(key)
            self.share(key)
        started = time.monotonic()
        uploads.drain()
        unsent = sorted(key for key in uploads.unsent if self._is_here(key))
        if unsent != before:
            self.index.set(kind, "keys", unsent)
        waited_s = time.monotonic() - started
        told = [f"Waited {waited_s:.0f} s for uploads to the remote cache."] if waited_s > _PATIENCE_S else []
        if unsent:
            told.append(f"{_results(len(unsent))} not in the remote cache yet: the next run sends what is missing.")
        return told

    def close(self) -> None:
        """As `Store.close`, when what is under way has ended; what was not told yet is told now."""
        self._uploads.drain()
        for line in self._last_news():
            print(f"qpipe: {line}", file=sys.stderr)
        super().close()

    def address(self) -> dict[str, Json]:
        """What `open_address` needs to open this cache in a worker process; nothing secret."""
        options = self.remote.options
        remote = {**dataclasses.asdict(options), "mode": "read"} if self.remote.readable else None
        return {"root": str(self.root), "remote": remote}

    def flush(self) -> None:
        self._uploads.drain()

    def address_elsewhere(self) -> dict[str, Json] | None:
        if not self.remote.writable:
            return None
        return {"root": None, "remote": dataclasses.asdict(self.remote.options), "writes": True}


def _results(count: int) -> str:
    return f"{count} result{'s' * (count != 1)}"


def open_address(address: dict[str, Json]) -> Store:
    """The cache in a worker process: it reads from the remote, and writes there only where it is on another machine
    (`address_elsewhere`)."""
    root, remote = Path(address["root"]), address.get("remote")
    if remote is None:
        return Store(root)
    return TieredStore(root, Remote(RemoteOptions(**remote)), reads_only=not address.get("writes", False))


class TieredLock(Lock):
    """A lock on this machine, then a lease among machines; held when both are."""

    def __init__(self, store: TieredStore, path: str, key: str) -> None:
        super().__init__(path)
        self._store, self._key = store, key

    def release(self) -> None:
        held = self.is_locked
        super().release()
        if held:
            self._store.release_lease(self._key)

    def _try(self) -> bool:
        if not super()._try():
            return False
        if not self._store.acquire_lease(self._key):
            super().release()
            return False
        return True
