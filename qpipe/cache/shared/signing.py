"""Results as they travel between machines: sealed, and signed where there is a secret.

The seal is a digest of key and result: it shows damage, and anyone can make it. The signature is a BLAKE3 keyed hash (a
MAC) with a key derived from a shared secret, for a cache that more people can write to than are trusted. The secret
comes from $QPIPE_CACHE_SECRET or a file; it is never in a config, a record or a log.
"""

from __future__ import annotations

import hmac
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from qpipe.artifacts.kinds import canonical_json
from qpipe.cache.store import sealed, unsealed
from qpipe.errors import ConfigError
from qpipe.keys.hashing import digest

Json = Any
VARIABLE = "QPIPE_CACHE_SECRET"
_LEAST_BYTES = 16
_PURPOSE = "qpipe shared cache: signatures of action results, version 1"
_OUTPUT = {"kind", "digest", "size_bytes"}


class UnsignedError(ValueError):
    """A result carries no signature, or one that was made with another secret."""


class Signer:
    """Signs and checks; it keeps the derived key and never shows it."""

    def __init__(self, secret: bytes) -> None:
        self._key = blake3(secret, derive_key_context=_PURPOSE).digest()

    def __repr__(self) -> str:
        return "Signer(…)"

    def sign(self, content: bytes) -> str:
        """The signature of `content`, 64 hexadecimal digits."""
        return str(blake3(content, key=self._key).hexdigest())

    def holds(self, content: bytes, signature: object) -> bool:
        """Whether `signature` is that of `content`; in constant time."""
        given = signature if isinstance(signature, str) and signature.isascii() else ""
        return hmac.compare_digest(self.sign(content), given)


def open_signer(secret_file: str | None) -> Signer | None:
    """The signer for the secret in $QPIPE_CACHE_SECRET, else in `secret_file`, else None.

    White space around the secret does not count. Errors: ConfigError where a secret was asked for and is not there, or
    has fewer than 16 bytes.
    """
    if text := os.environ.get(VARIABLE):
        return Signer(_checked(text.encode("utf-8", "surrogateescape"), f"${VARIABLE}"))
    if secret_file is None:
        return None
    try:
        content = Path(secret_file).expanduser().read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"cache.secret_file: '{secret_file}' cannot be read: {reason}.") from error
    return Signer(_checked(content, f"cache.secret_file: '{secret_file}'"))


def _checked(secret: bytes, where: str) -> bytes:
    secret = secret.strip()
    if len(secret) < _LEAST_BYTES:
        raise ConfigError(
            f"{where} holds a secret of {len(secret)} bytes; at least {_LEAST_BYTES} are needed. "
            'One way to make one: python -c "import secrets; print(secrets.token_hex(32))"'
        )
    return secret


def write_envelope(key: str, result: dict[str, Json], signer: Signer | None) -> bytes:
    """The result under `key` in the form in which it travels: as it lies in a store, and its signature."""
    if signer is None:
        return sealed(key, result)
    signature = signer.sign(canonical_json([key, result]))
    return canonical_json({**json.loads(sealed(key, result)), "signature": signature})


def read_envelope(key: str, content: bytes, signer: Signer | None) -> dict[str, Json]:
    """The result in an envelope that anybody may have written.

    Errors: UnsignedError; ValueError where it is not a whole result of this very key.
    """
    try:
        result = unsealed(key, content)
        _check_meaning(key, result)
    except (KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if signer is not None:
        signature = json.loads(content).get("signature")
        if not signer.holds(canonical_json([key, result]), signature):
            raise UnsignedError("it is not signed with this secret")
    return result


def _check_meaning(key: str, result: Mapping[str, Json]) -> None:
    """ValueError where a plan or a report would stumble over the result, or where it belongs to another key."""
    ingredients, provenance = result["ingredients"], result["provenance"]
    if "memo" not in ingredients and digest("action", ingredients) != key:
        raise ValueError("it is the result of another action")
    if any(set(output) != _OUTPUT for output in result["outputs"].values()):
        raise ValueError("its outputs have other fields than kind, digest and size_bytes")
    for name in ("duration_s", "cpu_s"):
        figure = provenance.get(name, 0.0 if name == "cpu_s" else None)
        if type(figure) not in (int, float) or not math.isfinite(figure):
            raise ValueError(f"its {name} is {figure!r}")
    if not all(isinstance(note, str) for note in result.get("notes", ())):
        raise ValueError("its notes are not sentences")
