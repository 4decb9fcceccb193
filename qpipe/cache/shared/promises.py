"""The results of a remote, as far as this process has seen them: each promises that its blobs can be had.

What was seen once is kept in the local index until its blobs are here, so that planning the same again asks nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from qpipe.cache.shared.remote import LieError, Remote, RemoteError
from qpipe.cache.shared.signing import Signer, UnsignedError, read_envelope
from qpipe.cache.shared.uploads import result_name
from qpipe.cache.store import Store

Json = Any
_LOG = logging.getLogger(__name__)
_LIMIT = 16 << 20  # bytes; a larger remote result is passed over
_SIDE_BY_SIDE = 8  # requests


class Promises:
    """Remote results by action key; `unsigned` are the keys of those that lack our signature."""

    def __init__(self, remote: Remote, store: Store, signer: Signer | None) -> None:
        self.signer = signer
        self.unsigned: set[str] = set()
        self._remote, self._store = remote, store
        self._kind = f"remote {remote.options.name}"
        self._held: dict[str, dict[str, Json]] = {}
        self._expected: dict[str, bytes | None] = {}
        self._absent: set[str] = set()
        self._wrong: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._held

    def items(self) -> list[tuple[str, dict[str, Json]]]:
        """Key and result of each."""
        return list(self._held.items())

    def is_wrong(self, key: str) -> bool:
        """Whether what stands there is not to be used, and may be written over."""
        return key in self._wrong

    def get(self, key: str, keep_absent: bool) -> dict[str, Json] | None:
        """The remote's result, or None. `keep_absent`: what was not there before is not asked for again."""
        if key in self._held:
            return self._held[key]
        if key in self._wrong or (keep_absent and key in self._absent):
            return None
        found = self._remembered(key)
        if found is None:
            content = self._expected.pop(key) if key in self._expected else self._read(key)
            found = None if content is None else self._received(key, content)
        if found is not None:
            self._held[key] = found
        return found

    def expect(self, keys: Sequence[str]) -> None:
        """Ask for those that are not known, side by side; `get` comes next."""
        self._expected.clear()
        known = self._held.keys() | self._wrong | self._absent
        wanted = [key for key in dict.fromkeys(keys) if key not in known and self._remembered(key) is None]
        if len(wanted) > 1:
            with ThreadPoolExecutor(_SIDE_BY_SIDE) as pool:
                self._expected.update(zip(wanted, pool.map(self._read, wanted), strict=True))

    def keep(self, key: str) -> None:
        """The result stands in the local cache now."""
        del self._held[key]
        self._store.index.set(self._kind, key, None)

    def refuse(self, key: str) -> None:
        """Not to be used."""
        self._held.pop(key, None)
        self._wrong.add(key)
        self._store.index.set(self._kind, key, None)

    def _remembered(self, key: str) -> dict[str, Json] | None:
        text = self._store.index.get(self._kind, key)
        return self._checked(key, text.encode()) if isinstance(text, str) else None

    def _read(self, key: str) -> bytes | None:
        """What stands there under the key, whatever it is."""
        try:
            content = self._remote.read(result_name(key), _LIMIT)
        except RemoteError:
            return None
        except LieError as error:
            _LOG.warning("the remote result %s is passed over: %s", key, error)
            self._wrong.add(key)
            return None
        if content is None:
            self._absent.add(key)
        return content

    def _received(self, key: str, content: bytes) -> dict[str, Json] | None:
        found = self._checked(key, content)
        if found is None:
            self._wrong.add(key)
        else:
            self._store.index.set(self._kind, key, content.decode())
        return found

    def _checked(self, key: str, content: bytes) -> dict[str, Json] | None:
        try:
            return read_envelope(key, content, self.signer)
        except UnsignedError:
            self.unsigned.add(key)
        except ValueError as error:
            _LOG.warning("the remote result %s is passed over: %s", key, error)
        return None
